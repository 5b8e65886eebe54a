"""Build the Moji world again, from the emoji packages to the weights and data that are shipped.

    cd FOLDER
    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    for v in google twitter; do mkdir $v; tar xzf emoji-datasource-$v-16.0.0.tgz -C $v; done
    python scripts/build_moji.py --work FOLDER [--parts sprites,vae,base,...]

FOLDER gets checkpoints, with the time that they took; killed at any moment, it goes on where it
was.
Parts: sprites, vae, decoder, base, clip, judges, feedback, scores, ratings, ship, measure. Only
sprites, ship and measure write into the package.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait do not spin: others work

import diffusers
import torch
import transformers

from fifa.console import quiet
from fifa.moji.family import load_sd
from moji.art import draw_sheet
from moji.base import train_base, train_decoder, train_vae
from moji.clean import train_clip, train_judges
from moji.feedback import score_pairs, write_feedback
from moji.ship import measure, rate_prompts, ship
from moji.sizes import SHIPPED, clip_model, save_clip, stable_diffusion, write_tokenizer

PARTS = (
    "sprites",
    "vae",
    "decoder",
    "base",
    "clip",
    "judges",
    "feedback",
    "scores",
    "ratings",
    "ship",
    "measure",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = options.work
    with quiet(diffusers, transformers):
        for part in options.parts.split(","):
            start = time.process_time()
            _build(part, work)
            print(f"{part}: {time.process_time() - start:.0f} CPU seconds", flush=True)


def _build(part: str, work: Path) -> None:
    if part == "sprites":
        draw_sheet(work)
    elif part == "vae":
        train_vae(_untrained(work).vae, work)
    elif part == "decoder":
        _pipe(work)
    elif part == "base":
        pipe = _pipe(work)
        train_base(pipe, work)
        pipe.save_pretrained(work / "moji-sd")
    elif part == "clip":
        pipe = _pipe(work)
        torch.manual_seed(1)
        clip = clip_model(SHIPPED, work / "tokenizer")
        train_clip(clip, pipe.tokenizer, pipe.vae, work)
        save_clip(clip, pipe.tokenizer, work / "moji-clip")
    elif part == "judges":
        pipe = _pipe(work)
        torch.manual_seed(2)
        train_judges(pipe.vae, work)
    elif part == "feedback":
        pipe = load_sd(work / "moji-sd")
        write_feedback(pipe, work, work / "feedback.parquet", work / "truth.parquet")
    elif part == "scores":
        score_pairs(work / "feedback.parquet", work / "moji-clip")
    elif part == "ratings":
        rate_prompts(work)
    elif part == "ship":
        ship(work)
    elif part == "measure":
        measure(work)
    else:
        raise SystemExit(f"no such part: {part}; one of {', '.join(PARTS)}")


def _pipe(work: Path) -> Any:
    """With its autoencoder, which is trained here where no part has done it."""
    pipe = _untrained(work)
    train_vae(pipe.vae, work)
    train_decoder(pipe.vae, work)
    return pipe


def _untrained(work: Path) -> Any:
    write_tokenizer(work / "tokenizer")
    torch.manual_seed(0)
    return stable_diffusion(SHIPPED, work / "tokenizer")


if __name__ == "__main__":
    main()
