"""What a source says about who won, as probabilities: one reader for `read` and for `train`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fifa.data.columns import Columns, as_number, side_pairs
from fifa.errors import FifaError

CLOSE = 1e-6  # what a share may be off by rounding
_STATUS = {"discarded", "draft", "pending", "skipped", "cancelled", "canceled", "rejected"}
_STATUS |= {"invalid", "expired", "returned", "timed-out", "timed_out"}
NOT_COUNTED = {  # columns of annotation tools, and the values of answers that nobody gave
    **dict.fromkeys(("status", "response_status", "annotation_status"), _STATUS),
    **{name: {"1"} for name in ("was_cancelled", "was_canceled", "is_discarded", "is_skipped")},
    "is_valid": {"0"},
}
# Text among numbers that means a number, or a tie: 63%, 0,5, 1,000, 2/3, both bad
TIE = re.compile(r"(tie|draw|equal|same|both|neither).*")
SAYS = re.compile(rf"[-+]?\d[\w.,/' ]*%?|{TIE.pattern}")
NO_VALUE = {"", "nan", "none", "null", "n/a", "na"}
OTHER_SCALES = (
    "a label is the probability that people prefer image_0: 1, 0, 0.5 for a tie, or a share. With "
    "prompt=...,image_0=...,image_1=... --columns also reads label=COLUMN:FIRST/SECOND/TIE "
    "(label=winner:A/B/tie, label=pref:1/-1/0), label=A/(A+B) of two counts of votes, label=A>B of "
    "two scores, and label=:first where image_0 always won"
)


@dataclass(frozen=True)
class Labels:
    """The labels of n rows.

    Parameters
    ----------
    value
        float64 [n], the probability that a person prefers the first image; NaN for none.
    wrong
        Rows to reject, and why.
    votes
        int32 [n], the votes in each; None is one each.
    """

    value: npt.NDArray[np.float64]
    wrong: dict[int, str]
    votes: npt.NDArray[np.int32] | None = None


def on_scale(
    labels: Labels, where: str, column: str = "the label", do: str = OTHER_SCALES, name: str = ""
) -> Labels:
    """The labels, those within rounding of 0 and 1 put there.

    Raises `FifaError` where one that counts is finite and beyond: the column has another scale,
    of which the values that happen to lie between 0 and 1 mean something else. ``name`` is the
    column's, for the option in the message.
    """
    value = labels.value
    beyond = np.isfinite(value) & ((value < -CLOSE) | (value > 1.0 + CLOSE))
    beyond[list(labels.wrong)] = False
    if beyond.any():
        raise other_scale(column, value[np.isfinite(value)].tolist(), where, do, name)
    value = np.where(np.isfinite(value), value, np.nan)  # an infinite label is none
    return replace(labels, value=np.clip(value, 0.0, 1.0) + 0.0)


def other_scale(
    column: str,
    values: Iterable[object],
    where: str,
    do: str = OTHER_SCALES,
    name: str = "",
    looks: tuple[str, str] | None = None,
) -> FifaError:
    """The error for a file whose labels cannot be read as they are.

    It has the values seen, what they look like, and the option that would read such a column:
    ``looks``, or else what `looks_like` finds.
    """
    counts = Counter(_name(value) for value in values)
    some = ", ".join(f"{value} ({count:,})" for value, count in counts.most_common(6))
    more = f" and {len(counts) - 6:,} more" if len(counts) > 6 else ""
    what, option = looks or looks_like(counts, name or "COLUMN")
    return FifaError(
        f"{column} is not on a scale from 0 to 1; seen: {some}{more}: {what}",
        where=where,
        do=f"{option}; {do}",
    )


def looks_like(
    counts: Counter[str], column: str, sides: Iterable[tuple[str, str]] = ()
) -> tuple[str, str]:
    """What a column's values (`_name`) look like, and what to write after ``--columns``.

    ``sides`` are columns that hold the same thing for image_0 and for image_1.
    """
    numbers = [as_number(value) for value in counts]
    if any(number != number for number in numbers):
        words = [value for value, _ in counts.most_common() if value not in NO_VALUE]
        ties = [value for value in words if TIE.fullmatch(value)]
        two = sorted(value for value in words if value not in ties)
        if len(two) != 2:
            return "text", f"label={column}:FIRST/SECOND/TIE names the value of each"
        spec = "/".join((*two, *ties))
        return "words for the sides", f"label={column}:{spec} if {two[0]!r} means image_0"
    if set(numbers) <= {1.0, 0.0}:
        index = f"label={column}:0/1 if it is the index of the better one"
        return "0 and 1", f"label={column} if 1 means image_0, {index}"
    if set(numbers) <= {1.0, -1.0, 0.0}:
        return "+1 and -1", f"label={column}:1/-1/0 if 1 means image_0"
    if set(numbers) <= {1.0, 2.0, 0.0}:
        tie = "/0 if 0 is a tie and" if 0.0 in numbers else " if"
        return "the number of an image", f"label={column}:1/2{tie} 1 means image_0"
    other = next((second for first, second in sides if first == column), "OTHER")
    if all(number >= 0 and number.is_integer() for number in numbers):
        share = f"label={column}/({column}+{other})"
        return "counts of votes, or ratings", f"{share}, or label={column}>{other}"
    return "a score or a reward", f"label={column}>{other}, where {other} is image_1's"


def two_labels(
    first: npt.NDArray[np.float64],
    second: npt.NDArray[np.float64] | None,
    labelled: npt.NDArray[np.float64] | None,
    where: str,
    do: str = OTHER_SCALES,
) -> Labels:
    """Pick-a-Pic and diffusers: label_0, which label_1 (if it is there) complements.

    Raises `FifaError` for another scale, also where most rows' two labels do not sum to 1: then
    they are scores of the images.

    Parameters
    ----------
    first, second
        label_0 and label_1, [n], NaN where there is none.
    labelled
        has_label, [n]; 0 where nobody labelled the pair.
    where, do
        The file, and what to do, for the message.
    """
    unlabelled = np.zeros(len(first), bool) if labelled is None else labelled == 0
    wrong: dict[int, str] = {}
    if second is not None:
        bad = np.isfinite(first) & ~(np.abs(first + second - 1.0) <= CLOSE)
        wrong = dict.fromkeys(np.flatnonzero(bad).tolist(), "label_0 and label_1 do not sum to 1")
        both = np.isfinite(first) & np.isfinite(second) & ~unlabelled
        for name, values in (("label_0", first), ("label_1", second)):
            beyond = both & ((values < -CLOSE) | (values > 1.0 + CLOSE))
            if beyond.any():
                raise other_scale(name, values[both].tolist(), where, do, name)
        _refuse_scores(first[both], second[both], ("label_0", "label_1"), where, do)
    wrong |= dict.fromkeys(
        np.flatnonzero(unlabelled).tolist(), "nobody labelled it (has_label is false)"
    )
    return on_scale(Labels(first, wrong), where, "label_0", do, "label_0")


def _refuse_scores(
    first: npt.NDArray[np.float64],
    second: npt.NDArray[np.float64],
    names: tuple[str, str],
    where: str,
    do: str = OTHER_SCALES,
) -> None:
    """Raise `FifaError` where most rows' two numbers do not sum to 1: they are no shares."""
    if 2 * np.count_nonzero(np.abs(first + second - 1.0) > CLOSE) > len(first):
        seen = [f"{a:g} and {b:g}" for a, b in zip(first, second, strict=True)]
        scores = "scores of the two images", "label={}>{}".format(*names)
        column = "the pair of {} and {}".format(*names)
        raise other_scale(column, seen, where, do, looks=scores)


