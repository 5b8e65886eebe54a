"""A reward model by its name: `load_reward` is what every other part calls."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
from PIL import Image

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.models.runtime import make_runtime
from fifa.scoring.rewards.aesthetic import AestheticReward
from fifa.scoring.rewards.base import RewardModel
from fifa.scoring.rewards.clip import ClipReward
from fifa.scoring.rewards.hps import FILES as HPS_FILES
from fifa.scoring.rewards.hps import hps_folder
from fifa.scoring.rewards.hpsv3 import HPSv3
from fifa.scoring.rewards.imagereward import ImageReward

CLIPS = {
    "pickscore": "yuvalkirstain/PickScore_v1",
    "clipscore": "openai/clip-vit-large-patch14",
    "clipscore-b32": "openai/clip-vit-base-patch32",
}
NAMES = (*CLIPS, *HPS_FILES, "aesthetic", "imagereward", "hpsv3")


def load_reward(
    spec: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    compile: bool | str = False,
    channels_last: bool = False,
) -> RewardModel:
    """The reward model that ``spec`` names; weights are loaded when they are first used.

    Parameters
    ----------
    spec
        One of `NAMES`, alone or as ``NAME:MODEL``: a hub id, a folder or (where the original is
        one checkpoint) a file.
    device
        A torch device; the fastest one by default.
    dtype
        ``float32`` (default), or ``bfloat16`` or ``float16`` under autocast; hpsv3 computes in
        ``bfloat16`` by default, as it was trained.
    compile
        True for `torch.compile`, or the name of its backend.
    channels_last
        Convolutions with channels last in memory.

    Raises
    ------
    FifaError
        For a name that is not there, weights that are neither here nor on the hub or do not
        fit, an unknown device or precision, and where the ``local`` extra is missing.
    """
    name, _, model = spec.partition(":")
    if name not in NAMES or spec.endswith(":"):
        raise FifaError(
            f"no such reward model: {spec}", do=f"{', '.join(NAMES)}, or NAME:HUB_ID_OR_FOLDER"
        )
    if name == "hpsv3":
        dtype = dtype or "bfloat16"
    runtime = make_runtime(device, dtype, compile, channels_last)
    if name in CLIPS:
        return ClipReward(name, model or CLIPS[name], runtime)
    if name in HPS_FILES:
        return ClipReward(name, str(hps_folder(name, model or None)), runtime)
    if name == "aesthetic":
        return AestheticReward(model or None, runtime)
    kind = ImageReward if name == "imagereward" else HPSv3
    return kind(model or None, runtime)


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
