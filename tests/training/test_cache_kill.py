"""SIGKILL while the cache is filled: the next run ends with the bytes of an unbroken one."""

import os
import signal
from pathlib import Path

import torch
from tiny_diffusion import write_model, write_pairs

from fifa.training import encoding
from fifa.training.backbones import load_backbone
from fifa.training.cache import encode
from fifa.training.pairs import read_training_pairs
from forked import start


def fill(model: Path, source: Path, folder: Path, kill_at: int) -> None:
    """Encode, but die at the given call of an encoder."""
    torch.set_num_threads(1)
    encoding.SHARD = 5
    backbone = load_backbone(model)
    calls = 0

    def counting(function):
        def call(inputs):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(inputs)

        return call

    backbone.vae.moments = counting(backbone.vae.moments)
    backbone.encode_prompts = counting(backbone.encode_prompts)
    encode(read_training_pairs(source), backbone, folder, resolution=64, buckets=True, batch=2)


def run(*arguments):
    process = start(fill, *arguments)
    process.join(60)
    return process.exitcode


def test_kills_change_nothing(tmp_path):
    model = write_model(tmp_path / "model")
    sizes = [((64, 64), (64, 64)), ((96, 64), (96, 64)), ((64, 96), (64, 96))] * 5
    source = write_pairs(tmp_path / "a.parquet", sizes)
    assert run(model, source, tmp_path / "unbroken", 0) == 0

    def files(folder):
        return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}

    expected = files(tmp_path / "unbroken")
    assert len(expected) == 1 + 4 + 6  # what images are there, prompts, moments
    for kill_at in (1, 3, 9, 14):
        folder = tmp_path / f"killed-{kill_at}"
        assert run(model, source, folder, kill_at) == -signal.SIGKILL
        assert files(folder) != expected
        assert run(model, source, folder, kill_at + 3) in (0, -signal.SIGKILL)
        assert run(model, source, folder, 0) == 0
        assert files(folder) == expected
