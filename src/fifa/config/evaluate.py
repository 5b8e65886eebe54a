"""Generating, evaluating and voting."""

from __future__ import annotations

from dataclasses import field
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from fifa.config.cluster import Cluster
from fifa.config.knobs import (
    Count,
    CountOrZero,
    Dtype,
    Knobs,
    NotNegative,
    Option,
    Share,
    Shared,
    knobs,
)

GENERATE_FILE = "generate.yaml"  # in a folder of generated pairs
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


@knobs
class Generate(Shared):
    """How images are made: the same for every model, so that only the weights differ.

    Parameters
    ----------
    steps
        Steps of the sampler; if not given, the default of the model family.
    guidance
        Scale of classifier-free guidance; if not given, the default of the model family.
    sampler
        The sampler; if not given, the base model's own. Each model keeps its noise schedule.
    width
        Width in pixels; if not given, what the base model was made for.
    height
        Height in pixels; if not given, what the base model was made for.
    negative
        A negative prompt; empty: none.
    batch
        Images that are made together; if not given, as many as fit and are of use on CUDA (found by
        trying, and kept in the run folder), 4 elsewhere. Another batch size makes new images,
        because it may change the last bit of a sum.
    dtype
        Precision of the image models; if not given, float32 on a CPU and elsewhere the half
        precision of the model family.
    """

    steps: Annotated[Count | None, Option(family="steps")] = None
    guidance: Annotated[NotNegative | None, Option(family="guidance")] = None
    sampler: Literal[tuple(SAMPLERS)] | None = None  # type: ignore[valid-type]
    width: Annotated[int, Field(ge=8, le=6000)] | None = None
    height: Annotated[int, Field(ge=8, le=6000)] | None = None
    negative: str = ""
    batch: Count | None = None
    device: str | None = None
    dtype: Annotated[Dtype | None, Option(family="half")] = None
    parts: str | None = None
    variant: str | None = None
    vae: str | None = None
    init_lora: str | None = None


@knobs
class Convert(Shared):
    """What is written for other programs, or made a folder once for all.

    Parameters
    ----------
    source
        A model, or with ``layout=kohya`` a LoRA: a folder, a ``.safetensors`` file or a hub id.
    layout
        What is written: ``diffusers``, a model's folder in diffusers' layout; ``kohya``, a LoRA's
        file as ComfyUI and the web UIs read it.
    """

    source: Annotated[str, Option(argument=True, required=True)] = ""
    layout: Literal["diffusers", "kohya"] = "diffusers"
    parts: str | None = None
    variant: str | None = None
    vae: str | None = None
    init_lora: str | None = None


@knobs
class GeneratePairs(Shared):
    """Preference pairs of a model's own images.

    Parameters
    ----------
    model
        The model that makes the images: a folder in diffusers' layout, a hub id, or a single
        ``.safetensors`` file in its authors' layout.
    tuned
        Take the images of this checkpoint of the model, PATH or NAME=PATH: a LoRA (file or folder),
        a folder with ``unet/`` or ``transformer/``, or a whole pipeline.
    margin
        A reward model that judges the images, one of `fifa.scoring.specs.REWARDS.made`. Several
        make a committee.
    per_prompt
        Images per prompt.
    pairs
        Which images of a prompt make a pair: ``best-worst`` takes the best and the worst one,
        ``all`` every two, ``adjacent`` neighbours in the order of their rewards.
    min_margin
        Make no pair whose rewards differ by less than this. A single judge has its own scale; with
        a committee the unit is the spread of each judge's differences.
    """

    model: Annotated[str, Option(required=True)] = ""
    tuned: str | None = None
    prompts: Annotated[str, Option(required=True)] = ""
    limit: Count | None = None
    margin: Annotated[tuple[str, ...], Option(required=True)] = ()
    per_prompt: Annotated[int, Field(ge=2)] = 4
    pairs: Literal["best-worst", "all", "adjacent"] = "best-worst"
    min_margin: NotNegative = 0.0
    first_seed: CountOrZero = 0
    images: Generate = Generate()
    cluster: Cluster = Cluster()


