import base64
import io
import json
import random
import re
import tracemalloc
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import fifa
from fifa.config import Read, Recipe, Score, Select
from fifa.data import read_pairs
from fifa.data.refs import url_bytes
from fifa.errors import FifaError
from fifa.scoring.margin import margin_scores
from fifa.scoring.table import Scores
from fifa.selection import trainers as subset_module
from fifa.selection.export import export, pair_contents, rebuild
from fifa.selection.trainers import COLUMNS, plan_shards
from fifa.shards.files import read_json, write_json
from fifa.training.pairs import read_training_pairs

ZEROS = base64.b64encode(bytes(48)).decode()  # 12 numbers of 4 bytes
SPEC = "column:good_0,good_1"


def encoded(seed: int, kind: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def make_source(path, n=40, images=True):
    """A Pick-a-Pic file with ties, PNG and JPEG cells, and a reward in its columns."""
    rng = np.random.default_rng(3)
    label = rng.choice([0.0, 0.5, 1.0], n, p=[0.45, 0.1, 0.45])
    columns = {
        "caption": [f"prompt number {i // 2}" for i in range(n)],
        "image_0_uid": [f"left-{i}" for i in range(n)],
        "image_1_uid": [f"right-{i}" for i in range(n)],
        "label_0": label,
        "label_1": 1 - label,
        "good_0": rng.normal(size=n),
        "good_1": rng.normal(size=n),
    }
    if images:
        columns["jpg_0"] = [encoded(2 * i, "PNG") for i in range(n)]
        columns["jpg_1"] = [encoded(2 * i + 1, "JPEG") for i in range(n)]
    else:
        for side in (0, 1):
            columns[f"image_{side}_url"] = [f"https://example.org/{side}/{i}" for i in range(n)]
    pq.write_table(pa.table(columns), path, row_group_size=16)
    return columns


def run(source, folder, keep=12, **knobs):
    recipe = Recipe(
        read=Read(source=str(source)),
        score=Score(margin=(SPEC,), quality="none", diversity="none"),
        select=Select(keep=keep, **knobs),
    )
    pairs = read_pairs(source)
    scores = Scores(margins={SPEC: margin_scores(pairs, SPEC)})
    selection = fifa.select(pairs, scores, recipe.select)
    return pairs, selection, export(pairs, selection, scores, folder, recipe=recipe)


@pytest.fixture
def source(tmp_path):
    make_source(tmp_path / "source.parquet")
    return tmp_path / "source.parquet"


def read_back(folder):
    return pq.ParquetDataset(sorted((folder / "data").glob("*.parquet"))).read()


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_subset_has_the_selected_pairs_by_rank_with_their_original_bytes(source, tmp_path):
    _, selection, exported = run(source, tmp_path / "subset")
    table = read_back(tmp_path / "subset")
    assert table.schema.equals(COLUMNS)
    kept = [row for row in selection.to_pylist() if row["status"] == "selected"]
    kept.sort(key=lambda row: row["rank"])
    assert table["pair_id"].to_pylist() == [row["pair_id"] for row in kept]
    for name in subset_module.FROM_SELECTION:
        assert table[name].to_pylist() == [row[name] for row in kept]
    raw = {row["image_0_uid"]: row for row in pq.read_table(source).to_pylist()}
    for row in table.to_pylist():
        original = raw[row["image_0_uid"]]
        assert (row["jpg_0"], row["jpg_1"]) == (original["jpg_0"], original["jpg_1"])
        assert (row["label_0"], row["label_1"]) == (original["label_0"], original["label_1"])
        assert (row["caption"], row["image_1_uid"]) == (
            original["caption"],
            original["image_1_uid"],
        )
        assert row["image_0_url"] is None and row["are_different"] and row["has_label"]
    assert exported.pairs == 12 and exported.images
    assert exported.bytes == sum(f.stat().st_size for f in (tmp_path / "subset/data").iterdir())


def as_diffusers_reads_it(examples):
    """The arithmetic of `preprocess_train` in diffusers' Diffusion-DPO scripts: winner first."""
    pairs = []
    for first, second, label_0 in zip(
        examples["jpg_0"], examples["jpg_1"], examples["label_0"], strict=True
    ):
        both = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (first, second)]
        pairs.append(both[::-1] if label_0 == 0 else both)
    return pairs


