"""Margins from pixels: a reward model by its spec, run over a data set."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fifa.config import Compute
from fifa.data.images import has_pixels
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.models.runtime import make_runtime
from fifa.scoring.encoders import keep_embeddings
from fifa.scoring.rewards.crossfit import crossfit_rewards
from fifa.scoring.rewards.engine import EngineOptions, prompt_features, score_images
from fifa.scoring.rewards.fit import TrainOptions
from fifa.scoring.rewards.load import NAMES, load_reward
from fifa.scoring.rewards.proxy import load_proxy
from fifa.shards.pool import Executor, LocalPool

if TYPE_CHECKING:
    from fifa.scoring.rewards.base import RewardModel


def reward_scores(
    pairs: Pairs,
    spec: str,
    folder: Path | None = None,
    *,
    compute: Compute | None = None,
    allow_download: bool = False,
) -> pa.Table:
    """What a reward model gives both images of every pair.

    Parameters
    ----------
    pairs
        The pairs, with images.
    spec
        ``proxy``: trained here on the pairs' own labels and cross-fitted over prompts;
        ``proxy@clip:MODEL``: the same on both towers of that CLIP, ``proxy@ENCODER`` on another
        image encoder (`fifa.scoring.rewards.features.make_image_encoder`).
        ``proxy:FOLDER``: one that `fifa.scoring.rewards.fit.train_reward` wrote. Otherwise a name
        as for `fifa.scoring.rewards.load.load_reward`.
    folder
        Where scores are kept; None keeps nothing.
    compute
        Where and how.
    allow_download
        Fetch images that the source only names by URL.

    Returns
    -------
    pyarrow.Table
        `fifa.scoring.table.MARGIN`, row by row with ``pairs.table``; NaN where an image could not
        be read.

    Raises
    ------
    FifaError
        For a source without images and a spec that names no reward model.
    """
    compute = compute or Compute()
    fitted_here = spec == "proxy" or spec.startswith("proxy@")
    if not fitted_here and spec.partition(":")[0] not in (*NAMES, "proxy"):
        raise FifaError(
            f"no such reward model: {spec}",
            do=f"column:NAME_0,NAME_1 for score columns, proxy, or one of {', '.join(NAMES)}",
        )
    if not allow_download and not has_pixels(pairs.table, pairs.origin):
        raise FifaError(
            f"the margin {spec!r} needs images, and the source only refers to them",
            where=pairs.origin.source,
            do="--allow-download fetches them; score columns need none: --margin column:A_0,A_1",
        )
    if fitted_here:
        train = TrainOptions(device=compute.device, allow_download=allow_download)
        if image := spec.partition("@")[2]:
            text = image if image.startswith("clip:") else train.text
            train = replace(train, image=image, text=text)
        return crossfit_rewards(pairs, folder=folder, options=train)
    load = partial(_load, spec, compute)
    model, executor = load(), make_executor(compute)
    options = EngineOptions(
        batch=compute.batch,
        workers=compute.workers,
        allow_download=allow_download,
        store=compute.store,
    )
    run: dict[str, Any] = {"folder": folder, "options": options, "executor": executor, "load": load}
    try:
        table = score_images(pairs, model, **run)
        encoder = getattr(model, "encoder", None)
        if folder is not None and encoder is not None:  # the diversity step finds them there
            keep_embeddings(pairs, encoder, prompt_features(pairs, model, **run), folder)
        return table
    finally:
        executor.close()


def make_executor(compute: Compute) -> Executor:
    """Who runs the shards: this process, N processes, or actors on a Ray cluster."""
    kind, _, processes = compute.executor.partition(":")
    if kind == "local":
        return LocalPool(int(processes or 0))
    from fifa.shards.ray import RayPool

    address = compute.executor if processes else None
    return RayPool(compute.actors, compute.num_cpus, compute.num_gpus, address)


def _load(spec: str, compute: Compute) -> RewardModel:
    name, _, folder = spec.partition(":")
    if name == "proxy":
        runtime = make_runtime(
            compute.device, compute.dtype, compute.compile, compute.channels_last
        )
        return load_proxy(folder, runtime)
    return load_reward(
        spec,
        device=compute.device,
        dtype=compute.dtype,
        compile=compute.compile,
        channels_last=compute.channels_last,
    )
