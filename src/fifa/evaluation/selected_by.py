"""Which scorers picked the training data: their praise of the result is no evidence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fifa.evaluation.models import Model
from fifa.scoring.rewards.hps import FILES as HPS_FILES
from fifa.scoring.rewards.load import CLIPS, NAMES
from fifa.shards.files import read_json, read_yaml


def selection_scorers(models: Iterable[Model], run: Path | None = None) -> tuple[str, ...]:
    """The specs of the reward models that picked the checkpoints' data, as far as that is known.

    Parameters
    ----------
    models
        Checkpoints; ``train.json`` and, beside the pairs they were trained on, ``subset.json``
        or ``recipe.yaml`` say it.
    run
        A run folder whose recipe says it too.
    """
    found: dict[str, None] = {}
    if run is not None:
        found |= dict.fromkeys(_recipe_margins(run / "recipe.yaml"))
    for model in models:
        folder = model.training
        if folder is None:
            continue
        facts = read_json(folder / "train.json", "the training", missing={})
        found |= dict.fromkeys(_margins(facts))
        source = training_source(folder)
        if source is not None:
            for place in (source, source.parent):
                found |= dict.fromkeys(_recipe_margins(place / "recipe.yaml"))
                subset = read_json(place / "subset.json", "the subset", missing={})
                found |= dict.fromkeys(_margins(subset))
    return tuple(found)


def is_picked(spec: str, picked: Sequence[str]) -> bool:
    """Whether a scorer, or a close relative of it, is among those that picked the data.

    ``pickscore`` is the same model as ``pickscore:FOLDER`` and as the columns
    ``column:pickscore_prob_0,pickscore_prob_1``; hpsv2 and hpsv2.1 are relatives; one proxy is
    as good as another, for all are trained on the same feedback.
    """
    family = _family(spec)
    return any(
        spec == other or family in _families(other) or _in_column(family, other) for other in picked
    )


def training_source(folder: Path) -> Path | None:
    """Where a checkpoint's training pairs were, by its ``train.yaml``; None if it is a URL."""
    source = read_yaml(folder / "train.yaml", "the training", missing={}).get("source")
    return Path(source) if isinstance(source, str) and source and "://" not in source else None


def _family(spec: str) -> str:
    name = spec.partition(":")[0].partition("@")[0].lower()  # proxy@clip:MODEL is a proxy
    if name in HPS_FILES:
        return "hps"
    return "clipscore" if name in CLIPS and name.startswith("clipscore") else name


def _families(spec: str) -> set[str]:
    return set() if spec.startswith("column:") else {_family(spec)}


def _in_column(family: str, spec: str) -> bool:
    """Whether the columns of a source are called like a scorer of the family."""
    if not spec.startswith("column:"):
        return False
    plain = re.sub(r"[^a-z0-9]", "", spec.removeprefix("column:").lower())
    names = {"clipscore": "clip", "hps": "hps"}.get(family, family)
    return names in plain if family in {_family(name) for name in NAMES} else False


def _recipe_margins(path: Path) -> list[str]:
    return _margins(read_yaml(path, "the recipe", missing={}))


def _margins(facts: Any) -> list[str]:
    """Every ``margin`` list of specs in some facts, however deep."""
    if isinstance(facts, dict):
        own = facts.get("margin")
        if isinstance(own, dict):
            own = list(own)
        found = [spec for spec in own if isinstance(spec, str)] if isinstance(own, list) else []
        return found + [s for key, part in facts.items() if key != "margin" for s in _margins(part)]
    return [spec for part in facts for spec in _margins(part)] if isinstance(facts, list) else []
