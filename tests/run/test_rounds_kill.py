"""SIGKILL in the middle of a loop: what comes of it are the bytes of an unbroken one."""

import signal
from pathlib import Path

import torch
from test_rounds import write_recipe

import fifa
from forked import die_at, finish, start

DEATH = ("round-1/checkpoint/pipeline", 1)  # just before the round's model is there
SAME = ("generated/pairs.parquet", "selection.parquet", "data/*.parquet", "*.safetensors", "*.png")


def run(recipe, out, *death):
    torch.set_num_threads(1)
    if death:
        die_at("os.rename", *death)
    fifa.loop(recipe, out)


def test_a_killed_loop_goes_on_to_the_same_bytes(tmp_path):
    recipe = write_recipe(tmp_path, method="full")
    out, unbroken = tmp_path / "out", tmp_path / "unbroken"
    finish(start(run, recipe, out))
    out.rename(unbroken)  # files name their sources by path, so both are made in one place
    finish(start(run, recipe, out, *DEATH), -signal.SIGKILL)
    finish(start(run, recipe, out))

    def contents(folder: Path):
        files = {f for pattern in SAME for f in folder.rglob(pattern)}
        return {f.relative_to(folder): f.read_bytes() for f in files}

    expected = contents(unbroken)
    assert len([f for f in expected if f.name == "diffusion_pytorch_model.safetensors"]) >= 6
    found = contents(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