def as_salesforce_reads_it(dataset, name):
    """DiffusionDPO's `train.py`: ties go only if the data set's name says so; SFT asserts."""
    if "pickapic" in name:
        dataset = dataset.select([i for i, y in enumerate(dataset["label_0"]) if y in (0, 1)])
    examples = dataset[:]
    for label_0 in examples["label_0"]:
        assert label_0 in (0, 1)
    captions = [c if isinstance(c, str) else random.choice(c) for c in examples["caption"]]
    return as_diffusers_reads_it(examples), captions


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("name", ["subset", "my-pickapic-subset"])
def test_public_trainers_find_the_winner_first(source, tmp_path, name):
    datasets = pytest.importorskip("datasets")
    run(source, tmp_path / name)
    dataset = datasets.load_dataset(
        str(tmp_path / name), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert dataset.features["jpg_0"] == datasets.Value("binary")
    assert dataset.features["label_0"] == datasets.Value("float64")
    pairs, captions = as_salesforce_reads_it(dataset, name)
    raw = {row["image_0_uid"]: row for row in pq.read_table(source).to_pylist()}
    for (first, second), caption, uid in zip(pairs, captions, dataset["image_0_uid"], strict=True):
        original = raw[uid]
        winner, loser = (0, 1) if original["label_0"] == 1 else (1, 0)
        for array, side in ((first, winner), (second, loser)):
            expected = Image.open(io.BytesIO(original[f"jpg_{side}"])).convert("RGB")
            np.testing.assert_array_equal(array, np.asarray(expected))
        assert caption == original["caption"]
    assert len(pairs) == 12 and {0.0, 1.0} == set(dataset["label_0"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_replaced_subset_is_not_taken_from_the_trainers_cache(source, tmp_path):
    datasets = pytest.importorskip("datasets")
    for keep in (5, 9):
        run(source, tmp_path / "subset", keep=keep)
        dataset = datasets.load_dataset(
            str(tmp_path / "subset"), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert len(dataset) == keep


def test_fifa_reads_its_own_subset(source, tmp_path):
    pairs, selection, _ = run(source, tmp_path / "subset")
    again = read_pairs(tmp_path / "subset")
    kept = {row["pair_id"] for row in selection.to_pylist() if row["status"] == "selected"}
    assert set(again.table["prompt_id"].to_pylist()) <= set(pairs.table["prompt_id"].to_pylist())
    assert len(again) == len(kept)


def test_votes_decide_the_winner_and_stay_beside_it(tmp_path):
    rows = [
        {"prompt": "p", "path1": "a", "path2": "b", "share": 0.3},
        {"prompt": "q", "path1": "c", "path2": "d", "share": 0.9},
    ]
    source = tmp_path / "votes.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "prompt", "image_0": "path1", "image_1": "path2", "label": "share"}
    pairs = read_pairs(source, columns=columns)
    selection = fifa.select(pairs, Scores(), strategy="random")
    recipe = Recipe(read=Read(source=str(source), columns=columns))
    export(pairs, selection, Scores(), tmp_path / "subset", recipe=recipe)
    found = {row["caption"]: row for row in read_back(tmp_path / "subset").to_pylist()}
    winners = {caption: (row["label_0"], row["label_1"]) for caption, row in found.items()}
    assert winners == {"p": (0.0, 1.0), "q": (1.0, 0.0)}
    assert found["p"]["label"] == pytest.approx(0.3)
    rebuild(tmp_path / "subset/subset.json", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "subset")


def test_a_source_without_pixels_gives_a_subset_of_references(tmp_path, capsys):
    make_source(tmp_path / "source.parquet", images=False)
    _, _, exported = run(tmp_path / "source.parquet", tmp_path / "subset")
    table = read_back(tmp_path / "subset")
    assert not exported.images and "jpg_0" not in table.column_names
    for row in table.to_pylist():
        number = row["image_0_uid"].removeprefix("left-")
        assert row["image_0_url"] == f"https://example.org/0/{number}"
        assert row["image_1_url"] == f"https://example.org/1/{number}"
    assert "keeps references" in capsys.readouterr().err
    rebuild(tmp_path / "subset/subset.json", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "subset")


def test_a_subset_is_rebuilt_to_the_byte_where_the_source_has_moved(source, tmp_path):
    _, _, first = run(source, tmp_path / "subset", per_prompt=1)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    source.rename(moved / "other-name.parquet")
    again = rebuild(tmp_path / "subset/subset.json", tmp_path / "again", str(moved))
    assert contents(tmp_path / "again") == contents(tmp_path / "subset")
    assert again.digest == first.digest


@pytest.mark.parametrize("what", ["jpg_0", "label_0", "caption"])
def test_a_source_that_changed_is_refused_and_nothing_is_written(source, tmp_path, what):
    run(source, tmp_path / "subset")
    table = pq.read_table(source)
    columns = table.to_pydict()
    if what == "jpg_0":
        columns["jpg_0"] = columns["jpg_0"][1:] + columns["jpg_0"][:1]
    elif what == "label_0":
        columns["label_0"], columns["label_1"] = columns["label_1"], columns["label_0"]
    else:
        columns["caption"] = [f"{text}!" for text in columns["caption"]]
    pq.write_table(pa.table(columns), source)
    message = "not in the source" if what == "caption" else "12 pairs have changed"
    with pytest.raises(FifaError, match=message):
        rebuild(tmp_path / "subset/subset.json", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_source_that_lost_its_images_is_refused(source, tmp_path):
    run(source, tmp_path / "subset")
    table = pq.read_table(source).drop_columns(["jpg_0", "jpg_1"])
    for side in (0, 1):
        urls = pa.array([f"https://example.org/{i}" for i in range(table.num_rows)])
        table = table.append_column(f"image_{side}_url", urls)
    pq.write_table(table, source)
    with pytest.raises(FifaError, match="only has their URLs"):
        rebuild(tmp_path / "subset/subset.json", tmp_path / "again")


def test_an_image_is_fetched_once_to_be_looked_at_and_exported(tmp_path, monkeypatch):
    make_source(tmp_path / "source.parquet", images=False)
    asked = Counter()

    def fetch(url, max_bytes):
        asked[url] += 1
        return encoded(zlib.crc32(url.encode()), "PNG")

    monkeypatch.setattr("fifa.data.refs.fetch", fetch)
    recipe = Recipe(
        read=Read(source=str(tmp_path / "source.parquet"), allow_download=True),
        score=Score(margin=(SPEC,), quality="none", diversity="none"),
        select=Select(keep=12),
    )
    filtered = fifa.filter_pairs(recipe, tmp_path / "run")
    subset = read_back(filtered.subset)
    urls = [url for side in (0, 1) for url in subset[f"image_{side}_url"].to_pylist()]
    assert len(urls) == 24
    assert asked == Counter(urls)
    assert not (tmp_path / "run" / "fetched").exists()
    rebuild(filtered.subset / "subset.json", tmp_path / "again", allow_download=True)
    assert contents(tmp_path / "again") == contents(filtered.subset)


def test_a_damaged_image_that_was_fetched_is_fetched_again(tmp_path, monkeypatch):
    asked = []

    def fetch(url, max_bytes):
        asked.append(url)
        return encoded(1, "PNG")

    monkeypatch.setattr("fifa.data.refs.fetch", fetch)
    address = "https://example.org/1"
    assert url_bytes(tmp_path, address) == url_bytes(tmp_path, address) == encoded(1, "PNG")
    assert len(asked) == 1
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1], b"", whole[:50] + b"?" + whole[51:]):
        file.write_bytes(damaged)
        assert url_bytes(tmp_path, address) == encoded(1, "PNG")
        assert file.read_bytes() == whole
    assert len(asked) == 4


def test_an_image_that_cannot_be_read_stops_the_export_and_is_named(source, tmp_path):
    columns = pq.read_table(source).to_pydict()
    columns["jpg_1"] = [b""] * 40
    pq.write_table(pa.table(columns), source)
    with pytest.raises(FifaError, match=r"12 images .* cannot be read") as caught:
        run(source, tmp_path / "subset")
    assert "image 1" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source.parquet"]  # nothing left behind


def test_a_folder_with_other_things_in_it_is_not_touched(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "subset.json").write_text('{"mine": true}')
    with pytest.raises(FifaError, match="no subset of fifa's"):
        run(source, tmp_path / "full")
    assert (tmp_path / "full" / "subset.json").read_text() == '{"mine": true}'
    run(source, tmp_path / "subset", keep=3)
    run(source, tmp_path / "subset", keep=4)  # its own it replaces, as a whole
    assert read_back(tmp_path / "subset").num_rows == 4
    for name in ("notes.txt", ".git", "data/mine/x"):
        other = tmp_path / "subset" / name
        other.parent.mkdir(exist_ok=True)
        other.write_text("mine")
        with pytest.raises(FifaError, match=f"other things in it: {name}"):
            run(source, tmp_path / "subset", keep=3)
        other.unlink()


def test_a_selection_of_other_pairs_is_refused(source, tmp_path):
    pairs, selection, _ = run(source, tmp_path / "subset")
    with pytest.raises(FifaError, match="from other pairs"):
        export(pairs, selection[1:], Scores(), tmp_path / "other", recipe=Recipe())


def test_a_file_that_is_no_subset_cannot_be_rebuilt(tmp_path):
    path = tmp_path / "subset.json"
    with pytest.raises(FifaError, match="cannot read the subset"):
        rebuild(path, tmp_path / "again")
    path.write_text("[]")
    with pytest.raises(FifaError, match=r"not a subset\.json"):
        rebuild(path, tmp_path / "again")


def edited(path, change):
    """``subset.json`` as somebody would write it who knows of its digest."""
    known = read_json(path, "the subset")
    change(known)
    write_json(path, known, sealed=True)
    return path


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:9/a.parquet",
        "https://example.org/a.parquet",
        "HTTP://10.0.0.1/a.parquet",
        "zip://a.parquet::http://169.254.169.254/a.zip",
        "simplecache::http://[::1]/a.parquet",
        "hf://datasets/a/b::http://127.0.0.1/x",
        "s3://bucket/a.parquet",
        "memory://a.parquet",
        "hf://datasets/someone/feedback",
    ],
)
@pytest.mark.parametrize("allow_download", [False, True])
def test_a_file_does_not_choose_whom_we_ask(source, tmp_path, address, allow_download, monkeypatch):
    run(source, tmp_path / "subset")
    path = edited(
        tmp_path / "subset/subset.json",
        lambda known: known["recipe"]["read"].update(source=address),
    )
    asked = []

    def open_url(named, **options):
        asked.append(named)
        raise OSError("no network here")

    monkeypatch.setattr("fsspec.core.url_to_fs", open_url)
    with pytest.raises(FifaError) as caught:
        rebuild(path, tmp_path / "again", allow_download=allow_download)
    on_hub = allow_download and address == "hf://datasets/someone/feedback"
    assert asked == ([address] if on_hub else [])
    if "::http://[" not in address:  # that one is no address to fsspec either
        assert on_hub or "is an address" in str(caught.value)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda known: known["columns"].update(weight=ZEROS), "weights in the file are none"),
        (lambda known: known["columns"].update(rank=ZEROS), "ranks in the file do not ascend"),
        (lambda known: known["columns"].update(margin=ZEROS), "margins, weights or digests in the"),
        (lambda known: known.update(digest="0" * 16), "margins, weights or digests in the file"),
        (lambda known: known["columns"].update(weight="?"), "has not 12 numbers in each column"),
        (lambda known: known["columns"].pop("margin"), "has not 12 numbers in each column"),
        (lambda known: known.update(content=""), "has not 12 numbers in each column"),
        (lambda known: known.update(pair_id=[]), "has not 0 numbers in each column"),
        (lambda known: known.update(pair_id=7), "the subset is not valid: pair_id"),
        (lambda known: known.pop("versions"), "the subset is not valid: versions"),
        (
            lambda known: known["recipe"]["select"].update(keep=-1),
            "the recipe is not valid: select",
        ),
        (lambda known: known.update(fifa_subset=1), r"not a subset\.json that this version"),
    ],
)
def test_what_a_subset_file_says_of_itself_has_to_be_so(source, tmp_path, change, message):
    run(source, tmp_path / "subset")
    path = edited(tmp_path / "subset/subset.json", change)
    with pytest.raises(FifaError, match=message) as caught:
        rebuild(path, tmp_path / "again")
    assert "subset.json" in str(caught.value.where)
    assert "pyarrow" not in str(caught.value)
    assert not (tmp_path / "again").exists()


