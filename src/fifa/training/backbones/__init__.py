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
    compute: str | torch.dtype | None = None,
    kept: str | None = None,
) -> Backbone:
    """A diffusion model as what the trainer needs of it; its networks are loaded when used.

    Parameters
    ----------
    model
        A folder in diffusers layout, or a hub id. Its ``model_index.json`` names the family.
    device
        Where to put it.
    dtype
        The floating type of the denoiser's weights: ``float32``, ``bfloat16`` or ``float16``.
    compute
        What training computes in, by default ``dtype``. On CUDA it is what the encoders have;
        elsewhere they have ``dtype``. For the VAE see `fifa.training.backbones.base.Vae`.
    kept
        How a frozen denoiser is kept: None, or of `fifa.models.frozen` ``nf4``, ``int8``
        (quantised) or ``offload`` (its blocks in CPU memory).

    Raises
    ------
    FifaError
        For a folder that is no model, or lacks a part (it says which), a family that is not
        known, a model that predicts the image itself, and weights that are not safetensors or
        damaged.
    """
    device = torch.device(device)
    encoding = compute if compute and device.type == "cuda" else dtype
    weights, encoding = (getattr(torch, str(t).removeprefix("torch.")) for t in (dtype, encoding))
    folder = open_folder(model, device, weights, encoding, kept)
    folder.check()
    module = import_module(f"fifa.training.backbones.{folder.family.name}")
    backbone: Backbone = getattr(module, folder.family.backbone)(folder)
    return backbone


__all__ = ["Backbone", "load_backbone"]
