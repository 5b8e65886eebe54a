"""SIGKILL in the middle of a loop: what comes of it are the bytes of an unbroken one."""

import signal
from pathlib import Path

import torch
from test_rounds import write_recipe

import fifa
from forked import die_at, finish, start

KILLS = [("round-1/checkpoint/pipeline", 1), (r"round\.json", 2)]
SAME = ("pairs.parquet", "selection.parquet", "*.safetensors", "subset/*/*.parquet", "*.png")


def run(recipe, out, *death):
    torch.set_num_threads(1)
    if death:
        die_at("os.rename", *death)
    fifa.loop(recipe, out)


def test_a_killed_loop_goes_on_to_the_same_bytes(tmp_path):
    recipe = write_recipe(tmp_path, method="full")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    finish(start(run, recipe, unbroken))
    for death in KILLS:
        finish(start(run, recipe, broken, *death), -signal.SIGKILL)
    finish(start(run, recipe, broken))

    def contents(folder: Path):
        files = {f for pattern in SAME for f in folder.rglob(pattern)}
        return {f.relative_to(folder): f.read_bytes() for f in files}

    expected = contents(unbroken)
    assert len([f for f in expected if f.name == "diffusion_pytorch_model.safetensors"]) >= 6
    found = contents(broken)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
