import re

import numpy as np
import pytest

from fifa.evaluation.crossed import Crossed
from fifa.reporting import figures, numbers
from fifa.scoring.rewards.metrics import agreement


def margins(*shares):
    """A hundred signed margins for each share, of which so many agree, the largest first."""
    agrees = np.concatenate([np.arange(100) < 100 * share for share in shares])
    return np.where(agrees, 1.0, -1.0) * np.linspace(2, 1, len(agrees))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 3, 7, 10, 28, 34, 1000])
def test_a_share_at_the_edge_is_drawn(share, n):
    found = agreement(np.where(np.arange(n) < share * n, 1.0, -1.0))
    curve = numbers.agreement_curve(margins(1.0, share))
    assert "<path" in figures.draw_agreement([curve], (0.1, found))
    assert "<path" in figures.draw_parts([found] * 10)


def test_a_figure_holds_no_style_no_colour_of_its_own_and_no_date():
    curve = numbers.agreement_curve(margins(0.9, 0.8, 0.6))
    svg = figures.draw_agreement([curve] * 5, None)
    assert "style" not in svg
    assert "<!--" not in svg
    assert not re.search(r"(fill|stroke)=\"#(?!curve)", svg)
    assert "date" not in svg.lower()
    assert svg == figures.draw_agreement([curve] * 5, None)


def test_many_scorers_share_one_figure():
    curve = numbers.agreement_curve(margins(0.9, 0.6))
    svg = figures.draw_agreement([curve] * 12, None)
    assert f"var(--scorer-{figures.SCORERS - 1})" in svg


@pytest.mark.parametrize("largest", [1e-30, 1e-3, 1.0, 1e30])
def test_a_histogram_of_any_scale_is_drawn(largest):
    values = np.linspace(0, largest, 500, dtype=np.float32)
    found = numbers.histogram(values, np.arange(500) % 2 == 0)
    assert "<path" in figures.draw_histogram(found, "margin")


def test_a_histogram_of_one_value_and_nothing_kept_is_drawn():
    found = numbers.histogram(np.full(5, 3.0, np.float32), np.zeros(5, bool))
    assert "<path" in figures.draw_histogram(found, "margin")


def test_gains_by_budget_are_lines_with_bands():
    points = [(0.001, Crossed(0.1, 0.0, 0.2, 5, 96)), (0.1, Crossed(0.2, np.nan, np.nan, 1, 96))]
    drawn = figures.draw_lines([("kept", points)], "share of all pairs", "by-budget", shares=True)
    assert "0.1 %" in drawn and "10 %" in drawn and 'stroke="var(--kept)"' in drawn
    noise = figures.draw_lines([("kept", [(0.0, points[0][1])])], "labels turned round", "by-noise")
    assert "labels turned round" in noise
    assert figures.draw_lines([], "share of all pairs", "by-budget") is None
