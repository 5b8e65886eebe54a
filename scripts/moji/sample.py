"""A part of a world's feedback in which the kinds of prompts have other shares.

Nothing is made: pictures and choices are the world's own, so two parts differ by what they hold
alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fifa.moji.world import asked
from fifa.shards.files import write_table

PAIR = ["caption", "image_0_uid", "image_1_uid"]


def sample_feedback(
    world: Path, work: Path, pairs: int, shares: dict[str, float | None], seed: int
) -> None:
    """Write a part of a world's feedback, and of its truth, into ``work``.

    Scenes come in random order, each with all of its prompts of a kind and all of their pairs,
    until a kind has its pairs: so prompts that say the same stay together. A prompt's last pairs
    are left out where it has too many.

    Parameters
    ----------
    pairs
        How many, over all kinds.
    shares
        Of the pairs, by kind of prompt. Kinds without one share the rest as they do in the world.
    seed
        Of the order.

    Raises
    ------
    SystemExit
        Where the world has too few pairs of a kind, or the shares leave nothing.
    """
    rows, truth = pq.read_table(world / "feedback.parquet"), pq.read_table(world / "truth.parquet")
    kind = dict(zip(truth["prompt"].to_pylist(), truth["kind"].to_pylist(), strict=True))
    held: dict[str, list[str]] = {}  # pairs of each prompt, in the order of the rows
    keys = [" ".join(key) for key in zip(*(rows[c].to_pylist() for c in PAIR), strict=True)]
    first = dict(zip(reversed(keys), reversed(rows["caption"].to_pylist()), strict=True))
    for key in dict.fromkeys(keys):
        held.setdefault(first[key], []).append(key)
    kept: set[str] = set()
    for name, count in _counts(held, kind, pairs, shares).items():
        found = [key for prompt in _together(held, kind, name, seed) for key in held[prompt]]
        if len(found) < count:
            raise SystemExit(f"{count:,} {name} pairs are wanted; {world} has {len(found):,}")
        kept |= set(found[:count])
    part = rows.filter(pa.array([key in kept for key in keys]))
    counts = {row["values"]: row["counts"] for row in pc.value_counts(part["caption"]).to_pylist()}
    place = part.schema.get_field_index("num_example_per_prompt")
    of_prompt = pa.array([counts[prompt] for prompt in part["caption"].to_pylist()], pa.int64())
    write_table(
        work / "feedback.parquet",
        part.set_column(place, "num_example_per_prompt", of_prompt),
    )
    shown = pa.chunked_array([*part["image_0_uid"].chunks, *part["image_1_uid"].chunks])
    write_table(work / "truth.parquet", truth.filter(pc.is_in(truth["image_uid"], shown.unique())))


def _counts(
    held: dict[str, list[str]], kind: dict[str, str], pairs: int, shares: dict[str, float | None]
) -> dict[str, int]:
    """Pairs of each kind."""
    world = dict.fromkeys(sorted(set(kind.values())), 0)
    for prompt, of_prompt in held.items():
        world[kind[prompt]] += len(of_prompt)
    given = {name: share for name, share in shares.items() if share is not None}
    left = 1 - sum(given.values())
    free = sum(count for name, count in world.items() if name not in given)
    if left < 0 or min(given.values(), default=0) < 0:
        raise SystemExit("shares are between 0 and 1, and no more than 1 together")
    every = {
        name: given[name] if name in given else left * count / free for name, count in world.items()
    }
    ends = np.rint(np.cumsum([0.0, *every.values()]) * pairs).astype(int)
    return dict(zip(every, np.diff(ends).tolist(), strict=True))


def _together(held: dict[str, list[str]], kind: dict[str, str], name: str, seed: int) -> list[str]:
    """The prompts of a kind; those of one scene follow one another."""
    scenes: dict[object, list[str]] = {}
    for prompt in sorted(held):
        if kind[prompt] == name:
            scenes.setdefault(asked(prompt) or prompt, []).append(prompt)
    order = np.random.default_rng(seed).permutation(len(scenes))
    groups = list(scenes.values())
    return [prompt for i in order for prompt in groups[i]]
