"""The seam between the trainer and a family of diffusion models, and what all families share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor

from fifa.errors import FifaError
from fifa.models.families import Family
from fifa.models.hub import PART_FILES, model_digest
from fifa.models.networks import loading, named_keys, working
from fifa.models.runtime import Runtime, release_memory
from fifa.shards.files import digest
from fifa.training.backbones.parts import (
    ModelFolder,
    diffusers,
    shapes_in,
)
from fifa.training.backbones.text import TextEncoder
from fifa.training.backbones.vae import Vae

T = TypeVar("T")
Tensors = dict[str, Tensor]
FITTING = "take all parts from one model, with the settings that belong to their weights"
_rehearsed: set[str] = set()
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


class Diffusion:
    """The forward process of DDPM (arXiv:2006.11239) with the model's own betas.

    Parameters
    ----------
    config
        The model's ``scheduler_config.json``. Which solver it is for does not matter, only
        ``num_train_timesteps``, the betas and ``prediction_type`` do.
    where
        The file, for messages.
    """

    def __init__(self, config: dict[str, Any], where: str) -> None:
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise FifaError(
                f"a model that predicts {prediction!r} cannot be trained here",
                where=where,
                do="use a model with prediction_type epsilon or v_prediction",
            )
        self.prediction = prediction
        if config.get("rescale_betas_zero_snr"):
            raise FifaError(
                "a schedule rescaled to zero terminal SNR is not supported",
                where=where,
                do="use a model whose scheduler has rescale_betas_zero_snr off",
            )
        try:
            betas = {name: config[name] for name in BETAS if name in config}
            known = diffusers("DDPMScheduler")(**betas)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise FifaError(
                f"no such beta schedule: {config.get('beta_schedule')}",
                where=where,
                do="linear, scaled_linear, squaredcos_cap_v2 or trained_betas",
            ) from error
        # alpha_bar_t = prod_{s <= t} (1 - beta_s), float32 [T]
        self.alphas: Tensor = known.alphas_cumprod
        self.steps = len(self.alphas)
        if not (self.steps and bool(((known.betas >= 0) & (known.betas < 1)).all())):  # NaN is none
            raise FifaError(
                f"the betas are no shares of noise: {betas}",
                where=where,
                do="take the scheduler_config.json that belongs to the model",
            )

    def draw_time(self, generator: torch.Generator) -> Tensor:
        """A timestep, uniform in [0, T), int64."""
        return torch.randint(0, self.steps, (), generator=generator)

    def add_noise(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """``sqrt(alpha_bar) * latents + sqrt(1 - alpha_bar) * noise``."""
        signal, sigma = self._rates(latents, time)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The noise, or ``v = sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * latents``."""
        if self.prediction == "epsilon":
            return noise
        # arXiv:2202.00512, appendix D
        signal, sigma = self._rates(latents, time)
        return signal * noise - sigma * latents

    def _rates(self, latents: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas.to(latents.device)[time].view(-1, *(1,) * (latents.ndim - 1))
        return alpha.sqrt(), (1 - alpha).sqrt()


class Flow:
    """Rectified flow (arXiv:2403.03206): straight lines from image to noise.

    Times are sigmas, logit-normal with mean 0 and deviation 1, then shifted as the model's
    scheduler says. They are continuous: diffusers' scripts round them down to one of the
    scheduler's 1,000 training sigmas, which moves a sigma by less than 0.003 and exists for
    looking up timesteps in a table, which the formula here has no need of. Where the scheduler
    shifts by resolution (``use_dynamic_shifting``, FLUX.1-dev), training does not shift, as in
    diffusers' scripts: that is a knob of sampling.

    Parameters
    ----------
    config
        The model's ``scheduler_config.json``.
    where
        The file, for messages.
    """

    prediction = "flow"

    def __init__(self, config: dict[str, Any], where: str) -> None:
        shift = float(config.get("shift", config.get("flow_shift", 1.0)))
        if not 0 < shift < math.inf:
            raise FifaError(f"the scheduler's shift is {shift}, not a number above 0", where=where)
        self.shift = 1.0 if config.get("use_dynamic_shifting") else shift
        self.steps = int(config.get("num_train_timesteps", 1000))

    def draw_time(self, generator: torch.Generator) -> Tensor:
        """A sigma in (0, 1), float32."""
        # s = sigmoid(N(0, 1)), then shift s / (1 + (shift - 1) s)
        s = torch.sigmoid(torch.randn((), generator=generator))
        return self.shift * s / (1 + (self.shift - 1) * s)

    def add_noise(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """``(1 - s) * latents + s * noise``."""
        s = time.to(latents.dtype).view(-1, *(1,) * (latents.ndim - 1))
        return (1 - s) * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """``noise - latents``."""
        return noise - latents


def in_background(function: Callable[[], T]) -> Future[T]:
    """What the function returns, made in a thread that does not keep the process from ending."""
    made: Future[T] = Future()

    def work() -> None:
        try:
            made.set_result(function())
        except BaseException as error:
            made.set_exception(error)

    Thread(target=work, daemon=True).start()
    return made


class Backbone:
    """A latent diffusion model: what turns images and prompts into numbers, and the denoiser.

    Everything but `denoiser` is frozen. The trainer encodes every prompt and image once, lets the
    encoders go (`drop_encoders`), and from then on calls `predict`, ``vae.latents`` and the
    schedule only. Each network is loaded when it is first used, so that a device never holds more
    than the one at work. A family's class defines `load_text`, `encode_prompts` and `predict`,
    and may define `prompt_shapes`.

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
    origin
        The same as a `ModelFolder`, with the floating types of its parts.
    settings
        The denoiser's configuration.
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
        self.origin = folder
        # at once: importing the networks' classes takes longer than reading their files
        trained = (self.family.part, "scheduler")
        frozen = [part for part in folder.parts if part not in trained]
        self._digests = in_background(
            lambda: {p: model_digest(folder.path / p, PART_FILES, nested=True) for p in frozen}
        )
        self._denoiser: torch.nn.Module | None = None
        self._text: list[TextEncoder] = []
        self._dropped = False
        self.settings = folder.settings(self.family.part, diffusers(self.family.denoiser))
        schedule = Flow if self.family.schedule == "flow" else Diffusion
        where = str(folder.path / "scheduler")
        with loading("the model's schedule", folder.path / "scheduler"):
            self.schedule: Diffusion | Flow = schedule(folder.config("scheduler"), where)
        with loading("the model's vae", folder.path / "vae"):
            self.vae = Vae(folder)

    @property
    def denoiser(self) -> torch.nn.Module:
        """The UNet or transformer, the only part that is trained; loaded when first asked for."""
        if self._denoiser is None:
            origin, cls = self.origin, diffusers(self.family.denoiser)
            self._denoiser = origin.model(self.family.part, cls, origin.dtype)
        return self._denoiser

    @denoiser.setter
    def denoiser(self, denoiser: torch.nn.Module) -> None:
        self._denoiser = denoiser

    @cached_property
    def encoders(self) -> dict[str, Any]:
        """JSON that changes whenever a cached moment or embedding could.

        Digests of VAE, text encoders and tokenizers, and what they compute in.
        """
        known = {
            "family": self.family.name,
            "dtype": self._precision(self.origin.encoding),
            **self._digests.result(),
        }
        vae = self._precision(self.vae.dtype)
        # elsewhere the VAE's follows from the rest
        return {**known, "vae_dtype": vae} if self.device.type == "cuda" else known

    def _precision(self, dtype: torch.dtype) -> str:
        """How arithmetic on the device is named."""
        return Runtime(str(self.device), str(dtype).removeprefix("torch.")).precision

    @property
    def pixels_per_latent(self) -> int:
        """The VAE's factor from latent to pixel sides, times the denoiser's patch.

        Sides of images are multiples of it.
        """
        return self.vae.factor * self.patch

    @property
    def text(self) -> list[TextEncoder]:
        """The text encoders, loaded when first asked for; `FifaError` after `drop_encoders`."""
        if self._dropped:
            raise FifaError(
                "the text encoders are no longer in memory: encode before drop_encoders"
            )
        if not self._text:
            self._text = self.load_text(self.origin)
        return self._text

    def cut_prompts(self, prompts: Sequence[str]) -> tuple[int, int]:
        """How many no encoder reads to their end, and how many of these are then as another.

        ``prompts`` are all different. None where nothing has been encoded now.
        """
        longest = max(self._text, key=lambda encoder: encoder.length, default=None)
        return longest.cut(prompts) if longest else (0, 0)

    def release_text(self) -> None:
        """Let go of the text encoders' memory; they are loaded again if they have to encode."""
        if self._text:
            self._text = []
            release_memory()

    def drop_encoders(self, text: bool = True) -> None:
        """Let go of the VAE and, with ``text``, the text encoders for good: memory for training."""
        _ = self.encoders  # their digests are asked for later, when the files may be gone
        self.vae.drop()
        if text:
            self.release_text()
            self._dropped = True

    def with_denoiser(self, denoiser: torch.nn.Module) -> Backbone:
        """The backbone with another denoiser; everything else is shared."""
        other = copy.copy(self)
        other.denoiser = denoiser
        return other

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the denoiser's weights; of a quantised folder, what they were before."""
        part = self.family.part
        config = self.origin.config(part)
        if "quantization_config" not in config:
            return shapes_in(self.folder / part)
        plain = {name: value for name, value in config.items() if name != "quantization_config"}
        with torch.device("meta"):
            network = diffusers(self.family.denoiser).from_config(plain)
        return {name: tuple(value.shape) for name, value in network.state_dict().items()}

    def rehearse(self, resolution: int) -> None:
        """Raise `FifaError` unless a prediction for images of this side can be made.

        Shapes alone are computed, and compared with those of the weights: nothing is loaded. Once
        in a process for the same settings, shapes and side.
        """
        part, side = self.family.part, resolution // self.vae.factor
        where, config = self.folder / part, self.origin.config(part)
        there, shape = self.shapes, (2, self.vae.channels, side, side)
        with working("the parts of the model do not fit", where, FITTING):
            prompts = {name: (2, *one) for name, one in self.prompt_shapes().items()}
            key = digest(self.family.name, config, there, shape, prompts)
            if key in _rehearsed:
                return
            time = self.schedule.draw_time(torch.Generator()).expand(2).to("meta")
            with torch.device("meta"), torch.no_grad():
                other = self.with_denoiser(diffusers(self.family.denoiser).from_config(config))
                other.device = torch.device("meta")
                text = {name: torch.empty(one) for name, one in prompts.items()}
                made = other.predict(torch.empty(shape), time, text, torch.empty(2, 6))
            if made.shape != shape:
                raise ValueError(f"{tuple(made.shape)} is predicted for latents of {shape}")
        needed = {name: tuple(value.shape) for name, value in other.denoiser.state_dict().items()}
        differ = [name for name in needed.keys() & there if needed[name] != there[name]]
        if differ or needed.keys() - there:
            raise FifaError(
                "the weights are not those of the network: "
                + named_keys(missing=needed.keys() - there, **{"of another shape": differ}),
                where=str(where),
                do=FITTING,
            )
        _rehearsed.add(key)

    def inputs(self, tensors: Tensors) -> Tensors:
        """``tensors`` on the device, in the floating type of the denoiser's weights."""
        dtype = next(self.denoiser.parameters()).dtype
        if not dtype.is_floating_point:  # quantised
            dtype = self.origin.dtype
        return {name: value.to(self.device, dtype) for name, value in tensors.items()}

    def load_text(self, folder: ModelFolder) -> list[TextEncoder]:
        """The text encoders, in the family's order."""
        raise NotImplementedError

    @cached_property
    def reader(self) -> TextEncoder | None:
        """As `load_reader`: what counts the tokens of prompts that are kept without padding."""
        return self.load_reader(self.origin)

    def load_reader(self, folder: ModelFolder) -> TextEncoder | None:
        """The text encoder without its model, of a family that masks padding out."""
        return None

    def encode_prompts(self, prompts: Sequence[str]) -> Tensors:
        """What the denoiser needs of prompts: by name, ``[n, ...]``, float32, on the device.

        A family that masks padding out has ``prompt`` ``[n, tokens, d]`` and ``mask``
        ``[n, tokens]``, as `fifa.training.backbones.text.padded` makes them, and a `reader`.
        """
        raise NotImplementedError

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what `encode_prompts` gives for one prompt: with a mask, for the longest.

        A family whose configurations tell them says so; else the empty prompt is encoded.
        """
        return {name: tuple(found.shape[1:]) for name, found in self.encode_prompts([""]).items()}

    def predict(self, noisy: Tensor, time: Tensor, prompts: Tensors, frames: Tensor) -> Tensor:
        """The denoiser's prediction, float32 ``[n, c, h, w]``, with gradients where they are on.

        Parameters
        ----------
        noisy
            ``[n, c, h, w]``.
        time
            ``[n]``, as ``schedule.draw_time`` gives: int64 timesteps or float32 sigmas.
        prompts
            As `encode_prompts` gives; without ``mask`` where all its tokens are there.
        frames
            int64 ``[n, 6]``, `fifa.training.resize.Frame`: SDXL takes them as an input, the
            image's size and crop.
        """
        raise NotImplementedError
