"""Every knob, once: frozen dataclasses, checked when they are made, YAML in and out."""

from __future__ import annotations

from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fifa.errors import FifaError
from fifa.shards.files import read_yaml

# "unsafe" is what raters say that see harm, but not of which kind.
UNSAFE_FLAGS = ("sexual", "violence", "hate", "self-harm", "minors", "unsafe")
STRATEGIES = (
    "fifa",
    "random",
    "low",
    "middle",
    "high",
    "consensus",
    "facility",
    "farthest",
    "weights",
)

_checked = ConfigDict(extra="forbid", validate_default=True)


@dataclass(frozen=True, config=_checked)
class Read:
    """Where the pairs come from.

    Parameters
    ----------
    source
        A file, folder, glob, ``hf://datasets/...`` id or fsspec URL.
    format
        A format's name; None recognises it by its columns.
    columns
        For a table of your own: ``prompt``, ``image_0``, ``image_1`` and ``label`` to the names
        of its columns.
    allow_download
        Fetch images that the source only names by URL (public addresses only).
    """

    source: str = ""
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    allow_download: bool = False


@dataclass(frozen=True, config=_checked)
class Score:
    """What scores pairs and prompts.

    Parameters
    ----------
    margin
        Reward models, several for a committee: ``column:NAME_0,NAME_1``, ``pickscore``,
        ``hpsv2.1``, ``imagereward``, ..., ``NAME:FOLDER``, ``proxy``, ``proxy@clip:MODEL``,
        ``proxy:FOLDER``.
    quality
        The rater: ``local``, ``local:MODEL``, ``openai:MODEL@URL``, ``column:NAME`` or ``none``.
    diversity
        The encoder: ``minilm``, ``text:MODEL``, ``clip:MODEL``, ``column:NAME`` or ``none``.
    k
        The neighbour whose distance enters the entropy.
    """

    margin: tuple[str, ...] = ()
    quality: str = "local"
    diversity: str = "minilm"
    k: Annotated[int, Field(ge=1)] = 10


@dataclass(frozen=True, config=_checked)
class Select:
    """What is kept.

    Parameters
    ----------
    keep
        How many pairs: an int is a count, a float up to 1.0 a fraction of all pairs.
    strategy
        ``fifa`` (top-K by importance), or one of the others in `fifa.config.STRATEGIES`.
    alpha, gamma
        Weights of quality and diversity beside the margin's 1.
    normalize
        How the three terms are brought to one scale.
    unsafe_flags
        A prompt with one of these flags is dropped.
    drop_nonsense
        Drop prompts the rater flags as ``nonsense``.
    min_quality
        Drop prompts rated below this (the rater's own scale, 1 to 5).
    min_agreement
        Drop pairs where a smaller share of the committee agrees with the person.
    margin_window
        Keep absolute margins within [low, high] only (the standardised committee scale, or the
        scorer's own if there is one).
    margin_percentiles
        The same window, as percentiles in [0, 100] of all eligible pairs' margins.
    per_prompt
        At most this many pairs of one prompt.
    drop_duplicates
        Drop a pair that compares the same two images as an earlier one, or an image with itself.
    seed
        For the strategies that draw.
    """

    keep: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] = 5000
    strategy: Literal[STRATEGIES] = "fifa"  # type: ignore[valid-type]
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    normalize: Literal["none", "z", "rank", "robust"] = "robust"
    unsafe_flags: tuple[str, ...] = UNSAFE_FLAGS
    drop_nonsense: bool = True
    min_quality: float | None = None
    min_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    margin_window: tuple[float | None, float | None] = (None, None)
    margin_percentiles: tuple[float, float] = (0.0, 100.0)
    per_prompt: Annotated[int, Field(ge=1)] | None = None
    drop_duplicates: bool = True
    seed: int = 0


@dataclass(frozen=True, config=_checked)
class Compute:
    """Where and how models run. Only ``dtype`` changes a reward by more than rounding.

    Parameters
    ----------
    device
        A torch device; None for the fastest.
    dtype
        ``float32``, or ``bfloat16`` or ``float16`` under autocast; None for the model's own.
    compile, channels_last
        `torch.compile`; convolutions with channels last in memory.
    batch
        Images of 224 x 224 in a forward pass.
    workers
        Threads that decode and preprocess; 0 for one a core.
    executor
        ``local``, ``local:N`` (N processes), ``ray`` or ``ray://HEAD:10001``.
    actors, num_cpus, num_gpus
        On Ray: how many actors, and what each takes.
    store
        A folder or URL that all workers reach, for unfinished shards; None: beside the scores.
    in_flight
        Requests to a rater's endpoint under way at once.
    """

    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    compile: bool = False
    channels_last: bool = False
    batch: Annotated[int, Field(ge=1)] = 32
    workers: Annotated[int, Field(ge=0)] = 0
    executor: Annotated[str, Field(pattern=r"^(local(:\d+)?|ray(://.+)?)$")] = "local"
    actors: Annotated[int, Field(ge=1)] = 1
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    store: str | None = None
    in_flight: Annotated[int, Field(ge=1)] = 16


@dataclass(frozen=True, config=_checked)
class Recipe:
    """A whole run: read, score, select, and what it runs on."""

    read: Read = Read()
    score: Score = Score()
    select: Select = Select()
    compute: Compute = Compute()

    def to_yaml(self) -> str:
        """The recipe as YAML; `from_yaml` gives the same recipe back."""
        plain = TypeAdapter(Recipe).dump_python(self, mode="json")
        # Escaped beyond ASCII: unescaped, PyYAML does not read every character back as it was.
        return str(yaml.safe_dump(plain, sort_keys=False))

    def differences(self, other: Recipe) -> list[str]:
        """``section.knob: here / there`` for every knob in which two recipes differ."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{section}.{knob}: {mine[section][knob]!r} / {theirs[section][knob]!r}"
            for section in mine
            for knob in mine[section]
            if mine[section][knob] != theirs[section][knob]
        ]


def from_yaml(path: Path) -> Recipe:
    """The recipe in a YAML file; what it leaves out has its default.

    Raises `FifaError` for text that is no YAML, unknown knobs and values out of range.
    """
    recipe: Recipe = build(Recipe, read_yaml(path, "the recipe"), where=str(path))
    return recipe


def build(kind: type[Any], values: object, *, where: str) -> Any:
    """A recipe dataclass from plain values; `FifaError` names every knob that is wrong."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'recipe'}: {item['msg']}"
            for item in error.errors()
        )
        raise FifaError(f"the recipe is not valid: {wrong}", where=where) from error


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """``recipe`` with some knobs of some sections replaced (None leaves a knob as it is)."""
    parts = {}
    for section, knobs in sections.items():
        old = getattr(recipe, section)
        values = {**asdict(old), **{k: v for k, v in knobs.items() if v is not None}}
        parts[section] = build(type(old), values, where=f"section {section!r}")
    return replace(recipe, **parts)
