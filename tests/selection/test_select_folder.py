import io
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from worlds import make_embeddings, make_pairs, make_scores, permuted

from fifa.config import Recipe, Select
from fifa.data.images import read
from fifa.data.table import save_pairs
from fifa.errors import FifaError
from fifa.run import steps
from fifa.run.folder import Run
from fifa.run.steps import IMAGE_COLUMNS, _columns, select_step
from fifa.selection import readable
from fifa.selection.choose import select
from fifa.selection.table import reason_counts
from fifa.shards.files import write_json, write_table


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def save_run(folder, pairs, scores):
    """The files of a scored run."""
    save_pairs(pairs, folder)
    index = {"margins": {}, "quality": "quality.parquet", "diversity": "diversity.parquet"}
    for number, (name, table) in enumerate(scores.margins.items()):
        index["margins"][name] = f"margin-{number}.parquet"
        write_table(folder / "scores" / index["margins"][name], table)
    write_table(folder / "scores" / "quality.parquet", scores.quality)
    write_table(folder / "scores" / "diversity.parquet", scores.diversity)
    write_json(folder / "scores.json", index, sealed=True)


def select_folder(folder, knobs, *memory):
    """Select in a run folder, from its files or from what is in memory."""
    return select_step(Run(folder, Recipe(select=knobs)), *memory)


def with_images(pairs, folder, broken=()):
    """The pairs with their images in the cells of a file; ``broken`` rows have one that is none."""
    n = len(pairs)
    cells = {
        f"jpg_{side}": [
            b"no image" if i in broken and side else png(2 * i + side) for i in range(n)
        ]
        for side in (0, 1)
    }
    pq.write_table(pa.table(cells), folder / "made.parquet")
    nothing = pa.nulls(n, pa.string())
    table = pairs.table
    for name in ("image_0_ref", "image_1_ref"):
        table = table.set_column(table.schema.get_field_index(name), name, nothing)
    origin = replace(pairs.origin, root=str(folder), cells=("jpg_0", "jpg_1"))
    return replace(pairs, table=table, origin=origin)


@pytest.mark.parametrize("strategy", ["fifa", "weights", "facility"])
def test_selecting_in_a_folder_is_selecting_in_memory(tmp_path, strategy, monkeypatch):
    pairs = make_pairs(200, 30)
    scores = make_scores(pairs)
    knobs = Select(keep=20, strategy=strategy)
    vectors = make_embeddings(pairs)
    monkeypatch.setattr("fifa.scoring.encoders.prompt_embeddings", lambda *arguments: vectors)
    save_run(tmp_path, pairs, scores)
    found = select_folder(tmp_path, knobs)
    assert found.equals(select(pairs, scores, knobs, embeddings=vectors))
    written = pq.read_table(tmp_path / "selection.parquet")
    assert written.equals(found) and written.schema.equals(found.schema)
    assert b"margin-0.parquet" in written.schema.metadata[b"fifa.select"]
    assert not (tmp_path / "checked.parquet").exists()  # no pixels, nothing to decode
    data = (tmp_path / "selection.parquet").read_bytes()
    assert select_folder(tmp_path, knobs, pairs, scores).equals(found)
    assert (tmp_path / "selection.parquet").read_bytes() == data


def test_the_same_selection_has_the_same_bytes(tmp_path):
    pairs = make_pairs(200, 30)
    save_run(tmp_path, pairs, make_scores(pairs))
    select_folder(tmp_path, Select(keep=20))
    first = (tmp_path / "selection.parquet").read_bytes()
    select_folder(tmp_path, Select(keep=30))
    assert (tmp_path / "selection.parquet").read_bytes() != first
    select_folder(tmp_path, Select(keep=20))
    assert (tmp_path / "selection.parquet").read_bytes() == first


def test_score_files_in_another_order_are_aligned_by_id(tmp_path):
    pairs = make_pairs(200, 30)
    scores = make_scores(pairs)
    _, shuffled, _ = permuted(pairs, scores, seed=5)
    save_run(tmp_path, pairs, shuffled)
    found = select_folder(tmp_path, Select(keep=20))
    assert found.equals(select(pairs, scores, Select(keep=20)))


def test_a_damaged_score_file_is_an_error_that_names_it(tmp_path):
    pairs = make_pairs()
    save_run(tmp_path, pairs, make_scores(pairs))
    (tmp_path / "scores" / "quality.parquet").write_bytes(b"PAR1 nothing else")
    with pytest.raises(FifaError, match=r"quality\.parquet"):
        select_folder(tmp_path, Select())
    (tmp_path / "pairs.parquet").unlink()
    with pytest.raises(FifaError, match="no pairs here"):
        select_folder(tmp_path, Select())
    with pytest.raises(FifaError, match="no scores yet"):
        select_folder(tmp_path / "elsewhere", Select())