def test_a_damaged_subset_is_named_by_those_who_read_it(source, tmp_path):
    run(source, tmp_path / "subset")
    (file,) = (tmp_path / "subset/data").iterdir()
    for path in (file, tmp_path / "subset/subset.json"):
        data = path.read_bytes()
        path.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
        for named in (tmp_path / "subset", file):
            with pytest.raises(FifaError, match=re.escape(path.name)):
                read_pairs(named)
        with pytest.raises(FifaError, match=re.escape(path.name)):
            read_training_pairs(tmp_path / "subset")
        path.write_bytes(data)
    file.unlink()
    with pytest.raises(FifaError, match="the file is missing"):
        read_training_pairs(tmp_path / "subset")


def test_many_shards_hold_the_same_rows_in_the_same_order(source, tmp_path, monkeypatch):
    run(source, tmp_path / "one")
    monkeypatch.setattr(subset_module, "GROUP_BYTES", 3000)
    monkeypatch.setattr(subset_module, "SHARD_BYTES", 6000)
    run(source, tmp_path / "many")
    files = sorted((tmp_path / "many/data").iterdir())
    assert len(files) > 2
    assert all(f"-of-{len(files):05d}-" in file.name for file in files)
    assert read_back(tmp_path / "many").equals(read_back(tmp_path / "one"))


