"""The model card of a reward trained here: what it is, how good it is, and where it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fifa.config import Reward
from fifa.data.table import Pairs
from fifa.scoring.rewards.calibrate import measure
from fifa.scoring.rewards.head import Comparisons


def reward_facts(
    pairs: Pairs,
    readable: npt.NDArray[np.bool_],
    data: Comparisons,
    held_out: Comparisons,
    logits: npt.NDArray[np.float64],
    temperature: float,
    options: Reward,
) -> dict[str, Any]:
    """What ``reward.json`` and the card say of a training, whatever was trained.

    Parameters
    ----------
    pairs, readable
        The source, and which of its pairs have both images.
    data, held_out
        What was trained on, and what it is judged on.
    logits
        reward_0 - reward_1 of the pairs held out, before calibration.
    temperature
        What they are divided by.
    options
        How it was trained.
    """
    before, after = (
        measure(logits / t, held_out.label, held_out.prompt, seed=options.seed)
        for t in (1.0, temperature)
    )
    return {
        "options": options.settings(),
        "training": {
            "source": Path(pairs.origin.source).name or "memory",
            "fingerprint": pairs.origin.fingerprint,
            "pairs": len(data.label),
            "of them ties": int((data.label == 0.5).sum()),
            "prompts": len(np.unique(data.prompt)),
            "pairs without both images": int((~readable).sum()),
        },
        "temperature": temperature,
        "metrics": {"before": before.as_dict(), "after": after.as_dict()},
    }


def model_card(settings: dict[str, Any]) -> str:
    """README.md of a reward's folder.

    Parameters
    ----------
    settings
        What goes into ``reward.json``: ``options``, ``training``, ``metrics`` with ``before`` and
        ``after`` (`fifa.scoring.rewards.calibrate.Metrics` as dicts), ``temperature``.
    """
    before, after = settings["metrics"]["before"], settings["metrics"]["after"]
    training = settings["training"]
    facts = "\n".join(f"| {name} | {_plain(value)} |" for name, value in training.items())
    options = "\n".join(f"| {name} | {_plain(v)} |" for name, v in settings["options"].items())
    low, high = after["low"], after["high"]
    return f"""---
library_name: fifa-align
pipeline_tag: image-classification
tags: [reward-model, human-preference, text-to-image]
---

# A proxy of people's preference

{settings["what"]}

A reward is the log-odds that people prefer the image: `sigmoid(reward_0 - reward_1)` is the
probability that they prefer image 0. Rewards compare within one prompt only.

## How good it is

On {after["pairs"]:,} pairs of {after["prompts"]:,} prompts, {settings["judged"]}:

| | |
|---|---|
| accuracy against the majority | {after["accuracy"]:.3f} |
| 95 % interval (bootstrap of prompts) | {low:.3f} to {high:.3f} |
| cross-entropy, nats | {before["nll"]:.3f} before calibration, {after["nll"]:.3f} after |
| expected calibration error | {before["ece"]:.3f} before calibration, {after["ece"]:.3f} after |
| temperature | {settings["temperature"]:.3f} |

The temperature was fitted on the same held-out pairs, one number for all of them.

## What it was trained on

| | |
|---|---|
{facts}

| option | |
|---|---|
{options}

## Where it ends

{settings["limits"]}
It says what the people in its training data preferred, with their habits and prejudices. Do not
score the pairs it was trained on with it: it has seen their labels. `--margin proxy` scores them
by cross-fitting instead.

## Use

```bash
fifa score SOURCE --margin proxy:FOLDER
```
"""


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
