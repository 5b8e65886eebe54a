"""The index of an evaluation, and indexes that are broken or hostile."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from vote_worlds import make_run, read_index, write_index

from fifa.errors import FifaError
from fifa.evaluation.vote.comparisons import draw_comparisons, load_comparisons, read_file


def spoiled(run: Path, row: int = 0, **changes: object) -> Path:
    rows = read_index(run)
    rows[row].update(changes)
    write_index(run, rows)
    return run


def test_every_two_models_of_a_prompt_and_seed_are_compared(tmp_path: Path) -> None:
    run = make_run(tmp_path, models=("base", "a", "b"), prompts=3, seeds=2)
    write_index(run, [row for row in read_index(run) if (row["model"], row["seed"]) != ("a", 1)])
    got = load_comparisons(run)
    expected = Counter({("a", "base"): 3, ("b", "base"): 6, ("b", "a"): 3})
    assert Counter((one.ours, one.theirs) for one in got) == expected
    assert len({one.key for one in got}) == 12
    for one in got:
        name = f"{int(one.prompt_id[1:]):04d}-{one.seed}.png"
        assert one.file_0 == f"images/{one.ours}/{name}"
        assert one.file_1 == f"images/{one.theirs}/{name}"
        assert one.category in {"circles", "squares", "triangles"}
    assert {one.ours for one in load_comparisons(run, ["b", "base"])} == {"b"}


def test_a_run_without_images_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FifaError, match="fifa evaluate"):
        load_comparisons(tmp_path)


def test_an_index_without_categories_is_fine(tmp_path: Path) -> None:
    run = make_run(tmp_path, prompts=1, seeds=1)
    write_index(run, [{k: v for k, v in r.items() if k != "category"} for r in read_index(run)])
    assert [one.category for one in load_comparisons(run)] == [None]


@pytest.mark.parametrize("path", ["../votes.png", "/etc/hostname", "images/../../x.png"])
def test_a_path_out_of_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    run = make_run(tmp_path / "run", prompts=1, seeds=1)
    (run / "votes.png").write_bytes(b"x")
    (run / "x.png").write_bytes(b"x")
    spoiled(run, file=path)
    with pytest.raises(FifaError, match="leaves the folder"):
        load_comparisons(run)
    with pytest.raises(FifaError, match="cannot be read"):
        read_file(run / "evaluate", path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", prompts=1, seeds=1)
    (tmp_path / "outside.png").write_bytes(b"x")
    (run / "evaluate" / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(FifaError, match="leaves the folder"):
        load_comparisons(spoiled(run, file="link.png"))
    with pytest.raises(FifaError, match="cannot be read"):
        read_file(run / "evaluate", "link.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "images/base/gone.png"}, "1 images are missing, the first: images/base/gone"),
        ({"prompt": None}, "'prompt' has empty cells"),
        ({"model": "tuned-secret"}, "two images of model"),
    ],
)
def test_a_broken_index_says_where(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    run = spoiled(make_run(tmp_path, prompts=1, seeds=1), **changes)
    with pytest.raises(FifaError, match=message):
        load_comparisons(run)


def test_an_index_of_the_wrong_columns_says_which(tmp_path: Path) -> None:
    run = make_run(tmp_path, prompts=1, seeds=1)
    rows = read_index(run)
    write_index(run, [{k: v for k, v in row.items() if k != "seed"} for row in rows])
    with pytest.raises(FifaError, match="no column 'seed'"):
        load_comparisons(run)
    write_index(run, [{**row, "seed": "first"} for row in rows])
    with pytest.raises(FifaError, match="wrong type"):
        load_comparisons(run)
    (run / "evaluate" / "images.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(FifaError, match="is damaged"):
        load_comparisons(run)


def test_one_model_is_nothing_to_compare(tmp_path: Path) -> None:
    run = make_run(tmp_path, models=("base",), prompts=1, seeds=1)
    with pytest.raises(FifaError, match="nothing to compare"):
        load_comparisons(run)
    with pytest.raises(FifaError, match=r"no model 'x'(.|\n)*there are base"):
        load_comparisons(run, ["x"])


def test_drawn_comparisons_take_every_prompt_before_a_second_seed(tmp_path: Path) -> None:
    found = load_comparisons(make_run(tmp_path, prompts=6, seeds=5))
    got = draw_comparisons(found, 8, seed=1)
    prompts = Counter(one.prompt_id for one in got)
    assert len(got) == 8
    assert len(prompts) == 6
    assert max(prompts.values()) == 2
    assert got == draw_comparisons(found, 8, seed=1)
    assert got != draw_comparisons(found, 8, seed=2)
    assert draw_comparisons(found, 1000, seed=0) == found
