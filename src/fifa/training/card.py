"""What a checkpoint says of itself: ``train.json`` for programs, the model card for people."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fifa.config import Train
from fifa.models.families import Family, family_named
from fifa.shards.files import read_json, write_json, write_text
from fifa.training.checkpoint import Progress
from fifa.training.folder import CARD, FACTS_FILE
from fifa.training.losses import LOSSES
from fifa.training.metrics import read_stats
from fifa.training.pairs import TrainingPairs
from fifa.training.plan import Plan

SHOWN = (
    ("loss", "loss"),
    ("winner's error minus the reference's", "winner_minus_reference"),
    ("loser's error minus the reference's", "loser_minus_reference"),
    ("implicit accuracy", "implicit_accuracy"),
)


def write_card(
    train: Train,
    plan: Plan,
    family: Family,
    pairs: TrainingPairs,
    progress: Progress,
    device: torch.device,
    out: Path,
) -> None:
    """Write the model card and, as the last of all files, ``train.json`` into ``out``.

    Parameters
    ----------
    train, plan, family, pairs
        The training, what it took, and what was trained on what.
    progress
        How far it went.
    device
        What it ran on.
    out
        The training's folder, with its ``stats.jsonl``.
    """
    from fifa import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    metrics = read_stats(out)
    facts = {
        "fifa": __version__,
        "base_model": train.model,
        "family": family.name,
        "method": train.method,
        "steps": progress.step,
        "pairs": len(pairs),
        "pairs_seen": progress.pairs,
        "dropped": pairs.dropped,
        "seconds": round(progress.seconds, 3),
        "processes": plan.processes,
        "device": name,
        "dtype": plan.dtype,
        "accelerator_hours": progress.seconds * plan.processes / 3600,
        "source": train.source,
        "pairs_digest": pairs.digest,
        "selection": selection_facts(pairs.folder),
        "options": asdict(train),
        "last": metrics[-1] if metrics else None,
        "versions": _versions(),
    }
    write_text(out / CARD, training_card(facts))
    write_json(out / FACTS_FILE, facts)


def selection_facts(folder: Path | None) -> dict[str, Any] | None:
    """How the pairs were selected, from the subset's ``subset.json``; None where there is none."""
    if folder is None:
        return None
    subset = read_json(folder / "subset.json", "the subset")
    names = ("digest", "pairs", "recipe", "source", "scores", "reasons")
    return {name: subset[name] for name in names if name in subset}


def training_card(facts: dict[str, Any]) -> str:
    """The model card, for what ``train.json`` holds."""
    options, name = facts["options"], _public(facts["base_model"])
    lora = facts["method"] == "lora"
    hub = f"base_model: {facts['base_model']}\n" if _is_hub(facts["base_model"]) else ""
    family = family_named(facts["family"])
    what = "A LoRA" if lora else f"All weights of the {family.part}"
    loss = options["loss"]
    if LOSSES[loss].needs_reference:
        loss += f", beta {options['beta']:g}"
    table = [
        ("method", f"LoRA, rank {options['rank']}" if lora else "full fine-tuning"),
        ("loss", loss),
        ("pairs", f"{facts['pairs']:,}, presented {facts['pairs_seen']:,} times in all"),
        ("steps", f"{facts['steps']:,} of {options['batch']:,} pairs"),
        ("learning rate", f"{options['lr']:g}, {options['schedule']}, {options['warmup']} warm-up"),
        ("optimiser", options["optimizer"]),
        ("prompt dropout", f"{options['prompt_dropout']:g}"),
        ("precision", facts["dtype"]),
        ("time", f"{facts['seconds']:,.0f} s on {facts['processes']} x {facts['device']}"),
    ]
    rows = "\n".join(f"| {left} | {right} |" for left, right in table)
    return f"""---
{hub}library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, diffusion-dpo, preference-optimization{", lora" if lora else ""}, fifa]
---

# {name}, aligned with {facts["pairs"]:,} preference pairs

{what}, trained with Diffusion-DPO ([arXiv 2311.12908](https://arxiv.org/abs/2311.12908))
on pairs of images of which people preferred one.

## Use

```python
{_use(facts, lora, family)}
```

## How it was trained

| | |
|---|---|
{rows}

Beta is that of `-log sigmoid(-(beta / 2) * difference)` with errors that are means over a latent's
numbers. `train.yaml` holds every option, `stats.jsonl` every step.
{_last(facts)}
{_data(facts)}
## Where it ends

It draws what the people behind these pairs preferred, with their habits and prejudices, and what
the base model could draw before. Whether it is better than the base has to be measured
(`fifa evaluate`), and not only by the reward model that picked its pairs. The base model's licence
and the data's hold for these weights too.
"""


def _use(facts: dict[str, Any], lora: bool, family: Family) -> str:
    base = facts["base_model"] if _is_hub(facts["base_model"]) else "the base model's folder"
    if lora:
        return (
            "from diffusers import DiffusionPipeline\n\n"
            f'pipeline = DiffusionPipeline.from_pretrained("{base}")\n'
            'pipeline.load_lora_weights("path/to/this/folder")'
        )
    part, model = family.part, family.denoiser
    return (
        f"from diffusers import DiffusionPipeline, {model}\n\n"
        f'{part} = {model}.from_pretrained("path/to/this/folder", subfolder="{part}")\n'
        f'pipeline = DiffusionPipeline.from_pretrained("{base}", {part}={part})'
    )


def _last(facts: dict[str, Any]) -> str:
    last = facts["last"]
    if not last:
        return ""
    rows = [f"| {label} | {last[name]:.4g} |" for label, name in SHOWN if last[name] is not None]
    return (
        f"\nIn its last line, step {last['step']:,}:\n\n| | |\n|---|---|\n" + "\n".join(rows) + "\n"
    )


def _data(facts: dict[str, Any]) -> str:
    selection = facts["selection"]
    if selection is None:
        return f"The pairs came from `{_public(facts['source'])}`.\n"
    select = selection["recipe"]["select"]
    origin = _public(selection["source"]["source"])
    return (
        f"The pairs are a selection of FiFA's from `{origin}`: {selection['pairs']:,} pairs, "
        f"strategy {select['strategy']}, alpha {select['alpha']:g}, gamma {select['gamma']:g} "
        f"(subset {selection['digest']}; the whole recipe is in `train.json`).\n"
    )


def _is_hub(model: str) -> bool:
    return (
        model.count("/") == 1 and not model.startswith((".", "~", "/")) and not Path(model).exists()
    )


def _public(name: str) -> str:
    """A name without the folders of the machine it was on."""
    return name if _is_hub(name) or "://" in name else Path(name).name


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "peft", "accelerate")}
