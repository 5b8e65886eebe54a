"""Small made-up worlds of scored pairs, with everything a selection can meet in them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from fifa.data.table import PAIRS, PROMPTS, Pairs
from fifa.scoring.table import DIVERSITY, MARGIN, QUALITY, Scores

FLAGS = np.array(["", "", "", "", "nonsense", "sexual", "hate,violence"], object)


def make_pairs(n: int = 60, prompts: int = 12, seed: int = 0) -> Pairs:
    """Pairs of URL-only images: ties, votes, repeats; ids in no order."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, prompts, n).astype(np.int32)
    prompt_ids = [f"p{seed}-{i:03d}" for i in rng.permutation(prompts)]
    texts = [f"a picture of {i}" for i in range(prompts)]
    columns = {
        "pair_id": [f"{i:05x}" for i in rng.permutation(n)],
        "prompt": [texts[i] for i in prompt],
        "prompt_id": [prompt_ids[i] for i in prompt],
        "prompt_index": prompt,
        "image_0": [f"left{i}" for i in range(n)],
        "image_1": [f"right{i}" for i in range(n)],
        "image_0_ref": [f"https://example.org/{i}-0.png" for i in range(n)],
        "image_1_ref": [f"https://example.org/{i}-1.png" for i in range(n)],
        "file": ["made.parquet"] * n,
        "row": np.arange(n),
        "swapped": np.zeros(n, bool),
        "label": rng.choice(np.array([0, 0.25, 0.5, 0.75, 1], np.float32), n),
        "votes": np.ones(n, np.int32),
        "repeat": rng.uniform(size=n) < 0.1,
    }
    table = pa.table(
        [pa.array(columns[field.name]).cast(field.type) for field in PAIRS], schema=PAIRS
    )
    return Pairs(table=table, prompts=pa.table([prompt_ids, texts], schema=PROMPTS))


def make_scores(pairs: Pairs, scorers: int = 2, seed: int = 0, coarse: bool = False) -> Scores:
    """Scores with holes; ``coarse`` ones have few distinct values, so that many pairs tie."""
    rng = np.random.default_rng(seed + 1)
    n, prompts = len(pairs), pairs.prompts.num_rows

    def numbers(size: int) -> np.ndarray:
        values = rng.normal(size=size).astype(np.float32)
        return np.round(values) if coarse else values

    def holes(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[rng.uniform(size=len(values)) < 0.05] = rng.choice([np.nan, np.inf, -np.inf])
        return values

    margins = {
        f"scorer {s}": pa.table(
            [pairs.table["pair_id"].combine_chunks(), holes(numbers(n)), holes(numbers(n))],
            schema=MARGIN,
        )
        for s in range(scorers)
    }
    ids = pairs.prompts["prompt_id"].combine_chunks()
    flags = rng.choice(FLAGS, prompts)
    flags[rng.uniform(size=prompts) < 0.05] = None
    rating = np.clip(3 + numbers(prompts), 1, 5)
    quality = pa.table([ids, holes(rating), pa.array(flags, pa.string())], schema=QUALITY)
    entropy = holes(numbers(prompts))
    diversity = pa.table([ids, np.exp(entropy), entropy], schema=DIVERSITY)
    return Scores(margins=margins, quality=quality, diversity=diversity)


def permuted(
    pairs: Pairs, scores: Scores, seed: int = 0, embeddings: np.ndarray | None = None
) -> tuple[Pairs, Scores, np.ndarray | None]:
    """The same world with its pairs and its prompts in another order."""
    rng = np.random.default_rng(seed)
    rows, prompt_rows = rng.permutation(len(pairs)), rng.permutation(pairs.prompts.num_rows)
    where = np.argsort(prompt_rows).astype(np.int32)
    table = pairs.table.take(rows)
    at = table.schema.get_field_index("prompt_index")
    table = table.set_column(at, "prompt_index", pa.array(where[table["prompt_index"].to_numpy()]))
    return (
        Pairs(table=table, prompts=pairs.prompts.take(prompt_rows), origin=pairs.origin),
        Scores(
            margins={name: margin.take(rows) for name, margin in scores.margins.items()},
            quality=scores.quality and scores.quality.take(prompt_rows),
            diversity=scores.diversity and scores.diversity.take(prompt_rows),
        ),
        None if embeddings is None else embeddings[prompt_rows],
    )


def make_embeddings(pairs: Pairs, seed: int = 0, d: int = 6) -> np.ndarray:
    """Unit vectors, one a prompt."""
    vectors = np.random.default_rng(seed + 2).normal(size=(pairs.prompts.num_rows, d))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
