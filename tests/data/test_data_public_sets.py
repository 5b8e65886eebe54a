"""Every row of the table in docs/data-sets.md is read, and its sides mean what the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from commands import fifa
from fifa.config import Read
from fifa.data import read_pairs
from fifa.data.explain import explained
from fifa.data.read import FORMATS, read_source
from fifa.data.table import Pairs, load_pairs, save_pairs
from fifa.errors import FifaError

Row = dict[str, Any]


class Example(NamedTuple):
    """A table of a public set, as the set's page or its code documents it.

    ``labels`` are those of the first image of every two; each pair has so many ``votes``.
    """

    name: str
    format: str
    rows: list[Row]
    labels: dict[tuple[str, str], float]
    votes: int = 1


P = {"prompt": "a red fox"}
C = {"caption": "a red fox"}
UIDS = {"image_0_uid": "u", "image_1_uid": "v"}
MODELS = {"model1": "flux", "model2": "sd3"}
JPG = {"jpg_0": "a.jpg", "jpg_1": "b.jpg"}
SEEN = {"model_a": "flux", "model_b": "sd3"}
RATED = [("a", [5, 4, 5]), ("b", [1, 2, 1]), ("c", [4, 5, 4])]
ANSWER = {"response_a": "a.jpg", "response_b": "b.jpg"}
NESTED = {
    name: {"model_name": "m", "response_content": [["image", path]]}
    for name, path in ANSWER.items()
}

EXAMPLES = [
    Example("Pick-a-Pic v2", "pickapic", [C | UIDS | {"label_0": 1.0, "label_1": 0.0,
        "image_0_url": "https://a.b/u", "image_1_url": "https://a.b/v", "has_label": True,
        "ranking_id": 1, "user_id": 3, "model_0": "flux", "model_1": "sd3"}], {("u", "v"): 1.0}),
    Example("diffusers", "diffusers", [C | JPG | {"label_0": 0}], {("a.jpg", "b.jpg"): 0.0}),
    Example("HPDv2 train", "hpdv2", [P | {"file_path": ["a.jpg", "b.jpg"],
        "human_preference": [0, 1]}], {("a.jpg", "b.jpg"): 0.0}),
    Example("HPDv2 test", "hpdv2", [P | {"image_path": ["a.jpg", "b.jpg"], "rank": [1, 2],
        "raw_annotations": [{"rank": r, "user_hash": "x"} for r in ([1, 2], [2, 1], [1, 2])]}],
        {("a.jpg", "b.jpg"): 2 / 3}, votes=3),
    Example("HPDv2 votes", "hpdv2", [P | {"user_id": u, "image_left_id": "a", "image_right_id": "b",
        "pref": p, "ranking_id": "r"} for u, p in enumerate([1, -1, -1])],
        {("a", "b"): 1 / 3}, votes=3),
    Example("HPDv3", "hpdv3", [P | MODELS | {"path1": "a.jpg", "path2": "b.jpg",
        "choice_dist": "[8, 2]", "confidence": "0.98"}], {("a.jpg", "b.jpg"): 0.8}, votes=10),
    Example("ImageReward", "imagereward", [P | {"id": "0-0", "generations": ["a", "b"],
        "ranking": [2, 1]}], {("a", "b"): 0.0}),
    Example("ImageRewardDB", "imagereward", [P | {"prompt_id": "7", "image_path": name,
        "rank": rank, "overall_rating": 5 - rank} for name, rank in (("a", 2), ("b", 1))],
        {("a", "b"): 0.0}),
    Example("open-image-preferences binarized", "open-image-preferences", [P | {"chosen": "a.jpg",
        "rejected": "b.jpg", "chosen_model": "dev", "rejected_model": "sd", "category": "Anime"}],
        {("a.jpg", "b.jpg"): 1.0}),
    Example("open-image-preferences results", "open-image-preferences", [{"images": P | {
        "image_1": "a.jpg", "image_2": "b.jpg"}, "preference": {"responses": ["image_2"]}}],
        {("a.jpg", "b.jpg"): 0.0}),
    Example("Rapidata weights", "rapidata", [P | MODELS | {"image1": "a.jpg", "image2": "b.jpg",
        "weighted_results_image1_preference": 0.9, "weighted_results_image2_preference": 0.3,
        "detailed_results_preference": "[]"}], {("a.jpg", "b.jpg"): 0.75}),
    Example("Rapidata votes", "rapidata", [P | MODELS | {"image1": "a.jpg", "image2": "b.jpg",
        "votes_image1": 20, "votes_image2": 5, "detailed_results": "[]"}],
        {("a.jpg", "b.jpg"): 0.8}, votes=25),
    Example("Rapidata aggregated", "rapidata", [P | {"image1": "x/a.jpg", "image2": "x/b.jpg",
        "aggregated_results": '{"b.jpg": 9, "a.jpg": 1}'}],
        {("x/a.jpg", "x/b.jpg"): 0.1}, votes=10),
    Example("GenAI-Arena", "genai-arena", [P | {"left_model": "m", "left_image": "a.jpg",
        "right_model": "n", "right_image": "b.jpg", "vote_type": "rightvote"}],
        {("a.jpg", "b.jpg"): 0.0}),
    Example("MJ-Bench", "mj-bench", [C | {"image0": "a.jpg", "image1": "b.jpg", "label": 1}],
        {("a.jpg", "b.jpg"): 0.0}),
    Example("MMRB2", "mmrb2", [NESTED | {"id": "1", "chosen": "B", "human_annotations": [2, 1, 4],
        "prompt_source": "wise", "prompt_content": [["text", "a red fox"]]}],
        {("a.jpg", "b.jpg"): 1 / 3}, votes=3),
    Example("EvalMuse", "evalmuse", [P | {"prompt_id": "1", "type": "real", "img_path": name,
        "total_score": scores, "element_score": {}} for name, scores in RATED],
        {("a", "b"): 1.0, ("b", "c"): 0.0}),
    Example("LAION aesthetic", "laion", [{"TEXT": "a red fox", "URL": f"https://h.org/{name}",
        "aesthetic": score, "hash": 1} for name, score in (("a", 7.5), ("b", 8))],
        {("https://h.org/a", "https://h.org/b"): 0.0}),
    Example("arena", "winner", [P | SEEN | {"image_a": f"{i}a.jpg", "image_b": f"{i}b.jpg",
        "winner": vote} for i, vote in enumerate(["model_a", "model_b", "tie", "tie (bothbad)"])],
        {(f"{i}a.jpg", f"{i}b.jpg"): label for i, label in enumerate([1.0, 0.0, 0.5, 0.5])}),
    Example("left and right", "winner", [P | {"left_image": f"{i}a", "right_image": f"{i}b",
        "preference": word} for i, word in enumerate(["left", "Right", "both bad"])],
        {("0a", "0b"): 1.0, ("1a", "1b"): 0.0, ("2a", "2b"): 0.5}),
    Example("image_1 and image_2", "winner", [P | {"image_1": "a", "image_2": "b",
        "winner": "image_2"}], {("a", "b"): 0.0}),
    Example("TRL", "chosen-rejected", [P | {"chosen": "a.jpg", "rejected": "b.jpg"}],
        {("a.jpg", "b.jpg"): 1.0}),
    Example("TRL's images", "trl", [C | {"images": ["a.jpg", "b.jpg"], "label_0": 0.0,
        "prompt": [{"role": "user", "content": "?"}], "chosen": [{"role": "assistant",
        "content": "Image 2"}], "rejected": [{"role": "assistant", "content": "Image 1"}]}],
        {("a.jpg", "b.jpg"): 0.0}),
    Example("VeRL-Omni", "win-lose", [P | {"img_win": "a.jpg", "img_lose": "b.jpg",
        "win_score": 3.5, "lose_score": -2.0}], {("a.jpg", "b.jpg"): 1.0}),
    Example("KTO", "kto", [P | {"image": name, "label": good}
        for name, good in (("a", True), ("b", False), ("c", False))],
        {("a", "b"): 1.0, ("a", "c"): 1.0}),
    Example("one's own", "columns", [P | {"image_0": "a", "image_1": "b", "label": 0.25}],
        {("a", "b"): 0.25}),
]  # fmt: skip
PAGE = Path(__file__).parents[2] / "docs" / "data-sets.md"


def table(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labels(pairs: Pairs) -> dict[tuple[str, str], float]:
    """Of every two images the label of the first, in both orders."""
    found = {}
    for row in pairs.table.to_pylist():
        found[row["image_0"], row["image_1"]] = row["label"]
        found[row["image_1"], row["image_0"]] = 1 - row["label"]
    return found


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_a_public_set_is_read_by_its_columns(example: Example, tmp_path: Path) -> None:
    pairs = read_pairs(table(tmp_path / "a.jsonl", example.rows))
    assert pairs.origin.format == example.format
    assert len(pairs) == len(example.labels)
    assert not len(pairs.rejected)
    found = labels(pairs)
    assert {key: found[key] for key in example.labels} == pytest.approx(example.labels)
    assert set(pairs.table["votes"].to_pylist()) == {example.votes}
    assert set(pairs.table["prompt"].to_pylist()) == {"a red fox"}


def test_the_page_has_every_format_and_every_row_of_it_a_test() -> None:
    page = PAGE.read_text("utf-8").partition("\n| set |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (.+?) \| `([a-z0-9-]+)` \| .* \|$", page, re.M)
    named = [(re.sub(r"\[(.+?)\]\(\S+\)", r"\1", name), form) for name, form in rows]
    assert named == [(example.name, example.format) for example in EXAMPLES]
    assert {form for _, form in named} == set(FORMATS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_what_is_understood_is_explained(example: Example, tmp_path: Path) -> None:
    text = explained(read_pairs(table(tmp_path / "a.jsonl", example.rows)))
    assert text.startswith(f"format    {example.format}, by ")
    assert text.count(" wins") + text.count("a tie") == min(3, len(example.labels))
    names = set().union(*example.rows)
    told = re.findall(r"^(?:column|kept|ignored) +(.*)$", text, re.M)
    for name in names:  # every column is used, kept or ignored; a rating is kept a side
        assert any(name in line for line in told), name


def test_explain_needs_no_run_and_says_what_was_left(tmp_path: Path) -> None:
    rows = [
        P | {"image_a": "a", "image_b": "b", "winner": "A", "clip": 0.5, "note": "x"},
        P | {"image_a": "b", "image_b": "a", "winner": "tie", "clip": 0.5},
        P | {"image_a": "c", "image_b": None, "winner": "B", "clip": 0.5},
    ]
    told = fifa("read", table(tmp_path / "a.jsonl", rows), "--explain").stdout
    assert "format    winner, by prompt, winner, image_a, image_b\n" in told
    assert "kept      clip\nignored   note\nimages    not with the source: there is no " in told
    assert "  label   image_0 wins with 75%, votes: 2\n" in told
    assert "pairs     1 of 3 rows, 1 merged\nrejected  1: image 1 is missing\n" in told
    assert list(tmp_path.iterdir()) == [tmp_path / "a.jsonl"]
    twice = ("--columns", "label=a,label=b", "--explain")
    assert "each name once" in fifa("read", tmp_path / "a.jsonl", *twice).stderr
    result = fifa("read", tmp_path / "a.jsonl")
    assert result.returncode == 1
    assert "no --out given" in result.stderr


SEEN = [
    (["A", "B", "C"], "text", "label=winner:FIRST/SECOND/TIE"),
    (["left", "right", "tie"], "words", "label=winner:left/right/tie if 'left' means image_0"),
    (["image_1", "image_2"], "words", "label=winner:image_1/image_2 if"),
    ([1, 2, 1], "the number of an image", "label=winner:1/2 if 1"),
    ([1, 2, 0], "the number of an image", "label=winner:1/2/0 if 0 is a tie and 1"),
    ([1, -1, 0], r"\+1 and -1", "label=winner:1/-1/0 if 1"),
    ([12, 0, 3], "counts of votes", "label=winner/(winner+OTHER)"),
    ([0.3, -2.5, 7.1], "a score or a reward", "label=winner>OTHER"),
]


@pytest.mark.parametrize(("values", "looks", "option"), SEEN)
def test_another_notation_is_refused_with_the_option_that_reads_it(
    tmp_path: Path, values: list[object], looks: str, option: str
) -> None:
    rows = [
        P | {"image_a": f"{i}a", "image_b": f"{i}b", "winner": value}
        for i, value in enumerate(values)
    ]
    path = table(tmp_path / "a.jsonl", rows)
    names = {"prompt": "prompt", "image_0": "image_a", "image_1": "image_b"}
    with pytest.raises(FifaError, match=looks) as error:
        read_pairs(path)  # by its columns
    assert f"--columns prompt=prompt,image_0=image_a,image_1=image_b,{option}" in str(error.value)
    with pytest.raises(FifaError, match=looks) as error:
        read_pairs(path, columns=names | {"label": "winner"})
    assert option in str(error.value)


def test_a_table_of_other_names_is_told_the_option_to_copy(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"caption": "x", "img_left": "a", "img_right": "b", "pref_0": n} for n in (1, -1, 0)
    ]
    with pytest.raises(FifaError) as error:
        read_pairs(table(tmp_path / "a.jsonl", rows))
    names = "prompt=caption,image_0=img_left,image_1=img_right,label=pref_0:1/-1/0"
    assert f"it looks like a row a pair: --columns {names} if 1 means image_0" in str(error.value)
    columns = dict(part.split("=") for part in names.split(","))
    pairs = read_pairs(tmp_path / "a.jsonl", columns=columns)
    assert pairs.table["votes"].to_pylist() == [3]
    rows += [rows[0] | {"pref_0": "\ud800"}]  # in words that can be printed
    with pytest.raises(FifaError, match="label=pref_0:FIRST/SECOND/TIE"):
        read_pairs(table(tmp_path / "a.jsonl", rows))
    rows = [{"prompt": "x", "image_1": "a", "image_2": "b", "votes_image_1": 3, "votes_image_2": 1}]
    with pytest.raises(FifaError) as error:
        read_pairs(table(tmp_path / "a.jsonl", rows))
    names = "prompt=prompt,image_0=image_1,image_1=image_2"
    share = "label=votes_image_1/(votes_image_1+votes_image_2)"
    assert f"--columns {names},{share}, or label=votes_image_1>votes_image_2" in str(error.value)


NUMBERS = {"image_0": "a", "image_1": "b", "va": 3, "vb": 1, "win_score": 0.5, "lose_score": 0.2}


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ("votes_0=va,votes_1=vb", (0.75, 4)),
        ("votes_0=vb,votes_1=va", (0.25, 4)),
        ("label=va / (va + vb)", (0.75, 4)),
        ("label=vb/(va+vb)", (0.25, 4)),
        ("label=vb > va", (0.0, 1)),
        ("label=win_score>lose_score", (1.0, 1)),
        ("label=win_score", "seen: 0.5 and 0.2 (1): scores of the two images"),
        ("votes_0=va", "votes_0 in --columns"),
        ("votes_0=va,votes_1=vb,label=va", "label and votes_0 and votes_1 in --columns"),
        ("label=va:3/3", "one value twice in label=va:3/3"),
        ("label=va/(va+vb),promt=image_0", "did you mean one of prompt, image_0"),
        ("image=image_0", "image with nothing in --columns"),
        ("image=image_0,score=va,rank=vb", "image with rank, score in --columns"),
        ("image=image_0,score=va,embedding=vb", "embedding in --columns, where a row is an image"),
    ],
)
def test_counts_and_scores_of_two_columns_are_read_or_told(
    tmp_path: Path, columns: str, label: tuple[float, int] | str
) -> None:
    path = table(tmp_path / "a.jsonl", [P | NUMBERS])
    named = dict(part.split("=", 1) for part in columns.split(","))
    if isinstance(label, str):
        with pytest.raises(FifaError) as error:
            read_pairs(path, columns=named)
        assert label in str(error.value)
    else:
        row = read_pairs(path, columns=named).table.to_pylist()[0]
        assert (row["label"], row["votes"]) == pytest.approx(label)


def test_nought_and_one_are_told_as_an_answer_or_an_index(tmp_path: Path) -> None:
    rows = [P | {"image_a": f"{i}a", "image_b": f"{i}b", "winner": i % 2} for i in range(4)]
    with pytest.raises(FifaError) as error:
        read_pairs(table(tmp_path / "a.jsonl", rows))
    names = {"image_0": "image_a", "image_1": "image_b"}
    for spec, wins in (("winner", 1.0), ("winner:0/1", 0.0)):  # never 1/-1/0: 0 is no tie here
        assert f"label={spec} if " in str(error.value)
        pairs = read_pairs(tmp_path / "a.jsonl", columns=names | {"label": spec})
        assert pairs.table["label"].to_pylist() == [1 - wins, wins, 1 - wins, wins]


def test_which_images_are_compared_is_no_question_where_a_row_is_a_pair(tmp_path: Path) -> None:
    path = table(tmp_path / "a.jsonl", [P | {"chosen": "a", "rejected": "b"}])
    assert len(read_pairs(path, pairs="all")) == 1
    for knobs in ({"pairs": "best-worst"}, {"min_gap": 1.0}):
        with pytest.raises(FifaError, match="here a row is a pair"):
            read_pairs(path, **knobs)  # type: ignore[arg-type]


SCORES = {"a": 4.0, "b": 1.0, "c": 3.5, "d": 1.25}


@pytest.mark.parametrize(
    ("knobs", "made"),
    [
        ({}, {"ab", "ac", "ad", "bc", "bd", "cd"}),
        ({"pairs": "best-worst"}, {"ab"}),
        ({"pairs": "adjacent"}, {"ac", "cd", "bd"}),
        ({"min_gap": 0.5}, {"ab", "ac", "ad", "bc", "cd"}),
        ({"pairs": "adjacent", "min_gap": 0.6}, {"cd"}),
    ],
)
def test_which_images_of_a_prompt_make_a_pair(tmp_path: Path, knobs, made) -> None:  # type: ignore[no-untyped-def]
    rows = [P | {"image": name, "score": score} for name, score in SCORES.items()]
    path = table(tmp_path / "a.jsonl", rows)
    read = Read(source=str(path), columns={"image": "image", "score": "score"}, **knobs)
    pairs = read_source(read)
    assert {"".join(sorted(r["image_0"] + r["image_1"])) for r in pairs.table.to_pylist()} == made
    for row in pairs.table.to_pylist():
        assert row["label"] == (SCORES[row["image_0"]] > SCORES[row["image_1"]])
    assert len(pairs) + sum(pairs.origin.not_made.values()) == 6
    save_pairs(pairs, tmp_path / "run")
    assert load_pairs(tmp_path / "run").origin == pairs.origin


def test_ratings_of_several_people_differ_by_more_than_their_noise(tmp_path: Path) -> None:
    """By hand: s^2 = (2/3 + 2/3 + 2) / 6 = 5/9, and two means have sqrt(2/3 * 5/9) = 0.61."""
    ratings = {"a": [4, 5, 4], "b": [4, 4, 5], "c": [3, 5, 4], "d": [1]}
    rows = [P | {"image": name, "score": json.dumps(own)} for name, own in ratings.items()]
    columns = {"image": "image", "score": "score"}
    pairs = read_pairs(table(tmp_path / "a.jsonl", rows), columns=columns)
    made = {"".join(sorted(r["image_0"] + r["image_1"])) for r in pairs.table.to_pylist()}
    assert made == {"ad", "bd", "cd"}
    assert pairs.origin.not_made == {"the ratings differ by no more than their noise": 3}
    pairs = read_pairs(tmp_path / "a.jsonl", columns=columns, min_gap=0.3)
    assert len(pairs) == 5  # a and b have one mean, c's is a third lower
    with pytest.raises(FifaError, match="take one of all, best-worst, adjacent"):
        read_pairs(tmp_path / "a.jsonl", columns=columns, pairs="some")


def test_a_rating_that_is_no_number_is_its_own_rows_fault(tmp_path: Path) -> None:
    ratings = [[4, 5], [1, None, 2], [float("inf"), 1], ["good", 1], []]
    rows = [P | {"image": f"{i}", "score": own} for i, own in enumerate(ratings)]
    columns = {"image": "image", "score": "score"}
    pairs = read_pairs(table(tmp_path / "a.jsonl", rows), columns=columns)
    assert labels(pairs)["0", "1"] == 1.0
    assert pairs.table["score_0"].to_pylist() in ([4.5], [1.5])
    assert pairs.rejected["row"].to_pylist() == [2, 3, 4]


def test_every_command_that_reads_makes_the_pairs_that_were_asked_for(tmp_path: Path) -> None:
    rows = [P | {"image": name, "score": score} for name, score in SCORES.items()]
    path = table(tmp_path / "a.jsonl", rows)
    words = ["read", path, "--columns", "image=image,score=score", "--pairs", "adjacent"]
    told = fifa(*words, "--min-gap", "0.5", "--out", tmp_path / "run").stderr
    assert "read 2 rows as columns: 2 pairs, 1 prompts" in told
    assert "not made          3  not one of the pairs adjacent" in told
    assert "not made          1  the ratings differ by less than 0.5" in told
    scorers = ("--margin", "column:score_0,score_1", "--quality", "none", "--diversity", "none")
    assert fifa("score", tmp_path / "run", *scorers).returncode == 0
    assert load_pairs(tmp_path / "run").table.num_rows == 2


def test_ranks_of_several_annotators_are_compared_by_their_means(tmp_path: Path) -> None:
    notes = [{"rank": [1, 2, 3]}, {"rank": [1, 3, 2]}, {"rank": [1, 3, 2]}]
    rows = [P | {"image_path": ["a", "b", "c"], "raw_annotations": notes}]
    path = table(tmp_path / "a.jsonl", rows)
    assert labels(read_pairs(path, pairs="best-worst")).keys() == {("a", "b"), ("b", "a")}
    pairs = read_pairs(path, min_gap=0.5)
    assert len(pairs) == 2
    assert pairs.origin.not_made == {"the ratings differ by less than 0.5": 1}


def test_two_folders_of_equal_file_names(tmp_path: Path) -> None:
    files = {"chosen": ("1.png", "2.jpg", "3.png"), "rejected": ("1.png", "2.png", "4.png")}
    for folder, names in files.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(b"x")
    (tmp_path / "chosen" / "1.txt").write_text(" a red fox\n")
    (tmp_path / "rejected" / "2.txt").write_text("a blue door")
    pairs = read_pairs(tmp_path)
    assert pairs.origin.format == "chosen-rejected"
    assert pairs.table["prompt"].to_pylist() == ["a red fox", "a blue door"]
    assert labels(pairs)["chosen/1.png", "rejected/1.png"] == 1.0
    assert labels(pairs)["chosen/2.jpg", "rejected/2.png"] == 1.0
    refs = {row["image_0_ref"] for row in pairs.table.to_pylist()}
    assert all((tmp_path / ref).is_file() for ref in refs)
    assert pairs.rejected["reason"].to_pylist() == [
        "rejected/ has no image '3'",
        "chosen/ has no image '4'",
    ]
    before = pairs.origin.fingerprint
    (tmp_path / "chosen" / "1.txt").write_text("another prompt")
    assert read_pairs(tmp_path).origin.fingerprint != before


def test_folders_with_a_trainers_settings_beside_them(tmp_path: Path) -> None:
    for folder in ("Win", "lose"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(b"x")
        (tmp_path / folder / "1.txt").write_text("a red fox")
    for name in ("concepts.json", "multidatabackend.json"):
        (tmp_path / name).write_text('[{"name": "win", "path": "win"}]')
    assert labels(read_pairs(tmp_path))["Win/1.png", "lose/1.png"] == 1.0
    table(tmp_path / "metadata.jsonl", [P | {"chosen": "a", "rejected": "b"}])
    assert labels(read_pairs(tmp_path))["a", "b"] == 1.0  # a table counts


def test_texts_about_images_are_no_images(tmp_path: Path) -> None:
    rows = [P | {"images": ["a.jpg"], "chosen": "A fox.", "rejected": "A dog."}]
    with pytest.raises(FifaError, match="TRL's answers about images: they say which text"):
        read_pairs(table(tmp_path / "a.jsonl", rows))


def test_one_object_is_records_by_their_ids_or_columns_of_pandas(tmp_path: Path) -> None:
    rows = [P | {"chosen": f"{i}a", "rejected": f"{i}b"} for i in range(3)]
    columns = {name: {str(i): row[name] for i, row in enumerate(rows)} for name in rows[0]}
    for whole in (columns, {f"id {i}": row for i, row in enumerate(rows)}):
        (tmp_path / "a.json").write_text(json.dumps(whole))
        assert len(read_pairs(tmp_path)) == 3
    (tmp_path / "a.json").unlink()
    (tmp_path / "a.csv").write_text("prompt, chosen, rejected\na red fox, a.png, b.png\n")
    assert labels(read_pairs(tmp_path))["a.png", "b.png"] == 1.0


def test_an_image_folder_of_datasets(tmp_path: Path) -> None:
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / "1.png").write_bytes(b"x")
    rows = [
        {"chosen_file_name": "chosen/1.png", "rejected_file_name": "r/1.png", "text": "a red fox"}
    ]
    table(tmp_path / "metadata.jsonl", rows)
    pairs = read_pairs(tmp_path)
    assert pairs.origin.format == "chosen-rejected"
    assert labels(pairs)["chosen/1.png", "r/1.png"] == 1.0
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,prompt,label\na,x,true\nb,x,false\n")
    pairs = read_pairs(tmp_path)
    assert (pairs.origin.format, labels(pairs)["a", "b"]) == ("kto", 1.0)
    columns = {"image_0": "chosen_file_name", "image_1": "rejected_file_name", "label": ":first"}
    table(tmp_path / "metadata.jsonl", rows)
    own = read_pairs(tmp_path / "metadata.jsonl", columns=columns | {"prompt": "text"})
    assert len(own) == 1  # named as they are in the file
    rows = [P | {"file_name": name, "aesthetic": score} for name, score in SCORES.items()]
    table(tmp_path / "metadata.jsonl", rows)
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(FifaError) as error:
        read_pairs(tmp_path)
    option = "prompt=prompt,image=image,score=aesthetic"  # what is told works
    assert f"--columns {option} " in str(error.value)
    for said in (option, option.replace("=image,", "=file_name,")):
        assert len(read_pairs(tmp_path, columns=dict(p.split("=") for p in said.split(",")))) == 6


def test_votes_named_by_files_are_those_of_either_image_or_of_none(tmp_path: Path) -> None:
    images = {"image1": "x/a.jpg", "image2": "https://h.org/b.jpg"}
    results = [{"b.jpg": 3, "a.jpg": 1}, {"image1": 0, "image2": 2}, {"c.jpg": 3, "a.jpg": 1}]
    results += [{"a.jpg": 0, "b.jpg": 0}, {"a.jpg": 1}]
    rows = [
        {"prompt": f"p{i}", "aggregatedResults": json.dumps(result)} | images
        for i, result in enumerate(results)
    ]
    pairs = read_pairs(table(tmp_path / "a.jsonl", rows))
    assert pairs.table["label"].to_pylist() == [0.25, 0.0]
    assert pairs.table["votes"].to_pylist() == [4, 2]
    unnamed = "aggregatedResults does not give the votes for either image by its name"
    reasons = [unnamed, "negative votes, or none", unnamed]
    assert pairs.rejected["reason"].to_pylist() == reasons


def test_a_benchmark_row_whose_parts_are_none_of_a_pair_is_rejected(tmp_path: Path) -> None:
    good = next(example for example in EXAMPLES if example.name == "MMRB2").rows[0]
    edit = {"prompt_content": [["image", "in.jpg"], ["text", "make it blue"]]}
    for side, name in (("response_a", "imagen4"), ("response_b", "flux")):
        good = good | {side: good[side] | {"model_name": name}}
    rows = [good, good | edit, good | {"chosen": "A"}, good | {"human_annotations": [7]}]
    (tmp_path / "t2i.json").write_text(json.dumps({"pairs": rows}))
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 1
    names = pairs.table.select(["model_0", "model_1", "category"]).to_pylist()
    assert names == [{"model_0": "imagen4", "model_1": "flux", "category": "wise"}]
    assert pairs.rejected["reason"].to_pylist() == [
        "no prompt, or no valid text",
        "the annotators' majority is not the one in chosen",
        "human_annotations are not numbers from 1 to 6",
    ]


def test_text_that_is_json_is_read_as_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'prompt,file_path,human_preference\nx,"[""a"", ""b""]","[1, 0]"\ny,"[""a""","[1, 0]"\n'
    )
    pairs = read_pairs(tmp_path / "a.csv")
    assert labels(pairs)["a", "b"] == 1.0
    assert pairs.rejected["reason"].to_pylist() == ["it does not name two images"]
