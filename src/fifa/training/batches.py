"""From cached pairs and their draws to what the denoiser reads, and to its errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fifa.config import Train
from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.draws import draw_pair
from fifa.training.losses import errors, margin_labels


@dataclass(frozen=True)
class Batch:
    """One micro-batch of n pairs: the n winners, then the n losers, in every tensor of 2n.

    Parameters
    ----------
    items
        ``(pair, draw)`` of each pair.
    noisy, target
        float32 ``[2n, c, h, w]``.
    time
        ``[2n]``, the same for both images of a pair.
    prompts
        ``[2n, ...]`` each.
    frames
        int64 ``[2n, 6]``.
    label, weight
        float32 ``[n]``.
    """

    items: list[tuple[int, int]]
    noisy: Tensor
    target: Tensor
    time: Tensor
    prompts: Tensors
    frames: Tensor
    label: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Source:
    """Where micro-batches come from.

    Parameters
    ----------
    train
        The training's knobs.
    backbone
        Its latents, times, noise and targets.
    pairs
        `fifa.training.pairs.TrainingPairs`.
    encoded
        Their `fifa.training.cache.Encoded`, pair by pair.
    device
        Where batches go.
    """

    train: Train
    backbone: Backbone
    pairs: Any
    encoded: Any
    device: Any

    def batch(self, items: Sequence[tuple[int, int]]) -> Batch:
        """The micro-batch of ``items``, all of one latent shape."""
        train, backbone = self.train, self.backbone
        pairs, encoded = self.pairs, self.encoded
        rows = [pair for pair, _ in items]
        shape = (backbone.vae.channels, *encoded.shape(rows[0]))
        time_of, dropout = backbone.schedule.draw_time, train.prompt_dropout
        draws = [
            draw_pair(train.seed, pairs.pair_id[pair], d, time_of, shape, dropout, train.flips)
            for pair, d in items
        ]
        drawn = list(zip(rows, draws, strict=True))
        moments = self._sides([encoded.moments(pair, one.flip) for pair, one in drawn]).float()
        latents = backbone.vae.latents(moments, self._sides([one.posterior for one in draws]))
        noise, time = self._both([d.noise for d in draws]), self._both([d.time for d in draws])
        prompts = [encoded.empty if d.no_prompt else encoded.prompts(pair) for pair, d in drawn]
        return Batch(
            items=list(items),
            noisy=backbone.schedule.add_noise(latents, noise, time),
            target=backbone.schedule.target(latents, noise, time),
            time=time,
            prompts={name: self._both([one[name] for one in prompts]) for name in prompts[0]},
            frames=self._sides([encoded.frames(pair) for pair in rows]),
            label=self._put(self._labels(rows)),
            weight=self._put(
                torch.from_numpy(self.pairs.weight[rows])
                if train.weights
                else torch.ones(len(rows))
            ),
        )

    def _sides(self, pairs: list[Tensor]) -> Tensor:
        """From ``[2, ...]`` of each pair to ``[2n, ...]``, winners first."""
        return self._put(torch.stack(pairs, dim=1).flatten(0, 1))

    def _both(self, values: list[Tensor]) -> Tensor:
        """From ``[...]`` of each pair to ``[2n, ...]``, the same for both images."""
        return self._put(torch.cat([torch.stack(values)] * 2))

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _labels(self, rows: list[int]) -> Tensor:
        if self.train.label == "margin":
            margins = torch.from_numpy(self.pairs.margin[rows])
            return margin_labels(margins, self.train.label_scale)
        return torch.from_numpy(self.pairs.label[rows])


def predict(backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
    """The denoiser's errors of (winner, loser), float32 ``[n, 2]``, and its prediction."""
    prediction = backbone.predict(batch.noisy, batch.time, batch.prompts, batch.frames)
    # [2n], winners first -> [n, 2]
    return errors(prediction, batch.target).view(2, -1).T, prediction
