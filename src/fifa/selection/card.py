"""The data-set card of a subset, and what it says beyond the recipe."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import yaml

from fifa.config import GENERATE_FILE, Export, Recipe, Select, build
from fifa.data.remote import fetch_file
from fifa.data.source import Root, is_url
from fifa.data.table import Origin, Pairs
from fifa.scoring.table import Scores
from fifa.selection.choose import gather_terms
from fifa.selection.table import REASONS
from fifa.selection.trainers import METADATA, Target
from fifa.shards.files import read_yaml
from fifa.shards.mapped import take

CARD = """\
---
{front}tags:
- text-to-image
- preference
- fifa
---

# {pairs:,} preference pairs, selected by FiFA

The {pairs:,} most important of {total:,} pairs of {whose} preferences between two images of one
prompt. Source: `{source}` (read as {format}). Rows are in the order of selection, the most
important first.

{use}

## What it is

| | |
|---|---|
{about}
{generators}
## How it was made

With FiFA's importance `margin + alpha * quality + gamma * diversity`
([arXiv 2410.10166](https://arxiv.org/abs/2410.10166)), by this recipe:

```yaml
{recipe}```

What became of every pair of the source:

| reason | pairs |
|---|--:|
{reasons}

`subset.json` names every pair and every score file, and `fifa rebuild subset.json --out FOLDER`
makes the same files again from the source.

## Licence

Prompts, images and labels are the source's, and so is their licence: this card grants nothing
beyond it. Which prompts were left out as unsafe is the recipe's choice, and what the rater missed
may still be there.
"""
CONFIGS = """\
configs:
- config_name: default
  data_files:
  - split: train
    path:
{files}
"""
COLUMNS = """\
```python
from datasets import load_dataset

pairs = load_dataset("path/to/this/folder", split="train")
```

{images}

| column | |
|---|---|
{image_columns}| `label_0`, `label_1` | 1.0 for the preferred image, 0.0 for the other; no ties |
| `caption` | the prompt |
| `label`, `votes` | the share of labels for image 0, and how many it averages |
| `pair_id`, `prompt_id`, `image_0_uid`, `image_1_uid` | content keys |
| `image_0_url`, `image_1_url` | URL or path in the source, where it names one |
| `margin`, `signed_margin`, `agreement` | what the reward models say of the pair |
| `quality`, `diversity` | what raters and neighbours say of the prompt |
| `importance`, `rank` | FiFA's importance, and the place in the order |
| `weight` | for the loss; 1.0 unless the selection is a soft one |{names}"""
NAMES = {
    "model_0": "the generator of image 0",
    "model_1": "the generator of image 1",
    "category": "the source's category",
}
LICENCE = ("license", "license_name", "license_link")  # as cards on the hub name it
MAX_README = 1 << 20
GENERATORS = 50  # at most so many in a card


@dataclass(frozen=True)
class About:
    """What a card says of some pairs beyond their recipe.

    Parameters
    ----------
    licence
        `source_licence`.
    several, share
        How many pairs have several votes, and the mean share of these for the winner.
    rated, flagged
        How many pairs have a prompt that was rated, None without a rater; of them, how many
        have one that was flagged as unsafe.
    generators
        Name, pairs and wins of each generator, the most frequent first, where the source has the
        columns ``model_0`` and ``model_1``.
    judges
        The reward models that made the labels, where `fifa.generate_pairs` made the source.
    """

    licence: dict[str, str] = field(default_factory=dict)
    several: int = 0
    share: float | None = None
    rated: int | None = None
    flagged: int = 0
    generators: list[tuple[str, int, int]] = field(default_factory=list)
    judges: list[str] = field(default_factory=list)


def about(pairs: Pairs, rows: npt.NDArray[np.int64], scores: Scores) -> About:
    """What a card says of some rows of the pairs."""
    generators = [name for name in ("model_0", "model_1") if name in pairs.table.column_names]
    chosen = take(pairs.table.select(["label", "votes", *generators]), rows)
    label, votes = (chosen[name].to_numpy() for name in ("label", "votes"))
    several = votes > 1
    share = float(np.maximum(label, 1 - label)[several].mean()) if several.any() else None
    rated, flagged = None, 0
    if scores.quality is not None:
        terms = gather_terms(pairs, Scores(quality=scores.quality), Select())
        if terms.unsafe is not None and terms.unrated is not None:
            rated, flagged = int((~terms.unrated[rows]).sum()), int(terms.unsafe[rows].sum())
    return About(
        licence=source_licence(pairs.origin),
        several=int(several.sum()),
        share=share,
        rated=rated,
        flagged=flagged,
        generators=_generators(chosen, label),
        judges=_judges(pairs.origin),
    )


def _generators(chosen: pa.Table, label: npt.NDArray[np.float32]) -> list[tuple[str, int, int]]:
    if not {"model_0", "model_1"} <= set(chosen.column_names):
        return []
    count: Counter[str] = Counter()
    wins: Counter[str] = Counter()
    sides = (chosen[name].cast(pa.string()).to_pylist() for name in ("model_0", "model_1"))
    for *models, first in zip(*sides, label > 0.5, strict=True):
        count.update({model for model in models if model})
        wins.update(filter(None, [models[0 if first else 1]]))
    return [(name, n, wins[name]) for name, n in sorted(count.items(), key=lambda x: (-x[1], x[0]))]


def _judges(origin: Origin) -> list[str]:
    path = Path(origin.root) / GENERATE_FILE
    found = {} if is_url(origin.root) else read_yaml(path, "the options", missing={})
    return [str(spec) for spec in found.get("margin", ())]


def source_licence(origin: Origin) -> dict[str, str]:
    """The licence that the source's README states in its front matter; empty if it states none.

    The README is that of the folder, or of the data set on the hub, that the pairs were read from.
    """
    root = origin.root
    if match := re.match(r"(hf://datasets/[^/]+/[^/]+)", root):
        root = match[1]
    elif is_url(root):
        return {}
    found: Any = None
    with suppress(Exception):  # whatever a file system or a README comes up with: not stated
        text = _readme(root).decode("utf-8-sig")
        if front := re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL):
            found = yaml.safe_load(front[1])
    given = found if isinstance(found, dict) else {}
    told = {name: given.get(name) for name in LICENCE}
    if isinstance(several := told["license"], list):
        told["license"] = ", ".join(one for one in several if isinstance(one, str))
    return {name: _line(value) for name, value in told.items() if value and isinstance(value, str)}


def _readme(root: str) -> bytes:
    if is_url(root):
        return fetch_file(f"{root}/README.md", MAX_README)[:MAX_README]
    with Root(root).open("README.md") as file:
        return file.read(MAX_README)


def dataset_card(subset: dict[str, Any], made_for: Target) -> str:
    """The card as Markdown, for what ``subset.json`` holds and the target it was written for."""
    reasons = {reason: subset["reasons"].get(reason, 0) for reason in REASONS}
    recipe: Recipe = build(Recipe, subset["recipe"], where="subset.json")
    known: About = build(About, subset["about"], where="subset.json")
    to = subset.get("to", Export().to)
    use = f"**Written for {to}**: {made_for.layout}; {made_for.keeps}. Read by {made_for.loader}."
    return CARD.format(
        front=_front(subset, known.licence),
        pairs=subset["pairs"],
        whose="a reward model's" if known.judges else "people's",
        total=sum(reasons.values()),
        source=_line(subset["source"]["source"], 1000).replace("`", "'"),
        format=subset["source"]["format"],
        use=_columns(subset["images"], subset.get("names", ())) if to == Export().to else use,
        about="\n".join(f"| {name} | {text} |" for name, text in _about(known, subset, recipe)),
        generators=_generator_table(known.generators),
        recipe=recipe.to_yaml(),
        reasons="\n".join(f"| {reason} | {n:,} |" for reason, n in reasons.items() if n),
    )


def _front(subset: dict[str, Any], licence: dict[str, str]) -> str:
    stated: dict[str, Any] = {name: licence[name] for name in LICENCE if name in licence}
    if "license" in stated:
        names = stated["license"].split(", ")
        stated["license"] = names[0] if len(names) == 1 else names
        if not all(re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name) for name in names):
            stated |= {"license": "other", "license_name": licence["license"]}  # none of the hub's
    text = yaml.safe_dump(stated, sort_keys=False) if stated else ""
    # each by its name: `datasets` would take a pattern for the data it has cached
    names = (file["name"].replace(METADATA, "*") for file in subset["files"])  # with the images
    files = "\n".join(f"    - {name}" for name in names)
    return text + (CONFIGS.format(files=files) if files else "")


def _columns(images: bool, names: Sequence[str]) -> str:
    pixels = (
        "`jpg_0` and `jpg_1` are the source's own bytes, never re-encoded."
        if images
        else "The source came without images, so this subset has references only: fetch them, or "
        "rebuild it from a source with images."
    )
    rows = "| `jpg_0`, `jpg_1` | the images, as bytes |\n" if images else ""
    named = "".join(f"\n| `{name}` | {NAMES[name]} |" for name in names)
    return COLUMNS.format(images=pixels, image_columns=rows, names=named)


def _about(known: About, subset: dict[str, Any], recipe: Recipe) -> list[tuple[str, str]]:
    """The lines of the table "What it is"."""
    stated = ", ".join(known.licence[name] for name in LICENCE if name in known.licence)
    agreement = "one label for each pair, so that nothing is known of it"
    if known.judges:
        agreement = (
            f"no person was asked: the labels are what {_cell(', '.join(known.judges))} says"
        )
    elif known.share is not None:
        agreement = (
            f"{known.several:,} pairs have several votes, of which {known.share:.0%} are for the "
            "winner on average"
        )
    harm = "the prompts were not rated"
    if known.rated is not None:
        left_out = subset["reasons"].get("unsafe_prompt", 0)
        total = sum(subset["reasons"].values())
        harm = (
            f"{known.flagged:,} of {known.rated:,} rated pairs here have a prompt that the rater "
            f"{_cell(recipe.score.quality)} flagged; {left_out:,} of the source's {total:,} pairs "
            f"({left_out / max(total, 1):.1%}) were left out for that"
        )
    return [
        ("licence, as the source's README states it", _cell(stated) or "not stated"),
        ("agreement of the annotators", agreement),
        ("unsafe prompts", harm),
    ]


def _generator_table(generators: list[tuple[str, int, int]]) -> str:
    if not generators:
        return ""
    lines = [f"| {_cell(name)} | {n:,} | {wins:,} |" for name, n, wins in generators[:GENERATORS]]
    if len(generators) > GENERATORS:
        lines.append(f"| {len(generators) - GENERATORS:,} more | | |")
    return "\n".join(["\n| generator | pairs | won |", "|---|--:|--:|", *lines, ""])


def _line(text: str, most: int = 200) -> str:
    """Text of a source as one line of at most ``most`` characters."""
    return " ".join(text.split())[:most]


def _cell(text: str) -> str:
    """Text of a source for a cell of a Markdown table."""
    return re.sub(r"([|`<>\[\]*_\\])", r"\\\1", _line(text))
