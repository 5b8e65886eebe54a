"""The state a killed training goes on from, and the weights it writes.

A state is a folder of its own that is there whole or not at all; the older one goes only when
the newer is there. Its tensors are what ``torch.load(weights_only=True)`` opens.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fifa.config import Train
from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.shards.files import atomic_folder, read_json, write_json
from fifa.training.adapters import add_lora, save_full, save_lora
from fifa.training.backbones.base import Backbone
from fifa.training.optim import Average

STATE = "state"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Parameters
    ----------
    step
        Steps done.
    pairs
        Pairs presented.
    seconds
        Time spent in the loop, over all its interruptions.
    window, since, sums
        Since the last line of metrics: pairs, the time at that line, and what
        `fifa.training.metrics.sums` has added up.
    """

    step: int = 0
    pairs: int = 0
    seconds: float = 0.0
    window: int = 0
    since: float = 0.0
    sums: tuple[float, ...] = ()

    def after_step(self, sums: Sequence[float], pairs: int, seconds: float) -> Progress:
        """After one more step of so many pairs, at that time."""
        known = self.sums or (0.0,) * len(sums)
        return replace(
            self,
            step=self.step + 1,
            pairs=self.pairs + pairs,
            seconds=seconds,
            window=self.window + pairs,
            sums=tuple(a + b for a, b in zip(known, sums, strict=True)),
        )

    def after_metrics(self) -> Progress:
        """After a line of metrics."""
        return replace(self, window=0, since=self.seconds, sums=())


def step_name(step: int) -> str:
    """``step-000100``: the name of what belongs to a step, in an order that is the steps'."""
    return f"step-{step:06d}"


def latest_state(out: Path) -> Path | None:
    """The newest state in a checkpoint folder; None before the first."""
    found = sorted((out / STATE).glob("step-*/state.json"))
    return found[-1].parent if found else None


@dataclass(frozen=True)
class TrainState:
    """What is trained and what trains it: all that a saved state holds.

    Parameters
    ----------
    accelerator
        Whose processes hold it.
    model
        The denoiser as accelerate wrapped it.
    optimizer
        The optimiser as accelerate wrapped it.
    average
        The average of the weights, if there is one.
    """

    accelerator: Any
    model: Any
    optimizer: Any
    average: Average | None

    @property
    def sharded(self) -> bool:
        """Whether a process holds only its shard of the weights (FSDP)."""
        return str(self.accelerator.distributed_type).endswith("FSDP")

    def weights(self) -> dict[str, Any]:
        """The trained weights by name, whole; under FSDP on the main process only.

        Every process has to call it.
        """
        if self.sharded:
            options = {"cpu_offload": True, "ignore_frozen_params": True}
            whole: dict[str, Any] = _of_shards("get_model_state_dict", self.model, **options)
            return whole
        plain = self.accelerator.unwrap_model(self.model)
        return {
            name: parameter.detach()
            for name, parameter in plain.named_parameters()
            if parameter.requires_grad
        }

    def averaged(self) -> dict[str, Any]:
        """The weights to give away: the average's if there is one. Every process calls it."""
        if self.average is None:
            return self.weights()
        with self.average.in_place():
            return {name: value.clone() for name, value in self.weights().items()}

    def export(self, train: Train, backbone: Backbone, folder: Path) -> None:
        """Write the averaged weights as diffusers reads them, into ``folder``.

        A LoRA or the whole denoiser, as the training is; every process has to call it.
        """
        whole = self.averaged() if self.sharded else {}
        if self.accelerator.is_main_process:
            plain = self.accelerator.unwrap_model(self.model)
            if self.sharded:  # a denoiser on the CPU with what all shards together are
                plain = type(plain).from_config(plain.config)
                if train.method == "lora":
                    add_lora(backbone.with_denoiser(plain), train)
                plain.load_state_dict(whole, strict=False)
            save = save_lora if train.method == "lora" else save_full
            with self.average.in_place() if self.average and not whole else nullcontext():
                save(backbone.with_denoiser(plain), folder)
        self.accelerator.wait_for_everyone()

    def save(self, out: Path, progress: Progress) -> None:
        """Write the state to resume from, then forget older ones. Every process calls it."""
        plain, scaler = self.optimizer.optimizer, self.accelerator.scaler
        state = {
            "weights": self.weights(),
            "average": self.averaged() if self.average is not None else None,
            "optimizer": _of_shards("get_optimizer_state_dict", self.model, plain, cpu_offload=True)
            if self.sharded
            else plain.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }
        if self.accelerator.is_main_process:
            target = out / STATE / step_name(progress.step)
            with atomic_folder(target) as folder:
                torch.save(state, folder / "state.pt")
                write_json(folder / "state.json", asdict(progress))
            for older in (out / STATE).glob("step-*"):
                if older != target:
                    shutil.rmtree(older, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def load(self, out: Path) -> Progress:
        """Take up the newest state; a fresh `Progress` where there is none.

        Raises `FifaError` for a state that cannot be read.
        """
        newest = latest_state(out)
        if newest is None:
            return Progress()
        try:
            known = read_json(newest / "state.json", "the state of the training")
            progress = Progress(**{**known, "sums": tuple(known["sums"])})
            state = torch.load(newest / "state.pt", map_location="cpu", weights_only=True)
            weights, average = state["weights"], state["average"]
            optimizer, scaler = state["optimizer"], state["scaler"]
        except (OSError, ValueError, TypeError, RuntimeError, EOFError, KeyError) as error:
            raise FifaError(
                f"the state cannot be read: {error}",
                where=str(newest),
                do="remove that folder to start again, or choose another --out",
            ) from error
        if self.average is not None:
            self._put(average)
            with torch.no_grad():
                for value, weight in zip(self.average.values, self.average.parameters, strict=True):
                    value.copy_(weight)
        self._put(weights)
        if self.sharded:
            _of_shards("set_optimizer_state_dict", self.model, self.optimizer.optimizer, optimizer)
        else:
            self.optimizer.optimizer.load_state_dict(optimizer)
        if self.accelerator.scaler is not None and scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        return progress

    def _put(self, weights: dict[str, Any]) -> None:
        if self.sharded:
            _of_shards("set_model_state_dict", self.model, weights, strict=False)
            return
        own = self.weights()
        if own.keys() != weights.keys():
            raise FifaError(
                "the saved state belongs to other weights",
                do="remove OUT/state, or choose another --out",
            )
        for name, value in own.items():
            value.copy_(weights[name])


def _of_shards(function: str, *given: Any, **options: bool) -> Any:
    """A function of `torch.distributed.checkpoint.state_dict`; states are whole, not in shards."""
    api = require("torch.distributed.checkpoint.state_dict", "train")
    return getattr(api, function)(
        *given, options=api.StateDictOptions(full_state_dict=True, **options)
    )
