"""The command line's options, made from the classes of knobs in `fifa.config`.

An option is named like its knob and has the knob's type, choices and bounds; its help text is the
knob's entry in the class's docstring. No option has a default of its own: one that is not given
leaves the knob as the class or the recipe has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import click

from fifa.cli.output import Command, Place
from fifa.errors import FifaError

if TYPE_CHECKING:
    from click.decorators import FC

    from fifa.config import Knobs

    K = TypeVar("K", bound=Knobs)


PATH: Any = Place()


def check_runs(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Refuse run folders of another version of fifa: the callback of arguments that name runs."""
    from fifa.run.folder import check_run

    for folder in [value] if isinstance(value, str) else value:
        if "://" not in folder:  # that of a store is checked once it is here
            check_run(folder)
    return value


def out_option(text: str = "The run folder.", required: bool = True) -> Callable[[FC], FC]:
    """The option ``--out``: where the command writes."""
    return click.option("--out", required=required, type=Place(writes=True), help=text)


RUN: Any = Place(writes=True, kind=str)
run_argument = click.argument("run", type=RUN, callback=check_runs)


class KnobCommand(Command):
    """A command with an option for every knob of a class, and ``--recipe``.

    The options are made when they are needed: `fifa --help` imports no class of knobs.

    Parameters
    ----------
    knobs
        The class's name in `fifa.config`.
    sections
        The class's sections that have options; all if empty.
    of_run
        SOURCE may be a run folder, and is written to then.
    """

    def __init__(
        self,
        *args: Any,
        knobs: str,
        sections: tuple[str, ...] = (),
        of_run: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self._knobs, self._sections, self._of_run = knobs, sections, of_run

    def stores(self, ctx: click.Context) -> Iterator[tuple[str, Place]]:
        """As `Command.stores`, and SOURCE where it is a run in a store."""
        yield from super().stores(ctx)
        source = str(ctx.params.get("source") or "")
        if self._of_run and "://" in source:
            from fifa.run.folder import STAMP
            from fifa.shards.mirror import has_object

            if has_object(source, STAMP):
                yield "source", RUN

    @property
    def made(self) -> list[click.Parameter]:
        """The parameters of the knobs."""
        return self._made

    @cached_property
    def _made(self) -> list[click.Parameter]:
        from fifa import config

        cls = getattr(config, self._knobs)
        inner = config.sections(cls)
        classes = [inner[name] for name in self._sections or inner]
        made = [one for part in (cls, *classes) for one in parameters(part)]
        text = "A YAML file of options; options given here win."
        return [*made, click.Option(["--recipe"], type=PATH, help=text)]


def chosen(base: K, options: dict[str, Any], *, only: tuple[str, ...] = ()) -> K:
    """The knobs that the command line asks for.

    Parameters
    ----------
    base
        What holds without ``--recipe``.
    options
        The values of the command's options; None for those that were not given.
    only
        The sections that are taken from ``--recipe``; all if empty.

    Raises `FifaError` for values out of range, and where what is required is not given.
    """
    from dataclasses import replace

    from fifa.config import changed, sections

    cls = type(base)
    if recipe := options.pop("recipe"):
        read = cls.from_yaml(recipe)
        base = replace(base, **{name: getattr(read, name) for name in only}) if only else read
    knobs = changed(base, **options)
    for part in (knobs, *(getattr(knobs, name) for name in sections(cls))):
        for name, option, *_ in _knobs_of(type(part)):
            if option.required and not getattr(part, name):
                how = "as the argument" if option.argument else f"with --{name}"
                raise FifaError(f"no {name} given", do=f"give it {how}, or in the recipe")
    return knobs


def parameters(cls: type[Any]) -> Iterator[click.Parameter]:
    """An option, or an argument, for every knob of a class."""
    texts = _texts(cls)
    for name, option, hint, bounds, default in _knobs_of(cls):
        written = option.name or f"--{name.replace('_', '-')}"
        text = texts[name]
        if option.argument:
            yield click.Argument([name], required=False)
            continue
        settings: dict[str, Any] = {"type": _type(hint, bounds, default, option.commas)}
        if hint is bool:
            written = option.name or f"{written}/--no-{written[2:]}"
        elif get_origin(hint) in (tuple, dict) and settings["type"] is click.STRING:
            settings |= {"multiple": True, "callback": lambda ctx, param, value: value or None}
            text += " May be repeated."
        shown = _shown(default, written)
        if option.family:
            from fifa.models.families import listed

            shown = listed(option.family)
        if shown:
            text += f"  [default: {shown}]"
        if option.required:
            text += "  [required, here or in the recipe]"
        yield click.Option([written, name], default=None, help=text, **settings)


class _Keep(click.ParamType[Any]):
    """``5000`` is a count; ``0.1`` and ``10%`` are a fraction of all pairs."""

    name = "count|fraction|percent"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | float:
        text = str(value).strip()
        try:
            keep: int | float
            if text.endswith("%"):
                keep = float(text[:-1]) / 100
            else:
                keep = int(text) if text.lstrip("+-").isdigit() else float(text)
        except ValueError:
            self.fail(f"{value!r} is neither a count nor a fraction", param, ctx)
        if not keep > 0 or (isinstance(keep, float) and not keep <= 1):
            self.fail(f"{value!r} is neither a count from 1 nor a fraction up to 1", param, ctx)
        return keep


class _Window(click.ParamType[Any]):
    """``LOW:HIGH``; an end that is left out is the default's."""

    name = "low:high"

    def __init__(self, default: tuple[float | None, float | None]) -> None:
        self._default = default

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float | None, ...]:
        ends = str(value).split(":")
        try:
            if len(ends) != 2:
                raise ValueError(value)
            pairs = zip(ends, self._default, strict=True)
            return tuple(float(end) if end else default for end, default in pairs)
        except ValueError:
            self.fail(f"{value!r} is not LOW:HIGH", param, ctx)


