"""What is trained, what trains it, how it is written, and the state a killed training goes on from.

A LoRA on the denoiser, or all of its weights. Weights are written as diffusers reads them: a LoRA
that the stock pipeline's ``load_lora_weights`` takes, its rank and alpha in the file's metadata,
or a folder for the denoiser's ``from_pretrained``. A state is a folder of its own that is there
whole or not at all; the older one goes only when the newer is there. Its tensors are what
``torch.load(weights_only=True)`` opens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fifa.config import Train
from fifa.errors import FifaError
from fifa.models.lora import LORA_FILE, METADATA
from fifa.models.optional import require
from fifa.shards.files import (
    atomic_folder,
    atomic_path,
    content_digest,
    digest,
    read_json,
    write_json,
)
from fifa.shards.manifest import write_manifest
from fifa.training.backbones.base import Backbone
from fifa.training.losses import START

STATE = "state"
TENSORS, FACTS = "state.pt", "state.json"  # of a state
CHECKPOINTS = "checkpoints"
BEST = "best"  # the weights with the lowest loss on held-out pairs
NAME = "default"  # of the adapter within the denoiser


def add_lora(backbone: Backbone, train: Train) -> list[torch.nn.Parameter]:
    """Put an adapter on the denoiser and return its parameters, float32, the only trainable ones.

    The low-rank adapter of a weight W (arXiv:2106.09685) is ``W x + (alpha / rank) B A x``, with
    ``rank`` rows in A and columns in B, and dropout of its input while training. A is drawn from a
    normal distribution of deviation 1 / rank, B is zero: the denoiser predicts as before. The same
    seed gives the same adapter.

    Raises
    ------
    FifaError
        If the denoiser has no module that ``train.targets`` names.
    """
    peft = require("peft", "train")
    denoiser: Any = backbone.denoiser
    config = peft.LoraConfig(
        r=train.rank,
        lora_alpha=train.rank if train.alpha is None else train.alpha,
        lora_dropout=train.lora_dropout,
        target_modules=layers(denoiser, train.targets or backbone.family.targets),
        init_lora_weights="gaussian",
    )
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        try:
            denoiser.add_adapter(config, adapter_name=NAME)
        except ValueError as error:
            raise FifaError(
                f"no adapter fits: {str(error).splitlines()[0]}",
                where=f"the {backbone.family.part}",
                do=f"name other modules than {', '.join(config.target_modules)}",
            ) from error
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in trained:  # in float32: an update of 1e-5 is lost in the rounding of a half
        parameter.data = parameter.data.to(backbone.device, torch.float32)
    return trained


def layers(denoiser: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """``targets``, with full names where the end of one names lists of layers too.

    peft refuses these: in FLUX.2 ``attn.to_out`` is a layer in some blocks and a list in others.
    """
    modules = dict(denoiser.named_modules())
    found: list[str] = []
    for target in targets:
        named = [name for name in modules if name == target or name.endswith(f".{target}")]
        plain = [name for name in named if not isinstance(modules[name], torch.nn.ModuleList)]
        found += [target] if len(plain) == len(named) else plain
    return found


def train_all(backbone: Backbone) -> list[torch.nn.Parameter]:
    """Make all the denoiser's parameters trainable, float32, and return them."""
    backbone.denoiser.float().requires_grad_(True)
    return list(backbone.denoiser.parameters())


def save_lora(backbone: Backbone, folder: Path) -> Path:
    """Write the adapter as ``pytorch_lora_weights.safetensors`` into ``folder``; its path.

    The same weights give the same bytes.
    """
    peft = require("peft", "train")
    denoiser: Any = backbone.denoiser
    name = backbone.family.part
    config = getattr(denoiser, "peft_config", {}).get(NAME)
    if config is None:
        raise FifaError("there is no adapter to save")
    state = peft.utils.get_peft_model_state_dict(denoiser, adapter_name=NAME)
    tensors = {f"{name}.{key}": value.detach().cpu().contiguous() for key, value in state.items()}
    # Without these a reader takes alpha for the rank. Only what every version of peft knows, and
    # sorted: peft keeps the targets as a set, whose order changes from process to process.
    settings = {
        f"{name}.r": config.r,
        f"{name}.lora_alpha": config.lora_alpha,
        f"{name}.lora_dropout": config.lora_dropout,
        f"{name}.target_modules": sorted(config.target_modules),
    }
    # One key: safetensors writes several in any order.
    metadata = {METADATA: json.dumps(settings, indent=2, sort_keys=True)}
    path = folder / LORA_FILE
    with atomic_path(path) as temporary:
        require("safetensors.torch", "train").save_file(tensors, temporary, metadata=metadata)
    return path


