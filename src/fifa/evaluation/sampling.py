"""Pipelines of diffusers, loaded with whichever weights are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from fifa.config import SAMPLERS, Generate
from fifa.console import quiet
from fifa.errors import FifaError
from fifa.evaluation.models import Model, class_name, part_name
from fifa.models.families import PIPELINES
from fifa.models.frozen import check_quantizer, quantized_parts
from fifa.models.lora import SAFE, adapted, cannot_load
from fifa.models.networks import load_network, load_parts, working
from fifa.models.optional import require
from fifa.models.runtime import Runtime, make_runtime, tf32
from fifa.shards.files import read_json

# What a model was trained with; the rest of a scheduler's settings belong to the sampler
SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "shift",
    "flow_shift",
    "use_flow_sigmas",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
)

# Pixels of the images that a CUDA device decodes together. Four of 512 x 512 take 4.5 GB on an H100
# and 17 ms each, one alone 2.9 GB and 22 ms, 32 together 19.5 GB and 14 ms.
DECODED = 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """`Generate` with nothing left open: what names an image beside its weights.

    Parameters
    ----------
    steps, guidance, width, height, negative, dtype
        As in `Generate`; ``guidance``, ``width`` and ``height`` are None for a pipeline whose
        own defaults are taken.
    sampler
        The scheduler's class.
    device
        ``cpu``, ``cuda`` or ``mps``: the same seed gives nearly, not quite, the same image on
        another.
    """

    steps: int | None
    guidance: float | None
    sampler: str
    width: int | None
    height: int | None
    negative: str
    device: str
    dtype: str

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that names them: as they are, with the precision of products for ``dtype``."""
        return {**asdict(self), "dtype": Runtime(self.device, self.dtype).precision}


def settings_for(asked: Generate, base: Path) -> Settings:
    """The settings for a base model: what was asked for, and its family's defaults for the rest.

    Raises `FifaError` for a device that this machine does not have.
    """
    family = PIPELINES.get(class_name(base))
    device = make_runtime(asked.device).device.partition(":")[0]
    steps, guidance, half = None, None, "bfloat16"
    if family is not None:
        steps, guidance = family.sampling(base)
        half = family.half
    return Settings(
        steps=steps if asked.steps is None else asked.steps,
        guidance=guidance if asked.guidance is None else asked.guidance,
        sampler=SAMPLERS[asked.sampler]
        if asked.sampler
        else str(_scheduler(base).get("_class_name", "")),
        width=asked.width,
        height=asked.height,
        negative=asked.negative,
        device=device,
        dtype=asked.dtype or ("float32" if device == "cpu" else half),
    )


class PipelineLoader:
    """Loads pipelines one at a time; a checkpoint's weights go into the base and out again.

    Parameters
    ----------
    base
        The base's folder.
    settings
        How images are made.
    device
        The torch device.
    """

    def __init__(self, base: Path, settings: Settings, device: str | None = None) -> None:
        self._folder, self._settings = base, settings
        self._device = make_runtime(device).device
        self._loaded: Path | None = None
        self._pipe: Any = None

    @contextmanager
    def use(self, model: Model) -> Iterator[Any]:
        """The pipeline with the model's weights; the base is as it was when the block ends."""
        with quiet(*(require(name, "train") for name in ("diffusers", "transformers"))):
            if self._loaded != model.pipeline:
                self._loaded = self._pipe = None  # not two models in memory
                self._pipe = self._load(model.pipeline)
                self._loaded = model.pipeline
            if model.method == "lora":
                with adapted(self._pipe, model.path):
                    yield self._pipe
            elif model.method == "part":
                with _exchanged(self._pipe, model.path, self._dtype, self._device):
                    yield self._pipe
            else:
                yield self._pipe

    @property
    def _dtype(self) -> Any:
        return getattr(require("torch"), self._settings.dtype)

    def _load(self, folder: Path) -> Any:
        diffusers = require("diffusers", "train")
        if quantized_parts(folder):
            check_quantizer(require("torch").device(self._device))
        options: dict[str, Any] = {"dtype": self._dtype, **SAFE}
        if class_name(folder) == "StableDiffusionPipeline":
            # what it would blacken is measured instead
            options |= {"safety_checker": None, "requires_safety_checker": False}
        if class_name(folder) == "StableDiffusionXLPipeline":
            options["add_watermarker"] = False
        try:
            options |= load_parts(folder, self._dtype, options)
            pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **options).to(self._device)
        except FifaError:
            raise
        except Exception as error:  # diffusers', torch's and safetensors' own
            raise cannot_load("the pipeline", folder, error) from error
        self._set_sampler(pipe, diffusers)
        pipe.set_progress_bar_config(disable=True)
        if self._settings.device == "cuda":
            _decode_in_parts(pipe)
        return pipe

    def _set_sampler(self, pipe: Any, diffusers: Any) -> None:
        """The same sampler for all, on each model's own noise schedule."""
        own = dict(pipe.scheduler.config)
        mixed = _scheduler(self._folder) | {name: own[name] for name in SCHEDULE if name in own}
        sampler = getattr(diffusers, self._settings.sampler, None)
        if sampler is None:
            raise FifaError(f"diffusers has no sampler {self._settings.sampler}", do="--sampler")
        usual = type(pipe.scheduler).__name__
        other = ("FlowMatch" in sampler.__name__) != ("FlowMatch" in usual)
        # SANA's samples a flow by this setting, which not every sampler knows
        flow = own.get("use_flow_sigmas") and "use_flow_sigmas" not in signature(sampler).parameters
        if other or flow:
            raise FifaError(
                f"{sampler.__name__} does not sample this model, {usual} does",
                where=str(self._folder),
                do="choose a sampler of the same family, or leave out --sampler",
            )
        pipe.scheduler = sampler.from_config(mixed)


