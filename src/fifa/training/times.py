"""How much noise a pair gets: the distribution of times that `Train.time` names, within a range.

The noise level is in [0, 1]: sigma of a flow model, t / T of a model with T timesteps. A family has
a distribution of its own, which is what its schedule draws: uniform timesteps, or logit-normal
sigmas. Any is drawn from one uniform number u of the pair's own generator, by its cumulative
distribution F and within [low, high]:

    level = F^-1( F(low) + u * (F(high) - F(low)) )

so what a pair draws depends on the seed, the pair and the number of the draw only. Densities:

- ``uniform``: 1.
- ``logit-normal``: that of sigmoid(N(0, 1)), from Stable Diffusion 3 (Esser et al. 2024, arXiv
  2403.03206, section 3.1), whose best one had mean 0 and deviation 1.
- ``snr``: times are as frequent as min-SNR weighs them (Hang et al. 2023, arXiv 2303.09556), with
  its gamma of 5: min(SNR, 5), for the error of the image, over what turns that into the error of
  the target, which is SNR for the noise, SNR + 1 for v, and 1 / sigma^2 for ``noise - latents``.
  Its weights would shrink the argument of the sigmoid of DPO; drawing leaves the loss as it is.

In flow models ``uniform`` and ``logit-normal`` are shifted as the model's scheduler says, as its
own distribution is; ``snr`` and the range are of the sigma that is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

from fifa.training.backbones.base import Diffusion, Flow

GAMMA = 5.0  # of min-SNR
CELLS = 10_000  # of the sigmas of a flow model, in each of which the density is that of its middle

Floats = npt.NDArray[np.float64]


@lru_cache(maxsize=4)
def time_drawer(
    schedule: Diffusion | Flow, time: str | None, between: tuple[float, float]
) -> Callable[[Generator], Tensor]:
    """What draws a time: an int64 timestep or a float32 sigma, as the schedule's ``draw_time``.

    Parameters
    ----------
    schedule
        The model's.
    time
        ``uniform``, ``logit-normal`` or ``snr``; None is the family's own.
    between
        The lowest and the highest noise level.
    """
    own = "logit-normal" if isinstance(schedule, Flow) else "uniform"
    if time in (None, own) and between == (0.0, 1.0):
        return schedule.draw_time
    shift = schedule.shift if isinstance(schedule, Flow) and time != "snr" else 1.0
    # before the shift, s = level / (shift - (shift - 1) level)
    low, high = (level / (shift - (shift - 1) * level) for level in between)
    weights = density(schedule, time or own)
    edges = np.linspace(0, 1, len(weights) + 1)
    share = np.concatenate([[0.0], np.cumsum(weights)]) / weights.sum()
    first, last = np.interp((low, high), edges, share)

    def draw(generator: Generator) -> Tensor:
        u = float(torch.rand((), dtype=torch.float64, generator=generator))
        s = np.interp(first + u * (last - first), share, edges)
        level = np.clip(shift * s / (1 + (shift - 1) * s), *between)
        if isinstance(schedule, Flow):
            return torch.tensor(level, dtype=torch.float32)
        return torch.tensor(min(int(level * schedule.steps), schedule.steps - 1))

    return draw


def density(schedule: Diffusion | Flow, time: str) -> Floats:
    """How frequent times are, up to a factor: a number a timestep, or one for each of `CELLS`."""
    flow = isinstance(schedule, Flow)
    n = CELLS if flow else schedule.steps
    s = (np.arange(n) + 0.5) / n
    if time == "uniform":
        return np.ones(n)
    if time == "logit-normal":
        # exp(-logit(s)^2 / 2) / (s (1 - s))
        return np.asarray(np.exp(-0.5 * np.log(s / (1 - s)) ** 2) / (s * (1 - s)))
    if isinstance(schedule, Flow):
        # min(SNR, gamma) * sigma^2,  SNR = (1 - sigma)^2 / sigma^2
        return np.minimum((1 - s) ** 2, GAMMA * s**2)
    # min(SNR, gamma) / SNR, or / (SNR + 1) for v,  SNR = alpha_bar / (1 - alpha_bar)
    alpha = schedule.alphas.double().numpy()
    snr = alpha / (1 - alpha)
    return np.asarray(np.minimum(snr, GAMMA) / (snr + (schedule.prediction == "v_prediction")))


def noise_level(schedule: Diffusion | Flow, time: Tensor) -> Tensor:
    """The level of times that were drawn, float32 of the same shape, in [0, 1]."""
    return time.float() if isinstance(schedule, Flow) else (time.float() + 0.5) / schedule.steps
