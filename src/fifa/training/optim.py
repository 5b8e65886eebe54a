"""The optimiser, its learning rate as a function of the step, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fifa.config import Train
from fifa.models.optional import require


def make_optimizer(train: Train, parameters: Sequence[Any], device: Any) -> Any:
    """The optimiser that the training asks for.

    AdamW is fused on CUDA. Adafactor is that of transformers with Salesforce's settings: the
    learning rate is the training's, updates are clipped at a root mean square of 1.

    Raises `FifaError` where bitsandbytes is not installed, for ``adamw8bit``.
    """
    if train.optimizer == "adafactor":
        return require("transformers", "train").Adafactor(
            parameters,
            lr=train.lr,
            weight_decay=train.weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
        )
    settings: dict[str, Any] = {
        "lr": train.lr,
        "betas": (train.beta1, train.beta2),
        "eps": train.epsilon,
        "weight_decay": train.weight_decay,
    }
    if train.optimizer == "adamw8bit":
        choose = "pip install bitsandbytes, or choose --optimizer adamw or adafactor"
        bitsandbytes = require("bitsandbytes", what="8-bit AdamW", do=choose)
        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings, fused=device.type == "cuda")


def learning_rate(train: Train, step: int, steps: int) -> float:
    """The learning rate of ``step``, counted from 0.

    It rises linearly to ``train.lr`` over the first ``train.warmup`` steps, of which none has
    rate 0, then follows the schedule, which would reach 0 right after the last step.
    """
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    done = (step - train.warmup) / max(1, steps - train.warmup)
    if train.schedule == "linear":
        return train.lr * max(0.0, 1.0 - done)
    if train.schedule == "cosine":
        return train.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return train.lr


class Average:
    """The exponential moving average of weights.

    Parameters
    ----------
    parameters
        What is averaged; copied as they are now.
    decay
        The share of the old average, once the run is long enough for it: in its step t it is
        ``min(decay, (1 + t) / (10 + t))``, so that the first weights are soon forgotten.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    def update(self, step: int) -> None:
        """Take in the weights after step ``step``, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        # average <- average + (1 - decay) (weights - average)
        with torch.no_grad():
            now = [parameter.detach() for parameter in self.parameters]
            torch._foreach_lerp_(self.values, now, 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the place of the weights, while the block lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.values, strict=True):
                kept = parameter.detach().clone()
                parameter.copy_(value)
                value.copy_(kept)
