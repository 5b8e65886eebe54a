"""Every knob of every command, once: its default, its bounds, and its help text.

A command's knobs are a frozen dataclass, checked when it is made. The help text of a knob is its
entry in the docstring of its class; `fifa.cli.options` makes the command line from both. `changed`
replaces knobs, ``from_yaml`` and ``to_yaml`` read and write them as files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import asdict, field, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, dataclass_transform

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fifa.errors import FifaError

RECIPE_FILE = "recipe.yaml"  # in a run folder
GENERATE_FILE = "generate.yaml"  # in a folder of generated pairs
# "unsafe" is what raters say that see harm, but not of which kind.
UNSAFE_FLAGS = ("sexual", "violence", "hate", "self-harm", "minors", "unsafe")
# In which order pairs are kept; `fifa.selection.strategies` has the function of each.
STRATEGIES = {
    "fifa": "importance, largest first",
    "random": "a seeded draw from each pair's id",
    "low": "absolute margin, smallest first",
    "middle": "absolute margin, nearest the median first",
    "high": "absolute margin, largest first",
    "consensus": "only pairs where all scorers agree with the person, then importance",
    "facility": "prompts that best represent all prompts, a pair of each in turn",
    "farthest": "prompts farthest from those already taken, a pair of each in turn",
    "weights": "no cut: every eligible pair, with a soft weight",
}
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
Dtype = Literal["float32", "bfloat16", "float16"]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

T = TypeVar("T")
K = TypeVar("K", bound="Knobs")


@dataclasses.dataclass(frozen=True)
class Option:
    """How a knob is written on the command line, where that is not ``--its-name``.

    Parameters
    ----------
    name
        The option: ``--target``, or both of a switch, ``--buckets/--crop``.
    commas
        Several values stand in one option, with commas between them; otherwise the option is
        given several times.
    argument
        It is given without a name.
    required
        It has no default: it has to be given, on the command line or in the recipe.
    family
        The field of `fifa.models.families.Family` that has the default, which is the model's.
    """

    name: str = ""
    commas: bool = False
    argument: bool = False
    required: bool = False
    family: Literal["", "steps", "guidance", "half"] = ""


class Knobs:
    """What all classes of knobs can do."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @classmethod
    def from_yaml(cls: type[K], path: Path, *, sealed: bool = False) -> K:
        """The knobs in a YAML file; what the file leaves out has its default.

        ``sealed``: it has to be as fifa wrote it. Raises `FifaError` for text that is no YAML,
        a file without any knob, unknown knobs and values out of range.
        """
        from fifa.shards.files import read_yaml  # pyarrow, which no help text needs

        values = read_yaml(path, "the recipe", sealed=sealed)
        if not values:
            raise FifaError("the recipe is empty", where=str(path), do="mend it, or name another")
        return build(cls, values, where=str(path))

    def to_yaml(self) -> str:
        """The knobs as YAML; ``from_yaml`` gives the same ones back."""
        plain = TypeAdapter(type(self)).dump_python(self, mode="json")
        # Escaped beyond ASCII: unescaped, PyYAML does not read every character back as it was.
        return str(yaml.safe_dump(plain, sort_keys=False))

    def differences(self: K, other: K, *, but: frozenset[str] = frozenset()) -> list[str]:
        """``knob: here / there`` for every knob that differs, ``section.knob`` in a section.

        Knobs named in ``but`` may differ.
        """
        here, there = _flat(self), _flat(other)
        return [
            f"{name}: {here[name]!r} / {there[name]!r}"
            for name in here
            if here[name] != there[name] and name not in but
        ]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def knobs(cls: type[T]) -> type[T]:
    """A frozen dataclass whose values are checked: what is wrong is a `FifaError`."""
    config = ConfigDict(extra="forbid", validate_default=True)
    made: Any = dataclass(cls, frozen=True, config=config)
    check = made.__init__

    @wraps(check)
    def checked_init(self: Any, *args: Any, **values: Any) -> None:
        try:
            check(self, *args, **values)
        except ValidationError as error:
            raise _wrong(error, cls.__name__) from error

    made.__init__ = checked_init
    return made  # type: ignore[no-any-return]


