"""Diffusion models as the trainer needs them: a file for each row of `fifa.models.families`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from fifa.training.backbones.base import Backbone
from fifa.training.backbones.parts import open_folder


def load_backbone(
    model: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> Backbone:
    """A diffusion model as what the trainer needs of it.

    Parameters
    ----------
    model
        A folder in diffusers layout, or a hub id. Its ``model_index.json`` names the family.
    device
        Where to put it.
    dtype
        The floating type of all weights, ``float32``, ``bfloat16`` or ``float16``; the VAE stays
        in float32 unless its configuration says that it need not.

    Raises
    ------
    FifaError
        For a folder that is no model, or lacks a part (it says which), a family that is not
        known, a model that predicts the image itself, and weights that are not safetensors.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    folder = open_folder(model, torch.device(device), dtype)
    folder.check()
    module = import_module(f"fifa.training.backbones.{folder.family.name}")
    backbone: Backbone = getattr(module, folder.family.backbone)(folder)
    return backbone


__all__ = ["Backbone", "load_backbone"]
