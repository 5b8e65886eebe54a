"""The distribution of noise levels, against its formula."""

import math

import pytest
import torch
from trainings import assemble, quick

from fifa.errors import FifaError
from fifa.training.backbones.base import Diffusion, Flow
from fifa.training.times import noise_level, time_drawer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE = Diffusion(BETAS, "here")
V = Diffusion({**BETAS, "prediction_type": "v_prediction"}, "here")
FLOW, SHIFTED = Flow({}, "here"), Flow({"shift": 3.0}, "here")
DRAWS = 1000


def snr_weight(schedule, level):
    """Plainly: min(SNR, 5) over what the error of the target has of the image's."""
    if isinstance(schedule, Flow):
        return min(((1 - level) / level) ** 2, 5) * level**2
    alpha = float(schedule.alphas[int(level * 1000)])
    snr = alpha / (1 - alpha)
    return min(snr, 5) / (snr + (schedule is V))


def cumulative(schedule, time, level):
    """F of a level before the range cuts it, at the levels of a fine grid."""
    if time == "snr":
        grid = [(i + 0.5) / 2000 for i in range(2000)]
        weights = [snr_weight(schedule, one) for one in grid]
        return sum(w for w, one in zip(weights, grid, strict=True) if one < level) / sum(weights)
    shift = getattr(schedule, "shift", 1.0)
    s = level / (shift - (shift - 1) * level)
    if time == "uniform" or s in (0, 1):
        return s
    return 0.5 * (1 + math.erf(math.log(s / (1 - s)) / math.sqrt(2)))


@pytest.mark.parametrize("schedule", [NOISE, V, FLOW, SHIFTED], ids=["noise", "v", "flow", "shift"])
def test_times_have_the_distribution_of_their_formula(schedule):
    for time in ("uniform", "logit-normal", "snr"):
        for low, high in ((0.0, 1.0), (0.2, 0.9), (0.95, 1.0)):
            draw = time_drawer(schedule, time, (low, high))
            generator = torch.Generator().manual_seed(0)
            times = torch.stack([draw(generator) for _ in range(DRAWS)])
            assert times.dtype == schedule.draw_time(generator).dtype
            levels = noise_level(schedule, times).double().sort().values
            assert low <= levels[0] and levels[-1] <= high
            first, last = cumulative(schedule, time, low), cumulative(schedule, time, high)
            for share in (0.1, 0.3, 0.5, 0.7, 0.9):
                level = low + share * (high - low)
                expected = (cumulative(schedule, time, level) - first) / (last - first)
                # three standard deviations of a share of so many draws
                bound = 3 * math.sqrt(expected * (1 - expected) / DRAWS) + 2e-3
                assert float((levels < level).double().mean()) == pytest.approx(expected, abs=bound)


def test_a_familys_own_distribution_is_drawn_as_it_was():
    for schedule, own in ((NOISE, "uniform"), (SHIFTED, "logit-normal")):
        for time in (None, own):
            assert time_drawer(schedule, time, (0.0, 1.0)) == schedule.draw_time
        # within a range without a name it is the family's too
        both = [time_drawer(schedule, time, (0.1, 0.6)) for time in (None, own)]
        one, other = (draw(torch.Generator().manual_seed(3)) for draw in both)
        assert one == other


def test_a_range_holds_for_every_pair_however_it_is_drawn(world, tmp_path):
    knobs = {"time": "logit-normal", "time_range": (0.3, 0.6), "holdout": 0.2, "draws": 2}
    loop = assemble(quick(world, **knobs), tmp_path / "out")
    items = [(pair, d) for pair in range(4) for d in (0, 1, -1, -4)]
    batch = loop.source.batch(items)
    assert ((batch.time >= 300) & (batch.time < 600)).all()
    assert len(batch.time.unique()) > 8
    for place, item in enumerate(items):
        assert loop.source.batch([item]).time[0] == batch.time[place]
    # the reference's errors are kept under the name of their times
    tables = len(list((tmp_path / "out" / "cache").glob("reference-*.parquet")))
    assemble(quick(world, **knobs | {"time_range": (0.3, 0.7)}), tmp_path / "out")
    assert len(list((tmp_path / "out" / "cache").glob("reference-*.parquet"))) == 2 * tables == 4
    for wrong in ((0.9, 0.2), (0.5, 0.5), (0.0, 1.5)):
        with pytest.raises(FifaError, match=r"time.range"):
            quick(world, time_range=wrong)
