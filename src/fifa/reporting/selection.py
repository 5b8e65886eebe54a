"""What the page says of a selection: how many pairs went where, and what the cut bought."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fifa.config import Recipe, Select
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.formatting import shorten, shorten_lines
from fifa.reporting import figures, numbers
from fifa.reporting.examples import load_examples
from fifa.reporting.numbers import label_noise
from fifa.reporting.trust import Trusted, judge_pairs
from fifa.scoring.margin import committee, pair_rewards
from fifa.scoring.rewards.metrics import agreement, by_margin, draw_rows
from fifa.scoring.specs import ENCODERS
from fifa.scoring.table import BLIND, Scores, map_array, score_facts, score_path
from fifa.selection.choose import aspects_disagree
from fifa.selection.readable import UNREADABLE_FILE
from fifa.selection.strategies import STRATEGIES
from fifa.shards.files import read_table

MAP_ROWS = 20_000  # prompts that the map is fitted on
NAMED = 20  # generators, two of them, or categories in a table
LISTED = 100  # ids of likely mislabelled pairs
# In the order in which the page has them; a reason that is not here comes after these
REASONS = {
    "tie": "the people preferred neither image",
    "duplicate": "the same two images as an earlier pair, or an image against itself",
    "other_generator": "an image by a generator that was not asked for",
    "aspects_disagree": "one image wins by one aspect, the other one by another",
    "unreadable_image": "an image could not be opened",
    "unsafe_prompt": "the rater flagged the prompt as unsafe",
    "low_quality_prompt": "the prompt is nonsense, or rated below the limit",
    "not_scored": "a score is missing or not finite",
    "contradicts_label": "too few scorers agree with the people",
    "outside_margin_window": "the margin is too small or too large",
    "prompt_cap": "enough pairs of this prompt are kept",
    "below_cutoff": "scored and sound, but ranked below the cut",
}
HEADINGS = {
    "kept_first": "Kept, first by {order}",
    "kept_last": "Kept, last by {order}",
    "dropped_first": "Dropped, first below the cut",
    "gated": "Dropped",
    "mislabelled": "Likely mislabelled",
}
COMPONENTS = {
    "margin": "How far apart the scorer sees the two images of a pair",
    "quality": "The rater's mark for the pair's prompt",
    "diversity": "Log distance of the prompt to its k-th neighbour: high is unusual",
}


def load_scores(scores: Path, selection: pa.Table, recipe: Recipe) -> Scores:
    """The scores that a selection was made of, as it says itself, as far as they are there."""
    used = _made_with(selection)

    def load(name: str | None, columns: list[str] | None) -> pa.Table | None:
        path = scores / name if name else None
        again = f"run `fifa score {scores.parent}`: it makes it again"
        return read_table(path, columns, do=again) if path and path.exists() else None

    margins = used.get("margin", {})
    names = sorted(margins, key=[*recipe.score.margin, *margins].index)
    found = {name: load(margins[name], None) for name in names}
    return Scores(
        margins={name: table for name, table in found.items() if table is not None},
        quality=load(used.get("quality"), ["flags"]),
        diversity=load(used.get("diversity"), []),
    )


def _made_with(selection: pa.Table) -> dict[str, Any]:
    """The knobs and score files of a selection that was read from its file."""
    used: dict[str, Any] = json.loads((selection.schema.metadata or {}).get(b"fifa.select", b"{}"))
    return used


def _unit(made_with: dict[str, Any]) -> str:
    unit: str = made_with.get("select", {}).get("margin_unit", Select.margin_unit)
    return unit


def selection_context(
    folder: Path, recipe: Recipe, pairs: Pairs, scores: Scores, selection: pa.Table
) -> dict[str, Any]:
    """What the templates of the selection read.

    Parameters
    ----------
    folder
        The run, for the prompts' embeddings and the images that could not be opened.
    recipe, pairs, scores, selection
        The run's own.
    """
    if selection.num_rows != len(pairs):
        raise FifaError(
            f"the selection has {selection.num_rows:,} rows, the pairs {len(pairs):,}",
            where=str(folder),
            do="select again: `fifa select`",
        )
    columns = numbers.columns_of(pairs.table, selection)
    made_with = _made_with(selection)
    select, knobs = recipe.select, made_with.get("select")
    rewards = {
        spec.removeprefix("column:"): pair_rewards(table, _unit(made_with), blind=True)
        for spec, table in scores.margins.items()
    }
    knew = any(BLIND in table.column_names for table in scores.margins.values())
    if knew:
        # that margin agrees with people by construction: what is shown is what it sees without them
        seen = committee(list(rewards.values()), columns.label).signed_margin
        columns = replace(columns, signed_margin=seen)
    trusted = judge_pairs(pairs, scores, _unit(made_with), groups=False) if rewards else None
    noise = label_noise(columns, rewards)
    groups = load_examples(pairs, columns, scores.quality, noise.rows if noise else ())
    return {
        "recipe": recipe,
        "recipe_yaml": shorten_lines(recipe.to_yaml()),
        "older": knobs is not None and {**_plain(Select()), **knobs} != _plain(select),
        "origin": pairs.origin,
        "funnel": _funnel(folder, pairs, columns, scores.quality, select),
        "pairs": len(pairs),
        "kept": int(columns.kept.sum()),
        "prompts": len(np.unique(columns.prompt)),
        "prompts_kept": len(np.unique(columns.prompt[columns.kept])),
        **_agreement(columns, rewards, trusted),
        "trusted": trusted,
        "least": numbers.LEAST,
        "by_labels": STRATEGIES[select.strategy].unanimous or bool(select.min_agreement) or knew,
        "distributions": _distributions(columns),
        "named": _named(pairs, columns),
        "groups": groups,
        "makers": sorted({name for g in groups for e in g.examples for name in e.makers if name}),
        "noise": noise,
        "noisy_ids": pairs.table["pair_id"].take(noise.rows[:LISTED]).to_pylist() if noise else [],
        "headings": HEADINGS,
        "order": "importance" if select.strategy == "fifa" else f"the order of {select.strategy}",
        "rated": scores.quality is not None,
        "pictured": any(example.images for group in groups for example in group.examples),
        "reasons": REASONS,
        "width": lambda part: f"{100 * part / max(pairs.origin.rows, len(pairs), 1):.3f}",
        "map": _prompt_map(folder / "scores", pairs, recipe, columns),
        "fingerprints": _fingerprints(scores),
        "source": shlex.quote(shorten(recipe.read.source or "SOURCE", 400)),
    }


def _plain(select: Select) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(select)))
    return plain


def _funnel(
    folder: Path, pairs: Pairs, columns: numbers.Columns, quality: pa.Table | None, select: Select
) -> dict[str, Any]:
    """Every row and pair in one line of a table, and whether the lines add up."""
    origin, rejected = pairs.origin, pairs.rejected.num_rows
    counts = np.bincount(columns.reason, minlength=len(columns.reasons))
    dropped = {name: int(n) for name, n in zip(columns.reasons, counts, strict=True) if n}
    kept = dropped.pop("selected", 0)
    unreadable = folder / UNREADABLE_FILE
    details = {"rejected": numbers.count_rejected(pairs.rejected)}
    if unreadable.exists():
        lost = read_table(unreadable, do=f"run `fifa select {folder}`: it makes it again")
        details["unreadable_image"] = numbers.count_rejected(lost, examples=0)
    if quality is not None and "unsafe_prompt" in dropped:
        unsafe = columns.prompt[columns.reason == columns.reasons.index("unsafe_prompt")]
        flags = quality["flags"].take(pa.array(unsafe))
        details["unsafe_prompt"] = numbers.count_harm(flags, select.unsafe_flags)

    def lines(left: int, named: dict[str, tuple[int, str]]) -> list[dict[str, Any]]:
        found = []
        for name, (lost, meaning) in named.items():
            left -= lost
            line = {"name": name, "meaning": meaning, "lost": lost, "left": left}
            found.append(line | {"details": details.get(name, ())})
        return found

    order = [*REASONS, *sorted(set(dropped) - set(REASONS))]
    rows_lost = {
        "rejected": (rejected, "rows that could not be read"),
        "merged": (origin.merged, "repeats of an earlier pair, their labels averaged into it"),
    }
    pairs_lost = {name: (dropped[name], REASONS.get(name, "")) for name in order if name in dropped}
    return {
        "rows": origin.rows,
        "rejected": rejected,
        "merged": origin.merged,
        "rows_lost": lines(origin.rows, rows_lost),
        "pairs_lost": lines(len(pairs), pairs_lost),
        "main": sorted(pairs_lost.items(), key=lambda item: -item[1][0])[:3],
        "dropped": len(pairs) - kept,
        "adds_up": origin.rows - rejected - origin.merged == len(pairs),
    }


def _agreement(
    columns: numbers.Columns,
    rewards: dict[str, tuple[numbers.Floats, numbers.Floats]],
    trusted: Trusted | None,
) -> dict[str, Any]:
    """The table of scorers and the two figures; a committee comes first, then its members."""
    named = {next(iter(rewards), "margin"): columns.signed_margin}
    if len(rewards) > 1:
        named = {"committee": columns.signed_margin} | {
            name: committee([pair], columns.label).signed_margin for name, pair in rewards.items()
        }
    scorers: list[dict[str, Any]] = []
    for place, (name, signed_margin) in enumerate(named.items()):
        ordered = by_margin(signed_margin)
        scorers.append(
            {
                "name": shorten(name, 60),
                "colour": figures.role(place + 1) if place <= figures.SCORERS else "none",
                "all": agreement(ordered),
                "kept": agreement(signed_margin[columns.kept]),
                "tenth": agreement(ordered[: math.ceil(len(ordered) / 10)]),
            }
        )
    drawn = [numbers.agreement_curve(signed_margin) for signed_margin in named.values()]
    curves = [curve for curve in drawn if curve is not None]
    if drawn[0] is None or trusted is None:
        return {"scorers": scorers, "curve": None, "parts": None, "lines": 0}
    kept, everything = scorers[0]["kept"], scorers[0]["all"]
    return {
        "scorers": scorers,
        "curve": figures.draw_agreement(curves, (kept.n / everything.n, kept) if kept.n else None),
        "parts": figures.draw_parts([part.own for part in trusted.judges[0].parts]),
        "lines": min(len(curves) - 1, figures.SCORERS),
    }


def _distributions(columns: numbers.Columns) -> list[dict[str, Any]]:
    found = []
    for name, meaning in COMPONENTS.items():
        histogram = numbers.histogram(getattr(columns, name), columns.kept)
        if histogram is not None:
            figure = figures.draw_histogram(histogram, name)
            found.append(
                {"name": name, "meaning": meaning, "histogram": histogram, "figure": figure}
            )
    return found


def _named(pairs: Pairs, columns: numbers.Columns) -> dict[str, Any] | None:
    """The tables by generator, category and aspect; None where the source names none of them."""
    single, double = numbers.by_generator(pairs.table, columns)
    groups = {
        "generator": single,
        "two generators": double,
        "category": numbers.by_category(pairs.table, columns),
    }
    aspects = numbers.by_aspects(pairs.table, columns)
    if not aspects and not any(groups.values()):
        return None
    disagree = aspects_disagree(pairs.table) if aspects else np.zeros(0, bool)
    return {
        "groups": {what: rows[:NAMED] for what, rows in groups.items() if rows},
        "more": {what: len(rows) - NAMED for what, rows in groups.items() if len(rows) > NAMED},
        "aspects": aspects,
        "disagree": int(disagree.sum()),
        "disagree_kept": int((disagree & columns.kept).sum()) if aspects else 0,
    }


def _prompt_map(
    scores: Path, pairs: Pairs, recipe: Recipe, columns: numbers.Columns
) -> dict[str, Any] | None:
    """The map of the prompt embeddings that the diversity step left; None if it left none."""
    total = pairs.prompts.num_rows
    vectors = _embeddings(scores, recipe.score.diversity, total)
    if vectors is None:
        return None
    kept = np.unique(columns.prompt[columns.kept])
    found = numbers.prompt_map(
        vectors[draw_rows(total, MAP_ROWS)].astype(np.float32),
        vectors[kept[draw_rows(len(kept), MAP_ROWS)]].astype(np.float32),
    )
    if found is None:
        return None
    sampled = len(found.before) if len(found.before) < total else 0
    return {"numbers": found, "figure": figures.draw_map(found), "sampled": sampled}


def _embeddings(scores: Path, spec: str, prompts: int) -> numbers.Floats | None:
    """This encoder's embeddings of these prompts, mapped from their file, if there is one."""
    if spec == "none" or (parsed := ENCODERS.parse(spec)).is_column:
        return None
    name = f"{parsed.name}-{Path(parsed.model).name}" if parsed.model else parsed.name
    # score_path with an empty identity gives the part of the name before the fingerprint
    start = score_path(scores, "embeddings", name).stem.rpartition("-")[0]
    for path in sorted(scores.glob("embeddings-*.npy")):
        if path.stem.rpartition("-")[0] == start:
            vectors: numbers.Floats = map_array(path)
            if len(vectors) == prompts:
                return vectors
    return None


def _fingerprints(scores: Scores) -> list[dict[str, str]]:
    """What made each table of scores, and its file."""
    tables = [("margin", spec, table) for spec, table in scores.margins.items()]
    tables += [("quality", "", scores.quality), ("diversity", "", scores.diversity)]
    found = []
    for step, spec, table in tables:
        if table is not None:
            facts = score_facts(table)
            file = str(facts.pop("file", ""))
            plain = json.dumps(facts, sort_keys=True, ensure_ascii=False) if facts else ""
            entry = {"step": step, "spec": shorten(spec, 120), "file": file}
            found.append(entry | {"facts": shorten(plain, 1500)})
    return found
