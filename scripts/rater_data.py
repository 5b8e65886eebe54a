"""Prompts to build and to measure raters on, split so that near-duplicates stay together."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

DATA = Path(__file__).parents[2] / "shared" / "data" / "prompts"
ALIKE = 0.85  # prompts with a larger cosine are near-duplicates
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def shuffled_characters(prompt: str, rng: random.Random) -> str:
    characters = list(prompt)
    rng.shuffle(characters)
    return "".join(characters)


def shuffled_within_words(prompt: str, rng: random.Random) -> str:
    return " ".join(shuffled_characters(word, rng) for word in prompt.split(" "))


def shuffled_words(prompt: str, rng: random.Random) -> str:
    words = prompt.split()
    rng.shuffle(words)
    return " ".join(words)


def keyboard_noise(prompt: str, rng: random.Random) -> str:
    """Keys mashed along the rows of a keyboard, as many characters as the prompt has."""
    text = ""
    while len(text) < len(prompt):
        row = rng.choice(ROWS)
        at = rng.randrange(len(row))
        for _ in range(rng.randint(3, 10)):
            if rng.random() < 0.2:
                row = rng.choice(ROWS)
            at = min(max(at + rng.choice((-2, -1, 1, 2)), 0), len(row) - 1)
            text += row[at]
        text += " "
    return text[: len(prompt)]


KINDS: dict[str, Callable[[str, random.Random], str]] = {
    "characters": shuffled_characters,
    "characters within words": shuffled_within_words,
    "keyboard noise": keyboard_noise,
    "words": shuffled_words,
}


def made_nonsense(prompts: list[str], seed: int) -> dict[str, list[str]]:
    """Every kind of nonsense, made of every prompt."""
    rng = random.Random(seed)
    return {kind: [make(prompt, rng) for prompt in prompts] for kind, make in KINDS.items()}


def half(name: str) -> int:
    """0 to build with, 1 to measure with."""
    return hashlib.sha256(name.encode()).digest()[0] & 1


def near_duplicates(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The smallest row that every row is connected to by cosines above `ALIKE`, int64 [n]."""
    group = np.arange(len(vectors))
    near = [np.flatnonzero(row > ALIKE) for row in vectors @ vectors.T]
    while True:
        lower = np.array([group[rows].min() for rows in near])
        if (lower == group).all():
            return group
        group = lower


def safety(source: str) -> dict[str, list[object]]:
    """The columns of ``safety.parquet``, rows of one source."""
    table = pq.read_table(DATA / "safety.parquet", filters=[("source", "==", source)])
    return {name: table[name].to_pylist() for name in table.column_names}


def real_prompts(which: int, count: int) -> list[str]:
    """``count`` Pick-a-Pic prompts of one half; prompts that begin alike are in one half."""
    prompts = pq.read_table(DATA / "pickapic.parquet")["prompt"].to_pylist()
    mine = [p for p in prompts if half(" ".join(p.lower().split()[:4])) == which]
    return random.Random(0).sample(mine, count)


def parti_prompts(which: int, count: int) -> list[str]:
    """``count`` PartiPrompts of one half."""
    prompts = [str(p) for p in safety("parti")["prompt"]]
    mine = [p for p in prompts if half(" ".join(p.lower().split()[:4])) == which]
    return random.Random(0).sample(mine, min(count, len(mine)))
