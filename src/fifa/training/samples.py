"""Sheets of samples: what the model draws at fixed seeds as it trains, beside the base's images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fifa.config import Train
from fifa.errors import FifaError
from fifa.models.memory import release_memory
from fifa.models.optional import require
from fifa.shards.files import atomic_path, read_json
from fifa.training.backbones.base import Backbone
from fifa.training.checkpoint import TrainState, step_name
from fifa.training.draws import seed_of

FOLDER = "samples"
BASE = "base.png"
PROMPTS = 4
GAP = 8  # pixels between two images


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

    def __init__(
        self,
        train: Train,
        backbone: Backbone,
        captions: Sequence[str],
        out: Path,
        accelerator: Any,
        resolution: int,
    ) -> None:
        self.train, self.backbone, self.accelerator = train, backbone, accelerator
        self.folder, self.resolution = out / FOLDER, resolution
        distinct = [caption for caption in dict.fromkeys(captions) if caption]
        self.prompts = train.sample_prompts or tuple(distinct[:PROMPTS]) or ("",)

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
        if self.accelerator.is_main_process and not (self.folder / BASE).exists():
            pipeline = self._pipeline({})
            _save(self._images(pipeline), self.folder / BASE)
            del pipeline
            release_memory()
        self.accelerator.wait_for_everyone()

    def draw(self, step: int, state: TrainState) -> None:
        """Write ``samples/step-*.png``: a row a prompt, the base's image left, today's right."""
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(state.model)
            model.eval()
            average = state.average.in_place() if state.average else nullcontext()
            with torch.no_grad(), self.accelerator.autocast():
                pipeline = self._pipeline({self.backbone.family.part: model})
                with average:
                    images = self._images(pipeline)
            model.train()
            del pipeline
            release_memory()
            with Image.open(self.folder / BASE) as base:
                sheet = _joined([base, images], axis=1)
            _save(sheet, self.folder / f"{step_name(step)}.png")
        self.accelerator.wait_for_everyone()

    def _pipeline(self, parts: dict[str, Any]) -> Any:
        """The stock pipeline of the base's folder, with some parts that are in memory already."""
        diffusers = require("diffusers", "train")
        index = read_json(self.backbone.folder / "model_index.json", "the pipeline's index")
        if "safety_checker" in index:  # no part of what is trained, and often not downloaded
            parts = {"safety_checker": None, "feature_extractor": None, **parts}
            parts["requires_safety_checker"] = False
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            self.backbone.folder, dtype=torch.float32, local_files_only=True, **parts
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.accelerator.device)

    def _images(self, pipeline: Any) -> Image.Image:
        """An image a prompt, one below the other."""
        images = []
        for number, prompt in enumerate(self.prompts):
            seed = seed_of("sample", self.train.seed, number)
            made = pipeline(
                prompt=prompt,
                height=self.resolution,
                width=self.resolution,
                num_inference_steps=self.train.sample_steps,
                generator=torch.Generator().manual_seed(seed),
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