def save_full(backbone: Backbone, folder: Path) -> Path:
    """Write the denoiser as ``unet`` or ``transformer`` into ``folder``; the path.

    What ``from_pretrained`` of its class reads, weights in safetensors.
    """
    denoiser: Any = backbone.denoiser
    path = folder / backbone.family.part
    with atomic_folder(path) as made:
        denoiser.save_pretrained(made)
    return path


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Parameters
    ----------
    step
        Steps done.
    pairs
        Pairs trained on; those of skipped steps do not count.
    seconds
        Time spent in the loop, over all its interruptions.
    skipped
        Steps that changed no weight, as float16's gradients overflowed.
    stats
        `fifa.training.metrics.stats_digest` when a state was saved.
    window, since, sums
        Since the last line of metrics: pairs, the time at that line, and what
        `fifa.training.loop.Loop.forward` has added up.
    running
        What `fifa.training.losses.run_on` keeps.
    best, best_step
        The lowest loss on held-out pairs, and after which step; None and 0 before the first.
    worse
        Measurements on held-out pairs since then.
    displaced
        By how much of the reference's error the policy's is above it, on the preferred images of
        held-out pairs.
    """

    step: int = 0
    pairs: int = 0
    seconds: float = 0.0
    skipped: int = 0
    stats: str = ""
    window: int = 0
    since: float = 0.0
    sums: tuple[float, ...] = ()
    running: tuple[float, ...] = START
    best: float | None = None
    best_step: int = 0
    worse: int = 0
    displaced: float = 0.0

    def after_step(
        self,
        sums: Sequence[float],
        pairs: int,
        seconds: float,
        *,
        running: Sequence[float] = START,
        skipped: bool = False,
    ) -> Progress:
        """After one more step of so many pairs, at that time."""
        known = self.sums or (0.0,) * len(sums)
        return replace(
            self,
            step=self.step + 1,
            pairs=self.pairs + (0 if skipped else pairs),
            seconds=seconds,
            skipped=self.skipped + skipped,
            window=self.window + pairs,
            sums=tuple(a + b for a, b in zip(known, sums, strict=True)),
            running=tuple(running),
        )

    def after_holdout(self, found: dict[str, Any]) -> Progress:
        """After a measurement by `fifa.training.holdout.Holdout`."""
        loss = found["heldout_loss"] or 0.0
        error, above = found["heldout_winner_error"], found["heldout_winner_minus_reference"]
        displaced = above / (error - above) if error and above else 0.0
        if self.best is None or loss < self.best:
            best = replace(self, best=loss, best_step=self.step, worse=0)
        else:
            best = replace(self, worse=self.worse + 1)
        return replace(best, displaced=displaced)

    def after_metrics(self) -> Progress:
        """After a line of metrics."""
        return replace(self, window=0, since=self.seconds, sums=())


def step_name(step: int) -> str:
    """``step-000100``: the name of what belongs to a step, in an order that is the steps'."""
    return f"step-{step:06d}"


def latest_state(out: Path) -> Path | None:
    """The newest state in a checkpoint folder; None before the first."""
    found = sorted((out / STATE).glob(f"step-*/{FACTS}"))
    return found[-1].parent if found else None


def latest_step(out: Path) -> int:
    """The step of the newest state in a checkpoint folder; 0 before the first."""
    newest = latest_state(out)
    return int(newest.name.rpartition("-")[2]) if newest else 0


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


def check_optimizer(train: Train) -> None:
    """Raise `FifaError` where what the optimiser needs is not installed."""
    if train.optimizer == "adamw8bit":
        _bitsandbytes()


def _bitsandbytes() -> Any:
    choose = "pip install 'fifa-align[quant]', or choose --optimizer adamw or adafactor"
    return require("bitsandbytes", what="8-bit AdamW", do=choose)


