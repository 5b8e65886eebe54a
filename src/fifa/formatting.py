"""How numbers, and other people's text, are written on a page or a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import jinja2

MOST = 300  # characters of a prompt or a reason
DASH, MINUS = "\u2013", "\u2212"


def shorten(text: str | None, most: int = MOST) -> str:
    """Hostile text made fit to show: no control or direction characters, not too long."""
    text = (text or "")[: most * 2]
    # C0 and C1 controls, lone surrogates, and the bidirectional overrides that reorder a page
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)
    text = re.sub(r"[\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]", "\ufffd", text)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def shorten_lines(text: str, most: int = 20_000) -> str:
    """`shorten` for text of several lines."""
    return "\n".join(shorten(line, 1000) for line in text.splitlines())[:most]


def count(value: float) -> str:
    """``12,345``; a dash for NaN."""
    return f"{value:,.0f}" if math.isfinite(value) else DASH


def percent(share: float) -> str:
    """``75.3 %``; a dash for NaN."""
    if not math.isfinite(share):
        return DASH
    share *= 100
    if share in (0, 100):
        return f"{share:.0f} %"
    return f"{share:.1f} %" if share >= 1 else f"{share:.2g} %"


class Interval(Protocol):
    """A share with the two ends of its interval."""

    @property
    def low(self) -> float:
        """The lower end."""

    @property
    def high(self) -> float:
        """The upper end."""


def interval(share: Interval) -> str:
    """The interval of a share: ``71.5 to 79.6 %``."""
    return f"{share.low * 100:.1f} to {share.high * 100:.1f} %"


def number(value: float) -> str:
    """Three significant digits; a dash for NaN."""
    if not math.isfinite(value):
        return DASH
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", MINUS)


def signed(value: float) -> str:
    """Three significant digits with a sign; a dash for NaN."""
    text = number(value)
    return f"+{text}" if math.isfinite(value) and value > 0 else text


def seconds(value: float) -> str:
    """``7.5 s``, ``1 min 15 s`` or ``2 h 05 min``; a dash for NaN."""
    if not math.isfinite(value):
        return DASH
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines for a terminal, the cells of a column one below the other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return [line.rstrip() for line in lines]


@cache
def page_templates(folder: Path) -> jinja2.Environment:
    """The Jinja templates in ``folder``, escaped, with the functions of this module as filters.

    A folder's are compiled once: that takes as long as to draw the figures of a report.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
    )
    named = (count, interval, number, percent, seconds, signed)
    templates.filters.update({each.__name__: each for each in named}, short=shorten)
    return templates
