"""What a training leaves: weights as diffusers reads them, the card, ``train.json``."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fifa.console import echo
from fifa.models.optional import require
from fifa.shards.files import write_json, write_text
from fifa.training.adapters import add_lora, save_full, save_lora
from fifa.training.card import training_card, training_facts
from fifa.training.checkpoint import Progress, Trainee
from fifa.training.folder import CARD, FACTS_FILE
from fifa.training.metrics import read_stats
from fifa.training.reference import with_denoiser

if TYPE_CHECKING:
    from fifa.training.job import Job


def write_weights(job: Job, trainee: Trainee, folder: Path) -> None:
    """Write the weights as diffusers reads them, into ``folder``; every process calls it.

    The average of the weights, if there is one.
    """
    save = save_lora if job.train.method == "lora" else save_full
    whole = trainee.averaged() if trainee.sharded else {}
    if job.accelerator.is_main_process:
        plain = job.accelerator.unwrap_model(trainee.model)
        if trainee.sharded:
            plain = _whole(job, plain, whole)
        with trainee.average.in_place() if trainee.average and not whole else nullcontext():
            save(with_denoiser(job.backbone, plain), folder)
    job.accelerator.wait_for_everyone()


def _whole(job: Job, sharded: Any, weights: dict[str, Any]) -> Any:
    """A denoiser on the CPU with the trained weights that all shards together are."""
    model = type(sharded).from_config(sharded.config)
    if job.train.method == "lora":
        add_lora(with_denoiser(job.backbone, model), job.train)
    model.load_state_dict(weights, strict=False)
    return model


def finish(job: Job, trainee: Trainee, done: Progress) -> None:
    """Write the final weights, the card, and ``train.json``, which says that all is there."""
    write_weights(job, trainee, job.out)
    if job.accelerator.is_main_process:
        facts = training_facts(
            job.train,
            family=job.backbone.family.name,
            progress=done,
            pairs=job.pairs,
            processes=job.accelerator.num_processes,
            device=device_name(job.accelerator.device),
            dtype=job.plan.dtype,
            stats=read_stats(job.out),
        )
        facts = json.loads(json.dumps(facts))
        write_text(job.out / CARD, training_card(facts))
        write_json(job.out / FACTS_FILE, facts)
        echo(f"trained {done.step:,} steps on {len(job.pairs):,} pairs; weights in {job.out}")
    job.accelerator.wait_for_everyone()


def device_name(device: Any) -> str:
    """What people call the device."""
    if device.type == "cuda":
        return str(require("torch", "train").cuda.get_device_name(device))
    return str(device.type).upper()
