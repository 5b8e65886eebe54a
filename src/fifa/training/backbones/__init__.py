"""Families of diffusion models behind one seam."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.training.backbones.base import Backbone

if TYPE_CHECKING:
    import torch

# By the pipeline's class: the module here, and the class in it.
FAMILIES = {
    "StableDiffusionPipeline": ("sd", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
}


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
        A folder in diffusers layout, or a hub id. Its ``model_index.json`` tells the family.
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
    torch = require("torch", "train")
    from fifa.training.backbones.parts import open_folder

    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    folder = open_folder(model, torch.device(device), kind)
    family = FAMILIES.get(folder.pipeline)
    if family is None:
        raise FifaError(
            f"a model of class {folder.pipeline} is not known",
            where=str(folder.path / "model_index.json"),
            do=f"one of {', '.join(FAMILIES)}",
        )
    module, name = family
    backbone: Backbone = getattr(import_module(f"fifa.training.backbones.{module}"), name)(folder)
    return backbone


__all__ = ["Backbone", "load_backbone"]
