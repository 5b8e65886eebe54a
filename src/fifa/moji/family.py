"""What is shipped, by name: models, feedback and ratings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.moji.world import DATA

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