def make_images(
    pipe: Any, settings: Settings, prompts: list[str], seeds: list[int]
) -> npt.NDArray[np.uint8]:
    """The images of some prompts, made together: uint8 [n, height, width, 3].

    Every image has a generator of its own on the CPU, so the noise depends on its seed alone.

    Raises
    ------
    FifaError
        Where an image is not finite.
    torch.OutOfMemoryError, RuntimeError, MemoryError
        Where memory runs out.
    """
    torch = require("torch")
    family = PIPELINES.get(type(pipe).__name__)
    negative = settings.negative or (family.negative if family else None)
    options: dict[str, Any] = {
        "num_inference_steps": settings.steps,
        family.guide if family else "guidance_scale": settings.guidance,
        "width": settings.width,
        "height": settings.height,
        "negative_prompt": [negative] * len(prompts) if negative else None,
    }
    known = {name: value for name, value in options.items() if value is not None}
    noise = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    # Of pipelines that are known, tensors are the same numbers, still on the device.
    options = {**known, "output_type": "pt" if family else "np"}
    vae: Any = getattr(pipe, "vae", None)
    try:
        place = Path(str(getattr(pipe, "name_or_path", "")))
        fits = "check --width, --height and --sampler, and that all parts are of one model"
        with tf32(pipe.device), working("the model cannot make an image", place, fits):
            found = pipe(prompt=prompts, generator=noise, **options).images
    finally:
        if family:  # SDXL's is float32 where memory ran out while it decoded
            vae.to(dtype=getattr(torch, settings.dtype))
    found = found.permute(0, 2, 3, 1) if family else torch.as_tensor(np.asarray(found))
    if not found.isfinite().all():
        raise FifaError(
            f"the model makes images that are not finite in {settings.dtype}",
            do="--dtype float32 or bfloat16; if it is a checkpoint, its training has diverged",
        )
    pixels: npt.NDArray[np.uint8] = (
        (found.float() * 255).round().to(torch.uint8).contiguous().cpu().numpy()
    )
    return pixels


def _decode_in_parts(pipe: Any) -> None:
    """Latents are decoded `DECODED` pixels at a time, always: in other parts, other bits."""
    vae: Any = getattr(pipe, "vae", None)
    if vae is None:
        return
    torch, whole, scale = require("torch"), vae.decode, getattr(pipe, "vae_scale_factor", 8)

    def decode(latents: Any, return_dict: bool = True, **options: Any) -> Any:
        pixels = latents.shape[-2] * latents.shape[-1] * scale**2
        parts = latents.split(max(1, DECODED // pixels))
        images = torch.cat([whole(part, return_dict=False, **options)[0] for part in parts])
        return SimpleNamespace(sample=images) if return_dict else (images,)

    vae.decode = decode


@contextmanager
def _exchanged(pipe: Any, folder: Path, dtype: Any, device: str) -> Iterator[None]:
    name = part_name(folder)
    own = getattr(pipe, name, None)
    if own is None:
        raise FifaError(f"the base model has no {name}", where=str(folder))
    try:
        tuned = load_network(type(own), folder, dtype)
    except FifaError:
        raise
    except Exception as error:  # diffusers', torch's and safetensors' own
        raise cannot_load(f"the {name}", folder, error) from error
    changed = [
        key
        for key in ("in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim")
        if tuned.config.get(key) != own.config.get(key)
    ]
    if changed:
        raise FifaError(f"not a {name} of this base: {', '.join(changed)}", where=str(folder))
    try:
        own.to("cpu")  # never two on the device
        pipe.register_modules(**{name: tuned.to(device)})
        yield
    finally:
        tuned.to("cpu")
        pipe.register_modules(**{name: own.to(device)})


def _scheduler(base: Path) -> dict[str, Any]:
    path = base / "scheduler" / "scheduler_config.json"
    found: dict[str, Any] = read_json(path, "the scheduler's settings", missing={})
    return found