@knobs
class Read(Knobs):
    """Where the pairs come from.

    Parameters
    ----------
    source
        A file, a folder, a glob, an ``hf://datasets/...`` id or any fsspec URL.
    format
        The format of the source, one of `fifa.data.read.FORMATS`; recognised by its columns if not
        given.
    columns
        For a table of your own: which column is which, as
        ``prompt=NAME,image_0=NAME,image_1=NAME,label=NAME``.
    pairs
        Where a prompt has several rated or ranked images, which two of them make a pair: ``all``,
        the best and the worst one, or neighbours in the order of their ratings.
    min_gap
        Make no pair of images whose ratings (or ranks) differ by less than this. If not given: by
        no more than their noise, where a rating is the mean of several.
    label_aspect
        The labels are those of this aspect, for example ``alignment``, of a source that has several
        labels a pair.
    annotators
        What a pair's label is where annotators have names: ``count`` is the share of their votes,
        ``weigh`` weighs each of them by how reliable they are (Dawid and Skene's model).
    allow_download
        Fetch images that the source only names by a URL (from public addresses only).
    images_from
        A URL (such as ``s3://bucket/images``) below which the source may name images: they are
        opened with your own rights there.
    """

    source: Annotated[str, Option(argument=True, required=True)] = ""
    format: str | None = None
    columns: Annotated[dict[str, str], Option(commas=True)] = field(default_factory=dict)
    pairs: Literal["all", "best-worst", "adjacent"] = "all"
    min_gap: NotNegative | None = None
    label_aspect: str | None = None
    annotators: Literal["count", "weigh"] = "count"
    allow_download: Annotated[bool, Option("--allow-download/--no-download")] = False
    images_from: tuple[str, ...] = ()


@knobs
class Score(Knobs):
    """What scores pairs and prompts.

    Parameters
    ----------
    margin
        A reward model, one of `fifa.scoring.specs.REWARDS.forms`. Several make a committee.
    quality
        The rater of prompts, one of `fifa.scoring.specs.RATERS.forms`, none.
    diversity
        The encoder of prompts, one of `fifa.scoring.specs.ENCODERS.forms`, none.
    k
        Diversity is the distance to the k-th nearest prompt.
    budget
        Ask a vision-language judge only about this part of the pairs, those that the other margins
        are least sure of: a share (0.2) or as many as so many tokens allow (2000000). On the
        command line also a percentage (20%).
    """

    margin: tuple[str, ...] = ()
    quality: str = "local"
    diversity: str = "minilm"
    k: Count = 10
    budget: Count | Annotated[float, Field(gt=0, le=1)] = 1.0


@knobs
class Select(Knobs):
    """What is kept.

    Parameters
    ----------
    keep
        How many pairs to keep: a count (5000) or a fraction of all pairs (0.1). On the command line
        also a percentage (10%).
    strategy
        How pairs are chosen: ``fifa`` takes the most important ones; the others are controls and
        variants of it (docs/select.md).
    alpha
        Weight of the prompt's quality (the margin's weight is 1).
    gamma
        Weight of the prompt's diversity (the margin's weight is 1).
    normalize
        How margin, quality and diversity are brought to one scale: ``none`` leaves them as they
        are, ``z`` takes (x - mean) / standard deviation, ``rank`` only the order, ``robust`` (x -
        median) / spread, where the spread is made from the quartiles.
    unsafe_flags
        Drop prompts to which the rater gave one of these flags; an empty list drops none.
    drop_nonsense
        Drop prompts that the rater flagged as nonsense.
    min_quality
        Drop prompts with a lower rating than this (on the rater's scale, 1 to 5).
    drop_disagreeing
        Drop a pair if its labels by aspect have different winners: one image is the better aligned
        one and the other one looks better.
    generators
        Keep only pairs of which both images are by these generators.
    not_generators
        Drop pairs with an image by one of these generators.
    min_agreement
        Drop pairs where a smaller share of the committee than this agrees with the person.
    margin_unit
        The unit of the margin: ``reward`` takes rewards as they are, ``sigma`` divides the
        difference of a model that says how sure it is (hpsv3, hpsv3++) by its own uncertainty.
    margin_window
        Keep only pairs whose absolute margin is within these bounds. A single scorer has its own
        scale; with a committee the unit is the spread of each scorer's differences.
    margin_percentiles
        The same bounds as percentiles (0 to 100) of the margins of all eligible pairs.
    per_prompt
        Keep at most this many pairs of one prompt.
    drop_duplicates
        Drop a pair if an earlier pair has the same two images, or if both its images are the same.
    anyway
        Select by the margin even if it is near chance on these labels (see ``fifa trust``).
    seed
        Seed for random strategies.
    """

    keep: Count | Annotated[float, Field(gt=0, le=1)] = 5000
    strategy: Literal[tuple(STRATEGIES)] = "fifa"  # type: ignore[valid-type]
    alpha: NotNegative = 0.5
    gamma: NotNegative = 0.5
    normalize: Literal["none", "z", "rank", "robust"] = "robust"
    unsafe_flags: Annotated[tuple[str, ...], Option(commas=True)] = UNSAFE_FLAGS
    drop_nonsense: Annotated[bool, Option("--drop-nonsense/--keep-nonsense")] = True
    min_quality: float | None = None
    drop_disagreeing: Annotated[bool, Option("--drop-disagreeing/--keep-disagreeing")] = False
    generators: Annotated[tuple[str, ...], Option(commas=True)] = ()
    not_generators: Annotated[tuple[str, ...], Option(commas=True)] = ()
    min_agreement: Share | None = None
    margin_unit: Literal["reward", "sigma"] = "reward"
    margin_window: tuple[float | None, float | None] = (None, None)
    margin_percentiles: tuple[float, float] = (0.0, 100.0)
    per_prompt: Count | None = None
    drop_duplicates: Annotated[bool, Option("--drop-duplicates/--keep-duplicates")] = True
    anyway: Annotated[bool, Option("--anyway/--if-trusted")] = False
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.margin_percentiles
        if not 0 <= low <= high <= 100:
            raise FifaError(
                f"margin percentiles of {low:g}:{high:g}", do="0 to 100, the lower one first"
            )
        for name, number in (
            ("margin window", self.margin_window[0]),
            ("margin window", self.margin_window[1]),
            ("least quality", self.min_quality),
        ):
            if number is not None and math.isnan(number):
                raise FifaError(f"the {name} is no number", do="give a number, or leave it out")