def make_optimizer(train: Train, parameters: Sequence[Any], device: Any) -> Any:
    """The optimiser that the training asks for.

    AdamW is fused on CPU and CUDA. Adafactor is that of transformers with Salesforce's settings:
    the learning rate is the training's, updates are clipped at a root mean square of 1.

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
        return _bitsandbytes().optim.AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings, fused=device.type in ("cpu", "cuda"))


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
    running
        What `fifa.training.losses.run_on` keeps, float32 ``[2]``; changed in place.
    """

    accelerator: Any
    model: Any
    optimizer: Any
    average: Average | None
    running: Tensor

    @property
    def sharded(self) -> bool:
        """Whether a process holds only its shard of the weights (FSDP)."""
        return str(self.accelerator.distributed_type).endswith("FSDP")

    def compile(self) -> None:
        """Compile the denoiser; after what fits is known, as every size tried is compiled anew.

        Where its class names the blocks that it repeats, only these: a compiled block serves all
        of one width, so that a start takes seconds where the whole network takes minutes.
        """
        plain = self.accelerator.unwrap_model(self.model)
        if getattr(plain, "_repeated_blocks", None):
            # for every width, with and without adapters, with and without gradients
            require("torch._dynamo", "train").config.recompile_limit = 64
            plain.compile_repeated_blocks()
        else:
            plain.compile()

    def checkpoint_gradients(self, on: bool) -> None:
        """Whether activations are computed a second time in the backward pass."""
        plain = self.accelerator.unwrap_model(self.model)
        if on:
            plain.enable_gradient_checkpointing()
        elif plain.is_gradient_checkpointing:
            plain.disable_gradient_checkpointing()

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

    def to_give_away(self) -> AbstractContextManager[None]:
        """The weights to give away in their place while it lasts: the average's if there is one."""
        return self.average.in_place() if self.average else nullcontext()

    def averaged(self) -> dict[str, Any]:
        """The weights to give away. Every process calls it."""
        if self.average is None:
            return self.weights()
        with self.to_give_away():
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
            with nullcontext() if whole else self.to_give_away():
                written = save(backbone.with_denoiser(plain), folder)
            write_manifest(folder, [written])
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
                _save(state, folder / TENSORS)
                named = _digest(folder, asdict(progress))
                write_json(folder / FACTS, {**asdict(progress), "digest": named})
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
            known = read_json(newest / FACTS, "the state of the training")
            if known.pop("digest", None) != _digest(newest, known):
                raise ValueError("its files are not as they were written")
            progress = Progress(
                **{**known, "sums": tuple(known["sums"]), "running": tuple(known["running"])}
            )
            state = torch.load(newest / TENSORS, map_location="cpu", weights_only=True)
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


def make_state(train: Train, backbone: Backbone, accelerator: Any) -> TrainState:
    """The denoiser as it is trained: adapters in, laid out, wrapped by accelerate."""
    learned = add_lora(backbone, train) if train.method == "lora" else train_all(backbone)
    model: Any = backbone.denoiser
    if train.method == "lora" and accelerator.mixed_precision != "no":
        # Autocast casts an adapter's input and weights to the base's type; peft would first widen
        # the input to the adapter's float32: the same numbers, with a copy of every input kept.
        layer = require("peft.tuners.tuners_utils", "train").BaseTunerLayer
        for module in model.modules():
            if isinstance(module, layer):
                module.cast_input_dtype_enabled = False
    if train.gradient_checkpointing or train.offload:
        model.enable_gradient_checkpointing()
    if train.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(train, learned, accelerator.device)
    # what is quantised or kept in CPU memory is where it should be
    there = train.quantize or train.offload or backbone.origin.quantized
    placed = [False, True] if there else None
    model, optimizer = accelerator.prepare(model, optimizer, device_placement=placed)
    backbone.denoiser = model
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = Average(learned, train.ema) if train.ema else None
    running = torch.tensor(START, device=accelerator.device)
    return TrainState(accelerator, model, optimizer, average, running)


def _digest(state: Path, progress: dict[str, Any]) -> str:
    """What names a state's tensors and how far it is: a flipped byte in either is noticed."""
    return digest(content_digest(state / TENSORS), progress)


def _save(state: dict[str, Any], path: Path) -> None:
    """`torch.save`, which tells in ever other words that a file could not be written."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError("No space left on device, or the file is too large") from error


def _of_shards(function: str, *given: Any, **options: bool) -> Any:
    """A function of `torch.distributed.checkpoint.state_dict`; states are whole, not in shards."""
    api = require("torch.distributed.checkpoint.state_dict", "train")
    return getattr(api, function)(
        *given, options=api.StateDictOptions(full_state_dict=True, **options)
    )
