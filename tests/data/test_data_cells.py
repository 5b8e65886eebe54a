"""Images where people's programs put them: a row's bytes if there are any, else its path."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fifa.data import read_pairs
from fifa.data.images import pair_images, read
from fifa.errors import FifaError

N = 4
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(i: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(out, "PNG")
    return out.getvalue()


def images_of(path: Path, columns: dict[str, str] | None = None) -> list[object]:
    """The bytes behind every slot of the pairs, as numbers of the pictures where they are known."""
    pairs = read_pairs(path, columns=columns)
    assert pairs.table["row"].to_pylist() == list(range(N))
    number = {png(i): i for i in range(2 * N)}
    found = dict(read(pair_images(pairs.table, pairs.origin)))
    return [number.get(found[i], found[i]) for i in range(2 * N)]  # type: ignore[call-overload]


def write(path: Path, cells: list[pa.Array], group: int = N, **options: object) -> None:
    columns = {"prompt": [f"p{i}" for i in range(N)], "label": [1.0, 0.0] * 2}
    table = pa.table(columns | {f"image_{side}": cells[side] for side in (0, 1)})
    try:
        pq.write_table(table, path, row_group_size=group, **options)
    except pa.ArrowNotImplementedError as error:  # views, by pyarrow 18
        pytest.skip(str(error))


def struct(side: int, with_bytes: set[int], kind: pa.DataType = STRUCT) -> pa.Array:
    rows = [
        {"bytes": png(2 * i + side) if i in with_bytes else None, "path": f"{i}_{side}.png"}
        for i in range(N)
    ]
    return pa.array(rows, kind)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(2 * N):
        (tmp_path / "images" / f"{i // 2}_{i % 2}.png").write_bytes(png(i))
    return tmp_path


@pytest.mark.parametrize("group", [1, 2, N])
@pytest.mark.parametrize("there", [(0, 1, 2, 3), (0, 1), (3,), (1, 2), ()])
def test_every_row_has_its_bytes_or_its_path(folder: Path, there: tuple[int], group: int) -> None:
    write(folder / "a.parquet", [struct(side, set(there)) for side in (0, 1)], group)
    assert images_of(folder) == list(range(2 * N))


def test_rows_that_are_an_image_have_their_bytes_or_their_path(folder: Path) -> None:
    names = [f"{i // 2}_{i % 2}.png" for i in range(2 * N)]
    cells = [{"bytes": png(i), "path": "tmp/left.png"} for i in range(2 * N)]  # no image's name
    for i in range(0, 2 * N, 3):
        cells[i] = {"bytes": None, "path": names[i]}
    table = {"prompt": ["p"] * 2 * N, "score": range(2 * N), "image": pa.array(cells, STRUCT)}
    pq.write_table(pa.table(table), folder / "a.parquet")
    columns = {"image": "image", "score": "score"}
    pairs = read_pairs(folder, columns=columns, pairs="adjacent")
    assert len(pairs) == 2 * N - 1
    found = dict(read(pair_images(pairs.table, pairs.origin)))
    for i, row in enumerate(pairs.table.to_pylist()):
        sides = [found[2 * i + side] for side in (0, 1)]
        assert sides == [png(int(row[f"score_{side}"])) for side in (0, 1)]


@pytest.mark.parametrize("turned", [False, True])
def test_bytes_on_one_side_and_paths_on_the_other(folder: Path, turned: bool) -> None:
    def cells(side: int) -> pa.Array:
        paths = pa.array([f"images/{i}_{side}.png" for i in range(N)])
        return struct(side, set(range(N))) if side == turned else paths

    write(folder / "a.parquet", [cells(0), cells(1)])
    assert images_of(folder) == list(range(2 * N))


@pytest.mark.parametrize(
    "kind",
    [
        pa.struct([("bytes", pa.binary())]),
        pa.struct([("path", pa.string()), ("bytes", pa.binary()), ("width", pa.int32())]),
        pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())]),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
    ],
)
def test_every_arrow_type_of_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    def cells(side: int) -> pa.Array:
        raw = [png(2 * i + side) for i in range(N)]
        return pa.array([{"bytes": one} for one in raw] if pa.types.is_struct(kind) else raw, kind)

    write(tmp_path / "a.parquet", [cells(0), cells(1)])
    assert images_of(tmp_path) == list(range(2 * N))


LISTS = [
    pa.list_(pa.binary()),
    pa.large_list(pa.large_binary()),
    pa.list_(STRUCT),
    pa.list_(STRUCT, 2),
    pa.list_(pa.string()),
]


def test_an_item_of_a_list_is_an_image_and_so_is_the_only_one(folder: Path) -> None:
    """Named as ``images.0``; a list of several is none."""

    def item(slot: int, kind: pa.DataType) -> object:
        if pa.types.is_string(kind):
            return f"images/{slot // 2}_{slot % 2}.png"
        return {"bytes": png(slot), "path": "x"} if pa.types.is_struct(kind) else png(slot)

    columns = {"image_0": "images.0", "image_1": "images.1"}
    for kind in LISTS:
        both = [[item(2 * i, kind.value_type), item(2 * i + 1, kind.value_type)] for i in range(N)]
        table = {"prompt": [f"p{i}" for i in range(N)], "label": [1.0] * N}
        pq.write_table(pa.table(table | {"images": pa.array(both, kind)}), folder / "a.parquet")
        assert images_of(folder, columns) == list(range(2 * N)), kind
        if pa.types.is_fixed_size_list(kind):
            continue
        write(folder / "a.parquet", [pa.array([[own[s]] for own in both], kind) for s in (0, 1)])
        assert images_of(folder) == list(range(2 * N)), kind
    write(folder / "a.parquet", [pa.array([[png(0), png(1)]] * N), pa.array([[png(1)]] * N)])
    one, *_ = images_of(folder)
    assert "several images: name one of the list" in str(one)
    lines = [
        {"prompt": f"p{i}", "label": 1, "images": [f"images/{i}_0.png", f"images/{i}_1.png"]}
        for i in range(N)
    ]
    (folder / "a.parquet").unlink()
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert images_of(folder, columns) == list(range(2 * N))


@pytest.mark.parametrize("there", [(0, 1, 2, 3), (0, 2), ()])
def test_a_file_without_statistics_has_bytes_or_paths_by_row(
    folder: Path, there: tuple[int]
) -> None:
    cells = [struct(side, set(there)) for side in (0, 1)]
    write(folder / "a.parquet", cells, write_statistics=False)
    assert images_of(folder) == list(range(2 * N))


def test_columns_of_categories_and_of_a_type_of_their_own(tmp_path: Path) -> None:
    raw = [pa.array([png(2 * i + side) for i in range(N)]) for side in (0, 1)]
    own = pa.ExtensionArray.from_storage(pa.opaque(pa.binary(), "image", "somebody"), raw[1])
    write(tmp_path / "a.parquet", [raw[0].dictionary_encode(), own])
    assert images_of(tmp_path) == list(range(2 * N))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), None]
)
def test_base64_and_paths_in_one_column(folder: Path, kind: pa.DataType | None) -> None:
    there = range(N) if kind == pa.binary() else range(1, N)  # bytes are no path

    def cells(side: int) -> pa.Array:
        rows = [f"images/{i}_{side}.png".encode() for i in range(N)]
        for i in there:
            rows[i] = base64.b64encode(png(2 * i + side))
        texts = rows if kind == pa.binary() else [row.decode() for row in rows]
        return pa.array(texts, kind) if kind else pa.array(texts).dictionary_encode()

    write(folder / "a.parquet", [cells(0), cells(1)])
    assert images_of(folder) == list(range(2 * N))


@pytest.mark.parametrize(
    "cell", [[1, 2], 7, 0.5, True, [{"data": b"x", "path": None}], [[0] * 3], [[b"x"]]]
)
def test_what_is_no_image_is_named_by_its_type(tmp_path: Path, cell: object) -> None:
    write(tmp_path / "a.parquet", [pa.array([cell] * N), struct(1, {0})])
    with pytest.raises(FifaError, match=r"column 'image_0' is of .+, which is no image"):
        read_pairs(tmp_path)


def test_a_struct_of_other_fields_is_named(tmp_path: Path) -> None:
    fields = {"origin": pa.string(), "height": pa.int32(), "data": pa.binary()}
    cells = pa.array([{"origin": "x", "height": 8, "data": b"rgb"}] * N, pa.struct(fields))
    write(tmp_path / "a.parquet", [cells, cells])
    with pytest.raises(FifaError, match="'image_0' is a struct of origin, height, data"):
        read_pairs(tmp_path)


def test_paths_of_windows_are_paths(folder: Path) -> None:
    rows = [
        {"prompt": f"p{i}", "label": i % 2} | {f"image_{k}": rf"images\{i}_{k}.png" for k in (0, 1)}
        for i in range(N)
    ]
    (folder / "a.json").write_text(json.dumps(rows))
    assert images_of(folder) == list(range(2 * N))


def test_images_as_text_are_no_paths(tmp_path: Path) -> None:
    texts = ["data:image/png;base64,iVBO", "iVBORw0KGgoAAAA", "/9j/4AAQSkZJRg", "UklGRiQAAABXRUJQ"]
    rows = [{"prompt": t, "image_0": t, "image_1": "a.png", "label": 1} for t in [*texts, "b.png"]]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pairs = read_pairs(tmp_path)
    assert pairs.table["prompt"].to_pylist() == ["b.png"]
    assert set(pairs.rejected["reason"].to_pylist()) == {
        "image 0 is base64 text: write it to a file, or as bytes into Parquet"
    }
