"""A column as the rater: the mean over a prompt's pairs, against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fifa.data.table import PAIRS, PROMPTS, Pairs
from fifa.errors import FifaError
from fifa.scoring.quality import column_ratings, quality_scores
from fifa.scoring.table import QUALITY

numbers = st.none() | st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf])


def pairs_of(index: list[int], values: list[float | None], prompts: int) -> Pairs:
    empty = PAIRS.empty_table()
    columns = {name: pa.nulls(len(index), empty.schema.field(name).type) for name in PAIRS.names}
    columns["prompt_index"] = pa.array(index, pa.int32())
    table = pa.table(
        {**columns, "stars": pa.array(values, pa.float64()), "word": ["x"] * len(index)}
    )
    names = [f"prompt {i}" for i in range(prompts)]
    return Pairs(table, pa.table([names, names], schema=PROMPTS))


@given(st.lists(st.tuples(st.integers(0, 4), numbers), min_size=1, max_size=30))
def test_the_rating_is_the_mean_over_the_prompts_pairs(
    rows: list[tuple[int, float | None]],
) -> None:
    got = column_ratings(pairs_of([i for i, _ in rows], [v for _, v in rows], 5), "stars")
    assert got.schema == QUALITY
    for prompt, rating in enumerate(got["rating"].to_pylist()):
        mine = [v for i, v in rows if i == prompt and v is not None and math.isfinite(v)]
        if mine:
            assert rating == pytest.approx(np.float32(sum(mine) / len(mine)), rel=1e-5, abs=1e-3)
        else:
            assert math.isnan(rating)
        assert got["flags"][prompt].as_py() == ("" if mine else None)


def test_a_column_that_is_not_there_is_told_with_those_that_are() -> None:
    pairs = pairs_of([0], [1.0], 1)
    for name in ("nothing", "word", "label"):
        with pytest.raises(FifaError, match="no numeric column") as caught:
            quality_scores(pairs, f"column:{name}")
        assert caught.value.do == "one of: stars"


def test_other_numbers_in_the_column_are_another_file(tmp_path) -> None:
    for value in (1.0, 2.0):
        table = quality_scores(pairs_of([0], [value], 1), "column:stars", folder=tmp_path)
        assert table["rating"].to_pylist() == [value]
    assert len(list(tmp_path.iterdir())) == 2
