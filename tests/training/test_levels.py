"""Where in time a training fails: its metrics in eight parts of the noise level."""

import math

import pytest
import torch
from trainings import quick

from fifa.evaluation.history import history_of
from fifa.reporting.figures import draw_levels
from fifa.training.job import run_training
from fifa.training.levels import LEVELS, line_by_level, output_gradient, sums_by_level
from fifa.training.metrics import read_stats, stats_line, sums


def test_a_line_has_the_means_of_the_pairs_of_each_level():
    torch.manual_seed(0)
    level = torch.tensor([0.0, 0.1, 0.13, 0.5, 0.51, 0.999, 1.0])
    policy, base, slope = torch.rand(7, 2), torch.rand(7, 2), torch.rand(7)
    found = line_by_level(sums_by_level(level, policy, base, slope).tolist(), "by_level")
    line = found["by_level"]
    assert line["pairs"] == [2, 1, 0, 0, 2, 0, 0, 2]
    for part, rows in enumerate([[0, 1], [2], [], [], [3, 4], [], [], [5, 6]]):
        told = [line[name][part] for name in ("winner_error", "loser_minus_reference")]
        told += [line[name][part] for name in ("implicit_accuracy", "output_gradient")]
        if not rows:
            assert told == [None] * 4
            continue
        gain = base[rows] - policy[rows]
        right = (gain[:, 0] > gain[:, 1]).float()
        means = policy[rows, 0].mean(), -gain[:, 1].mean(), right.mean(), slope[rows].mean()
        assert told == pytest.approx([float(mean) for mean in means], abs=1e-6)
    # of images one by one nothing is told, and nothing is known without a reference
    assert line_by_level(sums_by_level(level, policy[:, :1], base, slope).tolist(), "x") == {}
    alone = line_by_level(sums_by_level(level, policy, None, None).tolist(), "x")["x"]
    assert set(alone) == {"pairs", "winner_error", "loser_error"}
    assert stats_line(sums(slope, policy, None, None).tolist(), 7)["implicit_accuracy"] is None


def test_the_gradient_is_that_at_the_predictions():
    torch.manual_seed(0)
    prediction = torch.randn(6, 2, 3, 3, requires_grad=True)  # winners, then losers
    target = torch.randn(6, 2, 3, 3)
    policy = (prediction - target).square().mean(dim=(1, 2, 3)).view(2, 3).T
    loss = torch.nn.functional.softplus(20 * (policy[:, 0] - policy[:, 1]))
    found = output_gradient(loss, policy, 18)
    [whole] = torch.autograd.grad(loss.sum(), prediction)
    each = whole.square().sum(dim=(1, 2, 3)).view(2, 3).sum(0).sqrt()
    assert torch.allclose(found, each, rtol=1e-5)


def test_statistics_and_page_tell_levels(world, tmp_path):
    out = run_training(quick(world, steps=3, holdout=0.3, validate_every=3), tmp_path / "out")
    lines = read_stats(out)
    for line, prefix in [(lines[0], ""), (lines[-1], "heldout_")]:
        levels = line[f"{prefix}by_level"]
        assert len(levels["pairs"]) == LEVELS
        for name in ("winner_error", "implicit_accuracy"):
            pairs = zip(levels["pairs"], levels[name], strict=True)
            mean = sum(n * value for n, value in pairs if n) / sum(levels["pairs"])
            assert mean == pytest.approx(line[f"{prefix}{name}"], rel=1e-4)
    assert "output_gradient" not in lines[-1]["heldout_by_level"]
    assert any(value for value in lines[-1]["by_level"]["output_gradient"])
    history = history_of("one", lines)
    figure = draw_levels(history, "one")
    assert "By noise level. error above the base" in figure
    assert len([value for value in history.held_levels.winner if math.isfinite(value)]) >= 2
    for bad in ({"by_level": 3}, {"by_level": {"pairs": ["x"]}}, {"by_level": {"pairs": [0] * 8}}):
        assert draw_levels(history_of("bad", [{"step": 1, "loss": 0.7, **bad}]), "bad") is None
