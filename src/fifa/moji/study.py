"""The study of docs/study.md: its arms, its parts and its constants, in the small world."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from fifa.config import (
    Arm,
    Compute,
    Evaluate,
    Generate,
    Measure,
    Part,
    Read,
    Score,
    Select,
    Study,
    Train,
)
from fifa.errors import FifaError
from fifa.moji.family import CLIP, FEEDBACK, SD
from fifa.moji.world import DATA
from fifa.shards.files import read_json

PROMPTS = DATA / "study.csv"  # 48 seen, 48 unseen and 16 unsafe scenes, at even distances
SEEDS = (2711, 3948, 5067, 7193, 8426)
BUDGETS = (0.001, 0.005, 0.01, 0.05, 0.1)
MAIN = 0.005
# In the shipped world, a tenth of the other one: the same numbers of pairs, and seeds of its own
SHIPPED_SEEDS = (2237, 4409, 6521, 7757, 9302)
SHIPPED_BUDGETS: tuple[float, ...] = (0.01, 0.05, 0.1, 0.5)
SHIPPED_MAIN = 0.05
NOISE = (0.1, 0.2, 0.3)
STEPS, LONG = 96, 768
LONG_LR = (5e-6, 1e-5, 2e-5)  # everything gets the best of three learning rates
HARMLESS: dict[str, Any] = {"unsafe_flags": (), "drop_nonsense": False}
FREE: dict[str, Any] = {
    **HARMLESS,
    "drop_duplicates": False,
    "min_agreement": None,
    "per_prompt": None,
}
ALL = {**FREE, "strategy": "random", "keep": 1.0}
ARMS = {
    "fifa": Arm(),
    "random": Arm(select={**FREE, "strategy": "random"}),
    "margin": Arm(select={**HARMLESS, "alpha": 0.0, "gamma": 0.0}),
    "margin-quality": Arm(select={"gamma": 0.0}),
    "margin-diversity": Arm(select={**HARMLESS, "alpha": 0.0}),
    "fifa-no-gate": Arm(select=HARMLESS),
    "low": Arm(select={**FREE, "strategy": "low"}),
    "middle": Arm(select={**FREE, "strategy": "middle"}),
    "high": Arm(select={**FREE, "strategy": "high"}),
    "window-50-90": Arm(select={"margin_percentiles": (50.0, 90.0)}),
    "window-25-75": Arm(select={"margin_percentiles": (25.0, 75.0)}),
    "greedy": Arm(select={"strategy": "farthest"}),
    "weights": Arm(select={**FREE, "strategy": "weights", "keep": 1.0}),
    "poly": Arm(select=ALL, train={"loss": "poly"}),
    "full": Arm(select=ALL),
}
# what is compared where the kinds of prompts have other shares
SHARED = ("fifa", "margin", "margin-quality", "margin-diversity", "fifa-no-gate", "random")
LONGEST = {
    f"full-long-{lr:g}": Arm(select=ALL, train={"lr": lr, "steps": LONG, "checkpoint_every": 96})
    for lr in LONG_LR
}
GRID = (0.0, 0.5, 1.0, 2.0)
KEPT = 165  # pairs of the main budget in a part of a world: as many as `MAIN` of the large one


def moji_study(world: str | Path | None = None) -> Study:
    """The recipe of the study.

    Parameters
    ----------
    world
        A folder that ``scripts/build_moji.py`` wrote; None: the world that is shipped. For a part
        of another world (``--of``) the recipe is that of docs/study.md for other shares.

    Raises
    ------
    FifaError
        For a folder that holds no such world.
    """
    folder = Path(world).expanduser() if world else None
    feedback = folder / FEEDBACK.name if folder else FEEDBACK
    if not feedback.exists():
        raise FifaError(
            "no such world", where=str(feedback), do="make one with scripts/build_moji.py --pairs"
        )
    # a world of another size has the shipped models, or its own
    own = [folder / one.name if folder else one for one in (CLIP, SD)]
    clip, model = (one if one.is_dir() else two for one, two in zip(own, (CLIP, SD), strict=True))
    proxy = f"proxy@clip:{clip}"
    clipscore = f"clipscore:{clip}" if folder else "column:clipscore_0,clipscore_1"
    consensus = Arm(score={"margin": (proxy, clipscore)}, select={"strategy": "consensus"})
    sweep = {
        f"alpha-{alpha:g}-gamma-{gamma:g}": Arm(select={"alpha": alpha, "gamma": gamma})
        for alpha, gamma in product(GRID, GRID)
        if (alpha, gamma) != (Select.alpha, Select.gamma)
    }
    sweep |= {name: Arm(select={"normalize": name}) for name in ("none", "z", "rank")}
    sweep |= {f"k-{k}": Arm(score={"k": k}) for k in (1, 5, 20)}
    three = ("fifa", "margin", "random")
    main, budgets, seeds = SHIPPED_MAIN, SHIPPED_BUDGETS, SHIPPED_SEEDS
    if folder is not None:
        main, budgets, seeds = MAIN, BUDGETS, SEEDS
    parts: tuple[Part, ...] = (
        Part(name="arms", arms=(*ARMS, "consensus"), budgets=(main,)),
        Part(name="everything", arms=tuple(LONGEST), budgets=(main,)),
        Part(name="budgets", arms=three, budgets=budgets),
        Part(name="noise", arms=(*three, "full", "poly"), budgets=(main,), noise=NOISE),
        Part(name="harm", arms=("fifa-no-gate",), budgets=budgets),
        Part(name="terms", arms=tuple(sweep), budgets=(main,)),
    )
    if pairs := _sampled(folder):
        parts = (Part(name="shares", arms=SHARED, budgets=(min(1.0, KEPT / pairs),)),)
    return Study(
        arms={**ARMS, "consensus": consensus, **LONGEST, **sweep},
        parts=parts,
        seeds=seeds,
        against="random",
        target=tuple(LONGEST),
        judge="moji",
        read=Read(source=str(feedback)),
        score=Score(margin=(proxy,)),
        select=Select(per_prompt=3, min_agreement=1.0),
        train=Train(
            model=str(model),
            method="full",
            steps=STEPS,
            batch=8,
            micro_batch=8,
            lr=2e-5,
            beta=1000.0,
            holdout=0.0,
            checkpoint_every=24,
            cache_dtype="float32",
        ),
        evaluate=Evaluate(
            prompts=str(PROMPTS),
            seeds=2,
            curve=32,
            generate=Generate(steps=10, guidance=1.0, sampler="ddim", batch=32),
            measure=Measure(
                scorers=("none",), encoder=f"clip:{clip}", unsafe_categories=("unsafe",)
            ),
        ),
        compute=Compute(),
    )


def _sampled(folder: Path | None) -> int:
    """The pairs of a world that is a part of another one; 0 for one that is not."""
    facts = read_json(folder / "world.json", "what the world is", missing={}) if folder else {}
    return int(facts["pairs"]) if facts.get("crowd", {}).get("of") else 0
