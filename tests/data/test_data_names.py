"""Generators, annotators, categories and labels by aspect, from any source into the table."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fifa import read_pairs
from fifa.data.explain import explained
from fifa.data.names import NAMES, labels_by_aspect
from fifa.data.table import PAIRS, load_pairs, save_pairs
from fifa.errors import FifaError

RAPIDATA = {
    "prompt": ["a", "b", "a"],
    "image1": ["1.png", "2.png", "3.png"],
    "image2": ["3.png", "4.png", "1.png"],
    "model1": ["sd", "flux", "flux"],
    "model2": ["flux", None, "sd"],
    "user_id": [3, 4, 5],
    "category": ["x", " ", "y"],
    "weighted_results_image1_preference": [2.0, 1.0, 1.0],
    "weighted_results_image2_preference": [1.0, 3.0, 0.0],
    "weighted_results_image1_alignment": [1.0, 0.0, 0.0],
    "weighted_results_image2_alignment": [2.0, 0.0, 2.0],
}


@pytest.fixture
def rapidata(tmp_path):
    pq.write_table(pa.table(RAPIDATA), tmp_path / "rapidata.parquet")
    return tmp_path / "rapidata.parquet"


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def rows_of(pairs, *names):
    return list(zip(*(pairs.table[name].to_pylist() for name in names), strict=True))


def test_names_and_labels_by_aspect_stand_after_the_columns_of_every_source(rapidata, tmp_path):
    pairs = read_pairs(rapidata)
    beside = [*NAMES, "label_alignment", "label_preference"]
    assert pairs.table.column_names[: len(PAIRS) + 6] == [*PAIRS.names, *beside]
    assert not set(pairs.origin.score_columns) & set(beside)
    assert rows_of(pairs, "model_0", "model_1", "category") == [
        ("sd", "flux", "x"),
        ("flux", None, None),
    ]
    for name in NAMES:
        assert pairs.table.schema.field(name).type == pa.dictionary(pa.int32(), pa.string())
    save_pairs(pairs, tmp_path)
    again = load_pairs(tmp_path)
    assert again.table.equals(pairs.table)
    assert again.origin == pairs.origin


def test_a_merged_pair_has_all_annotators_and_the_mean_of_each_aspect(rapidata):
    pairs = read_pairs(rapidata)
    # row 2 is row 0 with the sides exchanged: 2/3 and 1 - 1, 1/3 and 1 - 0
    assert rows_of(pairs, "annotator", "votes") == [("3, 5", 2), ("4", 1)]
    assert pairs.table["label"].to_pylist() == pytest.approx([1 / 3, 0.25])
    assert pairs.table["label_preference"].to_pylist() == pytest.approx([1 / 3, 0.25])
    assert pairs.table["label_alignment"].to_pylist() == [pytest.approx(2 / 3), None]


def test_an_aspect_gives_the_labels_and_its_rows_without_one_are_rejected(rapidata):
    pairs = read_pairs(rapidata, label_aspect="alignment")
    assert pairs.table["label"].to_pylist() == pytest.approx([2 / 3])
    assert pairs.rejected["reason"].to_pylist() == ["nobody voted for either image"]
    assert pairs.origin.label_aspect == "alignment"
    plain = read_pairs(rapidata)
    assert plain.table["pair_id"][0] == pairs.table["pair_id"][0]
    assert plain.origin.fingerprint != pairs.origin.fingerprint
    with pytest.raises(FifaError, match="no labels by the aspect 'style'") as refused:
        read_pairs(rapidata, label_aspect="style")
    assert refused.value.do == "take one of alignment, preference"


def test_a_source_without_names_has_no_column_more(tmp_path):
    rows = [{"prompt": "p", "chosen": "a.png", "rejected": "b.png", "label_score": 3.5}]
    pairs = read_pairs(write(tmp_path / "rows.jsonl", rows))
    assert pairs.table.column_names == [*PAIRS.names, "label_score"]
    assert labels_by_aspect(pairs.table) == []
    with pytest.raises(FifaError, match="no labels by the aspect") as refused:
        read_pairs(tmp_path / "rows.jsonl", label_aspect="alignment")
    assert "the source has none" in refused.value.do


def test_names_change_places_with_the_sides(tmp_path):
    rows = [
        {"prompt": f"p{i}", "chosen": f"good{i}.png", "rejected": f"bad{i}.png"}
        | {"chosen_model": "best", "rejected_model": "worst", "category": ["x", "y"]}
        | {"model_0": "of no side", "model_1": "of no side", "share": 0.75}
        for i in range(40)
    ]
    columns = {"label_taste": "share"}
    pairs = read_pairs(write(tmp_path / "rows.jsonl", rows), columns=columns)
    found = rows_of(pairs, "label", "image_0", "model_0", "model_1", "label_taste", "category")
    for label, image, first, second, taste, category in found:
        assert image.startswith("good" if label else "bad")
        assert (first, second) == (("best", "worst") if label else ("worst", "best"))
        assert taste == (0.75 if label else 0.25)
        assert category == "x, y"
    assert {row[0] for row in found} == {0.0, 1.0}


def test_exchanged_columns_of_the_source_exchange_models_and_labels_and_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    names = ("image1", "image2", "model1", "model2")
    table = pa.table(
        {"prompt": [f"p{i}" for i in range(50)]}
        | {f"image{side}": [f"{side}-{i}.png" for i in range(50)] for side in (1, 2)}
        | {f"model{side}": rng.choice(["a", "b", "c"], 50) for side in (1, 2)}
        | {
            f"weighted_results_image{side}_{aspect}": rng.uniform(0.1, 1, 50)
            for side in (1, 2)
            for aspect in ("preference", "alignment")
        }
    )
    other = table.rename_columns([
        name.translate(str.maketrans("12", "21"))
        if name in names or name.startswith("weighted")
        else name
        for name in table.column_names
    ])  # fmt: skip
    both = []
    for name, one in (("one", table), ("other", other)):
        pq.write_table(one, tmp_path / f"{name}.parquet")
        both.append(read_pairs(tmp_path / f"{name}.parquet").table)
    here, there = both
    assert here["pair_id"].equals(there["pair_id"])
    for name, exchanged in (("model_0", "model_1"), ("model_1", "model_0"), ("image_0", "image_1")):
        assert here[name].to_pylist() == there[exchanged].to_pylist()
    for name in ("label", "label_alignment", "label_preference"):
        assert (here[name].to_numpy() + there[name].to_numpy()).tolist() == pytest.approx([1] * 50)


def test_a_users_own_names_are_read_and_a_missing_one_is_told(tmp_path):
    rows = [{"prompt": "p", "image_0": "a.png", "image_1": "b.png", "label": 1, "l": "x", "r": "y"}]
    rows[0] |= {"who": 7.0, "up": 3, "down": 1}
    source = write(tmp_path / "rows.jsonl", rows)
    columns = {"model_0": "l", "model_1": "r", "annotator": "who", "label_taste": "up/(up+down)"}
    pairs = read_pairs(source, columns=columns)
    assert rows_of(pairs, *NAMES[:3], "label_taste") == [("x", "y", "7", 0.75)]
    assert read_pairs(source, columns=columns, label_aspect="taste").table["votes"][0].as_py() == 4
    with pytest.raises(FifaError, match="no column 'where'"):
        read_pairs(source, columns={"category": "where"})
    with pytest.raises(FifaError, match="a generator of one image"):
        read_pairs(source, columns={"model_0": "l"})


def test_files_with_and_without_names_are_one_table(tmp_path):
    plain = {"prompt": "p", "image_0": "a.png", "image_1": "b.png", "label": 1}
    write(tmp_path / "1.jsonl", [plain])
    write(tmp_path / "2.jsonl", [plain | {"prompt": "q", "model_0": "x", "model_1": "y"}])
    write(tmp_path / "3.jsonl", [plain | {"prompt": "r", "model_0": "y", "model_1": "y"}])
    pairs = read_pairs(tmp_path)
    assert rows_of(pairs, "model_0", "model_1") == [(None, None), ("x", "y"), ("y", "y")]


def test_ratings_of_images_are_labels_by_aspect(tmp_path):
    rows = [
        {"prompt_id": "1", "prompt": "p", "image_path": f"{name}.png", "rank": rank}
        | {"overall_rating": overall, "fidelity_rating": fidelity}
        for name, rank, overall, fidelity in (("a", 1, 6, 2), ("b", 2, 4, 2), ("c", 3, 1, 5))
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    pairs = read_pairs(source)
    for zero, one, overall, fidelity in rows_of(
        pairs, "image_0", "image_1", "label_overall", "label_fidelity"
    ):
        by_name = {row["image_path"]: row for row in rows}
        for name, label in (("overall_rating", overall), ("fidelity_rating", fidelity)):
            difference = by_name[zero][name] - by_name[one][name]
            assert label == 0.5 + 0.5 * np.sign(difference)
    by_fidelity = read_pairs(source, label_aspect="fidelity").table
    assert by_fidelity["label"].to_pylist() == pairs.table["label_fidelity"].to_pylist()


IMAGES = [
    {"prompt": "p", "image": f"{name}.png", "mos": score, "gen": f"of {name}", "who": who}
    | {"taste": taste, "category": "x"}
    for name, score, who, taste in (("a", 5, 1, 2), ("b", 3, 2, 2), ("c", 1, 1, 9))
]


def test_names_of_images_go_with_them_into_their_pairs(tmp_path):
    source = write(tmp_path / "rows.jsonl", IMAGES)
    columns = {"image": "image", "score": "mos", "model": "gen", "annotator": "who"}
    columns |= {"label_taste": "taste"}
    pairs = read_pairs(source, columns=columns)
    assert len(pairs) == 3
    by_image = {row["image"]: row for row in IMAGES}
    for row in pairs.table.to_pylist():
        zero, one = (by_image[row[f"image_{side}"]] for side in (0, 1))
        assert (row["model_0"], row["model_1"]) == (zero["gen"], one["gen"])
        assert set(row["annotator"].split(", ")) == {str(zero["who"]), str(one["who"])}
        assert row["category"] == "x"
        assert row["label_taste"] == 0.5 + 0.5 * np.sign(zero["taste"] - one["taste"])
    by_taste = read_pairs(source, columns=columns, label_aspect="taste").table
    assert by_taste["label"].to_pylist() == pairs.table["label_taste"].to_pylist()
    assert by_taste["label_plain"].to_pylist() == pairs.table["label"].to_pylist()
    with pytest.raises(FifaError, match="no labels by the aspect 'style'") as refused:
        read_pairs(source, columns=columns, label_aspect="style")
    assert refused.value.do == "take one of taste"


ANSWERS = {
    f"response_{side}": {"model_name": f"of {side}", "response_content": [["image", f"{side}.png"]]}
    for side in "ab"
}
RANKED = {"prompt": "p", "image_path": ["a.png", "b.png"], "category": "x"}
NOTES = [{"rank": [1, 2], "user_hash": who} for who in ("u", "v")]


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (RANKED | {"raw_annotations": NOTES}, {"annotator": "u, v", "category": "x"}),
        (
            {"prompt": "p", "generations": ["a", "b"], "ranking": [1, 2], "user_id": 7},
            {"annotator": "7"},
        ),
        (
            {"prompt": "p", "file_path": ["a", "b"], "human_preference": [1, 0]}
            | {"model_1": "of a", "model_2": "of b"},
            {"model_0": "of a", "model_1": "of b"},
        ),
        (
            {"prompt_content": [["text", "p"]], "human_annotations": [5], "chosen": "A"} | ANSWERS,
            {"model_0": "of a", "model_1": "of b"},
        ),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rankings_and_nested_pairs_keep_the_names_they_have(tmp_path, row, names, kind):
    other = json.loads(json.dumps(row).replace('"p"', '"q"'))
    if kind == "parquet" and "prompt_content" not in row:
        pq.write_table(pa.Table.from_pylist([row, other]), tmp_path / "rows.parquet")
    else:
        write(tmp_path / "rows.jsonl", [row, other])
    pairs = read_pairs(tmp_path)
    assert [name for name in pairs.table.column_names if name in NAMES] == list(names)
    beside = ", ".join(f"{name} {value}" for name, value in names.items())
    assert explained(pairs).count(f"\n  beside  {beside}") == 2
    assert rows_of(pairs, *names) == [tuple(names.values())] * 2


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (RANKED | {"rank": [1, 2]}, "model_0"),
        (RANKED | {"rank": [1, 2]}, "label_taste"),
        ({"prompt_id": 1, "prompt": "p", "image": "a", "rank": 1}, "model_1"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "model"),
    ],
)
def test_a_name_that_such_a_row_cannot_have_is_refused(tmp_path, row, name):
    source = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(FifaError, match=f"{name} in --columns, where a row is a"):
        read_pairs(source, columns={name: "prompt"})


def test_the_plain_label_stays_beside_the_aspect_that_replaces_it(tmp_path):
    rows = [
        {"prompt": f"p{i}", "image_0": "a", "image_1": "b", "label": i % 2, "taste": 1 - i % 2}
        for i in range(4)
    ]
    source, columns = write(tmp_path / "rows.jsonl", rows), {"label_taste": "taste"}
    pairs = read_pairs(source, columns=columns, label_aspect="taste")
    assert pairs.table["label"].to_pylist() == [1, 0, 1, 0]
    assert pairs.table["label_plain"].to_pylist() == [0, 1, 0, 1]
    rewards = write(tmp_path / "rows.jsonl", [row | {"label": 7.5} for row in rows])
    assert read_pairs(rewards, columns=columns, label_aspect="taste").table["label"][0].as_py() == 1
