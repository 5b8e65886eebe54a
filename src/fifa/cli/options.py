"""The command line's options, by the recipe's sections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from fifa.config import Recipe

F = TypeVar("F", bound=Callable[..., Any])


class _Keep(click.ParamType[Any]):
    """``5000`` is a count; ``0.1`` and ``10%`` are a fraction of all pairs."""

    name = "count|fraction"

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
    """``LOW:HIGH``; either may be left out."""

    name = "low:high"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float | None, float | None]:
        if isinstance(value, tuple):
            return value
        low, colon, high = str(value).partition(":")
        try:
            if not colon:
                raise ValueError(value)
            return (float(low) if low else None, float(high) if high else None)
        except ValueError:
            self.fail(f"{value!r} is not LOW:HIGH", param, ctx)


def _columns(ctx: Any, param: Any, value: str | None) -> dict[str, str] | None:
    if not value:
        return None
    named = dict(part.partition("=")[::2] for part in value.split(","))
    if not all(named.values()):
        raise click.BadParameter("write prompt=NAME,image_0=NAME,image_1=NAME,label=NAME")
    return {key.strip(): name.strip() for key, name in named.items()}


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


read_options = _options(
    click.option("--format", help="The source's format; recognised by its columns if not given."),
    click.option(
        "--columns",
        callback=_columns,
        help="Your own table: prompt=NAME,image_0=NAME,image_1=NAME,label=NAME.",
    ),
    click.option(
        "--allow-download/--no-download",
        default=None,
        help="Fetch images the source only names by URL (public addresses only).",
    ),
)
score_options = _options(
    click.option(
        "--margin",
        multiple=True,
        help="Reward model: column:NAME_0,NAME_1, pickscore, hpsv2.1, imagereward, ..., proxy, "
        "proxy:FOLDER. Give it several times for a committee.",
    ),
    click.option(
        "--quality",
        help="Rater: local, local:MODEL, openai:MODEL@URL, column:NAME, none.  [default: local]",
    ),
    click.option(
        "--diversity",
        help="Encoder: minilm, text:MODEL, clip:MODEL, column:NAME, none.  [default: minilm]",
    ),
    click.option("--k", type=int, help="The neighbour whose distance enters the entropy."),
)
select_options = _options(
    click.option("--keep", type=_Keep(), help="How many pairs: a count, a fraction or a per cent."),
    click.option(
        "--strategy",
        help="fifa, random, low, middle, high, consensus, facility, farthest, weights.",
    ),
    click.option("--alpha", type=float, help="Weight of text quality beside the margin's 1."),
    click.option("--gamma", type=float, help="Weight of text diversity beside the margin's 1."),
    click.option("--normalize", help="none, z, rank or robust."),
    click.option(
        "--unsafe-flags",
        callback=lambda ctx, param, value: (
            None if value is None else tuple(filter(None, value.split(",")))
        ),
        help="Drop prompts with one of these flags; '' drops none.",
    ),
    click.option(
        "--drop-nonsense/--keep-nonsense", default=None, help="Prompts flagged as nonsense."
    ),
    click.option("--min-quality", type=float, help="Drop prompts rated below this."),
    click.option(
        "--min-agreement", type=float, help="Drop pairs the committee contradicts: a share, 0 to 1."
    ),
    click.option("--margin-window", type=_Window(), help="Keep margins within LOW:HIGH only."),
    click.option("--margin-percentiles", type=_Window(), help="The same, as percentiles 0 to 100."),
    click.option("--per-prompt", type=int, help="At most this many pairs of one prompt."),
    click.option(
        "--drop-duplicates/--keep-duplicates", default=None, help="The same two images again."
    ),
    click.option("--seed", type=int, help="For the strategies that draw."),
)
compute_options = _options(
    click.option("--device", help="cuda, cuda:1, mps, cpu; the fastest if not given."),
    click.option("--dtype", help="float32, or bfloat16 or float16 under autocast."),
    click.option("--compile/--no-compile", default=None, help="torch.compile the image tower."),
    click.option("--channels-last/--channels-first", default=None, help="Memory of convolutions."),
    click.option("--batch", type=int, help="Images of 224 x 224 in a forward pass."),
    click.option("--workers", type=int, help="Threads that decode images; 0 for one a core."),
    click.option("--executor", help="local, local:N processes, ray, ray://HEAD:10001."),
    click.option("--actors", type=int, help="On Ray: how many actors."),
    click.option("--num-cpus", type=float, help="On Ray: CPUs an actor takes."),
    click.option("--num-gpus", type=float, help="On Ray: GPUs an actor takes; fractions share."),
    click.option("--store", help="Folder or URL that all workers reach, for unfinished shards."),
    click.option("--in-flight", type=int, help="Requests to an endpoint under way at once."),
)
recipe_option = click.option(
    "--recipe", type=click.Path(path_type=Path), help="A YAML recipe; options override it."
)
out_option = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The run folder."
)


def by_section(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options by the recipe's sections; what was not given is None."""
    from dataclasses import fields

    from fifa.config import Compute, Read, Score, Select

    options = {**options, "margin": tuple(options.get("margin") or ()) or None}
    low, high = options.get("margin_percentiles") or (None, None)
    if (low, high) != (None, None):
        options["margin_percentiles"] = (low or 0.0, 100.0 if high is None else high)
    sections = {"read": Read, "score": Score, "select": Select, "compute": Compute}
    return {
        section: {field.name: options.get(field.name) for field in fields(kind)}
        for section, kind in sections.items()
    }


def recipe_of(base: Path | None, source: str, options: dict[str, Any]) -> Recipe:
    """The recipe in the file ``base`` (or the default), with what was given changed."""
    from fifa.config import Recipe, changed, from_yaml

    recipe = from_yaml(base) if base else Recipe()
    return changed(recipe, **by_section({**options, "source": source}))
