"""A reward model by its name: `load_reward` is what every other part calls."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.models.runtime import make_runtime
from fifa.scoring.rewards.base import RewardModel
from fifa.scoring.specs import REWARDS


def load_reward(spec: str, *, dtype: str | None = None, **runtime: Any) -> RewardModel:
    """The reward model that ``spec`` names; weights are loaded when they are first used.

    Parameters
    ----------
    spec
        A name of `fifa.scoring.specs.REWARDS`, alone or as ``NAME:MODEL``: a hub id, a folder or
        (where the original is one checkpoint) a file. ``proxy:FOLDER`` is one trained here.
    dtype
        ``float32``, or ``bfloat16`` or ``float16`` under autocast. The default is the model's own:
        ``bfloat16`` for hpsv3, as it was trained, else ``float32``.
    runtime
        ``device``, ``compile`` and ``channels_last`` as for `fifa.models.runtime.make_runtime`.

    Raises
    ------
    FifaError
        For a name that is not there or looks at no image, weights that are neither here nor on
        the hub or do not fit, an unknown device or precision, and where the ``local`` extra is
        missing.
    """
    parsed = REWARDS.parse(spec)
    if not parsed.entry.maker:
        raise FifaError(
            f"{spec} does not look at images",
            do="score with pickscore, hpsv2.1, clipscore, ... or with proxy:FOLDER",
        )
    made = make_runtime(dtype=dtype or parsed.entry.dtype, **runtime)
    model: RewardModel = parsed.make(made)
    return model


def score(
    model: RewardModel, prompts: Sequence[str], images: Sequence[Image.Image]
) -> npt.NDArray[np.float32]:
    """The rewards of some images, each for its prompt, float32 [n].

    Everything is held in memory at once; `fifa.scoring.rewards.engine` is for data sets. Raises
    `fifa.data.decode.BadImage` for an image that the model cannot take.
    """
    torch = require("torch")
    if len(prompts) != len(images):
        raise FifaError(f"{len(prompts)} prompts for {len(images)} images")
    pixels = [torch.from_numpy(model.preprocess(image)) for image in images]
    features = model.prompt_features(prompts)
    out = np.empty(len(images), np.float32)
    # most models have one shape for all images, a vision-language model one an aspect ratio
    order = sorted(range(len(images)), key=lambda i: tuple(pixels[i].shape))
    for _, rows in groupby(order, key=lambda i: tuple(pixels[i].shape)):
        batch = list(rows)
        seen = model.image_features(torch.stack([pixels[i] for i in batch]))
        out[batch] = model.rewards(features[batch], seen).float().cpu().numpy()
    return out