@knobs
class Compute(Knobs):
    """Where and how models run.

    Only ``dtype``, ``fast_decode`` and what a judge is sent change a reward by more than rounding.

    Parameters
    ----------
    device
        A torch device (cuda, cuda:1, mps, cpu); if not given, the fastest one.
    dtype
        Precision of reward models: ``float32``, or ``bfloat16`` or ``float16`` under autocast; if
        not given, each model's default, which for most is ``bfloat16`` on GPUs that have it.
    compile
        Compile the image encoder with ``torch.compile``.
    channels_last
        Use the channels-last memory format for convolutions.
    batch
        Batch size, in images of 224 x 224 pixels; a batch of larger images has fewer of them. If
        not given, what is useful on the device; if memory runs out, half of it from then on.
    workers
        Threads (on more than four cores: processes) that decode and preprocess images; 0: as many
        as the cores allow.
    fast_decode
        Decode JPEGs that are far larger than the model's input at a half, a quarter or an eighth
        of their size. Scores differ a little (docs/scale.md).
    executor
        Where shards run: ``local``, ``local:N`` (N processes), ``ray`` or ``ray://HEAD:10001``.
    actors
        On Ray: the number of actors.
    num_cpus
        On Ray: CPUs per actor.
    num_gpus
        On Ray: GPUs per actor; with a fraction, several actors share a GPU.
    store
        Where unfinished shards are kept: a folder or URL that all workers can read and write; if
        not given, beside the scores.
    cache_gb
        How many GB of a remote source's images are kept on this machine's disk (in the folder
        ``$FIFA_CACHE``, else ``~/.cache/fifa``); 0 keeps none. The oldest make room.
    in_flight
        How many requests are sent to the endpoint of a rater or judge at the same time.
    max_tokens
        How many tokens an answer of such an endpoint may have, including what the model thinks
        before it. An answer that was cut off does not count.
    judge_side
        Longest side, in pixels, of the images that a vision-language judge is sent; larger ones
        are resized.
    judge_images
        How these images are encoded.
    """

    device: str | None = None
    dtype: Dtype | None = None
    compile: bool = False
    channels_last: Annotated[bool, Option("--channels-last/--channels-first")] = False
    batch: Count | None = None
    workers: CountOrZero = 0
    fast_decode: bool = False
    executor: Annotated[str, Field(pattern=r"^(local(:\d+)?|ray(://.+)?)$")] = "local"
    actors: Count = 1
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    store: str | None = None
    cache_gb: NotNegative = 10.0
    in_flight: Count = 16
    max_tokens: Count = 8192
    judge_side: Annotated[int, Field(ge=28)] = 768
    judge_images: Literal["jpeg", "png"] = "jpeg"


