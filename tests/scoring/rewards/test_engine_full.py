"""A disk that is really full: told clearly, and the same command goes on once there is room."""

from __future__ import annotations

import os
import sys

import pytest
from tiny_models import write_clip

from fifa.cli import main

STEP = 16 << 10  # bytes of room, more at every attempt


@pytest.fixture
def disk(mount_disk):
    return mount_disk("1m")


def contents(run):
    """All files but the log, which has times."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name != "log.jsonl")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def fifa(monkeypatch, command, *arguments):
    """The exit code of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["fifa", *command.split(), *map(str, arguments)])
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0


def test_scoring_goes_on_once_there_is_room_and_ends_with_the_same_bytes(
    disk, shipped, tmp_path, monkeypatch, capsys
):
    write_clip(tmp_path / "clip")
    clip = tmp_path / "clip"
    options = f"--margin clipscore:{clip} --quality none --diversity clip:{clip} --batch 8"

    def score(run):
        return fifa(monkeypatch, f"score {options}", shipped, "--out", run)

    assert score(tmp_path / "unbroken") == 0
    told = []
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    while score(disk / "run") != 0:
        told.append(capsys.readouterr().err)
        os.truncate(ballast, ballast.stat().st_size - STEP)
    assert len(told) > 4
    for text in told:
        assert "error: cannot write" in text
        assert "No space left on device" in text
        assert "free space" in text
        assert str(disk / "run") in text
    assert len(set(told)) > 2  # it got further every few attempts
    assert contents(disk / "run") == contents(tmp_path / "unbroken")


def test_pixels_that_do_not_fit_are_told_and_are_no_signal(
    disk, shipped, tmp_path, monkeypatch, capsys
):
    write_clip(tmp_path / "clip")
    train = f"reward train --base {tmp_path}/clip --steps 1 --warmup 0 --batch 2 --device cpu"
    assert fifa(monkeypatch, train, shipped, "--out", disk / "proxy") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(disk.iterdir()) == []
