"""Makes images in forks of itself that are killed at random moments, then in one that is not.

    python kill_images.py BASE TUNED PROMPTS FOLDER KILLS

FOLDER/unbroken and FOLDER/broken are for the caller to compare.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from checkpoints import SMALL

from fifa.config import Evaluate, Generate
from fifa.evaluation.generate import generate
from fifa.evaluation.models import find_models
from fifa.evaluation.prompts import read_prompts
from fifa.evaluation.sampling import settings_for

torch.set_num_threads(1)  # forked processes do not inherit threads


def make(base, tuned, prompts, folder):
    models = find_models(base, {"tuned": tuned})
    asked = Evaluate(seeds=2, generate=Generate(**SMALL, batch=4))
    settings = settings_for(asked.generate, models[0].base)
    generate(asked, models, read_prompts(prompts), settings, folder)


def fork(*arguments):
    child = os.fork()
    if not child:
        make(*arguments)
        os._exit(0)
    return child


def main():
    base, tuned, prompts, folder, kills = sys.argv[1:]
    folder = Path(folder)
    begun = time.monotonic()
    assert os.waitpid(fork(base, tuned, prompts, folder / "unbroken"), 0)[1] == 0
    duration = time.monotonic() - begun
    draw, stopped = random.Random(0), 0
    for _ in range(int(kills)):
        child = fork(base, tuned, prompts, folder / "broken")
        time.sleep(draw.uniform(0, 0.6 * duration))
        os.kill(child, signal.SIGKILL)
        stopped += os.waitpid(child, 0)[1] == signal.SIGKILL
    assert os.waitpid(fork(base, tuned, prompts, folder / "broken"), 0)[1] == 0
    print(stopped)


main()
