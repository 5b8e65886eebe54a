import re

import numpy as np
import pytest

from fifa.reporting import data, figures


def hits(*shares):
    """A hundred pairs for each share, of which so many agree."""
    return np.concatenate([np.arange(100) < 100 * share for share in shares]).astype(float)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 3, 7, 10, 28, 34, 1000])
def test_a_share_at_the_edge_is_drawn(share, n):
    told = data.agreement_of(np.arange(n) < share * n)
    curve = data.agreement_curve(hits(1.0, share))
    assert "<path" in figures.draw_curve([curve], (0.1, told), "curve")
    assert "<path" in figures.draw_deciles([told] * 10, "tenths")


def test_a_figure_holds_no_style_no_colour_of_its_own_and_no_date():
    curve = data.agreement_curve(hits(0.9, 0.8, 0.6))
    svg = figures.draw_curve([curve] * 5, None, "curve")
    assert "style" not in svg
    assert "<!--" not in svg
    assert not re.search(r"(fill|stroke)=\"#(?!curve)", svg)
    assert "date" not in svg.lower()
    assert svg == figures.draw_curve([curve] * 5, None, "curve")


def test_many_scorers_share_one_figure():
    curve = data.agreement_curve(hits(0.9, 0.6))
    svg = figures.draw_curve([curve] * 12, None, "curve")
    assert f"var(--scorer-{figures.SCORERS - 1})" in svg


@pytest.mark.parametrize("largest", [1e-30, 1e-3, 1.0, 1e30])
def test_a_histogram_of_any_scale_is_drawn(largest):
    values = np.linspace(0, largest, 500, dtype=np.float32)
    found = data.histogram(values, np.arange(500) % 2 == 0)
    assert "<path" in figures.draw_histogram(found, "margin", "h")


def test_a_histogram_of_one_value_and_nothing_kept_is_drawn():
    found = data.histogram(np.full(5, 3.0, np.float32), np.zeros(5, bool))
    assert "<path" in figures.draw_histogram(found, "margin", "h")
