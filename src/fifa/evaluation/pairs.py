"""Preference pairs of a model's own images: which of them make a pair, and the file of pairs.

The judge's preference is the label, so a pair says what the judge likes, not what people like.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fifa.config import Compute, GeneratePairs
from fifa.console import progress
from fifa.data.images import look
from fifa.errors import FifaError
from fifa.evaluation.judges import colours, each_image, generated_images
from fifa.scoring.margin import committee, image_rewards
from fifa.scoring.specs import REWARDS
from fifa.shards.files import atomic_path
from fifa.shards.sealed import BLANK, SEAL, DamagedError, check_whole, seal

PAIRS_FILE = "pairs.parquet"
COLUMNS = pa.schema(  # then `reward_columns`
    [
        ("jpg_0", pa.binary()),  # the file as it was made: a PNG, in spite of the column's name
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),  # 1 for the image that the judges prefer, else 0
        ("label_1", pa.float64()),
        ("caption", pa.string()),
        ("has_label", pa.bool_()),  # Pick-a-Pic's; always true
        ("image_0_uid", pa.string()),  # XXH3-128 of the bytes
        ("image_1_uid", pa.string()),
        ("noise_seed_0", pa.int64()),  # of torch's generator on the CPU
        ("noise_seed_1", pa.int64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("category", pa.string()),  # null where the prompt has none
    ]
)
FACTS = b"fifa.generate"  # in the file's metadata: `Generated.facts`
GROUP_BYTES = 32 << 20  # of images in a row group: what is in memory at once
GROUP_ROWS = 1024
FLAT = 1e-3  # an image with less contrast than this has one colour
SCORES = ".scores"  # hidden, as every reader looks for Parquet files below the folder

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Judged:
    """What is known of every image.

    Parameters
    ----------
    images
        `fifa.evaluation.generate.IMAGES`.
    rewards
        By judge's spec, float32 [images]; NaN where it could not score.
    contents
        XXH3-128 of each file, [images].
    contrast
        float32 [images], as in `fifa.evaluation.judges.colours`.
    """

    images: pa.Table
    rewards: dict[str, Floats]
    contents: list[str]
    contrast: Floats


@dataclass(frozen=True)
class Choice:
    """Which images make pairs.

    Parameters
    ----------
    better, worse
        int64 [pairs], rows of the images.
    left_out
        How many images, prompts and pairs were left out, by what they are.
    """

    better: Integers
    worse: Integers
    left_out: dict[str, int]


@dataclass(frozen=True)
class Generated:
    """Pairs that were made.

    Parameters
    ----------
    path
        The Parquet file.
    facts
        ``made_of``, ``model``, ``prompts``, ``images`` and ``pairs`` (counts), ``left_out``,
        ``judges`` (the stems of their columns by their specs) and ``means`` (of the rewards of all
        images).
    """

    path: Path
    facts: dict[str, Any]

    @property
    def margin(self) -> tuple[str, ...]:
        """The specs by which `fifa filter` takes the rewards from the file."""
        return tuple(f"column:{stem}_0,{stem}_1" for stem in self.facts["judges"].values())


def judge_images(images: pa.Table, folder: Path, specs: Sequence[str], compute: Compute) -> Judged:
    """Every image through every judge; what is judged already is read.

    Parameters
    ----------
    images
        `fifa.evaluation.generate.IMAGES` of one model.
    folder
        What their files are below; keeps the scores.
    specs, compute
        Reward models, and where they run.
    """
    files, scores = generated_images(images, folder), folder / SCORES
    prompts = images["prompt"].combine_chunks()
    seen = each_image(images, folder, scores, "looks", "pixels", "1", colours)
    return Judged(
        images,
        {spec: image_rewards([(files, prompts)], spec, scores, compute)[0] for spec in specs},
        look(files, sizes=False)["content"].to_pylist(),
        seen["contrast"].to_numpy(),
    )


def reward_columns(specs: Sequence[str]) -> dict[str, str]:
    """What the columns of each judge's rewards begin with: ``pickscore``, ``clipscore_2``."""
    found: dict[str, str] = {}
    for spec in specs:
        name = REWARDS.parse(spec).name.replace(".", "_")  # a dot would go into a struct
        number = sum(REWARDS.parse(other).name == REWARDS.parse(spec).name for other in found)
        found[spec] = f"{name}_{number + 1}" if number else name
    return found


def choose_pairs(judged: Judged, asked: GeneratePairs) -> Choice:
    """The images that make pairs, as ``asked`` says.

    With r_s the rewards of judge s, and spread_s that of `fifa.scoring.margin.committee` over
    every two images of one prompt (1 for a single judge), images are ordered by

        u(x) = mean over s of r_s(x) / spread_s

    so that u(x_0) - u(x_1) is the committee's d.

    Raises `FifaError` where no pair can be made.
    """
    left_out: Counter[str] = Counter()
    rewards = list(judged.rewards.values())
    prompts = [_usable(judged, list(rows), left_out) for rows in _by_prompt(judged.images)]
    prompts = [rows for rows in prompts if rows]
    every = [two for rows in prompts for two in combinations(rows, 2)]
    first, second = np.array(every, np.int64).reshape(-1, 2).T
    label = np.ones(len(every))
    spreads = committee([(r[first], r[second]) for r in rewards], label).spreads
    # u(x) = mean over s of r_s(x) / spread_s
    u = np.mean([r / np.float64(s) for r, s in zip(rewards, spreads, strict=True)], axis=0)
    chosen = []
    for rows in prompts:
        for better, worse in _pairs_of(sorted(rows, key=lambda row: (-u[row], row)), asked.pairs):
            if u[better] == u[worse]:
                left_out["pairs of equal rewards"] += 1
            elif u[better] - u[worse] < asked.min_margin:
                left_out[f"pairs whose rewards differ by less than {asked.min_margin:g}"] += 1
            else:
                chosen.append((better, worse))
    if not chosen:
        n = len(judged.images)
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise FifaError(
            f"no pair can be made of {n:,} images ({reasons})",
            do="look at the images; take more per prompt, another judge or a smaller --min-margin",
        )
    better, worse = np.array(chosen, np.int64).T
    return Choice(better, worse, dict(left_out))


