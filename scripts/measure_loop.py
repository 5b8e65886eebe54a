"""What rounds of generating, judging, filtering and training buy in the Moji world.

    python scripts/measure_loop.py --out /tmp/loop

The judge is a proxy that is trained on moji-feedback, 4,676 noisy answers of simulated annotators.
It makes the pairs, and nothing else does. What says how good the models are is the hidden utility,
which has no part in the loop, on scenes that were in the training prompts' pictures and on scenes
that were not. Prints the table of the rounds; OUT/loop/loop.html has the figures, and --draw makes
docs/images/loop.png of them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import fifa
from fifa.config import Demo, Loop, Reward, build
from fifa.console import echo
from fifa.demo import test_prompts
from fifa.moji.family import CLIP, FEEDBACK, SD
from fifa.moji.judges import moji_judges
from fifa.moji.world import caption, scenes
from fifa.reporting.loop import PAGE, loop_text
from fifa.scoring.rewards.fit import train_reward
from fifa.shards.files import write_text

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "loop.png"
SAMPLER = {"steps": 20, "guidance": 1.0, "sampler": "ddim", "batch": 64, "device": "cpu"}


def write_prompts(folder: Path, count: int) -> tuple[Path, Path]:
    """Captions of seen scenes to train on, and captions of seen and unseen ones to evaluate on."""
    train, test = folder / "train.txt", folder / "test.csv"
    seen = [scene for scene in scenes(seen=True) if not scene.unsafe]
    chosen = [seen[i * len(seen) // count] for i in range(count)]
    write_text(train, "".join(f"{caption(scene)}\n" for scene in chosen))
    write_text(test, test_prompts(Demo(unsafe=0)))
    return train, test


def train_judge(folder: Path) -> str:
    """The spec of a proxy that is trained on moji-feedback."""
    if not (folder / "reward.json").is_file():
        towers = f"clip:{CLIP}"
        train_reward(fifa.read_pairs(FEEDBACK), folder, Reward(image=towers, text=towers))
    return f"proxy:{folder}"


def recipe_of(judge: str, train: Path, test: Path, given: argparse.Namespace) -> Loop:
    """The loop."""
    knobs = {
        "rounds": given.rounds,
        "generate": {
            "model": str(SD),
            "prompts": str(train),
            "margin": [judge],
            "per_prompt": given.per_prompt,
            "images": SAMPLER,
        },
        "score": {"quality": "none", "diversity": f"clip:{CLIP}"},
        "select": {"keep": given.keep},
        "train": {
            "method": given.method,
            "steps": given.steps,
            "batch": 32,
            "micro_batch": 32,
            "lr": given.lr,
            "beta": 1000.0,
            "device": "cpu",
            "cache_dtype": "float32",
            "tracker": "none",
        },
        "evaluate": {
            "prompts": str(test),
            "seeds": 2,
            "generate": SAMPLER,
            "measure": {"scorers": [f"clipscore:{CLIP}"]},
        },
        "compute": {"device": "cpu"},
    }
    return build(Loop, knobs, where="the script")


def draw(page: Path) -> None:
    """Write the top of the page as `PICTURE`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--headless", "--no-sandbox"]
        )
        shown = browser.new_page(viewport={"width": 1200, "height": 720})
        shown.goto(page.resolve().as_uri())
        shown.screenshot(path=PICTURE)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--per-prompt", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--method", default="full")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--draw", action="store_true")
    given = parser.parse_args()
    began = time.monotonic()
    train, test = write_prompts(given.out, given.prompts)
    judge = train_judge(given.out / "judge")
    recipe = recipe_of(judge, train, test, given)
    write_text(given.out / "loop.yaml", recipe.to_yaml())
    done = fifa.loop(recipe, given.out / "loop", judges=moji_judges())
    echo(f"{time.monotonic() - began:.0f} s")
    print(loop_text(done.folder))
    if given.draw:
        draw(done.folder / PAGE)


if __name__ == "__main__":
    main()
