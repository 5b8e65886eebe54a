"""Where in time a training fails: its metrics by noise level, in eight equal parts of it.

The sums are taken on the device and read with those of the step, so nothing more is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fifa.training.backbones.base import Backbone
from fifa.training.batches import Batch
from fifa.training.times import noise_level

LEVELS = 8
# What is added up for each level, in this order.
NAMES = (
    *("pairs", "winner_error", "loser_error", "winner_reference", "loser_reference"),
    *("implicit_accuracy", "output_gradient"),
)


def levels_of(backbone: Backbone, batch: Batch) -> Tensor:
    """The noise level of each pair's draw, ``[n]``: 0 is the image, 1 noise alone."""
    return noise_level(backbone.schedule, batch.time[: len(batch.items)])


def sums_by_level(
    level: Tensor, policy: Tensor, reference: Tensor | None, gradient: Tensor | None
) -> Tensor:
    """What a micro-batch tells by level, summed over its pairs, float32 ``[56]``: `NAMES` by level.

    Parameters
    ----------
    level
        ``[n]``, from 0, the image, to 1, noise alone.
    policy, reference
        Errors of (winner, loser), ``[n, 2]``. Of images one by one, ``[n, 1]``, nothing is told.
    gradient
        ``[n]``, of `output_gradient`; None where there is none.
    """
    policy = policy.detach().float()
    if policy.shape[1] != 2:
        return policy.new_zeros(LEVELS * len(NAMES))
    nothing = torch.full_like(policy, torch.nan)
    base = nothing if reference is None else reference.float()
    gain = base - policy
    gap = gain[:, 0] - gain[:, 1]
    correct = torch.where(gap.isnan(), gap, 0.5 * (1.0 + gap.sign()))
    rows = [torch.ones_like(correct), *policy.T, *base.T, correct]
    rows.append(nothing[:, 0] if gradient is None else gradient.float())
    part = (level * LEVELS).long().clamp(0, LEVELS - 1)
    inside = part[:, None] == torch.arange(LEVELS, device=part.device)  # [n, levels]
    # no product: what autocast would round, and where 0 times NaN is none
    return torch.where(inside, torch.stack(rows)[..., None], 0.0).sum(1).flatten()


def output_gradient(loss: Tensor, policy: Tensor, numbers: int) -> Tensor:
    """The norm of the gradient of each pair's loss at the network's outputs, ``[n]``.

    What the loss asks of the network, before the network's own derivative: the norm at the weights
    would take a backward pass for every level. It costs none, as the error of an image is all that
    links its loss to the ``numbers`` of its prediction.
    """
    [slope] = torch.autograd.grad(loss.sum(), policy, retain_graph=True)
    error = policy.detach()
    # |dl / dprediction|^2 = sum over both images of (dl / de)^2 * 4 e / n,  e = mean (p - t)^2
    return (slope.square() * 4 * error / numbers).sum(1).sqrt()


def line_by_level(total: Sequence[float], name: str) -> dict[str, dict[str, list[float | None]]]:
    """``name`` and the means by level of what `sums_by_level` added up, `LEVELS` of each.

    None for a level without pairs; what is not known at any level is left out, and all of it where
    no level has pairs.
    """
    rows = [total[start : start + LEVELS] for start in range(0, len(total), LEVELS)]
    pairs, *sums = rows
    if not any(pairs):
        return {}
    means = {
        name: [value / n if n else float("nan") for value, n in zip(row, pairs, strict=True)]
        for name, row in zip(NAMES[1:], sums, strict=True)
    }
    for side in ("winner", "loser"):
        both = zip(means[f"{side}_error"], means.pop(f"{side}_reference"), strict=True)
        means[f"{side}_minus_reference"] = [error - reference for error, reference in both]
    known = {key: [v if v == v else None for v in row] for key, row in means.items()}
    known = {key: row for key, row in known.items() if set(row) != {None}}
    return {name: {"pairs": [*pairs], **known}}
