"""The seam between the trainer and a family of diffusion models, and what all families share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fifa.errors import FifaError
from fifa.models.families import Family
from fifa.models.hub import model_digest
from fifa.models.memory import release_memory
from fifa.training.backbones.parts import ModelFolder, diffusers
from fifa.training.backbones.schedule import Diffusion, Flow
from fifa.training.backbones.text import TextEncoder
from fifa.training.backbones.vae import Vae

Tensors = dict[str, "Tensor"]


class Backbone:
    """A latent diffusion model: what turns images and prompts into numbers, and the denoiser.

    Everything but `denoiser` is frozen. The trainer encodes every image and prompt once, lets the
    encoders go (`drop_encoders`), and from then on calls `predict`, ``vae.latents`` and the
    schedule only. A family's class defines `load_text`, `encode_prompts` and `predict`.

    Parameters
    ----------
    folder
        The model's folder.

    Attributes
    ----------
    family
        Its row of `fifa.models.families.FAMILIES`.
    folder
        The model's folder in diffusers layout.
    denoiser
        The UNet or transformer, the only part that is trained.
    schedule
        How time is drawn, noise is added, and what the denoiser should predict.
    vae
        From pixels to the moments of latents, and from moments to latents.
    patch
        Sides of latents are multiples of it.
    """

    patch = 1

    def __init__(self, folder: ModelFolder) -> None:
        self.family: Family = folder.family
        self.folder: Path = folder.path
        self.device: torch.device = folder.device
        part = self.family.part
        # the largest part first: while it is loaded, memory holds its file as well
        self.denoiser: torch.nn.Module = folder.model(part, diffusers(self.family.denoiser))
        schedule = Flow if self.family.schedule == "flow" else Diffusion
        where = str(folder.path / "scheduler")
        self.schedule: Diffusion | Flow = schedule(folder.config("scheduler"), where)
        self._text = self.load_text(folder)
        self.vae = Vae(folder)
        self._origin = folder
        self._encoders: dict[str, Any] | None = None

    @property
    def encoders(self) -> dict[str, Any]:
        """JSON that changes whenever a cached moment or embedding could.

        Digests of VAE, text encoders and tokenizers, and their floating type.
        """
        if self._encoders is None:
            trained = (self.family.part, "scheduler")
            parts = [part for part in self._origin.parts if part not in trained]
            self._encoders = {
                "family": self.family.name,
                "dtype": str(self._origin.dtype).removeprefix("torch."),
                **{part: model_digest(self.folder / part, nested=True) for part in parts},
            }
        return self._encoders

    @property
    def pixels_per_latent(self) -> int:
        """The VAE's factor from latent to pixel sides, times the denoiser's patch.

        Sides of images are multiples of it.
        """
        return self.vae.factor * self.patch

    @property
    def text(self) -> list[TextEncoder]:
        """The text encoders; `FifaError` once they are gone."""
        if not self._text:
            raise FifaError(
                "the text encoders are no longer in memory: encode before drop_encoders"
            )
        return self._text

    def drop_encoders(self) -> None:
        """Let go of VAE and text encoders, to have their memory for training."""
        _ = self.encoders  # their digests are asked for later, when the files may be gone
        self.vae.drop()
        self._text.clear()
        release_memory()

    def with_denoiser(self, denoiser: torch.nn.Module) -> Backbone:
        """The backbone with another denoiser; everything else is shared."""
        other = copy.copy(self)
        other.denoiser = denoiser
        return other

    def inputs(self, tensors: Tensors) -> Tensors:
        """``tensors`` on the device, in the floating type of the denoiser's weights."""
        dtype = next(self.denoiser.parameters()).dtype
        return {name: value.to(self.device, dtype) for name, value in tensors.items()}

    def load_text(self, folder: ModelFolder) -> list[TextEncoder]:
        """The text encoders, in the family's order."""
        raise NotImplementedError

    def encode_prompts(self, prompts: Sequence[str]) -> Tensors:
        """What the denoiser needs of prompts: by name, ``[n, ...]``, float32, on the device."""
        raise NotImplementedError

    def predict(self, noisy: Tensor, time: Tensor, prompts: Tensors, frames: Tensor) -> Tensor:
        """The denoiser's prediction, float32 ``[n, c, h, w]``, with gradients where they are on.

        Parameters
        ----------
        noisy
            ``[n, c, h, w]``.
        time
            ``[n]``, as ``schedule.draw_time`` gives: int64 timesteps or float32 sigmas.
        prompts
            As `encode_prompts` gives.
        frames
            int64 ``[n, 6]``, `fifa.training.resize.Frame`: SDXL takes them as an input, the
            image's size and crop.
        """
        raise NotImplementedError
