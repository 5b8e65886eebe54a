"""Labels of every scale: read by name, or refused for the whole file; never a part of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from commands import fifa
from fifa.data import read_pairs
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.training.pairs import read_training_pairs

IMAGES = "prompt=prompt,image_0=image_a,image_1=image_b"


def read(path: Path, **label: str) -> Pairs:
    names = dict(part.split("=") for part in IMAGES.split(","))
    return read_pairs(path, columns=names | label)


def table(path: Path, **columns: list[object]) -> Path:
    n = len(next(iter(columns.values())))
    names = {
        "prompt": [f"p{i}" for i in range(n)],
        "image_a": [f"a{i}.png" for i in range(n)],
        "image_b": [f"b{i}.png" for i in range(n)],
    }
    rows = [dict(zip(names | columns, row)) for row in zip(*(names | columns).values())]  # noqa: B905
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def cells(path: Path, **columns: list[object]) -> Path:
    n = len(next(iter(columns.values())))
    names = {"caption": [f"p{i}" for i in range(n)]}
    names |= {f"jpg_{k}": [b"%d-%d" % (i, k) for i in range(n)] for k in (0, 1)}
    pq.write_table(pa.table(names | columns), path)
    return path


OTHER: list[tuple[list[object], str, list[float]]] = [
    ([1, -1, 0, -1], "label:1/-1/0", [1, 0, 0.5, 0]),
    ([1, 2, 1, 2], "label:1/2", [1, 0, 1, 0]),
    (["1", "2", "1", "2"], "label:1/2", [1, 0, 1, 0]),
    (["A", "B", "a", "tie"], "label:A/B/tie", [1, 0, 1, 0.5]),
    (["left", "right", "tie", "left"], "label:left/right/tie", [1, 0, 0.5, 1]),
    (
        ["model_a", "model_b", "tie", "tie (bothbad)"],
        "label:model_a/model_b/tie/tie (bothbad)",
        [1, 0, 0.5, 0.5],
    ),
    (["image_1", "image_2", "both_good"], "label:image_1/image_2/both_good", [1, 0, 0.5]),
]


@pytest.mark.parametrize(("seen", "spec", "expected"), OTHER)
def test_another_scale_stops_the_file_and_is_read_by_its_names(
    tmp_path: Path, seen: list[object], spec: str, expected: list[float]
) -> None:
    path = table(tmp_path / "a.jsonl", label=seen)
    with pytest.raises(FifaError, match="not on a scale from 0 to 1; seen: ") as error:
        read(path)
    assert f"{str(seen[0]).lower()} (" in str(error.value)
    assert "label=COLUMN:FIRST/SECOND/TIE" in str(error.value)
    assert read(path, label=spec).table["label"].to_pylist() == expected


def test_a_value_without_a_name_is_one_row_or_the_file(tmp_path: Path) -> None:
    path = table(tmp_path / "a.jsonl", winner=["A", "B", "A", "C", None])
    pairs = read(path, label="winner:A/B")
    assert pairs.table["label"].to_pylist() == [1, 0, 1]
    assert pairs.rejected["reason"].to_pylist() == [
        "unknown winner 'C'",
        "no label",
    ]
    with pytest.raises(FifaError, match=r"seen: a \(2\), b \(1\), c \(1\)"):
        read(path, label="winner:A/X")


def test_counts_scores_and_winners_that_come_first(tmp_path: Path) -> None:
    path = table(tmp_path / "a.jsonl", va=[1, 0, 3], vb=[25, 0, 1], ra=[0.2, 7, 1], rb=[0.3, 7, -2])
    with pytest.raises(FifaError, match=r"seen: 25 \(1\)|seen: .*25"):
        read(path, label="vb")
    votes = read(path, label="va/(va+vb)")
    assert votes.table["label"].to_pylist() == pytest.approx([1 / 26, 0.75])
    assert votes.table["votes"].to_pylist() == [26, 4]
    assert len(votes.rejected) == 1
    assert read(path, label="ra>rb").table["label"].to_pylist() == [0, 0.5, 1]
    for row in read(path, label=":first").table.to_pylist():
        assert row["label"] == float(row["image_0"].startswith("a"))


def test_rapidata_counts(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{i}", "image1": f"{i}a", "image2": f"{i}b", "votes_image1": a}
        | {"votes_image2": b}
        for i, (a, b) in enumerate([(20, 6), (1, 25), (0, 26), (13, 13)])
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pairs = read_pairs(tmp_path)
    assert pairs.origin.format == "rapidata"
    assert pairs.table["label"].to_pylist() == pytest.approx([20 / 26, 1 / 26, 0, 0.5])
    assert pairs.table["votes"].to_pylist() == [26] * 4


@pytest.mark.parametrize("reader", [read_pairs, read_training_pairs])
@pytest.mark.parametrize(
    ("columns", "seen"),
    [
        ({"label_0": [1.0, -1.0, 0.0, -1.0]}, r"-1 \(2\), 1 \(1\), 0 \(1\)"),
        ({"label_0": [1.0, 2.0, 2.0]}, r"2 \(2\)"),
        ({"label_0": [0.21, 0.3], "label_1": [0.20, 0.4]}, "0.21 and 0.2"),
        ({"label_0": [2.0, 0.5], "label_1": [-1.0, 0.5]}, r"2 \(1\)"),
        ({"label_0": [0.5, 1.0], "label_1": [0.5, 7.0]}, r"7 \(1\)"),
    ],
)
def test_read_and_train_refuse_the_same_labels(tmp_path, reader, columns, seen) -> None:  # type: ignore[no-untyped-def]
    path = cells(tmp_path / "a.parquet", **columns)
    with pytest.raises(FifaError, match=f"not on a scale from 0 to 1; seen: .*{seen}") as error:
        reader(path)
    assert "label=A>B" in str(error.value)


def test_read_and_train_drop_the_same_rows(tmp_path: Path) -> None:
    columns = {"label_0": [1.0, 1.0, 0.0, None, 9.0], "label_1": [0.0, 1.0, 1.0, 0.0, 9.0]}
    path = cells(tmp_path / "a.parquet", **columns, has_label=[True, True, True, True, False])
    assert read_pairs(path).table["label"].to_pylist() == [1, 0]
    pairs = read_training_pairs(path)
    assert pairs.caption == ["p0", "p2"]
    assert pairs.dropped == {"labels_disagree": 1, "no_label": 2}


def test_hpdv3_ties_shares_and_a_confidence_that_is_text(tmp_path: Path) -> None:
    rows = [
        {"choice_dist": "[12, 7]", "confidence": "0.98", "tie_case": False},
        {"choice_dist": [12, 7], "confidence": 0.5, "tie_case": None},
        {"choice_dist": [5, 5], "confidence": None},
        {"choice_dist": None, "tie_case": True},
        {"choice_dist": None, "tie_case": False},
    ]
    rows = [
        row | {"prompt": f"p{i}", "path1": f"{i}a", "path2": f"{i}b"} for i, row in enumerate(rows)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pairs = read_pairs(tmp_path)
    found = [
        row["label"] if not row["swapped"] else 1 - row["label"] for row in pairs.table.to_pylist()
    ]
    assert found == pytest.approx([12 / 19, 12 / 19, 0.5, 0.5, 1.0])
    assert pairs.table["votes"].to_pylist() == [19, 19, 10, 1, 1]
    assert pairs.table["confidence"].to_pylist()[:2] == [0.98, 0.5]


def test_answers_that_the_tool_does_not_count(tmp_path: Path) -> None:
    status = ["submitted", "discarded", "Draft", None]
    pairs = read(table(tmp_path / "a.jsonl", label=[1, 0, 0, 1], status=status))
    assert pairs.table["label"].to_pylist() == [1, 1]
    assert pairs.rejected["reason"][0].as_py() == (
        "the source does not count it: status is discarded"
    )
    rows = [
        {
            "images": {"image_1": f"{i}/1.jpg", "image_2": f"{i}/2.jpg", "prompt": f"p{i}"},
            "preference.responses": answers,
            "preference.responses.status": states,
        }
        for i, (answers, states) in enumerate(
            [
                (["image_1", "image_2"], ["submitted", "discarded"]),
                (["image_1", "image_2"], ["draft", "submitted"]),
                (["image_1"], ["draft"]),
            ]
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    pairs = read_pairs(tmp_path / "b.parquet")
    assert pairs.table["label"].to_pylist() == [1, 0]
    assert pairs.table["votes"].to_pylist() == [1, 1]
    assert pairs.rejected["reason"].to_pylist() == ["no submitted responses"]


@pytest.mark.parametrize(
    "odd",
    [
        *("63%", "0,5", "1,000", "2/3", "1_0", "0x1", "1st", [0, 1]),
        *("tie", "Both bad", "both_good", "draw", "neither", "equal"),
    ],
)
@pytest.mark.parametrize("name", ["label", "va/(va+vb)", "va>vb"])
def test_one_value_in_another_notation_refuses_the_file(tmp_path: Path, odd: object, name) -> None:
    seen = [1, 0, 1, odd] if isinstance(odd, str) else [odd, 1]
    path = table(tmp_path / "a.jsonl", label=seen, va=seen, vb=[1] * len(seen))
    with pytest.raises(FifaError, match=r"seen: .*" + re.escape(str(odd).lower())):
        read(path, label=name)
    rows = [
        {"caption": "p", "jpg_0": f"{i}a", "jpg_1": f"{i}b", "label_0": value}
        for i, value in enumerate(seen)
    ]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    with pytest.raises(FifaError, match="label_0 is not on a scale"):
        read_pairs(tmp_path / "b.json")


def test_no_value_and_no_number_are_rejected_one_by_one(tmp_path: Path) -> None:
    none = [None, "", "NaN", "n/a", " null ", float("nan"), float("inf"), "-inf", 10**400, "maybe"]
    good = [1, " 0 ", "True", "1e-1", False, "+1", -0.0, 1 + 1e-9, "0.50", 1, 1]
    pairs = read(table(tmp_path / "a.jsonl", label=[*none, *good]), label="label")
    assert len(pairs.rejected) == len(none)
    expected = [1, 0, 1, 0.1, 0, 1, 0, 1, 0.5, 1, 1]
    assert pairs.table["label"].to_pylist() == pytest.approx(expected)


def test_one_bad_row_at_the_end_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = '{"prompt": "p", "image_0": "a", "image_1": "b", "label": %s}\n'
    for name in "abcdefghijkl":
        (tmp_path / f"{name}.jsonl").write_text(row % 1 * 1000 + row % (7 if name == "l" else 0))
    with pytest.raises(FifaError, match=r"seen: 1 \(1,000\), 7 \(1\)"):
        read_pairs(tmp_path)
    assert fifa("read", tmp_path, "--out", "run").returncode != 0
    assert not list(tmp_path.glob("run/*.parquet"))


@pytest.mark.parametrize(
    ("column", "gone"),
    [
        *[("status", "Rejected"), ("response_status", "TIMED-OUT"), ("is_valid", False)],
        *[("is_skipped", True), ("annotation_status", "draft"), ("was_canceled", "true")],
    ],
)
def test_a_column_that_says_what_does_not_count(tmp_path: Path, column: str, gone: object) -> None:
    kept = {"is_valid": True, "is_skipped": False, "was_canceled": "false"}.get(column, "approved")
    path = table(tmp_path / "a.jsonl", label=[1, 0], **{column: [kept, gone]})
    pairs = read(path, label="label")
    assert pairs.table["label"].to_pylist() == [1]
    assert f"the source does not count it: {column} is" in pairs.rejected["reason"][0].as_py()
