"""What all families share: a VAE, a schedule, and encoders that leave once all is encoded."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.training.backbones.base import Prediction, Tensors
from fifa.training.backbones.parts import ModelFolder
from fifa.training.backbones.schedule import Diffusion, Flow
from fifa.training.backbones.text import TextEncoder
from fifa.training.backbones.vae import Vae

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LatentBackbone:
    """A `fifa.training.backbones.base.Backbone` but for `encode_prompts` and `predict`.

    Parameters
    ----------
    folder
        The model's folder.
    denoiser
        Its UNet or transformer.
    schedule
        How noise is added.
    text
        The text encoders, in the family's order.
    """

    kind: str
    denoiser_name: Literal["unet", "transformer"]
    lora_targets: tuple[str, ...]
    patch = 1  # sides of latents are multiples of it

    def __init__(
        self,
        folder: ModelFolder,
        denoiser: torch.nn.Module,
        schedule: Diffusion | Flow,
        text: Sequence[TextEncoder],
    ) -> None:
        self.folder: Path = folder.path
        self.denoiser = denoiser
        self.schedule = schedule
        self.vae = Vae(folder)
        self._text = list(text)
        self._origin = folder
        self._encoders: dict[str, Any] | None = None

    @property
    def prediction(self) -> Prediction:
        """What the denoiser predicts."""
        return self.schedule.prediction

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._origin.device

    @property
    def encoders(self) -> dict[str, Any]:
        """Digests of VAE, text encoders and tokenizers, and their floating types."""
        if self._encoders is None:
            names = [name for name in self._origin.index if name.startswith(("text_", "tokenizer"))]
            parts = ["vae", *sorted(name for name in names if self._origin.has(name))]
            self._encoders = {
                "kind": self.kind,
                "dtype": str(self._origin.dtype).removeprefix("torch."),
                **{part: self._origin.digest(part) for part in parts},
            }
        return self._encoders

    @property
    def latent_channels(self) -> int:
        """c: channels of a latent."""
        return self.vae.channels

    @property
    def pixels_per_latent(self) -> int:
        """Sides of images are multiples of it."""
        return self.vae.factor * self.patch

    @property
    def text(self) -> list[TextEncoder]:
        """The text encoders; `FifaError` once they are gone."""
        if not self._text:
            raise FifaError("the text encoders have been let go of: encode before drop_encoders")
        return self._text

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Moments, float32 ``[n, 2c, h, w]``, of pixels ``[n, 3, H, W]`` in [-1, 1]."""
        return self.vae.moments(pixels)

    def drop_encoders(self) -> None:
        """Let go of VAE and text encoders, to have their memory for training."""
        torch = require("torch")
        _ = self.encoders  # their digests are asked for later, when the files may be gone
        self.vae.drop()
        self._text.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A sample of the posterior, scaled, float32 ``[n, c, h, w]``."""
        return self.vae.latents(moments, noise)

    def draw_time(self, generator: torch.Generator) -> Tensor:
        """One time as training draws it."""
        return self.schedule.draw_time(generator)

    def add_noise(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Latents at ``time``."""
        return self.schedule.add_noise(latents, noise, time)

    def target(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What the denoiser should predict."""
        return self.schedule.target(latents, noise, time)

    def inputs(self, tensors: Tensors) -> Tensors:
        """``tensors`` on the device, in the floating type of the denoiser's weights."""
        kind = next(self.denoiser.parameters()).dtype
        return {name: value.to(self.device, kind) for name, value in tensors.items()}
