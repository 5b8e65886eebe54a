"""The data-set card of a subset."""

from __future__ import annotations

from typing import Any

from fifa.config import Recipe, build
from fifa.selection.table import REASONS

CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path:
{files}
tags:
- text-to-image
- preference
- fifa
---

# {pairs:,} preference pairs, selected by FiFA

The {pairs:,} most important of {total:,} pairs of people's preferences between two images of one
prompt. Source: `{source}` (read as {format}). Rows are in the order of selection, the most
important first.

```python
from datasets import load_dataset

pairs = load_dataset("path/to/this/folder", split="train")
```

{images}

| column | |
|---|---|
{image_columns}| `label_0`, `label_1` | 1.0 for the preferred image, 0.0 for the other; no ties |
| `caption` | the prompt |
| `label`, `votes` | the share of people for image 0, and how many labels it averages |
| `pair_id`, `prompt_id`, `image_0_uid`, `image_1_uid` | content keys |
| `image_0_url`, `image_1_url` | URL or path in the source, where it names one |
| `margin`, `signed_margin`, `agreement` | what the reward models say of the pair |
| `quality`, `diversity` | what raters and neighbours say of the prompt |
| `importance`, `rank` | FiFA's importance, and the place in the order |
| `weight` | for the loss; 1.0 unless the selection is a soft one |

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
beyond it. The prompts were written by people; which of them were left out as unsafe is the recipe's
choice, and what the rater missed may still be there.
"""


def dataset_card(subset: dict[str, Any]) -> str:
    """The card as Markdown, for what ``subset.json`` holds."""
    pixels = (
        "`jpg_0` and `jpg_1` are the source's own bytes, never re-encoded."
        if subset["images"]
        else "The source came without images, so this subset has references only: fetch them, or "
        "rebuild it from a source with images."
    )
    rows = "| `jpg_0`, `jpg_1` | the images, as bytes |\n" if subset["images"] else ""
    reasons = {reason: subset["reasons"].get(reason, 0) for reason in REASONS}
    recipe: Recipe = build(Recipe, subset["recipe"], where="subset.json")
    return CARD.format(
        pairs=subset["pairs"],
        total=sum(reasons.values()),
        source=subset["source"]["source"].replace("`", "'"),
        format=subset["source"]["format"],
        images=pixels,
        image_columns=rows,
        recipe=recipe.to_yaml(),
        # each by its name: `datasets` would take a pattern for the data it has cached
        files="\n".join(f"    - {file['name']}" for file in subset["files"]),
        reasons="\n".join(f"| {reason} | {n:,} |" for reason, n in reasons.items() if n),
    )
