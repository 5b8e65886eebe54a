"""The shipped family, by name: models, feedback, ratings; and tiny models for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.moji.sizes import TINY, Size, clip_model, stable_diffusion, write_tokenizer
from fifa.moji.world import DATA

__all__ = ["CLIP", "FEEDBACK", "RATINGS", "SD", "TRUTH", "generate", "load_sd", "write_tiny"]

SD = DATA / "moji-sd"  # a diffusers pipeline
CLIP = DATA / "moji-clip"  # a transformers CLIP, for `clip:FOLDER` and `pickscore:FOLDER`
FEEDBACK = DATA / "feedback.parquet"  # pairs in the Pick-a-Pic schema
TRUTH = DATA / "truth.parquet"  # what is hidden: the utility of every image; selection reads none
RATINGS = DATA / "scores"  # the default rater's, as its step names them: copy into RUN/scores


def load_sd(folder: Path = SD) -> Any:
    """The pipeline in ``folder`` in float32, without a progress bar of its own.

    Raises `FifaError` where nothing is there, or diffusers is not installed.
    """
    if not (folder / "model_index.json").exists():
        raise FifaError("no diffusers pipeline", where=str(folder), do="give a pipeline's folder")
    diffusers = require("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.float()  # whatever it is stored in
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    noise: Any = None,
    steps: int = 20,
    guidance: float = 3.0,
    batch: int = 64,
) -> np.ndarray:
    """One picture a prompt, by DDIM.

    Parameters
    ----------
    pipe
        A `diffusers.StableDiffusionPipeline`.
    prompts, seeds
        The same number of each; a seed draws a picture's first noise.
    noise
        That noise instead, a float32 tensor ``[n, 4, size / 4, size / 4]``.
    steps
        Of the sampler.
    guidance
        Scale of classifier-free guidance.
    batch
        Pictures made at once.

    Returns
    -------
    numpy.ndarray
        uint8 ``[n, size, size, 3]``.
    """
    torch = require("torch")
    parts = []
    for start in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(s) for s in seeds[start : start + batch]]
        out = pipe(
            prompt=list(prompts[start : start + batch]),
            generator=generators,
            latents=None if noise is None else noise[start : start + batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
        )
        parts.append(np.rint(out.images * 255).astype(np.uint8))
    return np.concatenate(parts)


def write_tiny(folder: Path, size: Size = TINY, *, seed: int = 0) -> tuple[Path, Path]:
    """Write an untrained moji-sd and moji-clip of another size, for tests.

    Parameters
    ----------
    folder
        Gets ``moji-sd`` and ``moji-clip``.
    size
        How wide they are.
    seed
        Of the random weights.

    Returns
    -------
    tuple
        The two folders: a diffusers pipeline and a transformers CLIP.
    """
    torch = require("torch")
    tokenizer = folder / "tokenizer"
    write_tokenizer(tokenizer, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = stable_diffusion(size, tokenizer)
        clip = clip_model(size, tokenizer)
    sd, pair = folder / "moji-sd", folder / "moji-clip"
    pipe.save_pretrained(sd)
    save_clip(clip, pipe.tokenizer, pair)
    return sd, pair


def save_clip(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a CLIP with its tokenizer and OpenAI's preprocessing at the world's size."""
    transformers = require("transformers")
    side = model.config.vision_config.image_size
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
