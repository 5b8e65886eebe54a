"""Reading, scoring and selecting: the recipe of `fifa filter`."""

from __future__ import annotations

import math
from dataclasses import field
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
from fifa.errors import FifaError

RECIPE_FILE = "recipe.yaml"  # in a run folder
# "unsafe" is what raters say that see harm, but not of which kind.
UNSAFE_FLAGS = (
    "sexual",
    "violence",
    "hate",
    "self-harm",
    "minors",
    "weapons",
    "drugs",
    "toxic",
    "unsafe",
)
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
class Select(Shared):
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
class Compute(Cluster, Shared):
    """Where and how models run; and who runs them, as in `Cluster`.

    Only ``dtype``, ``fast_decode`` and what a judge is sent change a reward by more than rounding.

    Parameters
    ----------
    dtype
        Precision of reward models: ``float32``, or ``bfloat16`` or ``float16`` under autocast; if
        not given, each model's default, which for most is ``bfloat16`` on GPUs that have it.
    compile
        Compile the image encoder with ``torch.compile``.
    batch
        Batch size, in images of 224 x 224 pixels; a batch of larger images has fewer of them. If
        not given, what is useful on the device; if memory runs out, half of it from then on.
    workers
        Threads (on more than four cores: processes) that decode and preprocess images; 0: as many
        as the cores allow.
    fast_decode
        Decode JPEGs that are far larger than the model's input at a half, a quarter or an eighth
        of their size. Scores differ a little (docs/scale.md).
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