@pytest.mark.parametrize("n", [1, 5, 3000])
def test_shards_and_row_groups_stay_within_their_bounds(n):
    sizes = np.random.default_rng(n).integers(1, 40 << 20, n)
    shards = plan_shards(sizes)
    rows = [row for groups in shards for start, end in groups for row in range(start, end)]
    assert rows == list(range(n))
    for groups in shards:
        total = [int(sizes[start:end].sum()) for start, end in groups]
        for (start, end), size in zip(groups, total, strict=True):
            assert 0 < end - start <= subset_module.GROUP_ROWS
            assert size <= subset_module.GROUP_BYTES or end - start == 1
        # the last group may lap over by what one image more than a group's bytes is
        assert sum(total) <= subset_module.SHARD_BYTES + (40 << 20)


def test_subset_json_names_recipe_scores_source_and_pairs_in_a_few_bytes_a_pair(tmp_path):
    make_source(tmp_path / "source.parquet", n=2400, images=False)
    run(tmp_path / "source.parquet", tmp_path / "subset", keep=2000)
    path = tmp_path / "subset/subset.json"
    known = json.loads(path.read_text())
    assert known["recipe"]["select"]["keep"] == 2000
    assert known["source"]["fingerprint"] and list(known["scores"]["margins"]) == [SPEC]
    assert sum(known["reasons"].values()) == 2400
    assert len(known["pair_id"]) == 2000
    assert path.stat().st_size < 100 * 2000  # 5,000 pairs take less than half a megabyte


