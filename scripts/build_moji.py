"""Build the Moji world again, from the emoji packages to the weights and data that are shipped.

    cd FOLDER
    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    for v in google twitter; do mkdir $v; tar xzf emoji-datasource-$v-16.0.0.tgz -C $v; done
    python scripts/build_moji.py --work FOLDER [--parts sprites,vae,base,...]

Parts: sprites, vae, decoder, base, clip, judges, feedback, scores, ratings, ship, measure. Only
sprites, ship and measure write into the package.

Or build another world with the models that are shipped: more pairs, other shares of its prompts.

    python scripts/build_moji.py --work FOLDER --pairs 33000 [--nonsense 0.2 ...]

It needs no package, trains nothing and writes into FOLDER only: feedback.parquet, truth.parquet,
scores/ (the default rater's ratings) and world.json, which says what was asked for and came out.
With --parts feedback,scores,ratings the feedback gets score columns too, as the shipped one has.
Or take such a world's own pairs, with other shares of its kinds of prompts; nothing is drawn then:

    python scripts/build_moji.py --work FOLDER --of WORLD --pairs 5500 [--nonsense 0.3 ...]

Killed at any moment, both go on where they were.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait do not spin: others work

import diffusers
import torch
import transformers

from fifa.console import quiet
from fifa.moji.family import CLIP, SD
from fifa.scoring.raters.local import precision
from fifa.shards.files import write_json
from fifa.shards.lock import only_writer
from moji.art import draw_sheet
from moji.base import train_base, train_decoder, train_vae
from moji.clean import train_clip, train_judges
from moji.feedback import SEED, crowd_of, score_pairs, write_feedback
from moji.sample import sample_feedback
from moji.ship import feedback_facts, measure, rate_prompts, ship
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parts", help="some of them only, with commas")
    parser.add_argument("--threads", type=int, default=1, help="of each process (%(default)s)")
    world = parser.add_argument_group("another world")
    world.add_argument("--pairs", type=int, help="how many; the shipped feedback has 3,300")
    for kind in ("nonsense", "reworded", "unsafe"):
        what = "its share of the prompts (with --of: of the pairs), 0 to 1"
        world.add_argument(f"--{kind}", type=float, help=what)
    world.add_argument("--of", type=Path, help="take the pairs from this world")
    world.add_argument("--seed", type=int, default=SEED, help="of everything (%(default)s)")
    cores = os.cpu_count() or 1
    world.add_argument("--processes", type=int, default=cores, help="drawing (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = options.work
    with quiet(diffusers, transformers), only_writer(work):
        if options.pairs:
            _build_world(options, work)
            return
        for part in options.parts.split(",") if options.parts else PARTS:
            _timed(part, partial(_build, part, work))


def _build_world(options: argparse.Namespace, work: Path) -> None:
    shares = {kind: getattr(options, kind) for kind in ("nonsense", "reworded", "unsafe")}
    feedback, truth = work / "feedback.parquet", work / "truth.parquet"
    if options.of:
        asked_for = {"of": str(options.of), "pairs": options.pairs, **shares, "seed": options.seed}
        write = partial(sample_feedback, options.of, work, options.pairs, shares, options.seed)
    else:
        crowd = crowd_of(options.pairs, **shares, seed=options.seed)
        asked_for = asdict(crowd)
        write = partial(write_feedback, SD, work, feedback, truth, crowd, options.processes)
    builders = {
        "feedback": write,
        "scores": partial(score_pairs, feedback, CLIP),
        "ratings": partial(rate_prompts, work, (precision()[1],)),
    }
    parts = options.parts.split(",") if options.parts else ("feedback", "ratings")
    if unknown := set(parts) - set(builders):
        raise SystemExit(f"no such part of a world: {', '.join(sorted(unknown))}")
    seconds = {part: _timed(part, builders[part]) for part in parts}
    facts = feedback_facts(feedback, truth)
    write_json(work / "world.json", {"crowd": asked_for, **facts, "seconds": seconds})


def _timed(part: str, build: Any) -> int:
    """Do it; the seconds that it took."""
    start, cpu = time.monotonic(), time.process_time()
    build()
    took = round(time.monotonic() - start)
    print(f"{part}: {took} s, {time.process_time() - cpu:.0f} CPU seconds", flush=True)
    return took


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
        feedback, truth = work / "feedback.parquet", work / "truth.parquet"
        write_feedback(work / "moji-sd", work, feedback, truth)
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
