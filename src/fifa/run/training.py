"""`fifa.train`: what `fifa train` does, as a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fifa.config import Train, changed
from fifa.run.folder import check_run
from fifa.training.job import run_training


def train(
    source: str | Path,
    model: str | Path,
    out: str | Path,
    knobs: Train | None = None,
    **changes: Any,
) -> Path:
    """Train a diffusion model on preference pairs, with Diffusion-DPO.

    Parameters
    ----------
    source
        A run folder, a subset that `fifa.export` wrote, or Parquet files in the diffusers schema.
    model
        A model folder in diffusers layout, or a hub id.
    out
        The checkpoint's folder. A training that was stopped goes on where it was, and ends with
        the weights of one that was not; a finished one is left alone.
    knobs
        `fifa.config.Train`, or a preset of `fifa.config.PRESETS`; None: the
        default.
    **changes
        Knobs to change: ``loss="ipo"``, ``steps=200``, ``draws=8``.

    Returns
    -------
    pathlib.Path
        ``out``, which then holds ``pytorch_lora_weights.safetensors`` (for ``load_lora_weights``)
        or ``unet`` / ``transformer`` (for ``from_pretrained``), the model card, ``train.json``,
        ``train.yaml`` and ``stats.jsonl``.

    Raises
    ------
    FifaError
        For pairs, a model or knobs that do not fit together, too little memory, and a loss that
        is not finite; what was done until then is kept.
    """
    given = {**changes, "source": str(source), "model": str(model)}
    check_run(source)
    return run_training(changed(knobs or Train(), **given), out)
