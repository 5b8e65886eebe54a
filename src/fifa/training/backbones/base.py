"""The seam between the trainer and a family of diffusion models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "flow"]
Tensors = dict[str, "Tensor"]
FRAME = 6  # numbers in a frame: original height and width, crop top and left, target height, width


class Backbone(Protocol):
    """A latent diffusion model: what turns images and prompts into numbers, and the denoiser.

    Everything but `denoiser` is frozen. The trainer encodes every image and prompt once, lets the
    encoders go (`drop_encoders`), and from then on calls `latents`, `add_noise`, `target` and
    `predict` only.

    Attributes
    ----------
    kind
        ``sd``, ``sdxl``, ``sd3`` or ``flux``.
    folder
        The model's folder in diffusers layout.
    denoiser
        The UNet or transformer, the only part that is trained.
    denoiser_name
        ``unet`` or ``transformer``: its folder, and the prefix of its keys in a LoRA file.
    lora_targets
        The modules that get an adapter unless others are named.
    """

    kind: str
    folder: Path
    denoiser: torch.nn.Module
    denoiser_name: Literal["unet", "transformer"]
    lora_targets: tuple[str, ...]

    @property
    def patch(self) -> int:
        """Sides of latents are multiples of it."""

    @property
    def prediction(self) -> Prediction:
        """What the denoiser predicts: the noise, v, or the flow ``noise - latents``."""

    @property
    def encoders(self) -> dict[str, Any]:
        """JSON that changes whenever a cached moment or embedding could."""

    @property
    def latent_channels(self) -> int:
        """c: channels of a latent."""

    @property
    def pixels_per_latent(self) -> int:
        """The VAE's factor from latent to pixel sides, times the denoiser's patch: sides of
        images are multiples of it."""

    def encode_prompts(self, prompts: Sequence[str]) -> Tensors:
        """What the denoiser needs of prompts: by name, ``[n, ...]``, float32, on the device."""
        ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """The VAE posterior's moments (mean, then standard deviation, before scaling), float32
        ``[n, 2c, h, w]``, of pixels ``[n, 3, H, W]`` in [-1, 1]; computed in float32 where the
        VAE overflows in half precision."""
        ...

    def drop_encoders(self) -> None:
        """Let go of VAE and text encoders, to have their memory for training."""

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A sample of the posterior, ``scale * (mean + std * noise - shift)``, ``[n, c, h, w]``."""
        ...

    def draw_time(self, generator: torch.Generator) -> Tensor:
        """One time as training draws it, a scalar: an int64 timestep, or a float32 sigma."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """``[n, c, h, w]``: latents at ``time`` ``[n]``, by the training schedule's formula."""
        ...

    def target(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """``[n, c, h, w]``: what the denoiser should predict."""
        ...

    def predict(self, noisy: Tensor, time: Tensor, prompts: Tensors, frames: Tensor) -> Tensor:
        """The denoiser's prediction, ``[n, c, h, w]``, with gradients where they are on.

        Parameters
        ----------
        noisy
            ``[n, c, h, w]``.
        time
            ``[n]``, as `draw_time` gives.
        prompts
            As `encode_prompts` gives.
        frames
            int64 ``[n, 6]`` (see `FRAME`): where SDXL is told the image's size and crop.
        """
        ...