def own_label(spec: str) -> tuple[tuple[str, ...], Callable[[Columns], Labels]]:
    """The columns that a user's ``label=SPEC`` needs, and how it reads them (`OTHER_SCALES`)."""
    if spec == ":first":
        return (), first_wins
    if match := re.fullmatch(r"(.+?) */ *\( *(.+?) *\+ *(.+?) *\)", spec):
        one, *both = match.groups()
        if one in both:
            both.remove(one)
            return (one, *both), lambda columns: vote_share(columns, one, *both)
    if match := re.fullmatch(r"([^:]+?) *> *([^:]+)", spec):
        better, worse = match.groups()
        return (better, worse), lambda columns: _larger(columns, better, worse)
    if match := re.fullmatch(r"([^:]+):([^/]+)/([^/]+)((?:/[^/]+)*)", spec):
        column, *sides, ties = match.groups()
        values = dict.fromkeys((_name(tie) for tie in ties.split("/")[1:]), 0.5)
        values |= {_name(sides[1]): 0.0, _name(sides[0]): 1.0}
        if len(values) < len(sides) + ties.count("/"):
            raise FifaError(
                f"one value twice in label={spec}", do="name each side by its own value"
            )
        return (column,), lambda columns: _named(columns, column, values)
    return (spec,), lambda columns: _share(columns, spec)


def by_row(function: Callable[..., tuple[float, float] | str], *values: Iterable[Any]) -> Labels:
    """Labels row by row: from its values, a label and its votes, or what is wrong."""
    found = list(map(function, *values))
    wrong = {i: one for i, one in enumerate(found) if isinstance(one, str)}
    both = [(np.nan, 1) if isinstance(one, str) else one for one in found]
    label, votes = np.array(both, np.float64).reshape(-1, 2).T.copy()
    return Labels(label, wrong, np.clip(votes, 1, 2**31 - 1).astype(np.int32))


