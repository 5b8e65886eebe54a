"""Images to the moments of their latents, and moments to latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fifa.errors import FifaError
from fifa.training.backbones.parts import ModelFolder, diffusers


class Vae:
    """The autoencoder of a latent diffusion model, encoder side.

    Parameters
    ----------
    folder
        The model's folder. ``AutoencoderKL`` and ``AutoencoderTiny`` are known; the latter has
        no posterior: its standard deviation is 0.

    Attributes
    ----------
    channels
        c, of a latent.
    factor
        Pixels a side of a latent's pixel.
    """

    def __init__(self, folder: ModelFolder) -> None:
        config = folder.config("vae")
        class_name = str(config.get("_class_name"))
        if class_name not in ("AutoencoderKL", "AutoencoderTiny"):
            raise FifaError(
                f"an autoencoder of class {class_name} is not known",
                where=str(folder.path / "vae"),
                do="AutoencoderKL or AutoencoderTiny",
            )
        self.tiny = class_name == "AutoencoderTiny"
        # SDXL's overflows in fp16 and says so by force_upcast, which is also the class's default.
        self.upcast = bool(config.get("force_upcast", not self.tiny))
        self._dtype = torch.float32 if self.upcast else folder.dtype
        self._model: Any = folder.model("vae", diffusers(class_name), self._dtype)
        known = self._model.config
        if getattr(known, "latents_mean", None) or getattr(known, "latents_std", None):
            raise FifaError(
                "a VAE that normalises its channels one by one is not supported",
                where=str(folder.path / "vae"),
            )
        self.channels = int(known.latent_channels)
        blocks = known.encoder_block_out_channels if self.tiny else known.block_out_channels
        self.factor: int = 2 ** (len(blocks) - 1)
        self.scale = float(known.scaling_factor)
        # shift_factor is None in the SD and SDXL families
        self.shift = float(known.shift_factor or 0.0)

    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and standard deviation, float32 ``[n, 2c, h, w]``, of ``[n, 3, H, W]`` in [-1, 1].

        Raises
        ------
        FifaError
            After `drop`, and where a moment is not finite.
        """
        if self._model is None:
            raise FifaError("the VAE is no longer in memory: encode before drop_encoders")
        with torch.no_grad():
            encoded = self._model.encode(pixels.to(self._model.device, self._dtype))
        if self.tiny:
            moments = torch.cat([encoded.latents, torch.zeros_like(encoded.latents)], dim=1)
        else:
            # std = exp(logvar / 2), logvar clamped to [-30, 20]
            posterior = encoded.latent_dist
            moments = torch.cat([posterior.mean, posterior.std], dim=1)
        if not bool(torch.isfinite(moments).all()):
            raise FifaError(
                f"the VAE gives infinite or NaN latents in {self._dtype}".replace("torch.", ""),
                where="vae",
                do="use float32 (SDXL's VAE overflows in float16), or the VAE sdxl-vae-fp16-fix",
            )
        both: Tensor = moments.float()
        return both

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """``scale * (mean + std * noise - shift)``, float32 ``[n, c, h, w]``."""
        mean, std = moments.float().chunk(2, dim=1)
        # z = (mean + std * e - shift) * scale
        return (mean + std * noise.float() - self.shift) * self.scale

    def drop(self) -> None:
        """Let go of the network; `latents` keeps working."""
        self._model = None
