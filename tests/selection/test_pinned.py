"""What the default recipe selects from the feedback that the package ships, to the last pair.

A selection is to be the same for everybody, so what it is made of (the formula, its defaults, the
gates, the order of ties) may not change unnoticed.
"""

import pyarrow.parquet as pq
import pytest

import fifa
from fifa.moji.family import FEEDBACK, RATINGS
from fifa.scoring.table import Scores
from fifa.selection.table import reason_counts
from fifa.shards.files import digest

RATED = RATINGS / "quality-local-38a32415e9e4a152.parquet"  # in float32
PINNED = {
    "margin": "d7bf1a8d8d49acfe",
    "margin and quality": "e349c7410f8a6cc8",
}
MESSAGE = """\
The default selection of the shipped feedback by {name} is another one than before:
{counts}
If nobody meant it, find out what changed it: every user's subset changes with it. If it was meant,
write {found!r} into PINNED and a line into CHANGELOG.md."""


@pytest.fixture(scope="module")
def scored():
    """The pairs and, for each entry of `PINNED`, their scores."""
    pairs = fifa.read_pairs(str(FEEDBACK))
    margin = fifa.score(pairs, "column:clipscore_0,clipscore_1", "none", "none").margins
    both = Scores(margins=margin, quality=pq.read_table(RATED))
    return pairs, {"margin": Scores(margins=margin), "margin and quality": both}


@pytest.mark.parametrize("name", list(PINNED))
def test_the_default_selection_is_the_same_as_ever(scored, name):
    pairs, scores = scored
    selection = fifa.select(pairs, scores[name])
    order = selection.filter(selection["rank"].is_valid()).sort_by("rank")["pair_id"].to_pylist()
    reasons = dict(
        zip(selection["pair_id"].to_pylist(), selection["reason"].to_pylist(), strict=True)
    )
    found = digest(order, reasons)
    counts = reason_counts(selection)
    assert len(order) > 1000 and len(counts) > 1
    assert found == PINNED[name], MESSAGE.format(name=name, counts=counts, found=found)