@knobs
class Recipe(Knobs):
    """A whole run: read, score, select, and what it runs on."""

    read: Read = Read()
    score: Score = Score()
    select: Select = Select()
    compute: Compute = Compute()


@knobs
class Trust(Knobs):
    """What is judged, and by which labels.

    Parameters
    ----------
    margin
        A reward model, one of `fifa.scoring.specs.REWARDS.forms`. Several are also judged
        together, as a committee. Those of a RUN are its recipe's if not given.
    limit
        Measure on at most this many pairs, drawn at random, always the same ones.
    """

    margin: tuple[str, ...] = ()
    limit: Count | None = None
    read: Read = Read()
    compute: Compute = Compute()


@knobs
class Export(Knobs):
    """Where the selected pairs go.

    Parameters
    ----------
    to
        The trainer that they are written for, one of `fifa.selection.trainers.TARGETS`.
    push_to_hub
        A data set of the Hugging Face hub, ORG/NAME, that the folder is uploaded to as well.
    public
        Let everybody see the data set on the hub; a new one is private otherwise.
    """

    to: str = "diffusers"
    push_to_hub: str | None = None
    public: Annotated[bool, Option("--public/--private")] = False


@knobs
class Train(Knobs):
    """A training of a diffusion model.

    Parameters
    ----------
    source
        The pairs: a run folder, a subset, or Parquet files in diffusers' schema.
    model
        The model to train: a folder in diffusers' layout, or a hub id.
    resolution
        Side of the training images in pixels (with buckets: of a square of the same area); if not
        given, the model's own resolution.
    buckets
        Sort images into buckets by their aspect ratio, or crop them to a square.
    flips
        Mirror both images of a pair, in half of the steps.
    cache_dtype
        Precision of the cached latents and embeddings.
    prompt_dropout
        Share of the presentations in which a pair has an empty prompt.
    method
        ``lora`` trains adapters, ``full`` trains all weights of the UNet or transformer.
    rank
        Rank of the LoRA.
    alpha
        Alpha of the LoRA; if not given, its rank.
    targets
        A module that gets an adapter; if not given, the model's attention layers.
    lora_dropout
        Dropout of the adapters' inputs.
    loss
        The loss: ``sigmoid`` is Diffusion-DPO; docs/training.md has the formulas of all.
    beta
        How strongly the model is kept close to the base model. Other trainers define beta in other
        ways: docs/training.md converts them.
    poly
        The factor a of Poly-DPO (loss ``poly``).
    mapo
        Weight of MaPO's ratio term (loss ``mapo``).
    beta_target
        Lower beta, step by step, until the logits are of this size in the mean (1.4: pairs have a
        fifth of the gradient that they begin with); if not given, beta stays as it is.
    sdpo
        Scale the gradient of the rejected image down where it would make the preferred one worse
        (Diffusion-SDPO): the share of the preferred image's own gain that has to stay, such as 0.9;
        if not given, it is not scaled.
    dpop
        Weight of the penalty for a preferred image that the model denoises worse than the base
        model does (DPO-Positive).
    sft
        Weight of the supervised term (SFT), the denoising error on the preferred image, which is
        added to the loss.
    weights
        Multiply the loss of each pair by its weight in the subset.
    label
        The soft labels of the losses ``soft`` and ``smpo``: ``people`` takes the share of votes,
        ``margin`` takes sigmoid(label_scale * signed margin).
    label_scale
        Factor of the margin in a soft label.
    holdout
        Share of the pairs that are held out, by prompt: measured, and not trained on. If not given,
        0.05 from 200 pairs on.
    validate_every
        Steps between two measurements on held-out pairs; if not given, a tenth of the training.
    stop
        End the training when held-out pairs get worse.
    patience
        Measurements in a row without a lower loss on held-out pairs, after which ``stop`` ends it.
    displacement
        By how much of the reference's error the policy's may be above it on the preferred images of
        held-out pairs, before ``stop`` ends it.
    draws
        Size of the noise pool: 0 draws new noise and a new timestep at every step. With D > 0 each
        pair has a fixed pool of D of them, and the reference model's errors on the pool are
        computed once, before the training.
    batch
        Pairs per step, over all processes and micro-batches.
    micro_batch
        Pairs per forward and backward pass; if not given, as many as the device has memory for.
    steps
        Training steps; by default from --epochs.
    epochs
        Passes over all pairs, if no steps are given.
    optimizer
        The optimiser; ``adamw8bit`` needs bitsandbytes.
    lr
        Learning rate.
    schedule
        The learning rate after the warm-up: ``linear`` and ``cosine`` fall to 0.
    warmup
        Steps of linear warm-up.
    weight_decay
        Weight decay of the optimiser.
    beta1
        First beta of AdamW.
    beta2
        Second beta of AdamW.
    epsilon
        Epsilon of AdamW.
    clip
        Largest norm of the gradient; 0 turns clipping off. Adafactor clips by itself.
    ema
        Decay of the moving average of the weights (EMA). If it is not 0, the average is what is
        written.
    seed
        Seed for everything that is random.
    device
        Only ``cpu`` can be chosen here; if not given, accelerate chooses the device.
    dtype
        Precision of the training: ``float32``, or ``bfloat16`` or ``float16`` under autocast; if
        not given, what accelerate is configured for, else ``bfloat16`` on a CUDA device that has
        it and ``float32`` elsewhere.
    compile
        Compile the blocks that the denoiser repeats (``torch.compile``).
    channels_last
        Use the channels-last memory format for convolutions.
    gradient_checkpointing
        Save memory: compute activations a second time in the backward pass; if not given, only
        where not even one pair fits otherwise.
    tracker
        Where metrics are sent, besides ``stats.jsonl``.
    log_every
        Steps between two lines of metrics.
    save_every
        Steps between two saved states. A stopped training continues from the last one.
    checkpoint_every
        Steps between two checkpoints; 0 keeps only the final weights.
    sample_every
        Steps between two sheets of sample images; 0: no samples.
    sample_prompts
        A prompt for the sample images; if not given, the first four prompts of the pairs.
    sample_steps
        Denoising steps of a sample image.
    """

    source: Annotated[str, Option(argument=True, required=True)] = ""
    model: Annotated[str, Option(required=True)] = ""
    resolution: Count | None = None
    buckets: Annotated[bool, Option("--buckets/--crop")] = False
    flips: bool = False
    cache_dtype: Dtype = "float16"
    prompt_dropout: Share = 0.0
    method: Literal["lora", "full"] = "lora"
    rank: Count = 8
    alpha: Positive | None = None
    targets: Annotated[tuple[str, ...], Option("--target")] = ()
    lora_dropout: Share = 0.0
    loss: Literal["sigmoid", "ipo", "hinge", "mapo", "poly", "soft", "smpo", "kto"] = "sigmoid"
    beta: Positive = 5000.0
    beta_target: Positive | None = None
    sdpo: Share | None = None
    dpop: NotNegative = 0.0
    poly: NotNegative = 8.0
    mapo: NotNegative = 0.1
    sft: NotNegative = 0.0
    weights: bool = True
    label: Literal["people", "margin"] = "people"
    label_scale: Positive = 1.0
    holdout: Annotated[float, Field(ge=0, lt=1)] | None = None
    validate_every: Count | None = None
    stop: bool = False
    patience: Count = 3
    displacement: NotNegative = 0.02
    draws: CountOrZero = 0
    batch: Count = 32
    micro_batch: Count | None = None
    steps: Count | None = None
    epochs: Positive = 10.0
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    lr: Positive = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: CountOrZero = 0
    weight_decay: NotNegative = 0.01
    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: Positive = 1e-8
    clip: NotNegative = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: int = 0
    device: Literal["cpu"] | None = None
    dtype: Dtype | None = None
    compile: bool = False
    channels_last: Annotated[bool, Option("--channels-last/--channels-first")] = False
    gradient_checkpointing: bool | None = None
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    log_every: Count = 1
    save_every: Count = 100
    checkpoint_every: CountOrZero = 0
    sample_every: CountOrZero = 0
    sample_prompts: Annotated[tuple[str, ...], Option("--sample-prompt")] = ()
    sample_steps: Count = 25

    def __post_init__(self) -> None:
        for given, name, losses in (
            (self.beta_target, "beta_target", ("ipo", "mapo")),
            (self.dpop, "dpop", ("mapo",)),
        ):
            if given and self.loss in losses:
                raise FifaError(
                    f"{name} does nothing for the loss {self.loss}", do="leave one of them out"
                )

    def steps_of(self, pairs: int) -> int:
        """How many steps the training takes on so many pairs."""
        return self.steps or max(1, round(self.epochs * pairs / self.batch))


