"""Every knob of an evaluation, once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

_checked = ConfigDict(extra="forbid", validate_default=True)
Count = Annotated[int, Field(ge=1)]

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


@dataclass(frozen=True, config=_checked)
class Generate:
    """How images are made: the same for every model, so that only the weights differ.

    Parameters
    ----------
    steps
        Of the sampler; None: 50 for SD and SDXL, 28 for SD3 and FLUX, 4 for FLUX schnell.
    guidance
        Classifier-free guidance; None: 7.5 for SD, 5 for SDXL, 7 for SD3, 3.5 for FLUX.
    sampler
        One of `SAMPLERS`; None: the base model's own. The noise schedule stays each model's.
    width, height
        In pixels; None: what the base model was made for.
    negative
        A negative prompt; empty for none.
    batch
        Images made together. It is part of what names an image: the last bit of a sum may
        depend on it.
    device
        A torch device; None for the fastest.
    dtype
        What weights are computed in; None: float32 on a CPU, else float16 (SD, SDXL) or
        bfloat16 (SD3, FLUX).
    """

    steps: Count | None = None
    guidance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    sampler: Literal[tuple(SAMPLERS)] | None = None  # type: ignore[valid-type]
    width: Annotated[int, Field(ge=8)] | None = None
    height: Annotated[int, Field(ge=8)] | None = None
    negative: str = ""
    batch: Count = 4
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


@dataclass(frozen=True, config=_checked)
class Measure:
    """What is measured on the images.

    Parameters
    ----------
    scorers
        Reward models, as for ``--margin`` but without columns: ``pickscore``, ``hpsv2.1``,
        ``clipscore:FOLDER``, ``proxy:FOLDER``, ...
    picked
        Reward models that picked the training data, beside those that the checkpoints and the
        run say: no evidence of their own.
    rater
        Finds unsafe prompts: ``local``, ``openai:MODEL@URL``, ...; ``none``.
    unsafe_categories
        Categories whose prompts are unsafe, whatever the rater says.
    detector
        A transformers image classifier (folder or hub id) that finds unsafe images; None.
    unsafe_labels
        Its labels that mean unsafe.
    encoder
        An image encoder for the diversity of a prompt's images; ``none``.
    """

    scorers: tuple[str, ...] = ()
    picked: tuple[str, ...] = ()
    rater: str = "none"
    unsafe_categories: tuple[str, ...] = ()
    detector: str | None = None
    unsafe_labels: tuple[str, ...] = ()
    encoder: str = "efficientnet-lite0"


@dataclass(frozen=True, config=_checked)
class Evaluation:
    """A whole evaluation: models, prompts, how images are made and what is measured.

    Parameters
    ----------
    base
        The model that was tuned: a folder in diffusers' layout, or a hub id.
    tuned
        Checkpoints by name: a LoRA (file or folder), a folder with ``unet/`` or
        ``transformer/``, or a whole pipeline.
    prompts
        As for `fifa.evaluation.prompts.read_prompts`.
    limit
        At most so many prompts, drawn in turn from each category.
    seeds
        Images a prompt and model.
    first_seed
        The number of the first: another one gives other images.
    curve
        Prompts on which every ``checkpoints/step-*`` of a checkpoint is measured too; 0 for none.
    """

    base: str
    tuned: dict[str, str]
    prompts: str
    limit: Count | None = None
    seeds: Count = 4
    first_seed: Annotated[int, Field(ge=0)] = 0
    curve: Annotated[int, Field(ge=0)] = 0
    generate: Generate = Generate()
    measure: Measure = Measure()

    def to_yaml(self) -> str:
        """The evaluation as YAML."""
        plain: dict[str, Any] = TypeAdapter(Evaluation).dump_python(self, mode="json")
        return str(yaml.safe_dump(plain, sort_keys=False))