def test_generators_and_categories_go_into_the_subset_and_its_rebuilding(tmp_path):
    columns = make_source(tmp_path / "source.parquet")
    made = {name: [f"{name} {i % 3}" for i in range(40)] for name in ("model_0", "model_1")}
    made["tags"] = [["x", "y"]] * 40
    table = pa.table({name: columns[name] for name in columns} | made)
    pq.write_table(table, tmp_path / "source.parquet", row_group_size=16)
    pairs, _, exported = run(tmp_path / "source.parquet", tmp_path / "subset")
    rows = read_back(exported.folder)
    assert rows.column_names == [*COLUMNS.names, "model_0", "model_1", "category"]
    known = {row["pair_id"]: row for row in pairs.table.to_pylist()}
    for row in rows.to_pylist():
        for name in ("model_0", "model_1", "category"):
            assert row[name] == known[row["pair_id"]][name]
    assert "| `model_0` | the generator of image 0 |" in (exported.folder / "README.md").read_text()
    again = rebuild(exported.folder / "subset.json", tmp_path / "again")
    assert contents(again.folder) == contents(exported.folder)


def test_a_subset_from_before_names_is_rebuilt_as_it_was(source, tmp_path):
    _, _, exported = run(source, tmp_path / "subset")
    assert "names" not in read_json(exported.folder / "subset.json", "the subset", object)
    table = pq.read_table(source)
    for name in ("model_0", "model_1"):
        table = table.append_column(name, pa.array(["m"] * len(table)))
    pq.write_table(table, tmp_path / "named.parquet", row_group_size=16)
    again = rebuild(
        exported.folder / "subset.json", tmp_path / "again", str(tmp_path / "named.parquet")
    )
    assert again.digest == exported.digest


def test_contents_take_eight_bytes_a_pair():
    n = 20_000
    names = {name: [f"{name} number {i}" for i in range(n)] for name in ("caption", "image_0_uid")}
    table = pa.table(names | {"label": [1.0] * n, "votes": [1] * n, "image_1_uid": ["one"] * n})
    tracemalloc.start()
    try:
        pair_contents(table, None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60 * n