@knobs
class Reward(Knobs):
    """A training of a reward model.

    Parameters
    ----------
    base
        ``features`` trains a small head on frozen features; MODEL (a folder or hub id) fine-tunes
        that transformers CLIP.
    image
        Head: the frozen image encoder, one of `fifa.scoring.specs.IMAGE_ENCODERS.forms`.
    text
        Head: the frozen text encoder, one of `fifa.scoring.specs.ENCODERS.made`, none.
    folds
        Head: the number of cross-validation folds (over prompts) by which it is chosen.
    parts
        CLIP: what is trained, ``full`` (all weights) or ``heads`` (both projections and
        logit_scale).
    lr
        CLIP: learning rate; it falls linearly to 0 after the warm-up.
    weight_decay
        CLIP: weight decay.
    warmup
        CLIP: steps of linear warm-up.
    steps
        CLIP: largest number of steps.
    batch
        CLIP: pairs per step.
    clip
        CLIP: largest norm of the gradient.
    bf16
        CLIP: use bfloat16 autocast.
    held_out
        CLIP: share of the prompts that are held out for evaluation.
    evaluate_every
        CLIP: steps between two evaluations on the held-out prompts. The best weights are kept.
    patience
        CLIP: stop after this many evaluations without an improvement.
    seed
        Seed for the folds, the order of training and the bootstrap.
    device
        A torch device (cuda, cuda:1, mps, cpu); if not given, the fastest one.
    """

    read: Read = Read()
    base: str = "features"
    image: str = "efficientnet-lite0"
    text: str = "minilm"
    folds: Annotated[int, Field(ge=2)] = 5
    parts: Literal["full", "heads"] = "full"
    lr: NotNegative = 3e-6
    weight_decay: NotNegative = 0.3
    warmup: CountOrZero = 500
    steps: Count = 4000
    batch: Count = 128
    clip: Positive = 1.0
    bf16: bool = False
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    evaluate_every: Count = 100
    patience: Count = 10
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        if self.warmup >= self.steps:
            raise FifaError(
                f"{self.warmup} warm-up steps, but only {self.steps} steps",
                do="fewer warm-up steps, or more steps",
            )

    @property
    def shared(self) -> bool:
        """Whether both frozen encoders are towers of one CLIP, so that images fit prompts."""
        return self.image == self.text and self.image.startswith("clip:")

    def settings(self) -> dict[str, Any]:
        """The knobs that this kind of training reads, for the card and for file names."""
        head = ("image", "text", "folds")
        if self.base == "features":
            return {name: getattr(self, name) for name in ("base", *head, "seed")}
        return {k: v for k, v in asdict(self).items() if k not in (*head, "read", "device")}


