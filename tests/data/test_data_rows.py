"""Every row that a reader meets is in a pair, merged into one or rejected, whatever is in it."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fifa.data import read_pairs
from fifa.data.read import FORMATS
from fifa.data.table import Pairs
from fifa.errors import FifaError

Rows = list[dict[str, Any]]
RATES = {"weighted_results_image1_preference": 1.0, "weighted_results_image2_preference": 0.5}
UIDS = {"image_0_uid": "u", "image_1_uid": "v"}
RESULT = {"images": {"prompt": "p", "image_1": "a", "image_2": "b"}}
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("rapidata", {"prompt": "p", "image1": "a", "image2": "b"} | RATES),
    (
        "rapidata",
        {"prompt": "p", "image1": "a", "image2": "b", "votes_image1": 3, "votes_image2": 1},
    ),
    (
        "genai-arena",
        {"prompt": "p", "left_image": "a", "right_image": "b", "vote_type": "leftvote"},
    ),
    ("open-image-preferences", RESULT | {"preference": {"responses": ["image_1"]}}),
    ("hpdv3", {"prompt": "p", "path1": "a", "path2": "b", "choice_dist": [3, 1], "tie_case": 0}),
    ("pickapic", {"caption": "p", "jpg_0": "a", "jpg_1": "b", "label_0": 1, "label_1": 0} | UIDS),
    ("diffusers", {"caption": "p", "jpg_0": "a", "jpg_1": "b", "label_0": 1, "has_label": True}),
    ("mj-bench", {"caption": "p", "image0": "a", "image1": "b", "label": 1}),
    (
        "open-image-preferences",
        {"prompt": "p", "chosen": "a", "rejected": "b"}
        | {"chosen_model": "m", "rejected_model": "n", "category": "c"},
    ),
    ("chosen-rejected", {"prompt": "p", "chosen": "a", "rejected": "b"}),
    ("columns", {"prompt": "p", "image_0": "a", "image_1": "b", "label": 0.5, "status": "done"}),
    ("hpdv2", {"prompt": "p", "file_path": ["a", "b"], "human_preference": [1, 0]}),
    ("hpdv2", {"prompt": "p", "image_left_id": "a", "image_right_id": "b", "pref": -1}),
    ("winner", {"prompt": "p", "image_a": "a", "image_b": "b", "winner": "model_a"}),
    ("win-lose", {"prompt": "p", "img_win": "a", "img_lose": "b", "win_score": 2.5}),
    ("trl", {"caption": "p", "images": ["a", "b"], "label_0": 1, "chosen": "x", "rejected": "y"}),
    (
        "mmrb2",
        {"prompt_content": [["text", "p"]], "human_annotations": [5, 1, 4], "chosen": "A"}
        | {f"response_{k}": {"response_content": [["image", k]]} for k in "ab"},
    ),
]
# whose votes are under the images' names: they go with them
NAMED = {"image1": "a", "image2": "b", "aggregated_results": {"a": 3, "b": 1}}
LAYOUTS.append(("rapidata", {"prompt": "p"} | NAMED))
SIDES = [("0", "1"), ("1", "2"), ("a", "b"), ("chosen", "rejected"), ("left", "right")]
SIDES += [("win", "lose")]
IMAGES_OF = "{}_image image_{} image_{}_id image{} path{} jpg_{} image_{}_uid {} img_{} response_{}"
EXCHANGED = [(of.format(a), of.format(b)) for a, b in SIDES for of in IMAGES_OF.split()]
RANKINGS: list[tuple[str, dict[str, Any]]] = [
    (
        "hpdv2",
        {"prompt": "p", "image_path": ["a", "b", "c"], "raw_annotations": [{"rank": [1, 2, 3]}]},
    ),
    ("hpdv2", {"prompt": "p", "image_path": ["a", "b"], "rank": [2, 1]}),
    ("imagereward", {"prompt": "p", "generations": ["a", "b", "c"], "ranking": [1, 1, 2]}),
]
IMAGES: list[tuple[str, str, dict[str, Any]]] = [
    ("imagereward", "image_path", {"prompt_id": "x", "prompt": "p", "rank": 1, "image_path": "a"}),
    (
        "evalmuse",
        "img_path",
        {"prompt_id": "x", "prompt": "p", "total_score": [4, 5], "img_path": "a"},
    ),
    ("kto", "image", {"prompt": "p", "label": True, "image": "a"}),
    ("laion", "URL", {"TEXT": "p", "AESTHETIC_SCORE": 5.5, "URL": "a"}),
]
MORE = {"kto": {"label": False}, "evalmuse": {"total_score": [1, 1]}}  # of a second image
NUMBERS = [0, 1, 2.5, -1, float("nan"), float("inf"), True, 10**400, None, [1, 0], {"rank": [1]}]
TEXTS = ["", " ", "\x1c", "\u3000", "b", "1", "\ud800", "a" * 5000, "p" * 100_001, "draft", [], {}]
NAMES = [
    "cell:0:jpg_0",
    "tar:0+5:x",
    "in:1:a:b",
    "https://a.b/c",
    "data:,",
    "iVBORw0KGgo",
    ["a"] * 2,
]
ODD = st.sampled_from([*NUMBERS, *TEXTS, *NAMES])


def rows_of(row: dict[str, Any]) -> st.SearchStrategy[list[Rows]]:
    """One to three files of rows like this one, some values of which are odd."""
    odd = st.dictionaries(st.sampled_from(sorted(row)), ODD, max_size=2)
    some = st.one_of(odd, st.just({}), st.just({"prompt": "q"} if "prompt" in row else {}))
    return st.lists(st.lists(some.map(lambda o: row | o), max_size=6), min_size=1, max_size=3)


KINDS = ["jsonl", "parquet", "texts", "csv", "metadata"]
FILES_OF = re.compile(r"(left_|right_)?image|(image|path|jpg|img)_?\w|image_(left|right)_id|chosen")


def metadata(row: dict[str, Any]) -> dict[str, Any]:
    """The row as an imagefolder names its columns of images."""
    names = {name: f"{name}_file_name" for name in row if FILES_OF.fullmatch(name)}
    return {({"image": "file_name"} | names).get(name, name): row[name] for name in row}


def write(folder: Path, files: list[Rows], kind: str) -> None:
    """As one of `KINDS`; JSON lines where the rows' types are none of a table's.

    Nested values are JSON in the cells of CSV, and of ``texts``, which is Parquet; ``metadata`` is
    an imagefolder.
    """
    for i, rows in enumerate(files):
        if kind == "metadata":
            (folder / f"{i}").mkdir()
            lines = (json.dumps(metadata(row)) + "\n" for row in rows)
            (folder / f"{i}" / "metadata.jsonl").write_text("".join(lines))
            continue
        if kind in ("csv", "texts"):
            nested = (list, dict)
            rows = [
                {k: json.dumps(v) if isinstance(v, nested) else v for k, v in row.items()}
                for row in rows
            ]
        try:
            if kind in ("parquet", "texts"):
                pq.write_table(pa.Table.from_pylist(rows), folder / f"{i}.parquet")
                continue
            if kind == "csv" and rows:
                with (folder / f"{i}.csv").open("w", encoding="utf-8") as file:
                    table = csv.DictWriter(file, list(rows[0]))
                    table.writeheader()
                    table.writerows(rows)
                continue
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            (folder / f"{i}.{kind.replace('texts', 'parquet')}").unlink(missing_ok=True)
        (folder / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def met(pairs: Pairs) -> Counter[tuple[str, int | None]]:
    """How often each row is in a pair, or rejected."""
    some = [*pairs.table.to_pylist(), *pairs.rejected.to_pylist()]
    return Counter((row["file"], row["row"]) for row in some)


def read(files: list[Rows], kind: str, name: str | None = None) -> Pairs | None:
    """The pairs; none where the whole source is refused, in words that can be printed."""
    with TemporaryDirectory() as folder:
        write(Path(folder), files, kind)
        try:
            return read_pairs(folder, name)
        except FifaError as error:
            str(error).encode()
            return None


def test_every_kind_of_file_has_its_pairs() -> None:
    """So that no property below holds because nothing was read."""
    images = [(name, [row, row | {image: "b"} | MORE.get(name, {})]) for name, image, row in IMAGES]
    for name, rows in [*((name, [row]) for name, row in (*LAYOUTS, *RANKINGS)), *images]:
        for kind in KINDS:
            pairs = read([rows], kind, name)
            assert pairs is not None, (name, kind)
            assert len(pairs) == (3 if ["a", "b", "c"] in rows[0].values() else 1), (name, kind)


def test_no_format_is_left_out() -> None:
    tried = {name for name, _ in (*LAYOUTS, *RANKINGS)} | {name for name, *_ in IMAGES}
    assert tried == set(FORMATS)


@pytest.mark.parametrize(("name", "row"), LAYOUTS)
@settings(max_examples=12, derandomize=True)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_rows_are_pairs_merged_or_rejected(name: str, row: dict[str, Any], kind, data) -> None:
    files = data.draw(rows_of(row))
    pairs = read(files, kind, name)
    if pairs is None:
        return
    nothing = sum(1 for rows in pairs.rejected.to_pylist() if rows["row"] is None)
    assert pairs.origin.rows == len(pairs) + pairs.origin.merged + len(pairs.rejected)
    assert set(met(pairs).values()) == {1}
    if not nothing:  # no file as a whole
        assert pairs.origin.rows == sum(map(len, files))
    assert all(0 <= label <= 1 for label in pairs.table["label"].to_pylist())


@pytest.mark.parametrize(("name", "row"), RANKINGS)
@settings(max_examples=12, derandomize=True)
@given(data=st.data(), kind=st.sampled_from(["jsonl", "parquet", "texts"]))
def test_rows_are_rankings_or_rejected(name: str, row: dict[str, Any], kind, data) -> None:
    """Rows = rankings + rejected, and rankings of n images make n (n - 1) / 2 pairs each."""
    files = data.draw(rows_of(row))
    pairs = read(files, kind, name)
    if pairs is None:
        return
    rejected = {(one["file"], one["row"]) for one in pairs.rejected.to_pylist()}
    assert len(rejected) == len(pairs.rejected)
    if any(number is None for _, number in rejected):
        return
    total = 0
    for i, rows in enumerate(files):
        for j, one in enumerate(rows):
            images = one.get("image_path", one.get("generations"))
            if not rejected & {(f"{i}.{end}", j) for end in ("jsonl", "parquet")}:
                total += len(images) * (len(images) - 1) // 2
    assert len(pairs) + pairs.origin.merged == total


def exchanged(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its two images in each other's place."""
    nested = isinstance(row.get("images"), dict)
    out = {**row, "images": exchanged(row["images"])} if nested else dict(row)
    for one, two in EXCHANGED:
        if one in row and two in row:
            out[one], out[two] = row[two], row[one]
    for name in ("file_path", "images"):
        if isinstance(row.get(name), list):
            out[name] = row[name][::-1]
    return out


