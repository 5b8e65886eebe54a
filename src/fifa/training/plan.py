"""What a training will take, said before it takes it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Literal

from fifa.config import Train
from fifa.errors import FifaError
from fifa.models.families import Activations
from fifa.models.frozen import kept_bytes
from fifa.models.runtime import SHARE, even_batch
from fifa.training.backbones import Backbone
from fifa.training.backbones.parts import shapes_in
from fifa.training.encoding import image_bytes, images_at_once, prompts_at_once
from fifa.training.losses import LOSSES

# Bytes a trained number takes beside its weight and its gradient: AdamW keeps two float32, the
# 8-bit one two bytes, Adafactor next to nothing (a row and a column of each matrix).
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0}
FLOAT = 4
HALF = 2


@dataclass(frozen=True)
class Memory:
    """Bytes that a training holds on one device, which holds one network at a time while encoding.

    Those of activations follow from the family's `Activations`; 0 where it has none.

    Parameters
    ----------
    weights
        The denoiser's, those of the frozen copy if there is one, and of text encoders that stay.
    training
        Gradients, the optimiser's state, the average.
    fixed
        What comes on top whatever the micro-batch.
    pair, pair_checkpointed
        Activations of a pair, without and with gradient checkpointing.
    text, vae
        Weights of the text encoders, and of the VAE.
    prompts, images
        Activations of what goes through them at once.
    """

    weights: int
    training: int
    fixed: int
    pair: int
    pair_checkpointed: int
    text: int
    vae: int
    prompts: int
    images: int

    @property
    def known(self) -> bool:
        """Whether activations are."""
        return self.pair > 0

    @property
    def encoding(self) -> int:
        """While the cache is made."""
        return max(self.text + self.prompts, self.vae + self.images)

    @property
    def held(self) -> int:
        """While training, without activations."""
        return self.weights + self.training

    def activations(self, pairs: int, checkpointed: bool) -> int:
        """Of a micro-batch of so many pairs."""
        return self.fixed + pairs * (self.pair_checkpointed if checkpointed else self.pair)

    def fit(self, train: Train, free: int, share: int) -> tuple[int, bool]:
        """A micro-batch that should fit, and whether with gradient checkpointing; 0 if none.

        As `fifa.training.fit` finds one by trying.

        Parameters
        ----------
        train
            Says what may be chosen.
        free
            Bytes on the device.
        share
            Pairs of a batch that are this process's.
        """
        given, twice = train.micro_batch, train.offload or train.gradient_checkpointing
        pairs, checkpointed = 0, False
        tries = [(one, SHARE, share) for one in ((False, True) if twice is None else (twice,))]
        for checkpointed, part, most in (*tries, (twice is not False, 1.0, 1)):
            each = self.pair_checkpointed if checkpointed else self.pair
            room = part * free - self.held - self.fixed
            pairs = max(0, min(most, int(room // each)))
            if pairs >= (given or 1):
                break
        if given is not None:
            return given, checkpointed
        return (even_batch(share, pairs) if pairs else 0), checkpointed


def memory_of(
    train: Train, backbone: Backbone, resolution: int, compute: str, shards: int = 1
) -> Memory:
    """The memory that training the model takes; no network is loaded.

    An adapter on a layer ``[out, in, ...]`` has ``[rank, in, ...]`` and ``[out, rank]``.

    Parameters
    ----------
    train
        The training.
    backbone
        Its model.
    resolution
        Pixels a side of an image.
    compute
        What the denoiser computes in.
    shards
        Devices that share gradients and optimiser (FSDP); each has loaded all weights before.
    """
    folder, family = backbone.origin, backbone.family
    shapes = {part: shapes_in(folder.path / part) for part in folder.parts}
    shapes[family.part] = backbone.shapes
    counts = {part: sum(map(prod, found.values())) for part, found in shapes.items()}
    numbers = counts.get(family.part, 0)
    casts = 0
    if train.method == "lora":
        ends = tuple(f".{target}.weight" for target in train.targets or family.targets)
        trained = sum(
            train.rank * (shape[0] + prod(shape[1:]))
            for name, shape in shapes.get(family.part, {}).items()
            if name.endswith(ends) and len(shape) >= 2
        )
        kept = folder.quantized or folder.kept
        weights = kept_bytes(shapes[family.part], kept, folder.dtype.itemsize) + trained * FLOAT
    else:
        trained = numbers
        weights = numbers * FLOAT * (2 if needs_copy(train) else 1)
        # autocast keeps a half of every weight until the backward pass is over
        casts = 0 if compute == "float32" else numbers * HALF
    average = FLOAT if train.ema else 0
    known = family.activations or Activations(numbers, 0, 0, 0, 0, 0)
    # Of a network with w times the width and the depth, w^3 times the numbers, layers have w times
    # the activations, and there are w times as many.
    scale = (numbers / known.numbers) ** (2 / 3) * (2 if compute == "float32" else 1)
    latents = (resolution // backbone.vae.factor) ** 2
    text, vae = folder.encoding.itemsize, backbone.vae.dtype.itemsize
    prompts = prompts_at_once(backbone) * known.prompt * text // HALF
    images = images_at_once(backbone, resolution) * image_bytes(backbone, resolution)
    texts = sum(n for part, n in counts.items() if part.startswith("text_encoder")) * text
    return Memory(
        weights + (0 if train.cache_prompts else texts),
        training=trained * (FLOAT + OPTIMIZER_BYTES[train.optimizer] + average) // shards,
        fixed=int(known.fixed * scale) + casts,
        pair=int(known.pair * scale) * latents,
        pair_checkpointed=int(known.pair_checkpointed * scale) * latents,
        text=texts,
        vae=counts.get("vae", 0) * vae,
        prompts=prompts,
        images=images,
    )


def needs_copy(train: Train) -> bool:
    """Whether a frozen copy of the network is the reference."""
    return train.method == "full" and not train.draws and LOSSES[train.loss].needs_reference


def distilled_warning(title: str, lora: bool) -> str:
    """What training a model that was distilled to few steps does to it, for people."""
    into_both = ", and load the LoRA into both" if lora else ""
    return (
        f"{title} was distilled to few steps, which training on pairs is known to undo: train what "
        f"it was distilled from{into_both}"
    )


@dataclass(frozen=True)
class Plan:
    """What a training will do.

    Parameters
    ----------
    train
        The training.
    pairs, held
        With a winner, to train on; and held out.
    dropped
        Rows that are no such pairs, by reason.
    processes
        That share the batch.
    resolution
        Pixels a side.
    buckets
        Whether images keep about their aspect ratio.
    dtype
        What the denoiser computes in.
    latents, prompts
        Bytes of them in the cache.
    memory
        Of one device.
    device
        Which: a torch device.
    free
        What is free there; None where that is not known.
    why
        The reason for the loss, where it was chosen here.
    distilled
        What the model is called, where it was distilled.
    init_lora
        What names the content of the LoRA in its base.
    what
        What is trained on: ``pairs``, or ``images`` one by one.
    """

    train: Train
    pairs: int
    held: int
    dropped: dict[str, int]
    processes: int
    resolution: int
    buckets: bool
    dtype: str
    latents: int
    prompts: int
    memory: Memory
    device: Any
    free: int | None
    why: str = ""
    distilled: str = ""
    init_lora: str | None = None
    what: Literal["pairs", "images"] = "pairs"

    def check(self) -> None:
        """Raise `FifaError` if the training does not fit on the device: before hours are spent.

        Where it computes on a processor, only what is held for sure is counted.
        """
        cuda, memory = self.device.type == "cuda", self.memory
        pairs, checkpointed = self.fit or (0, False)
        training = memory.held + (memory.activations(max(1, pairs), checkpointed) if cuda else 0)
        needs = {
            "training": (
                training,
                "a smaller --micro-batch (if it is not given, one is found that fits), "
                "--gradient-checkpointing, --method lora, --dtype bfloat16, --draws 8 (no frozen "
                "copy), --optimizer adafactor, or shard over several devices (FSDP through "
                "accelerate)",
            ),
            "encoding": (max(memory.text, memory.vae), "--dtype bfloat16"),
        }
        for what, (need, do) in needs.items():
            if self.free is not None and need > self.free:
                raise FifaError(
                    f"too little memory: {what} needs about {size(need)}, "
                    f"{size(self.free)} are free",
                    where=str(self.device),
                    do=do,
                )

    @property
    def share(self) -> int:
        """Pairs of a batch that a process has, at most."""
        return ceil(self.train.batch / self.processes)

    @property
    def fit(self) -> tuple[int, bool] | None:
        """Pairs of a micro-batch, and whether with gradient checkpointing, as far as it is known.

        What is not given is found when training begins; on CUDA the figures tell it about.
        """
        train = self.train
        if self.device.type == "cuda" and self.memory.known and self.free is not None:
            return self.memory.fit(train, self.free, self.share)
        return (
            (train.micro_batch, bool(train.offload or train.gradient_checkpointing))
            if train.micro_batch
            else None
        )

    @property
    def steps(self) -> int:
        """How many steps there are in all."""
        return self.train.steps_of(self.pairs)

    @property
    def presented(self) -> int:
        """How often a pair is presented in all."""
        return self.steps * self.train.batch

    @property
    def scalars(self) -> int:
        """How many errors of the reference are computed before training."""
        pairs = min(self.pairs, self.presented)
        return (2 if self.what == "pairs" else 1) * pairs * self.train.draws

    def __str__(self) -> str:
        """A line a fact."""
        train, memory = self.train, self.memory
        dropped = ", ".join(f"{n:,} {why}" for why, n in self.dropped.items())
        shape = "in buckets by aspect ratio" if self.buckets else "cropped to squares"
        lines = [
            f"{self.what:11} {self.pairs:,}"
            + (f", {self.held:,} more are held out" if self.held else "")
            + (f" (left out: {dropped})" if dropped else ""),
            f"steps       {self.steps:,} of {train.batch:,} {self.what}: "
            f"{self.processes:,} process(es), {self._micro_batches}",
            f"epochs      {self.presented / self.pairs:.2f} ({self.presented:,} {self.what} "
            f"presented){self._order}",
            f"resolution  {self.resolution:,}, {shape}, computed in {self.dtype}",
            f"reference   {self._reference}",
            f"cache       about {size(self.latents + self.prompts)} on disk (latents "
            f"{size(self.latents)}, {self._prompts})",
            f"memory      {self._memory}",
            f"encoding    {size(memory.encoding)} before that (text encoders "
            f"{size(memory.text + memory.prompts)}, then VAE {size(memory.vae + memory.images)})",
            f"free        {'unknown' if self.free is None else size(self.free)}",
        ]
        if self.distilled:
            lora = self.train.method == "lora"
            lines.append(f"warning     {distilled_warning(self.distilled, lora)}")
        return "\n".join(lines)

    @property
    def _prompts(self) -> str:
        """What becomes of prompts, for people."""
        if self.train.cache_prompts:
            return f"prompts {size(self.prompts)}"
        return "prompts are encoded at every step"

    @property
    def _order(self) -> str:
        """In which order pairs are, where it is not random, for people."""
        train = self.train
        return "" if train.order == "random" else f", {train.order} by {train.order_by}"

    @property
    def _micro_batches(self) -> str:
        """How a batch is cut, for people."""
        if self.fit is None or not self.fit[0]:
            return "in micro-batches as large as fit"
        pairs, checkpointed = self.fit
        each = f"{ceil(self.share / pairs):,} micro-batch(es) of up to {pairs:,} each"
        auto = " (auto)" if self.train.micro_batch is None else ""
        return each + auto + (", activations computed twice" if checkpointed else "")

    @property
    def _memory(self) -> str:
        """What training takes, for people."""
        memory = self.memory
        how = f" in {self.train.quantize}" if self.train.quantize else ""
        how = ", two blocks at a time" if self.train.offload else how
        parts = f"weights {size(memory.weights)}{how}, "
        parts += f"gradients and optimiser {size(memory.training)}"
        if self.fit is None or not memory.known:
            return f"{size(memory.held)} at least, activations come on top ({parts})"
        activations = memory.activations(max(1, self.fit[0]), self.fit[1])
        return f"{size(memory.held + activations)} ({parts}, activations {size(activations)})"

    @property
    def _reference(self) -> str:
        """How the reference's errors come about, for people."""
        if self.train.draws:
            return f"{self.scalars:,} precomputed scalars on {self.train.draws:,} draws a pair"
        if not LOSSES[self.train.loss].needs_reference:
            return f"none: the loss {self.train.loss} needs none"
        if self.train.method == "lora":
            return "the same network with its adapters off, at every step"
        return "a frozen copy of the network, at every step"


def size(number: int) -> str:
    """Bytes for people: ``3.44 GB``, ``12.3 MB``."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