@knobs
class Rubric(Knobs):
    """A rubric of yes-or-no questions, learned from people's labels.

    Parameters
    ----------
    judge
        The vision-language judge that answers the questions, for example ``vlm:MODEL@URL``.
    questions
        A text file with a question per line. If not given, the judge is shown some labelled pairs
        and writes the questions.
    count
        How many questions it writes.
    limit
        Labelled pairs that it answers them for, drawn at random.
    folds
        The number of cross-validation folds (over prompts) by which the penalty is chosen.
    seed
        Seed for the pairs, the folds and the bootstrap.
    """

    judge: Annotated[str, Option(required=True)] = ""
    questions: str | None = None
    count: Count = 20
    limit: Count = 300
    folds: Annotated[int, Field(ge=2)] = 5
    seed: int = 0
    read: Read = Read()
    compute: Compute = Compute()

    def settings(self) -> dict[str, Any]:
        """The knobs that make the rubric, for its card."""
        return {name: getattr(self, name) for name in ("judge", "count", "limit", "folds", "seed")}


@knobs
class Generate(Knobs):
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
    device
        A torch device (cuda, cuda:1, mps, cpu); if not given, the fastest one.
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


@knobs
class GeneratePairs(Knobs):
    """Preference pairs of a model's own images.

    Parameters
    ----------
    model
        The model that makes the images: a folder in diffusers' layout, or a hub id.
    tuned
        Take the images of this checkpoint of the model, PATH or NAME=PATH: a LoRA (file or folder),
        a folder with ``unet/`` or ``transformer/``, or a whole pipeline.
    prompts
        The prompts: a text file (one per line), CSV, TSV, Parquet, JSON or JSON lines, or a folder
        of these.
    limit
        Use at most this many prompts, taken from each category in turn.
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
    first_seed
        Number of the first seed; another number gives other images.
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
class Evaluate(Knobs):
    """An evaluation: models, prompts, how images are made and what is measured.

    Parameters
    ----------
    base
        The base model, before training: a folder in diffusers' layout, or a hub id.
    tuned
        A checkpoint, PATH or NAME=PATH: a LoRA (file or folder), a folder with ``unet/`` or
        ``transformer/``, or a whole pipeline.
    prompts
        The prompts: a text file (one per line), CSV, TSV, Parquet, JSON or JSON lines, or a folder
        of these.
    limit
        Use at most this many prompts, taken from each category in turn.
    seeds
        Images per prompt and model.
    first_seed
        Number of the first seed; another number gives other images.
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