def first_wins(columns: Columns) -> Labels:
    """The first image always wins."""
    return Labels(np.ones(len(columns.rows)), {})


def vote_share(columns: Columns, first: str, second: str) -> Labels:
    """label = v1 / (v1 + v2), from two columns of counts, votes = v1 + v2."""
    one, two = label_numbers(columns, first), label_numbers(columns, second)
    votes = one + two
    good = (one >= 0) & (two >= 0) & (votes > 0) & (votes < 2**31)
    wrong = dict.fromkeys(np.flatnonzero(~good).tolist(), "negative votes, or none")
    share = np.divide(one, votes, out=np.full_like(votes, np.nan), where=good)
    return Labels(share, wrong, np.maximum(np.where(good, votes, 1.0), 1.0).astype(np.int32))


def weight_share(columns: Columns, first: str, second: str) -> Labels:
    """label = w1 / (w1 + w2), from two columns of annotators' weights."""
    one, two = label_numbers(columns, first), label_numbers(columns, second)
    total = one + two
    wrong = dict.fromkeys(np.flatnonzero(total == 0).tolist(), "nobody voted for either image")
    negative = np.flatnonzero((one < 0) | (two < 0)).tolist()
    wrong |= dict.fromkeys(negative, "negative votes")
    good = (total > 0) & np.isfinite(total)
    return Labels(np.divide(one, total, out=np.full_like(total, np.nan), where=good), wrong)


def _larger(columns: Columns, first: str, second: str) -> Labels:
    one, two = label_numbers(columns, first), label_numbers(columns, second)
    one, two = (np.where(np.isfinite(each), each, np.nan) for each in (one, two))
    return Labels(0.5 * (np.sign(one - two) + 1.0), {})


def _named(columns: Columns, column: str, meaning: dict[str, float]) -> Labels:
    """Labels from the values that the user named; a file of which half are others is refused."""

    def named(value: Any) -> tuple[float, float] | str:
        if value in (None, ""):
            return "no label"
        label = meaning.get(_name(value))
        return f"unknown {column} {str(value)[:40]!r}" if label is None else (label, 1)

    values = columns.values(column)
    labels = by_row(named, values)
    others = [values[i] for i, why in labels.wrong.items() if why != "no label"]
    _refuse_half(columns, column, [value for value in values if value != ""], others)
    return labels


def _share(columns: Columns, column: str) -> Labels:
    """A column of shares; refused where there is one like it of the other image (`win_score`)."""
    found = label_numbers(columns, column)
    names = next((names for names in side_pairs(columns.numeric()) if column in names), None)
    if names and not ((found < 0) | (found > 1)).any():
        sides = np.array([columns.number(name) for name in names])
        one, two = sides[:, np.isfinite(sides).all(axis=0)]
        if not np.isin(sides, (0.0, 0.5, 1.0)).all():  # those are answers
            _refuse_scores(one, two, names, columns.file)
    return Labels(found, {})


def label_numbers(columns: Columns, column: str) -> npt.NDArray[np.float64]:
    """A column of numbers, NaN where there is none.

    Raises `FifaError` where other values are half of them, and where one means a number or a tie in
    another notation (`SAYS`): to drop these rows alone would drop ties, or those with most votes.
    """
    found = columns.number(column)
    odd = np.flatnonzero(np.isnan(found)).tolist()
    if odd:
        values = columns.values(column)
        given = [value for value in values if _is_given(value)]
        others = [values[i] for i in odd if _is_given(values[i])]
        texts = (value.strip().lower() for value in others if isinstance(value, str))
        if any(SAYS.fullmatch(text[:100]) for text in texts):
            raise other_scale(column, given, columns.file, name=column)
        _refuse_half(columns, column, given, others)
    return found


def _refuse_half(
    columns: Columns, column: str, values: Sequence[object], others: Sequence[object]
) -> None:
    given = [value for value in values if value is not None]
    if others and 2 * len(others) >= len(given):
        raise other_scale(column, given, columns.file, name=column)


def _is_given(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().lower() not in NO_VALUE
    return value is not None and value == value


def not_counted(columns: Columns) -> dict[int, str]:
    """Rows of which the source itself says that they do not count."""
    wrong: dict[int, str] = {}
    for column, values in NOT_COUNTED.items():
        if column in columns.names:
            for i, value in enumerate(columns.values(column)):
                if value is not None and _name(value) in values:
                    wrong[i] = f"the source does not count it: {column} is {str(value)[:40]}"
    return wrong


def _name(value: Any) -> str:
    """A label as it is compared: a number in its shortest form, or text without case."""
    number = as_number(value)
    return f"{number:g}" if number == number else str(value).strip().lower()[:40]
