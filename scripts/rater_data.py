"""Prompts to build and to measure raters on, split so that near-duplicates stay together."""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fifa.scoring.encoders import make_encoder
from fifa.scoring.raters.local import content_vectors

DATA = Path(__file__).parents[2] / "shared" / "data" / "prompts"
LABELS = Path(__file__).parent / "harm_labels.csv"
ALIKE = 0.85  # prompts with a larger cosine are near-duplicates
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")

Views = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


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


def part(name: str) -> str:
    """``build``, ``threshold`` or ``test``: a third, a sixth and a half."""
    digest = hashlib.sha256(name.encode()).digest()
    return "test" if digest[0] & 1 else "build" if digest[1] % 3 else "threshold"


def near_duplicates(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The smallest row that every row is connected to by cosines above `ALIKE`, int64 [n]."""
    n = len(vectors)
    near = [np.nonzero(vectors[i : i + 1024] @ vectors.T > ALIKE) for i in range(0, n, 1024)]
    rows = np.concatenate([block[0] + 1024 * i for i, block in enumerate(near)])
    columns = np.concatenate([block[1] for block in near])
    graph = coo_matrix((np.ones(len(rows), bool), (rows, columns)), (n, n))
    count, group = connected_components(graph, directed=False)
    smallest = np.full(count, n)
    np.minimum.at(smallest, group, np.arange(n))
    return smallest[group]


def views_of(prompts: Sequence[str]) -> Views:
    """The embeddings of prompts as a whole, and without their style."""
    embed = make_encoder("minilm").embed
    whole = embed(list(prompts)).astype(np.float16).astype(np.float32)
    return whole, content_vectors(prompts, whole, embed)


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


@dataclass(frozen=True)
class Corpus:
    """I2P, PartiPrompts and Pick-a-Pic together, a row a prompt.

    Attributes
    ----------
    prompts, source
        The texts, and ``i2p``, ``parti`` or ``pick``.
    vectors
        MiniLM's, float64 [n, 384].
    toxicity
        ``prompt_toxicity``, NaN outside I2P.
    group, part
        `near_duplicates` over all three, and `part` of a group's first prompt.
    label
        What a reader found, by ``harm_labels.csv``: kinds of harm with a space between them,
        ``benign``, ``borderline``; empty where nobody looked.
    drawn
        Whether a prompt was read because it was drawn at random, not for its score.
    """

    prompts: list[str]
    source: npt.NDArray[np.str_]
    vectors: npt.NDArray[np.float64]
    toxicity: npt.NDArray[np.float64]
    group: npt.NDArray[np.int64]
    part: npt.NDArray[np.str_]
    label: npt.NDArray[np.str_]
    drawn: npt.NDArray[np.bool_]

    def contents(self) -> npt.NDArray[np.float64]:
        """`content_vectors` of all, float64 [n, 384]; minutes, for it embeds their parts."""
        whole, embed = self.vectors.astype(np.float32), make_encoder("minilm").embed
        return content_vectors(self.prompts, whole, embed).astype(np.float64)

    def rows(self, part: str, *sources: str) -> npt.NDArray[np.int64]:
        """The rows of a part, of some sources."""
        return np.flatnonzero((self.part == part) & np.isin(self.source, sources))


@cache
def corpus() -> Corpus:
    """All prompts with everything that is known of them; minutes, for it embeds 23,247."""
    i2p, parti = safety("i2p"), safety("parti")
    pick = pq.read_table(DATA / "pickapic.parquet")["prompt"].to_pylist()
    prompts = [*map(str, i2p["prompt"]), *map(str, parti["prompt"]), *pick]
    vectors = make_encoder("minilm").embed(prompts)
    group = near_duplicates(vectors)
    with LABELS.open(encoding="utf-8", newline="") as file:
        read = {row["prompt"]: row for row in csv.DictReader(file)}
    found = [read.get(hashlib.sha256(prompt.encode()).hexdigest()[:12]) for prompt in prompts]
    toxicity = np.full(len(prompts), np.nan)
    toxicity[: len(i2p["prompt"])] = i2p["prompt_toxicity"]
    return Corpus(
        prompts=prompts,
        source=np.repeat(
            ["i2p", "parti", "pick"], [len(i2p["prompt"]), len(parti["prompt"]), len(pick)]
        ),
        vectors=vectors.astype(np.float64),
        toxicity=toxicity,
        group=group,
        part=np.array([part(prompts[first]) for first in group]),
        label=np.array(["" if row is None else row["label"] or "benign" for row in found]),
        drawn=np.array([row is not None and row["from"] == "drawn" for row in found]),
    )
