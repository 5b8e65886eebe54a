"""What a class of knobs is: a frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, dataclass_transform

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fifa.errors import FifaError

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
    family: Literal["", "steps", "guidance", "half", "buckets"] = ""


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


class Shared(Knobs):
    """The help texts of knobs that several classes have; each declares those that are its own.

    Parameters
    ----------
    parts
        Where a model in a single file has its settings, tokenizers and the networks that the file
        lacks: a folder in diffusers' layout, or a hub id; if not given, the hub's usual one.
    variant
        Take the copies of the weights with this in their names (``fp16``, ``bf16``) where there
        are any; if not given, the full ones where there are any.
    vae
        Another VAE, such as ``madebyollin/sdxl-vae-fp16-fix``: a folder, a file, or a hub id.
    init_lora
        A LoRA that is merged into the base model beforehand: a folder, a file, or a hub id.
    prompts
        The prompts: a text file (one per line), CSV, TSV, Parquet, JSON or JSON lines, or a folder
        of these.
    limit
        Use at most this many prompts, taken from each category in turn.
    first_seed
        Number of the first seed; another number gives other images.
    per_prompt
        Keep at most this many pairs of one prompt.
    lr
        Learning rate.
    device
        A torch device (cuda, cuda:1, mps, cpu); if not given, the fastest one.
    channels_last
        Use the channels-last memory format for convolutions.
    """


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
