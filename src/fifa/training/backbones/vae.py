"""The autoencoders of latent diffusion models, encoder side."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fifa.errors import FifaError
from fifa.models.runtime import release_memory, tf32
from fifa.training.backbones.parts import ModelFolder, diffusers, tensors_in

# The classes that are known, with their settings for channels and for levels: sides are halved
# from each level to the next.
CLASSES = {
    "AutoencoderKL": ("latent_channels", "block_out_channels"),
    "AutoencoderTiny": ("latent_channels", "encoder_block_out_channels"),
    "AutoencoderDC": ("latent_channels", "encoder_block_out_channels"),
    "AutoencoderKLFlux2": ("latent_channels", "block_out_channels"),
    "AutoencoderKLQwenImage": ("z_dim", "dim_mult"),
}


class Vae:
    """The autoencoder of a latent diffusion model, encoder side; loaded when it first encodes.

    It computes in float32 where its ``force_upcast`` says so, as its class does where the
    configuration says nothing, and else in the encoders' floating type. On CUDA it computes in
    bfloat16 with them in spite of that where `fifa.models.families.Family.half_vae` allows it.

    Parameters
    ----------
    folder
        The model's folder, whose family says which classes its VAE may have. ``AutoencoderTiny``
        and ``AutoencoderDC`` have no posterior: its standard deviation is 0. The latents of
        ``AutoencoderKLFlux2`` are patches of 2 x 2 of what its network gives.

    Attributes
    ----------
    channels
        c, of a latent.
    factor
        Pixels a side of a latent's pixel.
    dtype
        What it computes in.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self._name = str(folder.config("vae").get("_class_name"))
        if self._name not in folder.family.vaes:
            raise FifaError(
                f"an autoencoder of class {self._name} is not known",
                where=str(folder.path / "vae"),
                do=" or ".join(folder.family.vaes),
            )
        self._folder, self._class = folder, diffusers(self._name)
        self._known = known = folder.settings("vae", self._class)
        if self._name == "AutoencoderKL" and (
            known.get("latents_mean") or known.get("latents_std")
        ):
            raise FifaError(
                "a VAE that normalises its channels one by one is not supported",
                where=str(folder.path / "vae"),
            )
        channels, levels = CLASSES[self._name]
        patch = 2 if self._name == "AutoencoderKLFlux2" else 1
        self.channels = int(known[channels]) * patch**2
        self.factor: int = 2 ** (len(known[levels]) - 1) * patch
        if self._name == "AutoencoderKLQwenImage" and self.channels != len(known["latents_mean"]):
            raise ValueError("latents_mean has not a number for each of its channels")
        # SDXL's overflows in fp16 and says so by force_upcast
        upcast = bool(known.get("force_upcast", True))
        half = folder.device.type == "cuda" and folder.encoding == torch.bfloat16
        half = half and folder.family.half_vae
        self.dtype = torch.float32 if upcast and not half else folder.encoding
        self._network: Any = None
        self._dropped = False

    @property
    def network(self) -> Any:
        """The network, loaded when it is first asked for; `FifaError` after `drop`."""
        if self._dropped:
            raise FifaError("the VAE is no longer in memory: encode before drop_encoders")
        if self._network is None:
            self._network = self._folder.model("vae", self._class, self.dtype)
        return self._network

    @cached_property
    def norm(self) -> tuple[float | Tensor, float | Tensor]:
        """Shift and scale of latents: numbers, or float32 ``[c, 1, 1]``, one for each channel."""
        known = self._known
        if self._name == "AutoencoderKLQwenImage":
            mean, std = (torch.tensor(known[f"latents_{name}"]) for name in ("mean", "std"))
        elif self._name == "AutoencoderKLFlux2":
            names = ("bn.running_mean", "bn.running_var")
            mean, variance = tensors_in(self._folder.path / "vae", names)
            std = (variance.float() + known["batch_norm_eps"]).sqrt()
        else:  # shift_factor is None in the SD and SDXL families
            return float(known.get("shift_factor") or 0.0), float(known["scaling_factor"])
        return mean.float()[:, None, None], 1 / std.float()[:, None, None]

    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and standard deviation, float32 ``[n, 2c, h, w]``, of ``[n, 3, H, W]`` in [-1, 1].

        They may be infinite or NaN: see `check`. Raises `FifaError` after `drop`.
        """
        network = self.network
        pixels = pixels.to(network.device, self.dtype)
        with torch.no_grad(), tf32(network.device):
            # a video's class takes an image for one frame
            video = self._name == "AutoencoderKLQwenImage"
            encoded = network.encode(pixels.unsqueeze(2) if video else pixels)
        if self._name in ("AutoencoderTiny", "AutoencoderDC"):
            mean = encoded[0]
            both = [mean, torch.zeros_like(mean)]
        else:
            # std = exp(logvar / 2), logvar clamped to [-30, 20]
            both = [encoded.latent_dist.mean, encoded.latent_dist.std]
        if video:
            both = [one.squeeze(2) for one in both]
        if self._name == "AutoencoderKLFlux2":
            both = [torch.nn.functional.pixel_unshuffle(one, 2) for one in both]
        return torch.cat(both, dim=1).float()

    def check(self, moments: Tensor) -> None:
        """Raise `FifaError` where a moment is not finite; waits for a device that has them."""
        if not bool(torch.isfinite(moments).all()):
            raise FifaError(
                f"the VAE gives infinite or NaN latents in {self.dtype}".replace("torch.", ""),
                where="vae",
                do="use float32 (SDXL's VAE overflows in float16), or the VAE sdxl-vae-fp16-fix",
            )

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """``scale * (mean + std * noise - shift)``, float32 ``[n, c, h, w]``."""
        mean, std = moments.float().chunk(2, dim=1)
        shift, scale = self.norm
        # z = (mean + std * e - shift) * scale
        return (mean + std * noise.float() - shift) * scale

    def release(self) -> None:
        """Let go of the network's memory; it is loaded again if it has to encode."""
        if self._network is not None:
            self._network = None
            release_memory()

    def drop(self) -> None:
        """Let go of the network for good; `latents` keeps working."""
        _ = self.norm  # from the files, which may be gone later
        self.release()
        self._dropped = True
