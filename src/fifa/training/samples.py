"""Sheets of samples: what the model draws at fixed seeds as it trains, beside the base's images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fifa.config import Train
from fifa.errors import FifaError
from fifa.models.memory import release_memory
from fifa.models.optional import require
from fifa.shards.files import atomic_path, read_json
from fifa.training.backbones.base import Backbone
from fifa.training.checkpoint import Trainee, step_name
from fifa.training.draws import seed_of

if TYPE_CHECKING:
    from PIL.Image import Image

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
                "no samples are drawn of a sharded model", do="--sample-every 0 with FSDP"
            )
        if self.accelerator.is_main_process and not (self.folder / BASE).exists():
            pipeline = self._pipeline({})
            _save(_column(self._images(pipeline)), self.folder / BASE)
            del pipeline
            release_memory()
        self.accelerator.wait_for_everyone()

    def draw(self, step: int, trainee: Trainee) -> None:
        """Write ``samples/step-*.png``: a row a prompt, the base's image left, today's right."""
        if self.accelerator.is_main_process:
            torch = require("torch", "train")
            pil = require("PIL.Image")
            model = self.accelerator.unwrap_model(trainee.model)
            model.eval()
            average = trainee.average
            with torch.no_grad(), self.accelerator.autocast():
                pipeline = self._pipeline({self.backbone.family.part: model})
                if average is None:
                    images = self._images(pipeline)
                else:
                    with average.in_place():
                        images = self._images(pipeline)
            model.train()
            del pipeline
            release_memory()
            with pil.open(self.folder / BASE) as base:
                sheet = _beside(base.convert("RGB"), _column(images))
            _save(sheet, self.folder / f"{step_name(step)}.png")
        self.accelerator.wait_for_everyone()

    def _pipeline(self, parts: dict[str, Any]) -> Any:
        """The stock pipeline of the base's folder, with some parts that are in memory already."""
        diffusers, torch = require("diffusers", "train"), require("torch", "train")
        index = read_json(self.backbone.folder / "model_index.json", "the pipeline's index")
        if "safety_checker" in index:  # no part of what is trained, and often not downloaded
            parts = {"safety_checker": None, "feature_extractor": None, **parts}
            parts["requires_safety_checker"] = False
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            self.backbone.folder, dtype=torch.float32, local_files_only=True, **parts
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.accelerator.device)

    def _images(self, pipeline: Any) -> list[Image]:
        torch = require("torch", "train")
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
        return images


def _column(images: Sequence[Image]) -> Image:
    pil = require("PIL.Image")
    width, height = images[0].size
    sheet: Image = pil.new("RGB", (width, len(images) * (height + GAP) - GAP), "white")
    for row, image in enumerate(images):
        sheet.paste(image, (0, row * (height + GAP)))
    return sheet


def _beside(left: Image, right: Image) -> Image:
    pil = require("PIL.Image")
    sheet: Image = pil.new("RGB", (left.width + GAP + right.width, left.height), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + GAP, 0))
    return sheet


def _save(image: Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")