@pytest.mark.parametrize(("name", "row"), LAYOUTS)
@settings(max_examples=12, derandomize=True)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_swapping_the_sides_swaps_the_labels_and_nothing_else(
    name: str, row: dict[str, Any], kind: str, data: st.DataObject
) -> None:
    assert exchanged(row) != row
    sides = {key for key in row if exchanged(row)[key] != row[key]}
    odd = st.dictionaries(st.sampled_from(sorted(row.keys() - sides)), ODD, max_size=1)
    one = st.tuples(odd, st.booleans()).map(lambda t: (exchanged(row) if t[1] else row) | t[0])
    files = data.draw(st.lists(st.lists(one, max_size=5), min_size=1, max_size=2))
    there = read(files, kind, name)
    back = read([[*map(exchanged, rows)] for rows in files], kind, name)
    if there is None or back is None:
        assert there is back
        return
    assert there.rejected.to_pylist() == back.rejected.to_pylist()
    for column in ("pair_id", "prompt", "prompt_id", "file", "row", "votes", "repeat"):
        assert there.table[column].to_pylist() == back.table[column].to_pylist()
    for own, other in zip(there.table.to_pylist(), back.table.to_pylist(), strict=True):
        assert {own["image_0"], own["image_1"]} == {other["image_0"], other["image_1"]}
        turned = own["image_0"] != other["image_0"]
        flips = not turned if NAMED.keys() - row.keys() else turned
        assert own["label"] == pytest.approx(1 - other["label"] if flips else other["label"])