def test_rows_are_loaded_from_every_row_group(tmp_path):
    pairs = make_pairs(50, 8)
    save_pairs(pairs, tmp_path)
    pq.write_table(pq.read_table(tmp_path / "pairs.parquet"), tmp_path / "x", row_group_size=7)
    (tmp_path / "x").rename(tmp_path / "pairs.parquet")
    rows = np.array([0, 6, 7, 20, 49])
    some = partial(_columns, Run(tmp_path, Recipe()), None, IMAGE_COLUMNS)
    assert some(rows)["pair_id"].equals(pairs.table["pair_id"].take(rows))
    assert len(some(rows[:0])) == 0


def test_a_pair_with_an_unreadable_image_gives_its_place_to_the_next(tmp_path):
    pairs = make_pairs(100, 30)
    scores = make_scores(pairs)
    knobs = Select(keep=20)
    order = select(pairs, scores, knobs)
    best = [i for i, rank in enumerate(order["rank"].to_pylist()) if rank in (1, 5)]
    worst = [i for i, rank in enumerate(order["rank"].to_pylist()) if rank == 40]
    made = with_images(pairs, tmp_path, broken={*best, *worst})
    save_run(tmp_path, made, scores)
    found = select_folder(tmp_path, knobs)
    names = pairs.table["pair_id"].to_pylist()
    assert found.equals(select(pairs, scores, knobs, unreadable=[names[i] for i in best]))
    assert [found["reason"][i].as_py() for i in best] == ["unreadable_image"] * 2
    assert reason_counts(found)["selected"] == 20
    bad = pq.read_table(tmp_path / "unreadable.parquet").to_pylist()
    assert {(row["pair_id"], row["side"]) for row in bad} == {(names[i], 1) for i in best}
    assert all("no JPEG" in row["reason"] for row in bad)
    save_run(tmp_path / "none", with_images(pairs, tmp_path, broken=set(range(100))), scores)
    with pytest.raises(FifaError, match=r"images cannot be read; the first: .*no JPEG"):
        select_folder(tmp_path / "none", knobs)


def test_a_pair_of_one_image_in_two_formats_is_a_duplicate(tmp_path):
    pairs = make_pairs(100, 30)
    scores = make_scores(pairs)
    knobs = Select(keep=10)
    best = select(pairs, scores, knobs)["rank"].to_pylist().index(1)
    made = with_images(pairs, tmp_path)
    cells = pq.read_table(tmp_path / "made.parquet").to_pydict()
    again = io.BytesIO()
    Image.open(io.BytesIO(cells["jpg_0"][best])).save(again, "WEBP", lossless=True)
    cells["jpg_1"][best] = again.getvalue()
    pq.write_table(pa.table(cells), tmp_path / "made.parquet")
    save_run(tmp_path, made, scores)
    name = pairs.table["pair_id"][best].as_py()
    found = select_folder(tmp_path, knobs)
    assert found.equals(select(pairs, scores, knobs, same=[name]))
    assert found["reason"][best].as_py() == "duplicate"
    assert reason_counts(found)["selected"] == 10
    assert pq.read_table(tmp_path / "unreadable.parquet").num_rows == 0
    allowed = Select(keep=10, drop_duplicates=False)
    assert select_folder(tmp_path, allowed)["rank"][best].as_py() == 1


def test_no_image_is_decoded_twice_and_what_was_seen_before_changes_nothing(tmp_path, monkeypatch):
    pairs = make_pairs(100, 30)
    scores = make_scores(pairs)
    made = with_images(pairs, tmp_path, broken=range(0, 100, 7))
    save_run(tmp_path, made, scores)
    select_folder(tmp_path, Select(keep=10))
    fresh = (tmp_path / "selection.parquet").read_bytes()
    unreadable = (tmp_path / "unreadable.parquet").read_bytes()
    select_folder(tmp_path, Select(keep=40))

    def refuse(*args, **options):
        raise AssertionError("an image was opened again")

    monkeypatch.setattr(steps, "read", refuse)
    select_folder(tmp_path, Select(keep=10))
    assert (tmp_path / "selection.parquet").read_bytes() == fresh
    assert (tmp_path / "unreadable.parquet").read_bytes() == unreadable


def test_a_check_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    pairs = make_pairs(100, 30)
    made = with_images(pairs, tmp_path)
    save_run(tmp_path, made, make_scores(pairs))
    monkeypatch.setattr(readable, "BATCH", 8)
    seen = []

    def counted(images, **options):
        if len(seen) >= 16 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        seen.extend(images.table["row"].to_pylist()[::2])
        return read(images, **options)

    stopped: list[bool] = []
    monkeypatch.setattr(steps, "read", counted)
    with pytest.raises(KeyboardInterrupt):
        select_folder(tmp_path, Select(keep=30))
    kept = reason_counts(select_folder(tmp_path, Select(keep=30)))["selected"]
    assert len(seen) == len(set(seen)) == kept
