"""Every knob of a training, once: a frozen dataclass, checked when it is made; presets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from fifa.config import build
from fifa.errors import FifaError
from fifa.shards.files import read_yaml

_checked = ConfigDict(extra="forbid", validate_default=True)
_Count = Annotated[int, Field(ge=1)]
_CountOrZero = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# What may differ when a training is taken up again: it changes no weight by more than rounding.
FREE = frozenset(
    {"device", "compile", "channels_last", "gradient_checkpointing", "micro_batch"}
) | {
    "tracker",
    "log_every",
    "save_every",
}


@dataclass(frozen=True, config=_checked)
class Train:
    """A training, whole.

    Parameters
    ----------
    source
        A run folder, or any preference data with pixels: ours or the diffusers schema.
    model
        A model folder in diffusers layout, or a hub id.
    resolution
        Pixels a side (of a square, or of the buckets' area); None: what the model was made for.
    buckets
        Aspect-ratio buckets in place of a centre crop.
    flips
        Mirror both images of a pair in half of its presentations.
    cache_dtype
        What latents and embeddings are kept in.
    prompt_dropout
        The share of presentations with the empty prompt.
    method
        ``lora``: adapters; ``full``: all weights of the UNet or transformer.
    rank, alpha, targets, lora_dropout
        Of the adapters. ``alpha`` None: the rank. ``targets`` empty: the model's attention.
    loss, beta, poly, mapo, sft
        As in `fifa.training.losses.Loss`.
    weights
        Whether the pairs' own weights enter the loss.
    label
        For the losses ``soft`` and ``smpo``: ``people``, or ``margin`` for
        ``sigmoid(label_scale * signed margin)``.
    label_scale
        See ``label``.
    draws
        0: new noise and time every epoch, the reference computed at every step. D > 0: each pair
        has D of them, and the reference's errors on these are computed once, before training.
    batch
        Pairs a step, over all processes and micro-batches.
    micro_batch
        Pairs in one forward pass.
    steps, epochs
        ``steps`` if given; otherwise as many as ``epochs`` take.
    optimizer
        ``adamw``, ``adamw8bit`` (bitsandbytes) or ``adafactor``.
    lr, schedule, warmup
        The learning rate; ``constant``, ``linear`` or ``cosine`` to 0; steps of linear warm-up.
    weight_decay, beta1, beta2, epsilon
        Of the optimiser.
    clip
        The largest norm of the gradient; 0 does not clip. Adafactor clips for itself.
    ema
        Decay of the moving average of the weights, which is then what is written; 0: none.
    seed
        Of everything random.
    device
        ``cpu``; None for what accelerate chooses.
    dtype
        ``float32``, or ``bfloat16`` or ``float16`` under autocast; None: as accelerate is
        configured, which is ``float32`` unless it was told otherwise.
    compile, channels_last, gradient_checkpointing
        `torch.compile`; convolutions with channels last; activations computed twice to save memory.
    tracker
        Beside ``stats.jsonl``: ``tensorboard``, ``wandb``, ``trackio`` or ``none``.
    log_every, save_every, checkpoint_every, sample_every
        Steps between two lines of statistics, two states to resume from, two sets of weights to
        keep, two sheets of samples; 0: never (weights are always written at the end).
    sample_prompts
        Empty: the first four prompts of the training pairs.
    sample_steps
        Denoising steps of a sample.
    """

    source: str = ""
    model: str = ""
    resolution: _Count | None = None
    buckets: bool = False
    flips: bool = False
    cache_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    prompt_dropout: _Share = 0.0
    method: Literal["lora", "full"] = "lora"
    rank: _Count = 8
    alpha: _Positive | None = None
    targets: tuple[str, ...] = ()
    lora_dropout: _Share = 0.0
    loss: Literal["sigmoid", "ipo", "hinge", "mapo", "poly", "soft", "smpo"] = "sigmoid"
    beta: _Positive = 5000.0
    poly: _NotNegative = 8.0
    mapo: _NotNegative = 0.1
    sft: _NotNegative = 0.0
    weights: bool = True
    label: Literal["people", "margin"] = "people"
    label_scale: _Positive = 1.0
    draws: _CountOrZero = 0
    batch: _Count = 32
    micro_batch: _Count = 1
    steps: _Count | None = None
    epochs: _Positive = 10.0
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    lr: _Positive = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: _CountOrZero = 0
    weight_decay: _NotNegative = 0.01
    beta1: _Share = 0.9
    beta2: _Share = 0.999
    epsilon: _Positive = 1e-8
    clip: _NotNegative = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: int = 0
    device: Literal["cpu"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    compile: bool = False
    channels_last: bool = False
    gradient_checkpointing: bool = False
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    log_every: _Count = 1
    save_every: _Count = 100
    checkpoint_every: _CountOrZero = 0
    sample_every: _CountOrZero = 0
    sample_prompts: tuple[str, ...] = ()
    sample_steps: _Count = 25

    def to_yaml(self) -> str:
        """The training as YAML; `from_yaml` gives the same one back."""
        plain = TypeAdapter(Train).dump_python(self, mode="json")
        return str(yaml.safe_dump(plain, sort_keys=False))

    def differences(self, other: Train, *, but: frozenset[str] = frozenset()) -> list[str]:
        """``knob: here / there`` for every knob in which two trainings differ."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{knob}: {mine[knob]!r} / {theirs[knob]!r}"
            for knob in mine
            if mine[knob] != theirs[knob] and knob not in but
        ]

    def steps_of(self, pairs: int) -> int:
        """How many steps the training takes on so many pairs."""
        return self.steps or max(1, round(self.epochs * pairs / self.batch))


