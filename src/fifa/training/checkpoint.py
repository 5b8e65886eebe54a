"""The state a killed training goes on from, and the weights it writes.

A state is a folder of its own that is there whole or not at all; the older one goes only when
the newer is there. Tensors are safetensors, or what ``torch.load(weights_only=True)`` opens.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.shards.files import atomic_folder, read_json, write_json
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
        Since the last line of statistics: pairs, the time at that line, and what
        `fifa.training.metrics.sums` has added up.
    """

    step: int = 0
    pairs: int = 0
    seconds: float = 0.0
    window: int = 0
    since: float = 0.0
    sums: tuple[float, ...] = ()

    def after(self, told: Sequence[float], pairs: int, seconds: float) -> Progress:
        """After one more step of so many pairs, at that time."""
        known = self.sums or (0.0,) * len(told)
        return replace(
            self,
            step=self.step + 1,
            pairs=self.pairs + pairs,
            seconds=seconds,
            window=self.window + pairs,
            sums=tuple(a + b for a, b in zip(known, told, strict=True)),
        )

    def told(self) -> Progress:
        """After a line of statistics."""
        return replace(self, window=0, since=self.seconds, sums=())


def step_name(step: int) -> str:
    """``step-000100``: the name of what belongs to a step, in an order that is the steps'."""
    return f"step-{step:06d}"


def latest_state(out: Path) -> Path | None:
    """The newest state in a checkpoint folder; None before the first."""
    found = sorted((out / STATE).glob("step-*/state.json"))
    return found[-1].parent if found else None


def read_progress(out: Path) -> Progress:
    """How far the training in ``out`` has been saved."""
    state = latest_state(out)
    if state is None:
        return Progress()
    known = read_json(state / "state.json", "the state of the training")
    return Progress(**{**known, "sums": tuple(known["sums"])})


@dataclass(frozen=True)
class Trainee:
    """What is trained and what trains it: all that a state holds.

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
            api = require("torch.distributed.checkpoint.state_dict", "train")
            options = api.StateDictOptions(
                full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
            )
            found: dict[str, Any] = api.get_model_state_dict(self.model, options=options)
            return found
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

    def save(self, out: Path, progress: Progress) -> None:
        """Write the state to resume from, then forget older ones. Every process calls it."""
        weights, optimizer = self.weights(), self._optimizer_state()
        average = self.averaged() if self.average is not None else None
        if self.accelerator.is_main_process:
            save_file = require("safetensors.torch", "train").save_file
            target = out / STATE / step_name(progress.step)
            with atomic_folder(target) as folder:
                save_file(_contiguous(weights), folder / "weights.safetensors")
                if average is not None:
                    save_file(_contiguous(average), folder / "average.safetensors")
                scaler = self.accelerator.scaler
                kept = {"optimizer": optimizer, "scaler": scaler.state_dict() if scaler else None}
                require("torch", "train").save(kept, folder / "optimizer.pt")
                write_json(folder / "state.json", asdict(progress))
            for older in (out / STATE).glob("step-*"):
                if older != target:
                    shutil.rmtree(older, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def load(self, out: Path) -> Progress:
        """Take up the newest state; a fresh `Progress` where there is none.

        Raises `FifaError` for a state that cannot be read.
        """
        state = latest_state(out)
        if state is None:
            return Progress()
        torch = require("torch", "train")
        load_file = require("safetensors.torch", "train").load_file
        try:
            progress = read_progress(out)
            weights = load_file(state / "weights.safetensors")
            kept = torch.load(state / "optimizer.pt", map_location="cpu", weights_only=True)
            average = None
            if self.average is not None:
                average = load_file(state / "average.safetensors")
        except (OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
            raise FifaError(
                f"the state cannot be read: {error}",
                where=str(state),
                do="remove that folder to begin anew, or choose another --out",
            ) from error
        if average is not None and self.average is not None:
            self._put(average)
            with torch.no_grad():
                for value, weight in zip(self.average.values, self.average.parameters, strict=True):
                    value.copy_(weight)
        self._put(weights)
        self._put_optimizer_state(kept["optimizer"])
        if self.accelerator.scaler is not None and kept["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(kept["scaler"])
        return progress

    def _put(self, weights: dict[str, Any]) -> None:
        if self.sharded:
            api = require("torch.distributed.checkpoint.state_dict", "train")
            options = api.StateDictOptions(full_state_dict=True, strict=False)
            api.set_model_state_dict(self.model, weights, options=options)
            return
        own = self.weights()
        if own.keys() != weights.keys():
            raise FifaError(
                "the state is of other weights", do="remove OUT/state, or choose another --out"
            )
        for name, value in own.items():
            value.copy_(weights[name])

    def _optimizer_state(self) -> dict[str, Any]:
        plain = self.optimizer.optimizer
        if self.sharded:
            api = require("torch.distributed.checkpoint.state_dict", "train")
            options = api.StateDictOptions(full_state_dict=True, cpu_offload=True)
            found: dict[str, Any] = api.get_optimizer_state_dict(self.model, plain, options=options)
            return found
        state: dict[str, Any] = plain.state_dict()
        return state

    def _put_optimizer_state(self, state: dict[str, Any]) -> None:
        plain = self.optimizer.optimizer
        if self.sharded:
            api = require("torch.distributed.checkpoint.state_dict", "train")
            options = api.StateDictOptions(full_state_dict=True)
            api.set_optimizer_state_dict(self.model, plain, state, options=options)
            return
        plain.load_state_dict(state)


def _contiguous(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: value.contiguous() for name, value in weights.items()}
