"""A disk that is full while it trains: told clearly, and the same command goes on with room."""

import os
import sys

import pytest
from trainings import LORA, fresh_process

from fifa.cli import main


@pytest.fixture
def disk(mount_disk):
    return mount_disk("8m")


@pytest.mark.parametrize(("method", "step"), [("lora", 64 << 10), ("full", 640 << 10)])
def test_training_goes_on_once_there_is_room_and_ends_with_the_same_bytes(
    method, step, disk, world, tmp_path, monkeypatch, capsys
):
    options = (
        f"--model {world}/sd15 --method {method} --steps 2 --batch 2 --micro-batch 2 --device cpu "
        "--resolution 64 --lr 1e-3 --warmup 0 --save-every 1 --sample-every 0"
    )

    def train(out):
        command = f"fifa train {world}/pairs.parquet --out {out} {options}"
        monkeypatch.setattr(sys, "argv", command.split())
        with fresh_process():
            try:
                main()
            except SystemExit as ended:
                return ended.code
        return 0

    assert train(tmp_path / "unbroken") == 0
    told = []
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    while train(disk / "run") != 0:
        told.append(capsys.readouterr().err)
        os.truncate(ballast, ballast.stat().st_size - step)
    assert len(told) > 2
    for text in told:
        assert "error: cannot write" in text
        assert "free space" in text
        assert str(disk / "run") in text
        assert "Traceback" not in text
    part = LORA if method == "lora" else "unet/diffusion_pytorch_model.safetensors"
    made, expected = (folder / part for folder in (disk / "run", tmp_path / "unbroken"))
    assert made.read_bytes() == expected.read_bytes()
