"""What is known of a training while it runs: ``stats.jsonl`` always, and a tracker beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fifa.config import Train
from fifa.models.optional import require
from fifa.shards.files import cannot_write, digest, read_json_lines, write_text

STATS = "stats.jsonl"

# What a micro-batch adds up, in this order.
SUMS = ("loss", "winner", "loser", "winner_reference", "loser_reference", "correct", "kl", "bound")


def sums(loss: Tensor, policy: Tensor, reference: Tensor | None, kl: Tensor | None) -> Tensor:
    """What a micro-batch tells, summed over its pairs, float32 ``[8]`` in the order of `SUMS`.

    Parameters
    ----------
    loss
        ``[n]``.
    policy, reference
        Errors of (winner, loser), ``[n, 2]``.
    kl
        ``[n]``, or None where the reference's predictions are not at hand.
    """
    policy = policy.detach()
    base = torch.full_like(policy, torch.nan) if reference is None else reference
    gain = (base - policy).float()
    # implicit accuracy: the policy prefers the winner more than the reference does; a tie is half
    correct = 0.5 * (1.0 + (gain[:, 0] - gain[:, 1]).sign())
    # |sqrt e - sqrt e_ref|^2 <= mean (prediction - prediction_ref)^2, by the triangle inequality
    bound = (policy.sqrt() - base.sqrt()).square().mean(1)
    nothing = torch.full_like(bound, torch.nan)
    rows = [loss.detach(), *policy.T, *base.T, correct, nothing if kl is None else kl, bound]
    total: Tensor = torch.stack([row.float().sum() for row in rows])
    return total


def distance(prediction: Tensor, reference: Tensor) -> Tensor:
    """The KL proxy of each pair, ``[n]``, from predictions ``[2n, c, h, w]``.

    For Gaussian steps of equal variance the divergence of policy from reference is proportional to
    ``mean (prediction - prediction_ref)^2``; here its mean over both images.
    """
    squared = (prediction.detach().float() - reference.float()).square().mean(dim=(1, 2, 3))
    return squared.view(2, -1).mean(0)


def stats_line(total: Sequence[float], pairs: int) -> dict[str, float | None]:
    """The means over ``pairs`` of what `sums` added up; None for what is not known.

    ``winner_minus_reference`` and ``loser_minus_reference`` tell likelihood displacement: both
    may rise while the loss falls.
    """
    mean = {name: value / pairs for name, value in zip(SUMS, total, strict=True)}
    line = {
        "loss": mean["loss"],
        "winner_error": mean["winner"],
        "loser_error": mean["loser"],
        "winner_minus_reference": mean["winner"] - mean["winner_reference"],
        "loser_minus_reference": mean["loser"] - mean["loser_reference"],
        "implicit_accuracy": mean["correct"],
        "kl": mean["kl"],
        "kl_bound": mean["bound"],
    }
    # NaN marks what is not known; a loss or an error that is not finite has stopped the run before
    return {name: value if value == value else None for name, value in line.items()}


class Tracker(NamedTuple):
    """Anything that takes numbers by step.

    Parameters
    ----------
    log
        Called with a step and its numbers.
    close
        Called when the training is over, or interrupted.
    """

    log: Callable[[int, dict[str, float]], object]
    close: Callable[[], object]


class Stats:
    """Writes ``stats.jsonl`` and feeds the tracker.

    Parameters
    ----------
    train
        The training.
    out
        Its folder.
    step
        Steps done: lines of later ones, which an interrupted run wrote, are taken out.
    """

    def __init__(self, train: Train, out: Path, step: int) -> None:
        self.path = out / STATS
        kept = [line for line in read_json_lines(self.path)[0] if line["step"] <= step]
        if self.path.exists():
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.tracker = make_tracker(train, out, step)

    def log(self, step: int, line: dict[str, Any]) -> None:
        """Add one line."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if self.tracker is not None:
            self.tracker.log(step, {k: v for k, v in line.items() if v is not None})

    def close(self) -> None:
        """End the tracker."""
        if self.tracker is not None:
            self.tracker.close()


def read_stats(out: Path) -> list[dict[str, Any]]:
    """The lines of a training's ``stats.jsonl``."""
    return read_json_lines(Path(out) / STATS)[0]


def make_tracker(train: Train, out: Path, step: int) -> Tracker | None:
    """The tracker that the training asks for; `FifaError` where it is not installed."""
    if train.tracker == "none":
        return None
    choose = f"pip install {train.tracker}, or choose another --tracker (none: stats.jsonl only)"
    module = require(train.tracker, what=f"the tracker {train.tracker}", do=choose)
    if train.tracker == "tensorboard":
        # what an interrupted run wrote beyond its last state is hidden
        purge = step + 1 if step else None
        api = require("torch.utils.tensorboard", "train")
        writer = api.SummaryWriter(str(out / "logs"), purge_step=purge)

        def log(step: int, line: dict[str, float]) -> None:
            for name, value in line.items():
                writer.add_scalar(name, value, step)

        return Tracker(log, writer.close)
    # Weights & Biases, or trackio, which has the same three functions
    name = f"{out.name}-{digest(train.to_yaml())[:6]}"
    folder = {"dir": str(out), "id": name} if train.tracker == "wandb" else {}
    module.init(project="fifa", name=name, config=asdict(train), resume="allow", **folder)
    return Tracker(lambda step, line: module.log(line, step=step), module.finish)