@knobs
class Measure(Knobs):
    """What is measured on the images.

    Parameters
    ----------
    scorers
        A reward model that scores the images, one of `fifa.scoring.specs.REWARDS.made`; none: do
        not score them.
    picked
        A reward model that picked the training data, if the checkpoints and the run do not say so
        themselves. A win by it is no independent evidence.
    rater
        The rater that finds unsafe prompts, one of `fifa.scoring.specs.RATERS.made`; none: do not
        rate prompts.
    unsafe_categories
        Categories whose prompts count as unsafe, whatever the rater says.
    detector
        A transformers image classifier (folder or hub id) that finds unsafe images.
    unsafe_labels
        The labels of the detector that mean unsafe.
    encoder
        The image encoder that measures how different the images of one prompt are, one of
        `fifa.scoring.specs.IMAGE_ENCODERS.forms`; none: do not measure it.
    """

    scorers: Annotated[tuple[str, ...], Option("--score")] = ("pickscore", "hpsv2.1", "clipscore")
    picked: tuple[str, ...] = ()
    rater: str = "none"
    unsafe_categories: Annotated[tuple[str, ...], Option(commas=True)] = ()
    detector: str | None = None
    unsafe_labels: Annotated[tuple[str, ...], Option(commas=True)] = ()
    encoder: str = "efficientnet-lite0"


@knobs
class Evaluate(Shared):
    """An evaluation: models, prompts, how images are made and what is measured.

    Parameters
    ----------
    base
        The base model, before training: a folder in diffusers' layout, a hub id, or a single
        ``.safetensors`` file in its authors' layout.
    tuned
        A checkpoint, PATH or NAME=PATH: a LoRA (file or folder), a folder with ``unet/`` or
        ``transformer/``, or a whole pipeline.
    seeds
        Images per prompt and model.
    curve
        Also measure every ``checkpoints/step-*`` of a checkpoint, on about this many of the
        prompts; 0: do not.
    """

    base: Annotated[str, Option(required=True)] = ""
    tuned: Annotated[dict[str, str], Option(required=True)] = field(default_factory=dict)
    prompts: Annotated[str, Option(required=True)] = ""
    limit: Count | None = None
    seeds: Count = 4
    first_seed: CountOrZero = 0
    curve: CountOrZero = 0
    generate: Generate = Generate()
    measure: Measure = Measure()
    cluster: Cluster = Cluster()


@knobs
class Vote(Knobs):
    """What people are asked, and where the page is served.

    Parameters
    ----------
    models
        Compare only these models; if not given, all of them.
    limit
        Comparisons per voter, the same for all; if not given, all of them.
    votes_per_voter
        Votes that one voter is asked for, repeats and checks included, each from a draw of their
        own; if not given, the whole order.
    votes_per_pair
        Votes that a comparison gets before it is shown to nobody else; if not given, any number.
    until
        When voting ends: 2026-12-24T18:00 in this machine's time, or with an offset, as in
        2026-12-24T18:00+01:00.
    repeats
        Share of the comparisons that are shown again with sides swapped, to see whether voters are
        consistent.
    checks
        Share of attention checks, which show an image beside a destroyed copy of itself: do voters
        look?
    question
        The question above the images.
    seed
        Seed for the comparisons that are drawn. The order and sides that each voter sees come from
        a secret that is kept with the votes.
    host
        The address to listen on. With another address than this machine's own, visitors need the
        link that is printed.
    port
        The port to listen on; 0: any free one.
    allow_hosts
        Another name of this server, for example behind a proxy; with https:// before it, links
        begin with it.
    database
        Keep votes in this PostgreSQL database, postgresql://USER@HOST:PORT/NAME, instead of the
        run's folder. Give the password as PGPASSWORD or in ~/.pgpass.
    """

    models: Annotated[tuple[str, ...], Option(commas=True)] = ()
    limit: Count | None = None
    votes_per_voter: Count | None = None
    votes_per_pair: Count | None = None
    until: datetime | None = None
    repeats: Share = 0.0
    checks: Share = 0.0
    question: str = "Which image is better for this prompt?"
    seed: int = 0
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8750
    allow_hosts: Annotated[tuple[str, ...], Option("--allow-host")] = ()
    database: str | None = None
