"""SIGKILL while images are made, again and again: they are the bytes of an unbroken run."""

import signal

import torch
from checkpoints import SMALL

from fifa.config import Evaluate, Generate
from fifa.evaluation.generate import generate
from fifa.evaluation.models import find_models
from fifa.evaluation.prompts import read_prompts
from fifa.evaluation.sampling import settings_for
from forked import die_at, finish, start

# Before which image it dies, counted from the start of each run of batches of four; the last time
# all images are there and their index is not
KILLS = [*((r".*\.png", nth) for nth in (1, 3, 6, 2)), (r"images\.parquet", 1)]


def make(base, tuned, prompts, folder, *death):
    torch.set_num_threads(1)
    if death:
        die_at("os.rename", *death)
    models = find_models(base, {"tuned": tuned})
    asked = Evaluate(seeds=2, generate=Generate(**SMALL, batch=4))
    settings = settings_for(asked.generate, models[0].base)
    generate(asked, models, read_prompts(prompts), settings, folder)


def test_killed_at_five_moments_the_images_are_the_same_bytes(base, lora, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a cat number {i}\n" for i in range(9)))
    world = (str(base), str(lora), str(prompts))
    finish(start(make, *world, tmp_path / "unbroken"))
    for death in KILLS:
        finish(start(make, *world, tmp_path / "broken", *death), -signal.SIGKILL)
    finish(start(make, *world, tmp_path / "broken"))

    def contents(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    expected = contents(tmp_path / "unbroken")
    assert len(expected) == 2 * 9 * 2 + 1
    assert contents(tmp_path / "broken") == expected