@knobs
class Loop(Knobs):
    """Rounds of generating, judging, filtering and training, and their evaluation.

    The loop itself sets what a section here leaves empty: ``train.source`` and ``train.model``,
    ``evaluate.base`` and ``evaluate.tuned``. Without ``score.margin`` pairs are filtered by the
    rewards of the judges in ``generate.margin``.

    Parameters
    ----------
    rounds
        How many rounds there are in all. Those that are finished are left alone.
    """

    rounds: Count = 3
    generate: GeneratePairs = GeneratePairs()
    score: Score = Score()
    select: Select = Select()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    compute: Compute = Compute()


@knobs
class Vote(Knobs):
    """What people are asked, and where the page is served.

    Parameters
    ----------
    models
        Compare only these models; if not given, all of them.
    limit
        Comparisons per voter; if not given, all of them.
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
        Another name of this server, for example behind a proxy.
    """

    models: Annotated[tuple[str, ...], Option(commas=True)] = ()
    limit: Count | None = None
    repeats: Share = 0.0
    checks: Share = 0.0
    question: str = "Which image is better for this prompt?"
    seed: int = 0
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8750
    allow_hosts: Annotated[tuple[str, ...], Option("--allow-host")] = ()


@knobs
class Demo(Knobs):
    """What the demo compares, and how much of it.

    Parameters
    ----------
    arms
        The arms to compare. Each one trains its own model: ``fifa`` on the pairs that the whole
        method chooses, ``margin`` on those that the margin alone chooses, ``random`` on a random
        subset, ``full`` on all the feedback.
    seed
        Seed for the pairs of the arm random, the order of training and the noise of the images.
    fresh
        Rate the prompts again instead of using the ratings that the package ships; this takes a few
        minutes more.
    keep
        Pairs that an arm trains on (except the arm full).
    per_prompt
        Keep at most this many pairs of one prompt.
    steps
        Training steps (all weights of the UNet are trained).
    batch
        Pairs per step.
    lr
        Learning rate.
    beta
        How strongly the model is kept close to the base model.
    draws
        Size of the noise pool, as in ``fifa train``.
    prompts
        Test prompts of each kind: scenes that were in the training pictures, and scenes that were
        not.
    unsafe
        Test prompts that ask for weapons, drugs or cigarettes.
    images
        Images per prompt and model.
    curve
        Prompts on which the checkpoints of each training are measured, for the learning curves.
    sampler_steps
        Steps of the sampler.
    guidance
        Scale of classifier-free guidance.
    """

    arms: Annotated[
        tuple[Literal["fifa", "margin", "random", "full"], ...],
        Field(min_length=1),
        Option(commas=True),
    ] = ("fifa", "random")
    seed: int = 0
    fresh: bool = False
    keep: Count = 150
    per_prompt: Count = 3
    steps: Count = 150
    batch: Count = 32
    lr: Positive = 2e-5
    beta: Positive = 1000.0
    draws: CountOrZero = 8
    prompts: Count = 48
    unsafe: CountOrZero = 16
    images: Count = 2
    curve: CountOrZero = 24
    sampler_steps: Count = 20
    guidance: NotNegative = 1.0