@pytest.mark.parametrize(("name", "image", "row"), IMAGES)
@settings(max_examples=20, derandomize=True)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_images_are_in_a_ranking_or_rejected(
    name: str, image: str, row: dict[str, Any], kind: str, data: st.DataObject
) -> None:
    """Rows = images of rankings + rejected: an image of n is in n - 1 pairs."""
    some = (
        st.tuples(st.integers(0, 2), st.sampled_from(["p", "q", "P "]), st.integers(0, 5))
        .map(lambda t: {"prompt_id": t[0], "prompt": t[1], image: f"{t[2]}"})
        .map(lambda own: row | {key: own[key] for key in own if key in row})
        .flatmap(
            lambda r: st.dictionaries(st.sampled_from(sorted(r)), ODD, max_size=1).map(r.__or__)
        )
    )
    files = data.draw(st.lists(st.lists(some, max_size=8), min_size=1, max_size=3))
    pairs = read(files, kind, name)
    if pairs is None:
        return
    rejected = Counter((one["file"], one["row"]) for one in pairs.rejected.to_pylist())
    assert set(rejected.values()) <= {1}
    if any(number is None for _, number in rejected):
        return
    assert all(0 <= label <= 1 for label in pairs.table["label"].to_pylist())
    groups: dict[str, set[str]] = {}
    for one in pairs.table.to_pylist():
        # of one place: the file and row of a ranking's first image
        own = groups.setdefault((one["prompt_index"], one["file"], one["row"]), set())
        own |= {one["image_0"], one["image_1"]}
    if pairs.origin.merged or pairs.origin.not_made:
        return
    assert sum(map(len, groups.values())) + len(pairs.rejected) == sum(map(len, files))
    assert len(pairs) == sum(len(own) * (len(own) - 1) // 2 for own in groups.values())


@pytest.mark.parametrize(("name", "image", "row"), IMAGES)
def test_the_order_of_the_images_decides_nothing(
    name: str, image: str, row: dict[str, Any]
) -> None:
    prompt, number = ("TEXT" if "TEXT" in row else "prompt"), [*row][-2]
    ranks = {"a": [1, 4, True, 5.5], "b": [2, 3, False, 4.5], "c": [3, 2, False, 3.5]}
    which = [one[0] for one in IMAGES].index(name)
    rows = [row | {image: key, prompt: "P", number: values[which]} for key, values in ranks.items()]
    tables = [
        pairs.table for order in (rows, rows[::-1]) if (pairs := read([order], "jsonl", name))
    ]
    there, back = (
        sorted(table.select(["pair_id", "image_0", "image_1", "label"]).to_pylist(), key=str)
        for table in tables
    )
    assert there == back
    assert len(there) == (2 if name == "kto" else 3)
    better = {row[f"image_{1 - round(row['label'])}"] for row in there}
    assert "c" not in better and "a" in better


@settings(max_examples=20, derandomize=True)
@given(
    names=st.lists(st.tuples(st.sampled_from("abcd"), st.booleans(), st.booleans()), max_size=6),
    sides=st.sampled_from([("chosen", "rejected"), ("Win", "lose")]),
)
def test_names_of_two_folders_are_pairs_or_rejected(
    names: list[tuple[str, bool, bool]], sides: tuple[str, str]
) -> None:
    """Each name is one row; the folders the other way round are the other labels."""
    found: list[dict[str, tuple[str, str, float]]] = []
    for order in (sides, sides[::-1]):
        with TemporaryDirectory() as folder:
            for side in order:
                (Path(folder) / side).mkdir()
            for name, *there in names:
                for side, is_there in zip(order, there, strict=True):
                    if is_there:
                        (Path(folder) / side / f"{name}.png").touch()
                        (Path(folder) / side / f"{name}.txt").write_text(f"of {name}")
            try:
                pairs = read_pairs(folder)
            except FifaError:
                found.append({})
                continue
        rows = {name for name, *there in names if any(there)}
        assert pairs.origin.rows == len(rows) == len(pairs) + len(pairs.rejected)
        table = pairs.table.to_pylist()
        assert all(row[f"image_{int(row['label'] == 0)}"].startswith(sides[0]) for row in table)
        found.append({row["prompt"]: row["row"] for row in table})
    assert found[0].keys() == found[1].keys()
