"""Images that a table has as text: base64 and ``data:`` URLs, found where they stand."""

from __future__ import annotations

import base64
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fifa.data import read_pairs
from fifa.data.decode import BadImage
from fifa.data.images import pair_images, read
from fifa.data.refs import text_bytes
from fifa.data.table import Pairs

COLUMNS = ("prompt", "image_0", "image_1", "label")


def picture(i: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


KINDS = ["PNG", "JPEG", "WEBP", "PNG"]
PICTURES = [picture(i, KINDS[i]) for i in range(4)]
FORMS = {
    "base64": lambda data: base64.b64encode(data).decode(),
    "data": lambda data: "data:image/png;base64," + base64.b64encode(data).decode(),
    "lines": lambda data: base64.encodebytes(data).decode(),
    "web": lambda data: base64.urlsafe_b64encode(data).decode().rstrip("="),
}


def images(pairs: Pairs) -> list[bytes | BadImage]:
    return [data for _, data in sorted(read(pair_images(pairs.table, pairs.origin)))]


def write(folder: Path, kind: str, rows: list[dict[str, object]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    elif kind == "csv":
        quoted = [",".join('"' + str(cell) + '"' for cell in row) for row in cells]
        (folder / "a.csv").write_text("\ufeff" + "\n".join(quoted), "utf-8")
    else:
        text = {
            "jsonl": lines,
            "json": json.dumps(rows, indent=1),
            "escaped": lines.replace("/", "\\/"),
            "wrapped": json.dumps({"data": rows}),
            "columns": json.dumps({name: [row[name] for row in rows] for name in rows[0]}),
            "gz": lines,
        }[kind]
        name = {"jsonl": "a.jsonl", "gz": "a.jsonl.gz"}.get(kind, "a.json")
        data = text.encode()
        (folder / name).write_bytes(gzip.compress(data) if kind == "gz" else data)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "escaped", "wrapped", "columns", "gz", "csv", "parquet"]
)
def test_images_written_as_text_are_read(tmp_path: Path, kind: str, form: str) -> None:
    text = [FORMS[form](data) for data in PICTURES]
    (tmp_path / "c.png").write_bytes(PICTURES[0])
    rows = [
        {"prompt": "é", "image_0": text[0], "image_1": text[1], "label": 1},
        {"prompt": "data: of a chart", "image_0": text[2], "image_1": text[3], "label": 0},
        {"prompt": "again", "image_0": text[0], "image_1": text[0], "label": 0},
    ]
    write(tmp_path, kind, rows)
    pairs = read_pairs(tmp_path)
    assert pairs.table["prompt"].to_pylist() == [row["prompt"] for row in rows]
    assert images(pairs) == [*PICTURES, PICTURES[0], PICTURES[0]]
    keys = pairs.table["image_0"].to_pylist()
    assert len(set(keys)) == len(keys)
    assert max(map(len, keys)) < 60


def test_a_row_may_have_a_path_instead(tmp_path: Path) -> None:
    (tmp_path / "c.png").write_bytes(PICTURES[3])
    row = {"prompt": "p", "image_0": FORMS["data"](PICTURES[0]), "image_1": "c.png", "label": 1}
    struct = {"bytes": FORMS["base64"](PICTURES[1]), "path": "gone.png"}
    write(tmp_path, "jsonl", [row, row | {"image_0": struct}, row | {"image_0": {"path": "c.png"}}])
    assert images(read_pairs(tmp_path))[::2] == [PICTURES[0], PICTURES[1], PICTURES[3]]


def test_text_that_is_no_image_is_told_and_no_prompt_is_an_image(tmp_path: Path) -> None:
    bad = ["data:image/svg+xml,%3Csvg", "data:image/png;base64,iVBO", "/9j/4AAQ", "UklGR"]
    rows = [
        {"prompt": f"p{i}", "image_0": t, "image_1": "a", "label": 1} for i, t in enumerate(bad)
    ]
    good = {"prompt": "data:" + "A" * 40, "image_0": "a", "image_1": "b", "label": 1}
    image = good | {"prompt": FORMS["data"](PICTURES[0])}
    write(tmp_path, "jsonl", [*rows, good, image])
    pairs = read_pairs(tmp_path)
    assert pairs.table["prompt"].to_pylist() == [good["prompt"]]
    assert len(pairs.rejected) == 5


def test_a_text_in_utf_16_has_no_place_and_is_told(tmp_path: Path) -> None:
    row = {"prompt": "p", "image_0": FORMS["base64"](PICTURES[0]), "image_1": "a", "label": 1}
    text = json.dumps([row, row | {"image_0": "b"}])
    (tmp_path / "a.json").write_bytes(text.encode("utf-16"))
    assert "base64 text" in read_pairs(tmp_path).rejected["reason"][0].as_py()


@settings(max_examples=60, derandomize=True)
@given(st.binary(max_size=60), st.text("AZaz09+/=_- \n\\,;", max_size=20))
def test_what_comes_of_text_is_its_bytes_or_a_reason(data: bytes, noise: str) -> None:
    for form in FORMS.values():
        assert text_bytes(form(data).encode()) == data
    assert isinstance(text_bytes(noise.encode()), bytes | BadImage)
    assert isinstance(text_bytes(b"data:image/png;base64," + noise.encode()), bytes | BadImage)


@pytest.mark.parametrize("ref", ["file://{}/a%20b.png", "file://localhost{}/a b.png"])
def test_file_urls_are_paths_within_the_folder(tmp_path: Path, ref: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a b.png").write_bytes(PICTURES[0])
    (tmp_path / "out.png").write_bytes(PICTURES[1])
    row = {"prompt": "p", "image_0": ref.format(tmp_path / "set"), "label": 1}
    row |= {"image_1": f"file://{tmp_path}/out.png"}
    write(tmp_path / "set", "jsonl", [row])
    inside, outside = images(read_pairs(tmp_path / "set"))
    assert inside == PICTURES[0]
    assert isinstance(outside, BadImage)
    assert "leaves the data set's folder" in outside.reason
