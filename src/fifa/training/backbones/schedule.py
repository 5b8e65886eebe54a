"""Noise on latents as in training: diffusion by timesteps, and rectified flow by sigma."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fifa.errors import FifaError
from fifa.models.optional import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor


Prediction = Literal["epsilon", "v_prediction", "flow"]


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
        torch = require("torch", "train")
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise FifaError(
                f"a model that predicts {prediction!r} cannot be trained here",
                where=where,
                do="use a model with prediction_type epsilon or v_prediction",
            )
        self.prediction: Prediction = prediction
        betas = _betas(config, where)
        self.steps = len(betas)
        # alpha_bar_t = prod_{s <= t} (1 - beta_s), in float32 as diffusers multiplies it
        self.alphas = torch.cumprod(1.0 - betas, dim=0)

    def draw_time(self, generator: torch.Generator) -> Tensor:
        """A timestep, uniform in [0, T), int64."""
        torch = require("torch")
        drawn: Tensor = torch.randint(0, self.steps, (), generator=generator)
        return drawn

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

    prediction: Prediction = "flow"

    def __init__(self, config: dict[str, Any], where: str) -> None:
        shift = float(config.get("shift", 1.0))
        if not shift > 0:
            raise FifaError(f"the scheduler's shift is {shift}, not above 0", where=where)
        self.shift = 1.0 if config.get("use_dynamic_shifting") else shift
        self.steps = int(config.get("num_train_timesteps", 1000))

    def draw_time(self, generator: torch.Generator) -> Tensor:
        """A sigma in (0, 1), float32."""
        torch = require("torch")
        # s = sigmoid(N(0, 1)), then shift s / (1 + (shift - 1) s)
        s = torch.sigmoid(torch.randn((), generator=generator))
        shifted: Tensor = self.shift * s / (1 + (self.shift - 1) * s)
        return shifted

    def add_noise(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """``(1 - s) * latents + s * noise``."""
        s = time.to(latents.dtype).view(-1, *(1,) * (latents.ndim - 1))
        return (1 - s) * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """``noise - latents``."""
        return noise - latents


def _betas(config: dict[str, Any], where: str) -> Tensor:
    """The betas of the schedules that diffusers knows by name, float32 [T]."""
    torch = require("torch")
    if config.get("trained_betas") is not None:
        given: Tensor = torch.tensor(config["trained_betas"], dtype=torch.float32)
        return given
    steps = int(config.get("num_train_timesteps", 1000))
    start = float(config.get("beta_start", 0.0001))
    end = float(config.get("beta_end", 0.02))
    name = config.get("beta_schedule", "linear")
    if config.get("rescale_betas_zero_snr"):
        raise FifaError(
            "a schedule rescaled to zero terminal SNR is not supported",
            where=where,
            do="use a model whose scheduler has rescale_betas_zero_snr off",
        )
    if name == "linear":
        betas: Tensor = torch.linspace(start, end, steps, dtype=torch.float32)
    elif name == "scaled_linear":
        # linear in sqrt(beta): the latent diffusion models' schedule
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    elif name == "squaredcos_cap_v2":
        betas = _cosine(steps)
    else:
        raise FifaError(
            f"no such beta schedule: {name}",
            where=where,
            do="linear, scaled_linear, squaredcos_cap_v2 or trained_betas",
        )
    return betas


def _cosine(steps: int) -> Tensor:
    """``beta_t = 1 - f(t + 1) / f(t)``, ``f(t) = cos^2((t / T + 0.008) / 1.008 * pi / 2)``.

    At most 0.999 (arXiv:2102.09672).
    """
    torch = require("torch")
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    betas: Tensor = (1 - f[1:] / f[:-1]).clamp(max=0.999).float()
    return betas
