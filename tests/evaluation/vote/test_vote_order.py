"""What a voter is dealt."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fifa.evaluation.vote.order import CHECK, COMPARE, GAP, REPEAT, deal

SHARES = st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 1.0])


@given(st.integers(1, 60), SHARES, SHARES, st.integers(0, 10**6))
def test_every_comparison_once_and_the_promised_repeats_and_checks(
    n: int, repeats: float, checks: float, seed: int
) -> None:
    keys = [f"k{i}" for i in range(n)]
    cards = deal(keys, np.random.default_rng(seed), repeats=repeats, checks=checks)
    kinds = Counter(card.kind for card in cards)
    assert sorted(card.comparison for card in cards if card.kind == COMPARE) == sorted(keys)
    assert abs(kinds[CHECK] - checks * n) < 1
    assert kinds[REPEAT] <= repeats * n + 1
    assert kinds[REPEAT] > repeats * n - 1 - GAP  # those of the last few cards have no room
    first = {card.comparison: (i, card) for i, card in enumerate(cards) if card.kind == COMPARE}
    again = [card.comparison for card in cards if card.kind == REPEAT]
    assert len(set(again)) == len(again)
    for i, card in enumerate(cards):
        if card.kind == REPEAT:
            at, shown = first[card.comparison]
            assert i - at >= min(GAP, max(1, n // 2))
            assert card.left == 1 - shown.left


def test_order_and_sides_are_each_voters_own() -> None:
    keys = [f"k{i}" for i in range(400)]
    decks = [deal(keys, np.random.default_rng([0, voter])) for voter in (1, 2)]
    assert decks[0] == deal(keys, np.random.default_rng([0, 1]))
    assert [c.comparison for c in decks[0]] != [c.comparison for c in decks[1]]
    sides = [{card.comparison: card.left for card in deck} for deck in decks]
    assert 0.4 < np.mean(list(sides[0].values())) < 0.6
    assert 0.4 < np.mean([sides[0][key] == sides[1][key] for key in keys]) < 0.6
    assert (
        0.4
        < np.mean(
            [
                card.left
                for card in deal(keys, np.random.default_rng(3), checks=1.0)
                if card.kind == CHECK
            ]
        )
        < 0.6
    )


def test_repeats_and_checks_come_early_as_well_as_late() -> None:
    cards = deal([f"k{i}" for i in range(200)], np.random.default_rng(0), repeats=0.1, checks=0.1)
    for part in (cards[:60], cards[-60:]):
        kinds = Counter(card.kind for card in part)
        assert kinds[REPEAT] >= 4
        assert kinds[CHECK] >= 4
