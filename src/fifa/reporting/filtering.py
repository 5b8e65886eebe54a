"""What the page says of a selection: from the files of a run folder to the templates' words."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fifa.config import Recipe
from fifa.data.table import FILES, Origin
from fifa.formatting import shorten, shorten_lines
from fifa.reporting import data, figures
from fifa.reporting.examples import load_examples
from fifa.reporting.label_noise import LISTED, load_doubts
from fifa.scoring.agreement import Agreement, agreement
from fifa.scoring.specs import ENCODERS
from fifa.scoring.table import score_facts, score_path

PLANE_ROWS = 20_000  # prompts that the plane is fitted on
# In the order in which the page tells them; a reason that is not here comes after these
REASONS = {
    "tie": "the people preferred neither image",
    "duplicate": "the same two images as an earlier pair, or an image against itself",
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
    "doubted": "Likely mislabelled",
}
COMPONENTS = {
    "margin": "How far apart the scorer sees the two images of a pair",
    "quality": "The rater's mark for the pair's prompt",
    "diversity": "Log distance of the prompt to its k-th neighbour: high is unusual",
}


@dataclass(frozen=True)
class Scorer:
    """One line of the agreement table: a committee member, or the committee."""

    name: str
    colour: str
    whole: Agreement
    kept: Agreement
    tenth: Agreement


def filter_context(folder: Path, recipe: Recipe, origin: Origin) -> dict[str, Any]:
    """What the templates of the selection read."""
    columns = data.load_columns(folder)
    files = _made_from(folder, recipe)
    reasons = data.count_reasons(columns)
    scorers, curve, deciles, shown = _agreement(columns, files["margins"])
    doubts = load_doubts(columns, files["margins"])
    groups = load_examples(folder, columns, files["quality"], doubts.rows if doubts else ())
    return {
        "recipe": recipe,
        "recipe_yaml": shorten_lines(recipe.to_yaml()),
        "older": _older(files["knobs"], recipe),
        "origin": origin,
        "funnel": _funnel(folder, origin, reasons),
        "pairs": len(columns.kept),
        "kept": reasons.get("selected", 0),
        "prompts": len(np.unique(columns.prompt)),
        "prompts_kept": len(np.unique(columns.prompt[columns.kept])),
        "scorers": scorers,
        "curve": curve,
        "deciles": deciles,
        "lines": shown,
        "least": data.LEAST,
        "by_labels": recipe.select.strategy == "consensus" or bool(recipe.select.min_agreement),
        "distributions": _distributions(columns),
        "groups": [group for group in groups if group.name != "doubted"],
        "doubted": [group for group in groups if group.name == "doubted"],
        "doubts": doubts,
        "doubted_ids": _ids(folder, doubts.rows[:LISTED]) if doubts else [],
        "headings": HEADINGS,
        "order": "importance"
        if recipe.select.strategy == "fifa"
        else f"the order of {recipe.select.strategy}",
        "rated": files["quality"] is not None,
        "pictured": any(e.images for group in groups for e in group.examples),
        "reasons": REASONS,
        "width": lambda part: f"{100 * part / max(origin.rows, len(columns.kept), 1):.3f}",
        "plane": _plane(folder, recipe, columns),
        "fingerprints": _fingerprints(files),
        "source_word": shlex.quote(shorten(recipe.read.source or "SOURCE", 400)),
    }


def _ids(folder: Path, rows: Sequence[int]) -> list[str]:
    """The ids of some pairs, in the order of ``rows``."""
    order = sorted(rows)
    ids = data.take_rows(folder / FILES["table"], order, ["pair_id"])["pair_id"].to_pylist()
    found = dict(zip(order, ids, strict=True))
    return [found[row] for row in rows]


def _made_from(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Which score files and knobs the selection was made with, as it says itself."""
    metadata = pq.read_schema(folder / "selection.parquet").metadata or {}
    used = json.loads(metadata.get(b"fifa.select", b"{}"))
    names = sorted(
        used.get("margin", {}), key=[*recipe.score.margin, *used.get("margin", {})].index
    )
    paths = {name: folder / "scores" / used["margin"][name] for name in names}
    found: dict[str, Any] = {
        "margins": {name: path for name, path in paths.items() if path.exists()},
        "knobs": used.get("select"),
    }
    for kind in ("quality", "diversity"):
        path = folder / "scores" / used[kind] if used.get(kind) else None
        found[kind] = path if path is not None and path.exists() else None
    return found


def _older(knobs: dict[str, Any] | None, recipe: Recipe) -> bool:
    """Whether the selection was made with other knobs than the recipe has now."""
    return knobs is not None and knobs != json.loads(json.dumps(asdict(recipe.select)))


@dataclass(frozen=True)
class Drop:
    """One step down the funnel; `left` pairs or rows remain after it."""

    name: str
    meaning: str
    count: int
    left: int
    details: tuple[data.Rejected, ...] = ()


