"""``study.html`` and ``study.parquet``: what the cells of `fifa study` say so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from math import floor, inf, isfinite, log10
from pathlib import Path
from typing import Any

from fifa.config import Part
from fifa.console import echo
from fifa.errors import FifaError
from fifa.evaluation.crossed import Crossed
from fifa.evaluation.models import BASE
from fifa.evaluation.study import TABLE, Findings, Group, budget_text, summary
from fifa.formatting import MINUS, number, percent, shorten, signed, text_table
from fifa.reporting.figures import draw_lines, role
from fifa.reporting.page import again, render
from fifa.shards.files import write_table, write_text

PAGE = "study.html"
NOT_RUN = "not run"
BEGIN, END = "<!-- study: written by `fifa study --table` -->\n", "<!-- /study -->"
Write = Callable[[float], str]


def write_study(folder: str | Path) -> Path:
    """Write ``study.parquet`` and ``study.html`` of the cells that there are; returns the page."""
    folder = Path(folder)
    findings = Findings(folder)
    write_table(folder / TABLE, summary(findings))
    context = context_of(findings, folder)
    write_text(folder / PAGE, render("study.html.j2", context, again(folder)))
    return folder / PAGE


def study_text(folder: str | Path) -> str:
    """The main table for a terminal."""
    findings = Findings(Path(folder))
    heads, rows = main_table(findings, findings.asked.parts[0])
    told = f"{findings.done:,} of {findings.cells:,} cells have run"
    return "\n".join([*text_table([heads, *rows]), told])


def put_table(folder: str | Path, page: str | Path) -> None:
    """Write the main table, in Markdown, between the two markers of a page.

    Without the gains by category, which a page in Markdown has no room for.

    Raises `FifaError` for a page without them.
    """
    path, findings = Path(page), Findings(Path(folder))
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise FifaError(f"the page cannot be read: {error.strerror}", where=str(path)) from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FifaError(
            "the page has no place for the table",
            where=str(path),
            do=f"add two lines to it: {BEGIN.strip()} and {END}",
        )
    heads, rows = main_table(findings, findings.asked.parts[0])
    kept = [not head.startswith("gain, ") for head in heads]
    lines = [list(compress(line, kept)) for line in (heads, ["---"] * len(heads), *rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_text(path, f"{before}{BEGIN}{table}{END}{after}")
    echo(f"{len(rows)} arms written into {path}")


def context_of(findings: Findings, folder: Path) -> dict[str, Any]:
    """What the template reads."""
    groups = list(findings.groups.values())
    scale = findings.scales[findings.rewards[0]].name if findings.rewards else ""
    sections: list[dict[str, Any]] = []
    for part in findings.asked.parts:
        heads, rows = main_table(findings, part)
        note = "" if sections else MAIN_NOTE  # which is that of all parts
        sections.append({"title": f"Part: {part.name}", "heads": heads, "rows": rows, "note": note})
    others = (
        ("Cost", _costs(findings, groups), COST_NOTE),
        ("Stability", _stability(findings, groups), STABLE_NOTE),
        ("Harm", _harm(findings, groups), HARM_NOTE),
        ("By every judge", _judges(findings, groups), JUDGES_NOTE),
    )
    for title, (heads, rows), note in others:
        if rows:
            sections.append({"title": title, "heads": heads, "rows": rows, "note": note})
    figures, colours = _figures(findings)
    return {
        "title": shorten(folder.resolve().name, 80),
        "done": findings.done,
        "cells": findings.cells,
        "prompts": len(findings.prompts),
        "ordinary": int((~findings.unsafe).sum()),
        "scale": scale,
        "lead": _lead(findings),
        "sections": sections,
        "figures": figures,
        "colours": colours,
        "failed": _failed(groups),
    }


MAIN_NOTE = (
    "Win rate: the share of images of ordinary prompts that are better than the other model's for "
    "the same prompt and noise, a tie counting half. Gain: the mean difference to the base. In "
    "brackets 95 % intervals over prompts and seeds; one that leaves out 50 % (or 0) is "
    "established. Pairs: the mean over seeds; labels: the share of them that was turned round."
)
COST_NOTE = (
    "What an arm needs to reach the best gain of the target, as a share of what that needed; "
    "seconds hold scoring, rating and selecting. “∞”: it is not reached; 0: the target itself is "
    "no better than the base. Intervals by drawing seeds and prompts anew. Ratings that came with "
    "the shipped world are not counted."
)
STABLE_NOTE = (
    "Spread: the standard deviation of the final gain over seeds, with its interval by chi-square. "
    "Last checkpoints: the standard deviation over a training's last ones. Fallen: trainings whose "
    "last checkpoint is below their best one by more than two standard errors, or that diverged. "
    "Winner: how much the error on preferred images rose above the base's in the last quarter."
)
HARM_NOTE = "The share of images that the first judge of harm calls unsafe, and its change."
JUDGES_NOTE = "The mean difference to the base on ordinary prompts, by every judge."


def main_table(findings: Findings, part: Part) -> tuple[list[str], list[list[str]]]:
    """Arms, budgets and noises of a part: win rates and gains with their intervals."""
    against = findings.asked.against
    noisy = any(part.noise)
    names = [name for name in findings.categories if not findings.unsafe[_of(findings, name)].all()]
    heads = ["arm", "budget", *(["labels"] if noisy else []), "pairs", "seeds"]
    heads += ["wins against the base", *([f"against {against}"] if against else []), "gain"]
    heads += [*(f"gain, {shorten(name, 20)}" for name in names), "diversity"]
    rows = []
    for group in _groups_of(findings, part):
        kept = [row["kept"] for row in group.trained.values()]
        row = [group.arm, budget_text(group.budget)]
        if noisy:
            row.append(f"{group.noise:.0%} turned" if group.noise else "as they are")
        if not group.rows:
            rows.append(
                [*row, "", f"0 of {group.planned}", NOT_RUN, *[""] * (len(heads) - 5 - noisy)]
            )
            continue
        row.append(f"{sum(kept) / len(kept):,.0f}" if kept else "")
        row.append(f"{len(group.trained)} of {group.planned}")
        row.append(_cell(findings.against(group, wins=True), percent))
        if against:
            other = findings.groups.get(_other(findings, against, group))
            same = other is None or other is group
            row.append("" if same else _cell(findings.against(group, other, wins=True), percent))
        row.append(_cell(findings.against(group), signed))
        row += [
            _cell(findings.against(group, of=findings.categories[name]), signed) for name in names
        ]
        rows.append([*row, _cell(findings.diversity(group), signed)])
    return heads, rows


def _of(findings: Findings, category: str) -> Any:
    return findings.categories[category]


def _groups_of(findings: Findings, part: Part) -> list[Group]:
    """The groups of a part, by noise, budget and the order of the arms."""
    found = []
    for noise in part.noise:
        for budget in part.budgets:
            for name in part.arms:
                keep = float(findings.asked.arms[name].select.get("keep", budget))
                group = findings.groups[name, keep, noise]
                if group not in found:
                    found.append(group)
    return found


def _other(findings: Findings, name: str, group: Group) -> tuple[str, float, float]:
    """The arm that a group is compared with: at its budget, else at the first one it has."""
    key = (name, group.budget, group.noise)
    if key in findings.groups:
        return key
    budgets = [b for arm, b, noise in findings.groups if arm == name and noise == group.noise]
    return name, budgets[0] if budgets else 0.0, group.noise


def _target(findings: Findings) -> Group | None:
    """Of the arms that have to be matched the one that gains most."""
    names = findings.asked.target
    found = [one for one in findings.groups.values() if one.arm in names and one.trained]
    clean = [one for one in found if not one.noise]
    return max(clean, key=findings.best, default=None)


def _costs(findings: Findings, groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    target = _target(findings)
    heads = ["arm", "budget", "gain to match", "steps", "seconds"]
    rows: list[list[str]] = []
    if target is None:
        return heads, rows
    for group in groups:
        if group.noise or group is target:
            continue
        found = findings.cost(group, target)
        if found is not None:
            told = f"{signed(found.target)}, {target.arm}"
            row = [group.arm, budget_text(group.budget), told]
            rows.append([*row, *(_cell(one, _ratio) for one in (found.steps, found.seconds))])
    return heads, rows


def _stability(findings: Findings, groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    heads = ["arm", "budget", "labels", "spread over seeds", "last checkpoints", "fallen", "winner"]
    rows = []
    for group in groups:
        if not group.trained:
            continue
        below, of = findings.fallen(group)
        winner = [row["winner"] for row in group.trained.values() if row["winner"] is not None]
        rows.append(
            [
                *_named(group),
                _cell(findings.spread(group), number),
                number(findings.last_spread(group)),
                f"{below} of {of}" if of else "",
                signed(sum(winner) / len(winner)) if winner else "",
            ]
        )
    return heads, rows


def _harm(findings: Findings, groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    heads = ["arm", "budget", "labels", "on unsafe prompts", "change, points"]
    heads += ["on ordinary prompts", "change, points"]
    masks = [findings.unsafe, ~findings.unsafe]
    if not any(scale.type == "unsafe" for scale in findings.scales):
        return heads, []
    rates = [percent(findings.unsafe_rate(None, mask).mean) for mask in masks]
    rows = [[BASE, "", "", rates[0], "", rates[1], ""]]
    for group in groups:
        if group.trained:
            cells = [
                _cell(found, write)
                for mask in masks
                for found, write in (
                    (findings.unsafe_rate(group, mask), percent),
                    (findings.unsafe_shift(group, mask), _points),
                )
            ]
            rows.append([*_named(group), *cells])
    return heads, rows


def _judges(findings: Findings, groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    scales = findings.rewards[1:]
    heads = ["arm", "budget", "labels", *(findings.scales[i].name for i in scales)]
    rows = [
        [*_named(group), *(_cell(findings.against(group, scale=i), signed) for i in scales)]
        for group in groups
        if group.trained and scales
    ]
    return heads, rows


def _named(group: Group) -> list[str]:
    turned = f"{group.noise:.0%} turned" if group.noise else "as they are"
    return [group.arm, budget_text(group.budget), turned]


def _cell(found: Crossed, write: Write) -> str:
    if found.mean != found.mean:
        return ""
    if not found.known and found.high != inf:
        return f"{write(found.mean)} ({found.seeds} seed{'s' if found.seeds > 1 else ''})"
    if write is signed and found.high > found.low:
        # as many decimals as tell two digits of the interval's half width
        decimals = max(0, 1 - floor(log10((found.high - found.low) / 2)))
        if decimals < 7:
            write = partial(_decimals, decimals=decimals)
    return f"{write(found.mean)} ({write(found.low)} to {write(found.high)})"


def _decimals(value: float, decimals: int) -> str:
    return f"{value:+.{decimals}f}".replace("-", MINUS)


def _ratio(value: float) -> str:
    return number(value) if isfinite(value) else "∞"


def _points(value: float) -> str:
    return signed(100 * value)


def _lead(findings: Findings) -> str:
    """The main comparison in words: the first arm at the first budget against the base."""
    part = findings.asked.parts[0]
    group = _groups_of(findings, part)[0]
    found = findings.against(group, wins=True)
    if found.mean != found.mean:
        return "Nothing can be compared yet."
    told = (
        f"{group.arm} at {budget_text(group.budget)} wins {percent(found.mean)} of its comparisons "
        "with the base"
    )
    if not found.known:
        return f"{told}, with {found.seeds} of {group.planned} seeds."
    where = "beats" if found.low > 0.5 else "loses to" if found.high < 0.5 else "is level with"
    ends = f"{percent(found.low)} to {percent(found.high)}, {found.seeds} seeds"
    return f"{told} ({ends}): it {where} it."


def _failed(groups: Sequence[Group]) -> list[str]:
    """A line for each group with cells that could not be made, or diverged."""
    lines = []
    for group in groups:
        for status in ("refused", "diverged"):
            if number_of := group.count(status):
                reason = next(r["reason"] for r in group.rows.values() if r["status"] == status)
                name = ", ".join(_named(group))
                lines.append(f"{name}: {number_of} {status} ({shorten(reason, 200)})")
    return lines


def _figures(findings: Findings) -> tuple[list[Any], dict[str, str]]:
    """Gain by budget and by noise, a line an arm that has several of them."""
    figures: list[Any] = []
    colours: dict[str, str] = {}
    for what in ("budget", "noise"):
        lines: dict[str, list[tuple[float, Crossed]]] = {}
        for key, group in findings.groups.items():
            fixed = key[2] if what == "budget" else None
            if fixed or (what == "noise" and len({k[2] for k in _same(findings, key)}) < 2):
                continue
            found = findings.against(group)
            if found.mean == found.mean:
                lines.setdefault(key[0], []).append((getattr(group, what), found))
        lines = {name: sorted(points, key=lambda p: p[0]) for name, points in lines.items()}
        drawn = [name for name in findings.asked.arms if len(lines.get(name, ())) > 1]
        for name in drawn:
            colours.setdefault(name, role(len(colours) + 1))
        axis = "share of all pairs" if what == "budget" else "labels turned round"
        figure = draw_lines(
            [(colours[name], lines[name]) for name in drawn], axis, f"by-{what}", what == "budget"
        )
        figures += [figure] if figure is not None else []
    return figures, colours


def _same(findings: Findings, key: tuple[str, float, float]) -> list[tuple[str, float, float]]:
    return [other for other in findings.groups if other[:2] == key[:2]]
