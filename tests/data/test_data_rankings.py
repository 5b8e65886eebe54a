"""Rankings whose images are rows: one ranking a prompt, whichever files its images are in."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fifa.data import rankings as module
from fifa.data import read_pairs
from fifa.data.images import pair_images, read
from fifa.data.table import Pairs
from fifa.errors import FifaError


def picture(i: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(out, "PNG")
    return out.getvalue()


def write(folder: Path, kind: str, name: str, numbers: list[int], **columns: object) -> None:
    """A file with the images of these numbers, each ranked by its number."""
    rows = [{"prompt_id": "x", "prompt": "p", "rank": i, **columns} for i in numbers]
    if kind == "cells":
        rows = [r | {"image": {"bytes": picture(r["rank"]), "path": None}} for r in rows]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    elif kind == "tar":
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for row in rows:
                members = {"json": json.dumps(row).encode(), "image.png": picture(row["rank"])}
                for end, data in members.items():
                    info = tarfile.TarInfo(f"{row['rank']}.{end}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    else:
        (folder / name).mkdir()
        for row in rows:
            (folder / name / f"{row['rank']}.png").write_bytes(picture(row["rank"]))
        rows = [row | {"image_path": f"{row['rank']}.png"} for row in rows]
        (folder / name / "a.json").write_text(json.dumps(rows))


def labels(pairs: Pairs) -> dict[tuple[int, int], float]:
    """Of the numbers in the two images' pixels, the label of every pair."""
    images = dict(read(pair_images(pairs.table, pairs.origin)))
    shown = {i: Image.open(io.BytesIO(data)).getpixel((0, 0))[0] for i, data in images.items()}
    own = pairs.table["label"].to_pylist()
    return {(shown[2 * i], shown[2 * i + 1]): label for i, label in enumerate(own)}


@pytest.mark.parametrize("kind", ["cells", "tar", "paths"])
def test_images_in_several_files_are_one_ranking(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind, "a", [3, 0])
    write(tmp_path, kind, "b", [2])
    write(tmp_path, kind, "c", [1, 4])
    pairs = read_pairs(tmp_path)
    assert len(pairs.rejected) == 0
    found = labels(pairs)
    assert {frozenset(pair) for pair in found} == {
        *map(frozenset, itertools.combinations(range(5), 2))
    }
    assert all(label == float(first < second) for (first, second), label in found.items())
    assert set(pairs.table["file"].to_pylist()) == {pairs.table["file"][0].as_py()}
    assert read_pairs(tmp_path).pairs_digest == pairs.pairs_digest


def test_a_ranking_is_a_prompt_id_with_its_prompt(tmp_path: Path) -> None:
    write(tmp_path, "cells", "a", [0, 1, 2], prompt_id=7)
    write(tmp_path, "cells", "b", [3, 4], prompt_id=7.0, prompt="P ")
    write(tmp_path, "cells", "c", [5, 6], prompt_id=7, prompt="q")
    pairs = read_pairs(tmp_path)
    assert sorted(pairs.table["prompt"].to_pylist()) == ["p"] * 10 + ["q"]


def test_every_image_that_is_in_no_ranking_is_rejected_by_its_row(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_IMAGES", 4)
    write(tmp_path, "paths", "a", [0, 1])
    write(tmp_path, "paths", "b", [2])
    write(tmp_path, "paths", "c", [3, 4], prompt_id="many")
    write(tmp_path, "paths", "d", [5, 6, 7], prompt_id="many")
    write(tmp_path, "paths", "e", [8], prompt_id="single")
    write(tmp_path, "paths", "f", [9, 9, 8], prompt="")
    pairs = read_pairs(tmp_path)
    assert (len(pairs), pairs.origin.merged) == (3, 0)
    told = [(row["file"][0], row["row"], row["reason"][:9]) for row in pairs.rejected.to_pylist()]
    many = [(name, row, "5 images ") for name, rows in (("c", 2), ("d", 3)) for row in range(rows)]
    empty = [("f", row, "no prompt") for row in range(3)]
    assert told == [*many, ("e", 0, "1 images "), *empty]


def test_an_image_that_is_there_again_is_told(tmp_path: Path) -> None:
    rows = [{"prompt_id": 1, "prompt": "p", "rank": i, "image_path": f"{i}.png"} for i in (1, 2, 3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps([rows[1], rows[2] | {"rank": 1}]))
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 3
    assert pairs.rejected["reason"].to_pylist() == [
        "the prompt has this image already, in row 1 of a.json",
        "the prompt has this image with another rank already, in row 2 of a.json",
    ]


def test_the_order_is_that_of_the_files_however_many_are_made_at_a_time(
    tmp_path, monkeypatch
) -> None:
    rows = [
        {"prompt_id": i // 3 % 9, "prompt": "p", "rank": i, "image_path": f"{i}.png", "a_rating": i}
        for i in range(36)
    ]
    for name, part in (("a", rows[:20]), ("b", rows[20:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    whole = read_pairs(tmp_path)
    places = [(row["file"], row["row"]) for row in whole.table.to_pylist()]
    assert places == sorted(places)
    monkeypatch.setattr(module, "NEAR", 5)
    assert read_pairs(tmp_path).table.equals(whole.table)


def test_images_of_two_folders_are_two_images_though_their_paths_are_the_same(tmp_path) -> None:
    for folder, numbers in (("train", (1, 2)), ("test", (3, 4))):
        (tmp_path / folder).mkdir()
        for i, number in enumerate(numbers):
            (tmp_path / folder / f"{i}.png").write_bytes(picture(number))
        row = {"prompt": "p", "image_0": "0.png", "image_1": "1.png", "label": 1}
        (tmp_path / folder / "metadata.jsonl").write_text(json.dumps(row))
    assert labels(read_pairs(tmp_path)) == {(3, 4): 1.0, (1, 2): 1.0}


def test_a_table_with_a_row_an_image_is_read_by_its_columns(tmp_path: Path) -> None:
    rows = [
        {"text": f"p{i % 2}", "file": f"{i}.png", "mos": score, "place": score and -score}
        for i, score in enumerate([3.5, 1, 2.5, 1, 3.5, None, 0.5])
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows[:3]))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows[3:])))
    with pytest.raises(FifaError, match="image=file,score=mos pairs the images of each prompt"):
        read_pairs(tmp_path)
    own = {"prompt": "text", "image": "file", "score": "mos"}
    pairs = read_pairs(tmp_path, columns=own)
    assert len(pairs) == 6 + 1
    assert pairs.rejected.to_pylist()[0]["reason"] == "no rank, prompt_id or image"
    for row in pairs.table.to_pylist():
        zero, one = row["mos_0"], row["mos_1"]
        assert row["label"] == (0.5 if zero == one else float(zero > one))
        assert zero == rows[int(row["image_0"][0])]["mos"]
    by_rank = {"prompt": "text", "image": "file", "rank": "place"}
    assert read_pairs(tmp_path, columns=by_rank).table["label"].equals(pairs.table["label"])
    with pytest.raises(FifaError, match="no column 'nix'"):
        read_pairs(tmp_path, columns=own | {"image": "nix"})