def _funnel(folder: Path, origin: Origin, reasons: dict[str, int]) -> dict[str, Any]:
    table = pq.read_table(folder / FILES["rejected"])
    pairs, kept = sum(reasons.values()), reasons.get("selected", 0)
    refused, left = table.num_rows, origin.rows - table.num_rows
    why = tuple(data.count_rejected(table))
    rows_lost = [Drop("rejected", "rows that could not be read", refused, left, why)]
    left -= origin.merged
    repeats = "repeats of an earlier pair, their labels averaged into it"
    rows_lost.append(Drop("merged", repeats, origin.merged, left))
    adds_up = left == pairs
    left, dropped = pairs, []
    for name in [*REASONS, *sorted(set(reasons) - set(REASONS) - {"selected"})]:
        if lost := reasons.get(name, 0):
            left -= lost
            why = _unreadable(folder) if name == "unreadable_image" else ()
            dropped.append(Drop(name, REASONS.get(name, ""), lost, left, why))
    return {
        "rows": origin.rows,
        "rejected": refused,
        "merged": origin.merged,
        "rows_lost": rows_lost,
        "pairs_dropped": dropped,
        "main": sorted(dropped, key=lambda step: -step.count)[:3],
        "dropped": pairs - kept,
        "adds_up": adds_up and left == kept,
    }


def _unreadable(folder: Path) -> tuple[data.Rejected, ...]:
    """The images of selected pairs that could not be opened, by reason."""
    path = folder / "unreadable.parquet"
    if not path.exists():
        return ()
    reasons = pq.read_table(path, columns=["reason"])["reason"].cast(pa.string()).drop_null()
    found = [
        data.Rejected(entry["values"], entry["counts"], ())
        for entry in pc.value_counts(reasons).to_pylist()
    ]
    return tuple(sorted(found, key=lambda entry: (-entry.count, entry.reason))[:12])


def _agreement(
    columns: data.Columns, margins: dict[str, Path]
) -> tuple[list[Scorer], Any, Any, int]:
    """The table, the two figures, and how many scorers the first figure shows beside the first."""
    names = {"committee" if len(margins) > 1 else next(iter(margins), "margin"): columns.signed}
    if len(margins) > 1:
        for spec, path in margins.items():
            names[spec] = data.signed_margins(path, columns.label)
    rows, curves = [], []
    deciles: list[Agreement] = []
    for i, (name, signed) in enumerate(names.items()):
        hits = data.hits_by_margin(signed)
        colour = "kept" if i == 0 else f"scorer-{i - 1}" if i <= figures.SCORERS else "none"
        rows.append(
            Scorer(
                shorten(name.removeprefix("column:"), 60),
                colour,
                whole=data.agreement_of(hits),
                kept=agreement(signed[columns.kept & np.isfinite(signed)]),
                tenth=data.agreement_of(hits[: math.ceil(len(hits) / 10)]),
            )
        )
        curve = data.agreement_curve(hits)
        if curve is not None:
            curves.append(curve)
        deciles = deciles or data.agreement_deciles(hits)
    first = rows[0]
    if not curves or first.whole.n < data.LEAST:
        return rows, None, None, 0
    cut = (first.kept.n / first.whole.n, first.kept) if first.kept.n else None
    return (
        rows,
        figures.draw_curve(curves, cut, "curve"),
        figures.draw_deciles(deciles, "deciles"),
        min(len(curves) - 1, figures.SCORERS),
    )


def _distributions(columns: data.Columns) -> list[dict[str, Any]]:
    found = []
    for name, meaning in COMPONENTS.items():
        histogram = data.histogram(getattr(columns, name), columns.kept)
        if histogram is not None:
            figure = figures.draw_histogram(histogram, name, f"histogram-{name}")
            found.append(
                {"name": name, "meaning": meaning, "histogram": histogram, "figure": figure}
            )
    return found


def _plane(folder: Path, recipe: Recipe, columns: data.Columns) -> dict[str, Any] | None:
    """The plane of the prompt embeddings that the diversity step left; None if it left none."""
    total = pq.ParquetFile(folder / FILES["prompts"]).metadata.num_rows
    path = _embeddings(folder / "scores", recipe.score.diversity, total)
    if path is None:
        return None
    kept = np.unique(columns.prompt[columns.kept])

    def vectors(rows: data.Ints) -> data.Floats:
        column = data.take_rows(path, rows, ["embedding"])["embedding"].combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        found: data.Floats = flat.reshape(len(rows), -1)
        return found

    plane = data.prompt_plane(
        vectors(data.draw_rows(total, PLANE_ROWS)),
        vectors(kept[data.draw_rows(len(kept), PLANE_ROWS)]),
    )
    if plane is None:
        return None
    return {
        "numbers": plane,
        "figure": figures.draw_plane(plane, "plane"),
        "sampled": len(plane.before) if len(plane.before) < total else 0,
    }


def _embeddings(scores: Path, spec: str, prompts: int) -> Path | None:
    """The file of this encoder's embeddings of these prompts, if there is one."""
    if spec == "none" or (parsed := ENCODERS.parse(spec)).is_column:
        return None
    name = f"{parsed.name}-{Path(parsed.model).name}" if parsed.model else parsed.name
    # score_path with an empty identity gives the part of the name before the fingerprint
    start = score_path(scores, "embeddings", name).stem.rpartition("-")[0]
    found = [
        path
        for path in sorted(scores.glob("embeddings-*.parquet"))
        if path.stem.rpartition("-")[0] == start
        and pq.ParquetFile(path).metadata.num_rows == prompts
    ]
    return found[0] if found else None


def _fingerprints(files: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    named = [("margin", spec, path) for spec, path in files["margins"].items()]
    named += [(kind, "", files[kind]) for kind in ("quality", "diversity") if files[kind]]
    for kind, spec, path in named:
        facts = score_facts(pq.read_schema(path).empty_table())
        facts.pop("file", None)
        found.append(
            {
                "kind": kind,
                "spec": shorten(spec, 120),
                "file": path.name,
                "facts": shorten(json.dumps(facts, sort_keys=True, ensure_ascii=False), 1500)
                if facts
                else "",
            }
        )
    return found
