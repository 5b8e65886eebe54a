"""SIGKILL in every phase of a training: resumed, it ends with the bytes of an unbroken one."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from tiny_diffusion import write_model, write_pairs
from trainings import quick

from fifa.training.job import run_training
from forked import die_at, finish, start

KNOBS = {
    "steps": 8,
    "save_every": 3,
    "checkpoint_every": 2,
    "draws": 2,
    "lora_dropout": 0.1,
    "log_every": 2,
    "holdout": 0.2,
    "validate_every": 4,
}
# Where it dies: before the nth event on a path, of a training whose reference is computed at every
# step, or is a table that is made first. All that is on the disk changes at such events alone.
KILLS = {
    "every step": [
        ("os.rename", "cache/images-.*"),  # the cache begins
        ("open", "stats.jsonl"),  # two steps are done
        ("os.rename", "state/.*/state.json"),  # the first state is half written
        ("os.rename", "checkpoints/step-000004/pytorch_lora_weights.safetensors"),
        ("shutil.rmtree", "state/step-000003"),  # there are two states
        ("os.rename", "train.json"),  # all is done but for the last file
    ],
    "table": [
        ("os.rename", "cache/moments-.*"),
        ("os.rename", "cache/reference-.*"),  # its parts are there
        ("os.rename", "state/step-000003"),  # the first state has not its name yet
        ("os.rename", "state/step-000006"),  # the second has not
        ("open", "stats.jsonl", 2),  # the second line after the first state
        ("os.rename", "killed/pytorch_lora_weights.safetensors"),  # after the last state
    ],
}


def work(world: Path, out: Path, reference: str, *death: object) -> None:
    torch.set_num_threads(1)
    if death:
        die_at(*death)
    pool = {"table": {}, "every step": {"draws": 0}}[reference]
    run_training(quick(world, ema=0.9, prompt_dropout=0.2, **{**KNOBS, **pool}), out)


def contents(out: Path) -> dict[str, bytes]:
    """What has to be the same: all tensors, and the statistics but for what a clock tells."""
    tensors = (*out.rglob("*.safetensors"), *out.rglob("*.pt"), *out.rglob("*.parquet"))
    found = {str(p.relative_to(out)): p.read_bytes() for p in tensors}
    clock = ("seconds", "pairs_per_second", "peak_bytes")
    for text in (out / "stats.jsonl").read_text().splitlines():
        line = {k: v for k, v in json.loads(text).items() if k not in clock}
        assert f"step {line['step']}" not in found
        found[f"step {line['step']}"] = json.dumps(line).encode()
    return found


@pytest.mark.parametrize("reference", KILLS)
def test_kills_in_every_phase_change_nothing(memory, reference):
    write_model(memory / "sd15")
    write_pairs(memory / "pairs.parquet")
    finish(start(work, memory, memory / "unbroken", reference))
    expected = contents(memory / "unbroken")
    assert sum(name.startswith("step ") for name in expected) == 4
    assert sum(name.startswith("checkpoints") for name in expected) == 4
    out = memory / "killed"
    for death in KILLS[reference]:  # one after another: each goes on where the one before died
        finish(start(work, memory, out, reference, *death), -signal.SIGKILL)
        assert not (out / "train.json").exists()
    finish(start(work, memory, out, reference))
    assert contents(out) == expected