def paper_sd15() -> Train:
    """Diffusion-DPO on SD1.5, as its authors trained it.

    From Salesforce's ``launchers/sd15.sh`` and ``train.py`` (github.com/SalesforceAIResearch/
    DiffusionDPO): beta 5,000; lr 1e-8 scaled by the batch of 2,048 pairs; 2,000 steps, 500 of
    them warm-up, then constant; AdamW (0.9, 0.999), weight decay 0.01, gradients clipped at 1;
    every fifth prompt empty; half of the images mirrored (both of a pair alike here); all
    weights; half precision, bf16 for their fp16.
    """
    return Train(
        method="full",
        loss="sigmoid",
        beta=5000.0,
        lr=1e-8 * 2048,
        batch=2048,
        steps=2000,
        schedule="constant",
        warmup=500,
        optimizer="adamw",
        weight_decay=0.01,
        clip=1.0,
        prompt_dropout=0.2,
        flips=True,
        resolution=512,
        dtype="bfloat16",
        save_every=100,
        checkpoint_every=500,
    )


def paper_sdxl() -> Train:
    """Diffusion-DPO on SDXL, as its authors trained it.

    From ``launchers/sdxl.sh`` and ``train.py`` (see `paper_sd15`): 200 steps of warm-up of 2,000
    (a comment there gives 30 hours for 200 steps), Adafactor without relative steps, gradient
    checkpointing, 1,024 pixels, the rest as for SD1.5. Sizes and crops are each image's own, where
    theirs are the constant resolution.
    """
    return replace(
        paper_sd15(),
        warmup=200,
        optimizer="adafactor",
        gradient_checkpointing=True,
        resolution=1024,
        checkpoint_every=200,
    )


def lora_small() -> Train:
    """A LoRA on a few hundred to a few thousand pairs, on one GPU.

    From the command in diffusers' ``examples/research_projects/diffusion_dpo/README.md``: rank 8
    with alpha 8, lr 1e-5, constant, batch 32 (16 x 2 accumulated), beta 2,500 of its convention,
    which is our 5,000. Its 10,000 steps and 8-bit AdamW are not taken over: a small subset
    takes ten epochs, and adapters' states are small.
    """
    return Train(
        method="lora",
        rank=8,
        alpha=8.0,
        loss="sigmoid",
        beta=5000.0,
        lr=1e-5,
        batch=32,
        epochs=10.0,
        schedule="constant",
        optimizer="adamw",
    )


PRESETS: dict[str, Callable[[], Train]] = {
    "paper-sd15": paper_sd15,
    "paper-sdxl": paper_sdxl,
    "lora-small": lora_small,
}


def preset(name: str) -> Train:
    """The preset called ``name``; `FifaError` if there is none."""
    if name not in PRESETS:
        raise FifaError(f"no such preset: {name}", do=", ".join(PRESETS))
    return PRESETS[name]()


def build(cls: type[T], values: object, *, where: str, what: str = "the recipe") -> T:
    """A ``cls`` from plain values; `FifaError` names every knob of ``what`` that is wrong."""
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise _wrong(error, where, what) from error


def changed(old: K, **values: Any) -> K:
    """``old`` with some knobs replaced; None leaves a knob as it is.

    A knob of a section goes by its own name, or with its section: ``select={"keep": 7}``. Epochs
    that are given take the place of steps that were there before.

    Raises `FifaError` for unknown knobs and values out of range.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if "epochs" in given:
        given.setdefault("steps", None)
    made: dict[str, Any] = asdict(old)
    for section in sections(type(old)):
        inner = given.pop(section, {})
        inner |= {name: given.pop(name) for name in made[section] if name in given}
        made[section] |= {name: value for name, value in inner.items() if value is not None}
    return build(type(old), made | given, where="the options")


def sections(cls: type[Any]) -> dict[str, type[Any]]:
    """The sections of a class of knobs: the dataclasses within it, by their names."""
    return {one.name: type(one.default) for one in fields(cls) if is_dataclass(one.default)}


def _flat(one: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in asdict(one).items():
        inside = name in sections(type(one))
        found |= {f"{name}.{knob}": v for knob, v in value.items()} if inside else {name: value}
    return found


def _wrong(error: ValidationError, where: str, what: str = "the recipe") -> FifaError:
    wrong = []
    for item in error.errors():
        name = ".".join(map(str, item["loc"])) or what.removeprefix("the ")
        known = item["type"] != "unexpected_keyword_argument"
        given = f", not {item['input']!r}" if known and _is_short(item["input"]) else ""
        wrong.append(f"{name}: {item['msg']}{given}")
    return FifaError(f"{what} is not valid: {'; '.join(wrong)}", where=where)


def _is_short(value: object) -> bool:
    return isinstance(value, str | int | float) and len(str(value)) < 100
