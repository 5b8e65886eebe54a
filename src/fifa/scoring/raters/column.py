"""A rater that is a column of the source."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.table import NUMERIC, QUALITY, source_columns


def column_ratings(pairs: Pairs, name: str) -> pa.Table:
    """`QUALITY` from a numeric column of ``pairs.table``, on that column's own scale.

    A prompt's rating is the mean over those of its pairs that have a finite number; a prompt
    without any has NaN and null flags, the others have no flags.

    Raises `FifaError` for a column that is missing or not numeric.
    """
    table = pairs.table
    numeric = source_columns(pairs, *NUMERIC)
    if name not in numeric:
        raise FifaError(
            f"the pairs have no numeric column {name!r} to rate prompts by",
            do=f"one of: {', '.join(numeric) or 'none here, choose another rater'}",
        )
    values = table[name].cast(pa.float64(), safe=False).to_numpy()
    rows = table["prompt_index"].to_numpy()
    finite = np.isfinite(values)
    n = pairs.prompts.num_rows
    count = np.bincount(rows[finite], minlength=n)
    # q_c = mean of the column over the pairs of prompt c
    total = np.bincount(rows[finite], weights=values[finite], minlength=n)
    with np.errstate(invalid="ignore", divide="ignore"):
        rating = (total / count).astype(np.float32)
    flags = pa.array(["" if some else None for some in count], pa.string())
    ids = pairs.prompts["prompt_id"].combine_chunks()
    return pa.table([ids, pa.array(rating), flags], schema=QUALITY)