class _Commas(click.ParamType[Any]):
    """``A,B``; an empty text is no value at all."""

    name = "name,name,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        return tuple(filter(None, map(str.strip, str(value).split(","))))


class _Named(_Commas):
    """``NAME=VALUE,NAME=VALUE``."""

    name = "name=value,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        parts = [one.partition("=") for one in super().convert(value, param, ctx)]
        named = {key.strip(): name.strip() for key, _, name in parts}
        if not all(named.values()) or len(named) < len(parts):
            self.fail(f"{value!r} is not NAME=VALUE,NAME=VALUE, each name once", param, ctx)
        return named


def _knobs_of(cls: type[Any]) -> Iterator[tuple[str, Any, Any, dict[str, Any], Any]]:
    """Name, `fifa.config.Option`, type, bounds and default of every knob outside of sections."""
    from dataclasses import MISSING, fields, is_dataclass
    from typing import get_type_hints

    from fifa.config import Option

    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        if is_dataclass(field.default):
            continue
        hint, marks = _bare(hints[field.name])
        options = [mark for mark in marks if isinstance(mark, Option)]
        default = None if field.default is MISSING else field.default
        yield field.name, (*options, Option())[0], hint, _bounds(marks), default


def _bare(hint: Any) -> tuple[Any, list[Any]]:
    """A type without its annotations and without None, and the annotations."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        bare, more = _bare(inner)
        return bare, [*marks, *more]
    if type(None) in get_args(hint):
        return _bare(get_args(hint)[0])
    return hint, []


def _bounds(marks: list[Any]) -> dict[str, Any]:
    """What `click.IntRange` and `click.FloatRange` take, from pydantic's bounds."""
    found: dict[str, Any] = {}
    for bound in (bound for mark in marks for bound in getattr(mark, "metadata", ())):
        for name, end, is_open in (
            ("ge", "min", False),
            ("gt", "min", True),
            ("le", "max", False),
            ("lt", "max", True),
        ):
            if hasattr(bound, name):
                found |= {end: getattr(bound, name), f"{end}_open": is_open}
    return found


def _type(hint: Any, bounds: dict[str, Any], default: Any, commas: bool) -> Any:
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    if hint in (int, float):
        of, within = ((int, click.IntRange), (float, click.FloatRange))[hint is float]
        return within(**bounds) if bounds else of
    if commas:
        return _Named() if get_origin(hint) is dict else _Commas()
    if get_origin(hint) is tuple and ... not in get_args(hint):
        return _Window(default)
    return {bool: click.BOOL, str: click.STRING, datetime: click.STRING}.get(hint) or (
        click.STRING if get_origin(hint) in (tuple, dict) else _Keep()
    )


def _shown(default: Any, written: str) -> str:
    """How a default is shown in a help text; empty for none."""
    if isinstance(default, bool):
        return written.split("/")[not default]
    if isinstance(default, tuple):
        numbers = all(isinstance(one, float) for one in default)
        default = [one for one in default if one is not None]
        return (":" if numbers else ", ").join(_shown(one, "") for one in default)
    if isinstance(default, float):
        return f"{default:g}"
    return "" if default is None else str(default)


def _texts(cls: type[Any]) -> dict[str, str]:
    """The entries of a class's docstring by name, without its markup; those it inherits, too,
    unless it has its own.

    A reference to names, such as `fifa.scoring.specs.RATERS.forms`, becomes these names.
    """
    from inspect import getdoc
    from pkgutil import resolve_name

    def names(reference: re.Match[str]) -> str:
        found = resolve_name(reference[1])
        return found if isinstance(found, str) else ", ".join(found)

    docs = "\n".join(getdoc(one) or "" for one in cls.__mro__[-2::-1])
    entries = re.findall(r"^(\w+)\n((?:    .+\n?)+)", docs, re.MULTILINE)
    return {
        name: re.sub(r"`(fifa\.[\w.]+)`", names, " ".join(text.split())).replace("`", "")
        for name, text in entries
    }
