"""A disk that is full while models are evaluated: told, and the same command goes on with room."""

import os
import sys

from checkpoints import write_clip

from fifa.cli import main


def test_an_evaluation_goes_on_once_there_is_room_and_ends_with_the_same_bytes(
    mount_disk, base, lora, tmp_path, monkeypatch, capsys
):
    disk = mount_disk("4m")
    write_clip(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("the cat\n")
    options = (
        f"--base {base} --tuned {lora} --prompts {tmp_path}/prompts.txt --seeds 2 --steps 1 "
        f"--width 32 --height 32 --device cpu --encoder none --score clipscore:{tmp_path}/clip"
    )

    def evaluate(out):
        monkeypatch.setattr(sys, "argv", ["fifa", "evaluate", *options.split(), "--out", str(out)])
        try:
            main()
        except SystemExit as ended:
            return ended.code
        return 0

    def contents(out):
        files = (path for path in sorted((out / "evaluate").rglob("*")) if path.is_file())
        return {str(path.relative_to(out)): path.read_bytes() for path in files}

    assert evaluate(tmp_path / "unbroken") == 0
    told = set()
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    capsys.readouterr()
    while evaluate(disk / "run") != 0:
        told.add(capsys.readouterr().err.partition("error: ")[2])
        os.truncate(ballast, ballast.stat().st_size - (56 << 10))
    assert len(told) > 1
    assert all(text.startswith("cannot write: No space left") for text in told)
    assert all(str(disk / "run") in text and "Traceback" not in text for text in told)
    assert contents(disk / "run") == contents(tmp_path / "unbroken")
