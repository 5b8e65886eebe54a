"""SIGKILL while pairs are made: what comes of it are the bytes of an unbroken run."""

import signal

import torch
from checkpoints import SMALL, write_clip

import fifa
from forked import die_at, finish, start

KILLS = [(r".*\.png", 3), (r"images\.parquet", 1), (r"rewards-pickscore.*\.parquet", 1)]
KILLS += [(r"pairs\.parquet", 1)]


def make(base, prompts, judge, out, *death):
    torch.set_num_threads(1)
    if death:
        die_at("os.rename", *death)
    fifa.generate_pairs(base, prompts, judge, out, per_prompt=2, batch=2, device="cpu", **SMALL)


def test_killed_pairs_are_the_same_bytes(base, tmp_path):
    prompts, clip = tmp_path / "prompts.txt", tmp_path / "clip"
    write_clip(clip)
    prompts.write_text("".join(f"a cat number {i}\n" for i in range(4)))
    world = (str(base), str(prompts), f"pickscore:{clip}")
    finish(start(make, *world, tmp_path / "unbroken"))
    for death in KILLS:
        finish(start(make, *world, tmp_path / "broken", *death), -signal.SIGKILL)
    finish(start(make, *world, tmp_path / "broken"))

    def contents(folder):
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.jsonl"]
        return {path.relative_to(folder): path.read_bytes() for path in files}

    expected = contents(tmp_path / "unbroken")
    assert len([path for path in expected if path.suffix == ".png"]) == 8
    assert contents(tmp_path / "broken") == expected