def from_yaml(path: Path) -> Train:
    """The training in a YAML file; what it leaves out has its default.

    Raises `FifaError` for text that is no YAML, unknown knobs and values out of range.
    """
    train: Train = build(Train, read_yaml(path, "the training"), where=str(path))
    return train


def changed(train: Train, **knobs: Any) -> Train:
    """``train`` with some knobs replaced (None leaves a knob as it is).

    Epochs that are given take the place of steps that were there before.
    """
    given = {name: value for name, value in knobs.items() if value is not None}
    if "epochs" in given and "steps" not in given:
        train = replace(train, steps=None)
    new: Train = build(Train, {**asdict(train), **given}, where="the training's options")
    return new


def paper_sd15() -> Train:
    """Diffusion-DPO on SD1.5, as its authors trained it.

    From Salesforce's ``launchers/sd15.sh`` and ``train.py`` (github.com/SalesforceAIResearch/
    DiffusionDPO): beta 5,000; lr 1e-8 scaled by the batch of 2,048 pairs; 2,000 steps, 500 of
    them warm-up, then constant; AdamW (0.9, 0.999), weight decay 0.01, gradients clipped at 1;
    every fifth prompt empty; half of the images mirrored (both of a pair alike here); all
    weights; half precision, bf16 for their fp16.
    """
    return Train(
        method="full",
        loss="sigmoid",
        beta=5000.0,
        lr=1e-8 * 2048,
        batch=2048,
        steps=2000,
        schedule="constant",
        warmup=500,
        optimizer="adamw",
        weight_decay=0.01,
        clip=1.0,
        prompt_dropout=0.2,
        flips=True,
        resolution=512,
        dtype="bfloat16",
        save_every=100,
        checkpoint_every=500,
    )


def paper_sdxl() -> Train:
    """Diffusion-DPO on SDXL, as its authors trained it.

    From ``launchers/sdxl.sh`` and ``train.py`` (see `paper_sd15`): 200 steps of warm-up of 2,000
    (a comment there gives 30 hours for 200 steps), Adafactor without relative steps, gradient
    checkpointing, 1,024 pixels, the rest as for SD1.5. Sizes and crops are each image's own, where
    theirs are the constant resolution.
    """
    return replace(
        paper_sd15(),
        warmup=200,
        optimizer="adafactor",
        gradient_checkpointing=True,
        resolution=1024,
        checkpoint_every=200,
    )


def lora_small() -> Train:
    """A LoRA on a few hundred to a few thousand pairs, on one GPU.

    From the command in diffusers' ``examples/research_projects/diffusion_dpo/README.md``: rank 8
    with alpha 8, lr 1e-5, constant, batch 32 (16 x 2 accumulated), beta 2,500 of its convention,
    which is our 5,000. Its 10,000 steps and 8-bit AdamW are not taken over: a small subset
    takes ten epochs, and adapters' states are small.
    """
    return Train(
        method="lora",
        rank=8,
        alpha=8.0,
        loss="sigmoid",
        beta=5000.0,
        lr=1e-5,
        batch=32,
        epochs=10.0,
        schedule="constant",
        optimizer="adamw",
    )


PRESETS: dict[str, Callable[[], Train]] = {
    "paper-sd15": paper_sd15,
    "paper-sdxl": paper_sdxl,
    "lora-small": lora_small,
}


def preset(name: str) -> Train:
    """The preset called ``name``; `FifaError` if there is none."""
    if name not in PRESETS:
        raise FifaError(f"no such preset: {name}", do=", ".join(PRESETS))
    return PRESETS[name]()
