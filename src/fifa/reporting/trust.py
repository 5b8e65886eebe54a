"""The table of `fifa trust`, which is also at the head of a run's report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fifa.config import Select
from fifa.data.table import Pairs
from fifa.formatting import count, interval, number, percent, shorten, text_table
from fifa.reporting import numbers
from fifa.scoring.judges.pairs import findings
from fifa.scoring.rewards.metrics import Agreement
from fifa.scoring.table import Scores, score_facts
from fifa.scoring.trust import USABLE, Trust, measure_trust, same_verdicts
from fifa.selection.trusted import differences

GROUPS = 20  # generators, two of them, or categories in a table


@dataclass(frozen=True)
class Trusted:
    """Judges against the labels of one data set.

    Parameters
    ----------
    judges
        Each judge; of several the committee comes first.
    same
        How often each two of them prefer the same image.
    groups
        Of the first judge: the pairs by ``generator``, ``two generators`` and ``category``, where
        the source names them.
    notes
        What a reader has to know of the judges.
    """

    judges: tuple[Trust, ...]
    same: dict[tuple[str, str], Agreement]
    groups: dict[str, list[numbers.Group]]
    notes: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        judges = [
            asdict(judge)
            | {"verdict": judge.verdict, "finding": judge.finding, "usable_part": judge.usable}
            for judge in self.judges
        ]
        groups = {
            what: [{"name": g.name, "other": g.other, "right": g.agrees} for g in found]
            for what, found in self.groups.items()
        }
        same = [{"judges": two, "same": share} for two, share in self.same.items()]
        found: dict[str, Any] = _plain(
            {"judges": judges, "same": same, "groups": groups, "notes": self.notes}
        )
        return found


def _plain(value: Any) -> Any:
    """Named tuples as objects, and NaN, which is no JSON, as null."""
    value = value._asdict() if hasattr(value, "_asdict") else value
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def judge_pairs(
    pairs: Pairs, scores: Scores, unit: str = Select.margin_unit, *, groups: bool = True
) -> Trusted:
    """Every margin of ``scores``, at least one, on the labels of ``pairs``.

    ``unit`` is that of `fifa.scoring.margin.pair_rewards`; ``groups``: also by generator and
    category, where the pairs have them.
    """
    found = differences(pairs, scores, unit)
    label, prompt = (pairs.table[name].to_numpy() for name in ("label", "prompt_index"))
    judges = tuple(measure_trust(name, one, label, prompt) for name, one in found.items())
    return Trusted(
        judges=judges,
        same=same_verdicts({name: found[name] for name in scores.margins}, prompt),
        groups=_groups(pairs, next(iter(found.values()))) if groups else {},
        notes=tuple(_notes(pairs, scores, judges[0])),
    )


def _groups(pairs: Pairs, difference: numbers.Floats) -> dict[str, list[numbers.Group]]:
    label, none = pairs.table["label"].to_numpy(), np.full(len(pairs), np.nan, np.float32)
    person = np.sign(label - np.float32(0.5))
    columns = numbers.Columns(
        margin=np.abs(difference),
        signed_margin=np.where(person == 0, none, difference * person),
        quality=none,
        diversity=none,
        importance=none,
        rank=np.zeros(len(pairs), np.int32),
        reason=np.zeros(len(pairs), np.int32),
        reasons=("",),
        kept=np.zeros(len(pairs), bool),
        label=label,
        prompt=pairs.table["prompt_index"].to_numpy(),
    )
    single, double = numbers.by_generator(pairs.table, columns)
    found = {
        "generator": single,
        "two generators": double,
        "category": numbers.by_category(pairs.table, columns),
    }
    return {what: some for what, some in found.items() if some}


def _notes(pairs: Pairs, scores: Scores, judge: Trust) -> list[str]:
    notes = []
    if known := pairs.origin.reliability:
        worst = ", ".join(
            f"{shorten(name, 40)} ({percent(right)} of {count(n)} votes)"
            for name, n, right in known["worst"][:3]
        )
        notes.append(
            f"Labels weigh {count(known['annotators'])} annotators by their reliability; right "
            f"least often: {worst}."
        )
    for name, table in scores.margins.items():
        notes += [f"{shorten(name, 80)}: {found}." for found in findings(score_facts(table))]
        kind, _, model = name.partition(":")  # scores that somebody made may have any name
        if kind.partition("@")[0] == "proxy" and (kind != "proxy" or not model):
            notes.append(
                f"{name} was trained on these labels, but each pair is scored by a model that has "
                "not seen its prompt (cross-fitting): its accuracy is honest."
            )
        elif kind == "arena":
            notes.append(
                f"{name} is measured by its generators' names alone, with strengths from the votes "
                "on other prompts: the person's own choice is left out here, and its margins are "
                "gaps of strengths."
            )
        elif kind in ("proxy", "rubric"):
            notes.append(
                f"If {name} was trained on these labels, its accuracy here says nothing; --margin "
                "proxy is cross-fitted."
            )
    people = judge.people_first
    if people.n >= 20 and not 0.05 < people.share < 0.95:
        notes.append(
            f"People preferred image 0 in {percent(people.share)} of the pairs: whether a judge "
            "answers by position cannot be told here."
        )
    return notes


def trust_text(found: Trusted) -> str:
    """The tables for a terminal."""
    lines = []
    for judge in found.judges:
        lines += ["", f"{shorten(judge.judge, 80)}: {judge.verdict}"]
        lines += _indented(["margin from", "right", "95 % interval", "pairs"], *_parts(judge))
        facts = {
            "right where people chose image 0": _share(judge.won_by_0),
            "right where people chose image 1": _share(judge.won_by_1),
            "prefers image 0": _share(judge.first),
            "people prefer image 0": _share(judge.people_first),
            "calibration error": f"{number(judge.ece)} at temperature {number(judge.temperature)}",
            "not counted": f"{count(judge.ties)} ties, {count(judge.unscored)} without a margin",
        }
        lines += _indented(*map(list, facts.items()))
        bins = [[percent(b.confidence), percent(b.outcome), count(b.n)] for b in judge.bins]
        lines += _indented(["certain of", "people agree", "pairs"], *bins)
    if found.same:
        same = [[f"{one}, {other}", _share(s)] for (one, other), s in found.same.items()]
        lines += ["", *_indented(["two judges", "prefer the same image"], *same)]
    for what, groups in found.groups.items():
        rows = [
            [" against ".join(shorten(n, 40) for n in (g.name, g.other) if n), _share(g.agrees)]
            for g in groups[:GROUPS]
        ]
        lines += ["", *_indented([what, "right"], *rows)]
        if len(groups) > GROUPS:
            lines.append(f"  and {count(len(groups) - GROUPS)} more")
    lines += ["", *found.notes] if found.notes else []
    lines.append(
        f"\nRight: it prefers the people's winner; ties are left out. Intervals of 95 % count the "
        "pairs of a prompt as dependent, but not those by generator and category. Usable: right on "
        f"more than {percent(USABLE)}."
    )
    return "\n".join(lines).strip("\n")


def _parts(judge: Trust) -> list[list[str]]:
    named = [("all", judge.accuracy), *((number(part.margin), part.own) for part in judge.parts)]
    rows = [[name, percent(own.share), interval(own), count(own.n)] for name, own in named]
    if judge.usable is not None:
        rows[judge.usable + 1][-1] += "  <- usable from here on"
    return rows


def _share(share: Agreement) -> str:
    if not share.n:
        return "no pair"
    return f"{percent(share.share)} ({interval(share)}) of {count(share.n)}"


def _indented(*rows: list[str]) -> list[str]:
    return [f"  {line}" for line in text_table(rows)]