def write_pairs(
    path: Path, judged: Judged, choice: Choice, folder: Path, facts: dict[str, Any]
) -> Generated:
    """Write the pairs of a choice in Pick-a-Pic's columns, and the rewards beside them.

    Images are on sides by the digest of their bytes, so the side says nothing of the label. The
    same images and rewards give the same bytes.

    Parameters
    ----------
    path
        The Parquet file.
    judged, choice
        The images, and those that make pairs.
    folder
        What the images' files are below.
    facts
        What `Generated.facts` has beside what is known here.
    """
    judges = reward_columns(list(judged.rewards))
    names = [f"{stem}_{side}" for stem in judges.values() for side in (0, 1)]
    rewards = judged.rewards.items()
    known = {
        **facts,
        "prompts": len(set(judged.images["prompt_id"].to_pylist())),
        "images": len(judged.images),
        "pairs": len(choice.better),
        "left_out": choice.left_out,
        "judges": judges,
        "means": {spec: _mean(r) for spec, r in rewards},
    }
    schema = pa.schema([*COLUMNS, *((name, pa.float32()) for name in names)])
    text = json.dumps(known, sort_keys=True)
    schema = schema.with_metadata({FACTS: text})
    table = judged.images.to_pylist()

    def row(better: int, worse: int) -> dict[str, Any]:
        made: dict[str, Any] = {"has_label": True, "caption": table[better]["prompt"]}
        for side, image in enumerate(sorted((better, worse), key=judged.contents.__getitem__)):
            own = table[image]
            made |= {
                f"jpg_{side}": (folder / own["file"]).read_bytes(),
                f"label_{side}": float(image == better),
                f"image_{side}_uid": judged.contents[image],
                f"noise_seed_{side}": own["seed"],
                f"model_{side}": own["model"],
                "category": own["category"],
                **{f"{judges[spec]}_{side}": r[image] for spec, r in rewards},
            }
        return made

    rows = (row(*pair) for pair in zip(choice.better.tolist(), choice.worse.tolist(), strict=True))
    with atomic_path(path) as temporary, temporary.open("w+b") as file:
        with (
            pq.ParquetWriter(file, schema, compression="zstd") as writer,
            progress("writing pairs", len(choice.better)) as advance,
        ):
            for group in row_groups(rows, schema):
                writer.write_table(group)
                advance(len(group))
            writer.add_key_value_metadata({SEAL: BLANK})
        seal(file)
    return Generated(path, json.loads(text))


def row_groups(rows: Iterator[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows with images as tables of `GROUP_BYTES` of these and `GROUP_ROWS` rows at most."""
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += sum(len(cell) for cell in row.values() if isinstance(cell, bytes))
        if size >= GROUP_BYTES or len(group) >= GROUP_ROWS:
            yield pa.Table.from_pylist(group, schema=schema)
            group, size = [], 0
    if group:
        yield pa.Table.from_pylist(group, schema=schema)


def read_generated(path: Path) -> Generated:
    """The facts of a file that `write_pairs` wrote; `DamagedError` for any other file."""
    check_whole(path)
    try:
        facts = json.loads(pq.read_schema(path).metadata[FACTS])
    except (ValueError, KeyError) as error:
        raise DamagedError(str(path)) from error
    return Generated(path, facts)


def _by_prompt(images: pa.Table) -> Iterator[Iterator[int]]:
    """The rows of each prompt, which lie together."""
    ids = images["prompt_id"].to_pylist()
    return (rows for _, rows in groupby(range(len(ids)), key=ids.__getitem__))


def _usable(judged: Judged, rows: list[int], left_out: Counter[str]) -> list[int]:
    """The images of a prompt that can stand in a pair; none where there are fewer than two."""
    kept: dict[str, int] = {}
    for row in rows:
        if judged.contrast[row] < FLAT:
            left_out["images of one colour"] += 1
        elif not all(np.isfinite(rewards[row]) for rewards in judged.rewards.values()):
            left_out["images to which a judge gave no finite reward"] += 1
        elif kept.setdefault(judged.contents[row], row) != row:
            left_out["images that are the same as another of their prompt"] += 1
    if len(kept) < 2:
        left_out["prompts with fewer than two images left"] += 1
        return []
    return list(kept.values())


def _pairs_of(order: list[int], how: str) -> Iterator[tuple[int, int]]:
    """Pairs of rows that are sorted by what they are worth, the better one first."""
    if how == "best-worst":
        return iter([(order[0], order[-1])])
    return iter(pairwise(order) if how == "adjacent" else combinations(order, 2))


def _mean(rewards: Floats) -> float | None:
    finite = rewards[np.isfinite(rewards)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else None
