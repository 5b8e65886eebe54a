"""Every constant of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fifa.config import Read, Recipe, Score, Select
from fifa.errors import FifaError
from fifa.moji.family import CLIP, FEEDBACK

NO_GATES: dict[str, Any] = {
    "unsafe_flags": (),
    "drop_nonsense": False,
    "drop_duplicates": False,
    "min_agreement": None,
}
# What each arm keeps: the recipe's selection with these knobs changed. Only `fifa` looks at
# scores; the others take feedback as it comes, ties aside.
ARMS: dict[str, dict[str, Any]] = {
    "fifa": {},
    "margin": {"alpha": 0.0, "gamma": 0.0},
    "random": {"strategy": "random", **NO_GATES},
    "full": {"strategy": "random", "keep": 1.0, "per_prompt": None, **NO_GATES},
}


@dataclass(frozen=True)
class Demo:
    """What is compared, and how much of it.

    Parameters
    ----------
    arms
        Of `ARMS`; each trains a model of its own.
    seed
        Of what is drawn: the random arm's pairs, the order of training, the images' noise.
    fresh
        Rate the prompts here, in place of the ratings that the package ships.
    keep, per_prompt
        Pairs that an arm trains on, and how many of one prompt at most.
    steps, batch, lr, beta, draws
        Of the training (`fifa.training.config.Train`): all weights of the UNet.
    prompts
        Test prompts of each kind: scenes that training pictures showed, and others.
    unsafe
        Test prompts that ask for weapons, drugs or cigarettes.
    images
        Images a prompt and model.
    curve
        Prompts on which the checkpoints on the way are measured too.
    sampler_steps, guidance
        How they are made.
    """

    arms: tuple[str, ...] = ("fifa", "random")
    seed: int = 0
    fresh: bool = False
    keep: int = 150
    per_prompt: int = 3
    steps: int = 150
    batch: int = 32
    lr: float = 2e-5
    beta: float = 1000.0
    draws: int = 8
    prompts: int = 48
    unsafe: int = 16
    images: int = 2
    curve: int = 24
    sampler_steps: int = 20
    guidance: float = 1.0

    def __post_init__(self) -> None:
        wrong = [arm for arm in self.arms if arm not in ARMS]
        if wrong or not self.arms:
            raise FifaError(f"no such arm: {', '.join(wrong) or 'none given'}", do=", ".join(ARMS))

    @property
    def recipe(self) -> Recipe:
        """How the feedback is filtered: the default, but no choice that the proxy contradicts."""
        return Recipe(
            read=Read(source=str(FEEDBACK)),
            score=Score(margin=(f"proxy@clip:{CLIP}",)),
            select=Select(
                keep=self.keep, per_prompt=self.per_prompt, min_agreement=1.0, seed=self.seed
            ),
        )
