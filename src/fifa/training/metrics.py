"""What is known of a training: ``stats.jsonl`` and a tracker while it runs, a card at its end.

The card is ``train.json`` for programs and the model card, ``README.md``, for people.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fifa.config.train import FACTS_FILE, STATS, TRAIN_FILE
from fifa.errors import FifaError
from fifa.models.assemble import PIECES
from fifa.models.families import Family
from fifa.models.lora import LORA_FILE
from fifa.shards.files import (
    cannot_write,
    read_json,
    read_json_lines,
    write_text,
)
from fifa.shards.manifest import bytes_digest, write_manifest
from fifa.training.checkpoint import Progress
from fifa.training.losses import LOSSES
from fifa.training.pairs import TrainingPairs
from fifa.training.plan import Plan, distilled_warning
from fifa.training.trackers import Track

CARD = "README.md"
OF_PAIRS = """Diffusion-DPO ([arXiv 2311.12908](https://arxiv.org/abs/2311.12908))
on pairs of images of which people preferred one"""
ONE_BY_ONE = """Diffusion-KTO ([arXiv 2404.04465](https://arxiv.org/abs/2404.04465))
on images that were judged one by one, good or bad"""
SHOWN = {
    "loss": "loss",
    "winner_minus_reference": "winner's error minus the reference's",
    "loser_minus_reference": "loser's error minus the reference's",
    "implicit_accuracy": "implicit accuracy",
}

# What a micro-batch adds up, in this order.
SUMS = (
    *("loss", "winner_error", "loser_error", "winner_reference", "loser_reference"),
    *("implicit_accuracy", "kl", "kl_bound", "gap"),
)


def sums(
    loss: Tensor,
    policy: Tensor,
    reference: Tensor | None,
    kl: Tensor | None,
    single: tuple[Tensor, float] | None = None,
) -> Tensor:
    """What a micro-batch tells, summed over its pairs, float32 ``[9]`` in the order of `SUMS`.

    Parameters
    ----------
    loss
        ``[n]``.
    policy, reference
        Errors of (winner, loser), ``[n, 2]``.
    kl
        ``[n]``, or None where the reference's predictions are not at hand.
    single
        Of images one by one: label and share of the good ones, as `sided` takes them.
    """
    policy = policy.detach()
    base = torch.full_like(policy, torch.nan) if reference is None else reference
    if single is not None:
        policy, base = sided(policy, *single), sided(base, *single)
    gain = (base - policy).float()
    # implicit accuracy: the policy prefers the winner more than the reference does; a tie is half
    gap = gain[:, 0] - gain[:, 1]
    correct = torch.where(gap.isnan(), gap, 0.5 * (1.0 + gap.sign()))
    # |sqrt e - sqrt e_ref|^2 <= mean (prediction - prediction_ref)^2, by the triangle inequality
    bound = (policy.sqrt() - base.sqrt()).square().mean(1)
    nothing = torch.full_like(bound, torch.nan)
    rows = [loss.detach(), *policy.T, *base.T, correct, nothing if kl is None else kl, bound]
    rows.append(gap.abs())
    return torch.stack([row.float().sum() for row in rows])


def sided(found: Tensor, label: Tensor, good: float) -> Tensor:
    """Errors ``[n, 1]`` of images one by one as ``[n, 2]`` of (winner, loser).

    A good image is a winner without a loser, and counts ``1 / good`` times, where ``good`` is their
    share of all: sums over n images are then n times the mean of either side, as far as the n have
    that share of good ones. NaN for a side without images.
    """
    winner, loser = found * label[:, None], found * (1 - label)[:, None]
    # by plain numbers: a tensor of them would wait for all that is queued on the device
    return torch.cat([winner / good, loser / (1 - good)], 1)


def means_of(total: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Of what `sums` added up over ``pairs``: what `fifa.training.losses.run_on` takes in."""
    # without a reference there is nothing to know
    means = (total[: len(SUMS)].float() / pairs).nan_to_num()
    _, winner, loser, winner_base, loser_base, *_, gap = means
    return gap, 0.5 * (winner_base + loser_base - winner - loser)


def distance(prediction: Tensor, reference: Tensor, pairs: int) -> Tensor:
    """The KL proxy of each pair, ``[n]``, from predictions ``[2n, c, h, w]``.

    For Gaussian steps of equal variance the divergence of policy from reference is proportional to
    ``mean (prediction - prediction_ref)^2``; here its mean over both images.
    """
    squared = (prediction.detach().float() - reference.float()).square().mean(dim=(1, 2, 3))
    return squared.view(-1, pairs).mean(0)


def stats_line(total: Sequence[float], pairs: int) -> dict[str, float | None]:
    """The means over ``pairs`` of what `sums` added up; None for what is not known.

    ``winner_minus_reference`` and ``loser_minus_reference`` tell likelihood displacement: both
    may rise while the loss falls.
    """
    line = {name: value / pairs for name, value in zip(SUMS, total, strict=True)}
    for side in ("winner", "loser"):
        reference = line.pop(f"{side}_reference")
        line[f"{side}_minus_reference"] = line[f"{side}_error"] - reference
    # NaN marks what is not known; a loss or an error that is not finite has stopped the run before
    return {name: value if value == value else None for name, value in line.items()}


# Takes a step and its numbers; and what is called when the training is over, or interrupted.


class Stats:
    """Writes ``stats.jsonl`` and feeds the tracker.

    Parameters
    ----------
    out
        The training's folder.
    done
        Lines of later steps, which an interrupted run wrote, are taken out.
    track
        Gets every line too.

    Raises `FifaError` where the others are not those of when the state was saved.
    """

    def __init__(self, out: Path, done: Progress, track: Track) -> None:
        self.path, step, self.track = out / STATS, done.step, track
        if self.path.exists():
            lines = read_stats(out)
            kept = [line for line in lines if isinstance(n := line.get("step"), int) and n <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            if done.stats and bytes_digest(text.encode()) != done.stats:
                raise FifaError(
                    "the statistics are not as they were written: damaged, or changed",
                    where=str(self.path),
                    do="remove the file to go on without its lines, or choose another --out",
                )
            write_text(self.path, text)

    def log(self, step: int, line: dict[str, Any]) -> None:
        """Add one line."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.track(step, {k: v for k, v in line.items() if isinstance(v, int | float)})


def stats_digest(out: Path) -> str:
    """`bytes_digest` of ``stats.jsonl``, which is on the disk then; empty where there is none."""
    if not (out / STATS).is_file():
        return ""
    try:
        with (out / STATS).open("rb") as file:
            os.fsync(file.fileno())
            return bytes_digest(file.read())
    except OSError as error:
        raise cannot_write(out / STATS, error) from error


def read_stats(out: Path) -> list[dict[str, Any]]:
    """The lines of a training's ``stats.jsonl``."""
    return read_json_lines(Path(out) / STATS)[0]


def write_card(
    plan: Plan, family: Family, pairs: TrainingPairs, progress: Progress, device: Any, out: Path
) -> None:
    """Write the model card and, as the last of all files, ``train.json`` into ``out``.

    Parameters
    ----------
    plan, family, pairs
        The training and what it took, and what was trained on what.
    progress
        How far it went.
    device
        What it ran on.
    out
        The training's folder, with its ``stats.jsonl``.
    """
    from fifa import __version__

    train = plan.train
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    metrics = read_stats(out)
    facts = {
        "fifa": __version__,
        "base_model": train.model,
        "family": family.name,
        "method": train.method,
        "steps": progress.step,
        "pairs": plan.pairs,
        "trained_on": plan.what,
        "held_out": plan.held,
        "best": {"step": progress.best_step, "loss": progress.best} if plan.held else None,
        "pairs_seen": progress.pairs,
        "skipped_steps": progress.skipped,
        "loss_why": plan.why or None,
        "distilled": plan.distilled or None,
        "init_lora": plan.init_lora,
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
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "accelerate")},
    }
    write_text(out / CARD, training_card(facts, family))
    # whatever is read again; the card is for people, who may change it
    weights = [out / name for name in (LORA_FILE, family.part) if (out / name).exists()]
    files = [path for name in (STATS, TRAIN_FILE) if (path := out / name).is_file()]
    text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_manifest(out, [*weights, *files], {FACTS_FILE: text.encode("utf-8", "surrogatepass")})
    write_text(out / FACTS_FILE, text)


def selection_facts(folder: Path | None) -> dict[str, Any] | None:
    """How the pairs were selected, from the subset's ``subset.json``; None where there is none."""
    if folder is None:
        return None
    subset = read_json(folder / "subset.json", "the subset")
    names = ("digest", "pairs", "recipe", "source", "scores", "reasons")
    return {name: subset[name] for name in names if name in subset}


def training_card(facts: dict[str, Any], family: Family) -> str:
    """The model card, for what ``train.json`` holds."""
    options, base, lora = facts["options"], facts["base_model"], facts["method"] == "lora"
    hub = f"base_model: {base}\n" if _is_hub(base) else ""
    loss = options["loss"]
    if LOSSES[loss].needs_reference:
        loss += f", beta {options['beta']:g}"
    if facts.get("loss_why"):
        loss += f": {facts['loss_why']}"
    distilled = facts.get("distilled")
    warning = f"\n{distilled_warning(distilled, lora)}.\n" if distilled else ""
    what, one_by_one = facts["trained_on"], facts["trained_on"] == "images"
    kind, by = ("rated images", ONE_BY_ONE) if one_by_one else ("preference pairs", OF_PAIRS)
    held, best = "", facts["best"]
    if best:
        held = (
            f"| held out | {facts['held_out']:,} more {what}; the lowest loss on them, "
            f"{best['loss']:.4f}, is after step {best['step']:,}, whose weights are in `best/` |\n"
        )
    return f"""---
{hub}library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, diffusion-dpo, preference-optimization{", lora" if lora else ""}, fifa]
---

# {_public(base)}, aligned with {facts["pairs"]:,} {kind}

{"A LoRA" if lora else f"All weights of the {family.part}"}, trained with {by}.
{warning}
## Use

```python
{_use(facts, lora, family)}
```

## How it was trained

| | |
|---|---|
| method | {f"LoRA, rank {options['rank']}" if lora else "full fine-tuning"} |
| loss | {loss} |
| {what} | {facts["pairs"]:,}, presented {facts["pairs_seen"]:,} times in all |
{held}| steps | {facts["steps"]:,} of {options["batch"]:,} {what} |
| learning rate | {options["lr"]:g}, {options["schedule"]}, {options["warmup"]} warm-up |
| optimiser | {options["optimizer"]} |
| prompt dropout | {options["prompt_dropout"]:g} |
| precision | {facts["dtype"]} |
| time | {facts["seconds"]:,.0f} s on {facts["processes"]} x {facts["device"]} |

Beta is that of `-log sigmoid(-(beta / 2) * difference)` with errors that are means over a latent's
numbers. `train.yaml` holds every option, `stats.jsonl` every step.
{_last(facts)}
{_data(facts)}
## Where it ends

It draws what the people behind these {what} preferred, with their habits and prejudices, and what
the base model could draw before. Whether it is better than the base has to be measured
(`fifa evaluate`), and not only by the reward model that picked its {what}. The base model's licence
and the data's hold for these weights too.
"""


def _use(facts: dict[str, Any], lora: bool, family: Family) -> str:
    base = facts["base_model"] if _is_hub(facts["base_model"]) else "the base model's folder"
    given, made = facts["options"], ""
    pieces = [
        f"--{name.replace('_', '-')} {_public(given[name])}" for name in PIECES if given[name]
    ]
    if pieces:
        model, base = _public(facts["base_model"]), "BASE"
        made = f"# made by: fifa convert {model} {' '.join(pieces)} --out BASE\n"
    if lora:
        return (
            f"{made}from diffusers import DiffusionPipeline\n\n"
            f'pipeline = DiffusionPipeline.from_pretrained("{base}")\n'
            'pipeline.load_lora_weights("path/to/this/folder")'
        )
    part, model = family.part, family.denoiser
    return (
        f"{made}from diffusers import DiffusionPipeline, {model}\n\n"
        f'{part} = {model}.from_pretrained("path/to/this/folder", subfolder="{part}")\n'
        f'pipeline = DiffusionPipeline.from_pretrained("{base}", {part}={part})'
    )


def _last(facts: dict[str, Any]) -> str:
    last = facts["last"]
    if not last:
        return ""
    rows = [
        f"| {label} | {last[name]:.4g} |\n"
        for name, label in SHOWN.items()
        if last[name] is not None
    ]
    return f"\nIn its last line, step {last['step']:,}:\n\n| | |\n|---|---|\n" + "".join(rows)


def _data(facts: dict[str, Any]) -> str:
    selection = facts["selection"]
    if selection is None:
        return f"The {facts['trained_on']} came from `{_public(facts['source'])}`.\n"
    select = selection["recipe"]["select"]
    origin = _public(selection["source"]["source"])
    return (
        f"The pairs are a selection of FiFA's from `{origin}`: {selection['pairs']:,} pairs, "
        f"strategy {select['strategy']}, alpha {select['alpha']:g}, gamma {select['gamma']:g} "
        f"(subset {selection['digest']}; the whole recipe is in `train.json`).\n"
    )


def _is_hub(model: str) -> bool:
    local = model.startswith((".", "~", "/")) or Path(model).exists()
    return model.count("/") == 1 and not local


def _public(name: str) -> str:
    """A name without the folders of the machine it was on."""
    return name if _is_hub(name) or "://" in name else Path(name).name
