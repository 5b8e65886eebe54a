"""Sheets of sample images: the base's beside the training's, drawn while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fifa.config import Train
from fifa.errors import FifaError
from fifa.models.networks import load_parts, loading
from fifa.models.optional import require
from fifa.models.runtime import out_of_memory, release_memory
from fifa.shards.files import atomic_path, read_json
from fifa.training.backbones.base import Backbone
from fifa.training.batches import seed_of
from fifa.training.checkpoint import TrainState, step_name

BASE = "samples/base.png"
PROMPTS = 4
GAP = 8  # pixels between two images


@dataclass(frozen=True)
class Samples:
    """Draws the sheets of one training.

    Parameters
    ----------
    train
        The training: prompts, steps, seed.
    backbone
        The base's folder, and the denoiser.
    captions
        Of the training pairs, of which the first few stand in for prompts not given.
    out
        The training's folder.
    accelerator
        Of all processes, only the main one draws.
    resolution
        Pixels a side.
    """

    train: Train
    backbone: Backbone
    captions: Sequence[str]
    out: Path
    accelerator: Any
    resolution: int

    @property
    def prompts(self) -> Sequence[str]:
        """What is drawn."""
        distinct = [caption for caption in dict.fromkeys(self.captions) if caption]
        return self.train.sample_prompts or tuple(distinct[:PROMPTS]) or ("",)

    def base(self) -> None:
        """Draw the base's images once, with its own stock pipeline; every process calls it.

        Raises `FifaError` where the weights are sharded: the pipeline would need them whole.
        """
        if not self.train.sample_every:
            return
        if str(self.accelerator.distributed_type).endswith("FSDP"):
            raise FifaError(
                "a sharded model cannot make sample images", do="--sample-every 0 with FSDP"
            )
        if self.accelerator.is_main_process and not (self.out / BASE).exists():
            _save(self._drawn({}), self.out / BASE)
            release_memory()
        self.accelerator.wait_for_everyone()

    def draw(self, step: int, state: TrainState) -> None:
        """Write ``samples/step-*.png``: a row a prompt, the base's image left, today's right."""
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(state.model)
            model.eval()
            average = state.average.in_place() if state.average else nullcontext()
            with torch.no_grad(), self.accelerator.autocast(), average:
                images = self._drawn({self.backbone.family.part: model})
            model.train()
            release_memory()
            with Image.open(self.out / BASE) as base:
                sheet = _joined([base, images], axis=1)
            _save(sheet, (self.out / BASE).with_name(f"{step_name(step)}.png"))
        self.accelerator.wait_for_everyone()

    def _drawn(self, parts: dict[str, Any]) -> Image.Image:
        """An image a prompt, one below the other, by the stock pipeline of the base's folder.

        ``parts`` of it are in memory already. Raises `FifaError` where memory does not suffice.
        """
        try:
            return self._made(parts)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise FifaError(
                "out of memory while sample images were made",
                where=str(self.accelerator.device),
                do="--sample-every 0: the same command continues without them",
            ) from error

    def _made(self, parts: dict[str, Any]) -> Image.Image:
        diffusers = require("diffusers", "train")
        index = read_json(self.backbone.folder / "model_index.json", "the pipeline's index")
        if "safety_checker" in index:  # no part of what is trained, and often not downloaded
            parts = {"safety_checker": None, "feature_extractor": None, **parts}
            parts["requires_safety_checker"] = False
        # 16 bits where training computes in them: its memory may have no room for more
        halved = self.accelerator.device.type == "cuda" and self.accelerator.mixed_precision != "no"
        dtype = getattr(torch, self.backbone.family.half if halved else "float32")
        folder = self.backbone.folder
        with loading("the pipeline", folder):
            parts = {**parts, **load_parts(folder, dtype, parts)}
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, **parts
            )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(self.accelerator.device)
        family, images = self.backbone.family, []
        options = {family.guide: family.sampling(folder)[1], "negative_prompt": family.negative}
        if family.negative is None:  # FLUX.2's takes none
            del options["negative_prompt"]
        for number, prompt in enumerate(self.prompts):
            seed = seed_of("sample", self.train.seed, number)
            made = pipeline(
                prompt=prompt,
                height=self.resolution,
                width=self.resolution,
                num_inference_steps=self.train.sample_steps,
                generator=torch.Generator().manual_seed(seed),
                **options,
            )
            images.append(made.images[0])
        return _joined(images, axis=0)


def _joined(images: Sequence[Image.Image], axis: int) -> Image.Image:
    """Images of one size below (axis 0) or beside (axis 1) each other, with white between them."""
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    gap = np.full_like(arrays[0].take(range(GAP), axis), 255)
    parts = [part for array in arrays for part in (gap, array)][1:]
    return Image.fromarray(np.concatenate(parts, axis))


def _save(image: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")
