"""Noise on latents as in training: diffusion by timesteps, and rectified flow by sigma."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fifa.errors import FifaError
from fifa.training.backbones.parts import diffusers

Prediction = Literal["epsilon", "v_prediction", "flow"]


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
        self.prediction: Prediction = prediction
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

    def draw_time(self, generator: torch.Generator) -> Tensor:
        """A timestep, uniform in [0, T), int64."""
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
