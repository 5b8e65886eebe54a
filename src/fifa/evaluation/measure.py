"""Every number of every image: reward models, judges, safety, colours, diversity."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fifa.config import UNSAFE_FLAGS, Compute, Measure
from fifa.console import echo
from fifa.data.table import PROMPTS
from fifa.errors import FifaError
from fifa.evaluation.judges import (
    COLOURS,
    Judge,
    colours,
    each_image,
    generated_images,
    load_detector,
)
from fifa.evaluation.models import is_picked
from fifa.models.runtime import make_runtime
from fifa.scoring import engine_kept
from fifa.scoring.margin import image_rewards
from fifa.scoring.quality import prompt_quality
from fifa.scoring.rewards import load_reward
from fifa.scoring.rewards.features import image_features
from fifa.scoring.rewards.image_encoders import make_image_encoder
from fifa.scoring.specs import REWARDS
from fifa.shards.executors import executor_of
from fifa.shards.files import read_table, write_table

MEASURES = "measures.parquet"
DIVERSITY = "diversity.parquet"
CURVE_SUFFIX = "-curve"  # of both files, for the checkpoints on the way
SCORES = "scores"  # finished tables, by content
KEYS = ["model", "prompt_id", "seed", "file", "category"]
UNSAFE_PROMPT = "unsafe_prompt"  # null where no rater looked
DISTANCES = pa.schema(
    [("model", pa.string()), ("prompt_id", pa.string()), ("distance", pa.float32())]
)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scale:
    """One column of `MEASURES`.

    Parameters
    ----------
    column
        Its name there.
    name
        For people.
    type
        ``reward``: higher is better; ``unsafe``: a probability; ``colour``: neither.
    scale
        What a number is.
    picked
        The scorer, or a relative of it, picked the training data.
    source
        ``scorer``, ``judge``, ``detector`` or ``pixels``.
    tie
        The largest difference that counts as a tie in a win rate.
    """

    column: str
    name: str
    type: Literal["reward", "unsafe", "colour"]
    scale: str = ""
    picked: bool = False
    source: str = "scorer"
    tie: float = 0.0


@dataclass(frozen=True)
class Measured:
    """All numbers of an evaluation.

    Parameters
    ----------
    table
        `KEYS`, ``unsafe_prompt`` (bool), then a float32 column a `Scale`; a row an image, in the
        order of the index.
    scales
        What the columns are.
    diversity
        ``model``, ``prompt_id``, ``distance``: how far apart the images of one prompt are;
        empty with one seed or without an encoder.
    """

    table: pa.Table
    scales: tuple[Scale, ...]
    diversity: pa.Table


def check_scorers(scorers: Sequence[str], compute: Compute) -> dict[str, str]:
    """The scale of every scorer, so that a wrong name or missing weights are reported at once.

    Raises `FifaError` for a spec that names no reward model that looks at images.
    """
    return {
        spec: load_reward(spec, device=compute.device, dtype=compute.dtype).scale
        for spec in scorers
    }


def measure(
    images: pa.Table,
    folder: Path,
    asked: Measure,
    *,
    compute: Compute,
    judges: Sequence[Judge] = (),
    picked: Sequence[str] = (),
    suffix: str = "",
) -> Measured:
    """Measure every image; what was measured before is read.

    Parameters
    ----------
    images
        `fifa.evaluation.generate.IMAGES`.
    folder
        What their files are below; gets ``measures.parquet`` and ``diversity.parquet``.
    asked
        Scorers, rater, detector and encoder.
    compute
        Where reward models run.
    judges
        Further judges.
    picked
        Specs of the reward models that picked the training data.
    suffix
        Of the two files' names.

    Raises
    ------
    FifaError
        For a scorer, rater, detector or encoder that is not there.
    """
    scores = folder / SCORES
    models = [
        images.filter(pc.equal(images["model"], name))
        for name in dict.fromkeys(images["model"].to_pylist())
    ]
    units = check_scorers(asked.scorers, compute)
    unsafe = _unsafe_prompts(images, asked, scores, compute)
    table = images.select(KEYS).append_column(UNSAFE_PROMPT, unsafe)
    scales: list[Scale] = []

    def add(scale: Scale, numbers: Iterable[Floats]) -> None:  # an array a model
        nonlocal table
        scales.append(scale)
        column = np.concatenate([*numbers])
        table = table.append_column(scale.column, pa.array(column, pa.float32()))

    for spec in asked.scorers:
        name, known = scorer_name(spec, asked.scorers), is_picked(spec, picked)
        add(
            Scale(spec, name, "reward", units[spec], known),
            _rewards(models, folder, spec, compute),
        )
    judged = [(f"judge:{judge.name}", judge, "judge") for judge in judges]
    if asked.detector:
        runtime = make_runtime(compute.device, compute.dtype)
        judge = load_detector(asked.detector, asked.unsafe_labels, runtime)
        judged.append(("detector", judge, "detector"))
    for column, judge, source in judged:
        add(
            Scale(column, judge.name, judge.type, judge.scale, source=source, tie=judge.tie),
            (_judged(own, folder, judge) for own in models),
        )
    seen = [each_image(own, folder, scores, "looks", "pixels", "1", colours) for own in models]
    for name in COLOURS:
        scale = Scale(name, name, "colour", "0 to 1", source="pixels")
        add(scale, (found[name].to_numpy() for found in seen))
    diversity = _diversity(models, folder, asked.encoder, compute)
    plain = json.dumps([asdict(scale) for scale in scales], sort_keys=True)
    table = table.replace_schema_metadata({"fifa.scales": plain})
    write_table(folder / with_suffix(MEASURES, suffix), table)
    write_table(folder / with_suffix(DIVERSITY, suffix), diversity)
    return Measured(table, tuple(scales), diversity)


def load_measured(folder: Path, suffix: str = "") -> Measured:
    """What `measure` wrote into ``folder``; `FifaError` if there is nothing."""
    path = folder / with_suffix(MEASURES, suffix)
    if not path.exists():
        raise FifaError(
            "nothing has been measured here yet",
            where=str(folder),
            do="run the same `fifa evaluate` to its end",
        )
    again = "run the same `fifa evaluate` again: it makes it again"
    table = read_table(path, do=again)
    plain = json.loads((table.schema.metadata or {}).get(b"fifa.scales", b"[]"))
    scales = tuple(Scale(**entry) for entry in plain)
    diversity = read_table(folder / with_suffix(DIVERSITY, suffix), do=again)
    return Measured(table, scales, diversity)


def with_suffix(name: str, suffix: str) -> str:
    """``measures-curve.parquet`` of ``measures.parquet`` and ``-curve``."""
    return name.replace(".parquet", f"{suffix}.parquet")


def scorer_name(spec: str, others: Sequence[str]) -> str:
    """A scorer's name for people: ``clipscore (folder)`` where it was given a model's place."""
    parsed = REWARDS.parse(spec)
    brief = f"{parsed.name} ({Path(parsed.model).name})" if parsed.model else parsed.name
    alike = [other for other in others if other != spec and scorer_name(other, ()) == brief]
    return spec if alike else brief


def pairwise_distance(vectors: npt.NDArray[Any]) -> float:
    """The mean cosine distance of two different rows of ``vectors`` [n, d]; NaN for n < 2."""
    n = len(vectors)
    if n < 2:
        return float("nan")
    x = vectors.astype(np.float64)
    z = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    total = z.sum(0)
    # 1 - mean over i != j of z_i . z_j, with sum over i != j = |sum z|^2 - sum |z_i|^2
    return float(1 - (total @ total - (z * z).sum()) / (n * (n - 1)))


def _rewards(models: Sequence[pa.Table], folder: Path, spec: str, compute: Compute) -> list[Floats]:
    sets = [(generated_images(own, folder), own["prompt"].combine_chunks()) for own in models]
    return image_rewards(sets, spec, folder / SCORES, compute)


def _judged(own: pa.Table, folder: Path, judge: Judge) -> Floats:
    def value(prompts: list[str], pictures: list[Any]) -> dict[str, Any]:
        return {"value": judge.measure(prompts, pictures)}

    # without an identity nobody knows when its numbers change: nothing is kept
    scores = None if judge.identity is None else folder / SCORES
    found = each_image(own, folder, scores, "judge", judge.name, judge.identity, value)
    return np.asarray(found["value"].to_numpy(), np.float32)


def _unsafe_prompts(images: pa.Table, asked: Measure, scores: Path, compute: Compute) -> pa.Array:
    """Whether each image's prompt is unsafe: of a category that is, or flagged by the rater."""
    ids = images["prompt_id"].to_pylist()
    unsafe: dict[str, bool | None] = dict.fromkeys(ids)
    if asked.unsafe_categories:
        categories = images["category"].to_pylist()
        in_category = [category in asked.unsafe_categories for category in categories]
        unsafe = dict(zip(ids, in_category, strict=True))
    if asked.rater != "none":
        texts = dict(zip(ids, images["prompt"].to_pylist(), strict=True))
        prompts = pa.table([list(texts), list(texts.values())], schema=PROMPTS)
        limits: dict[str, Any] = {"in_flight": compute.in_flight, "max_tokens": compute.max_tokens}
        with engine_kept(), executor_of(compute) as executor:
            limits |= {"executor": executor, "device": compute.device}
            rated = prompt_quality(prompts, asked.rater, folder=scores, **limits)
        for name, flags in zip(texts, rated["flags"].to_pylist(), strict=True):
            if flags is not None:
                harm = any(flag in UNSAFE_FLAGS for flag in flags.split(","))
                unsafe[name] = bool(unsafe[name]) or harm
        echo(f"rated {len(texts):,} prompts for safety")
    return pa.array([unsafe[name] for name in ids], pa.bool_())


def _diversity(
    models: Sequence[pa.Table], folder: Path, encoder: str, compute: Compute
) -> pa.Table:
    rows: list[dict[str, Any]] = []
    if encoder == "none":
        models = ()
    else:
        made = make_image_encoder(encoder, make_runtime(compute.device, compute.dtype))
    for own in models:
        names = np.asarray(own["prompt_id"].to_pylist(), object)
        prompts = dict.fromkeys(names.tolist())
        if len(prompts) == len(names):  # one image a prompt: nothing to compare
            continue
        features, of_image = image_features(
            generated_images(own, folder), made, folder=folder / SCORES
        )
        vectors, model = features[of_image], own["model"][0].as_py()
        for name in prompts:
            distance = pairwise_distance(vectors[names == name])
            rows.append({"model": model, "prompt_id": name, "distance": distance})
    return pa.Table.from_pylist(rows, schema=DISTANCES)
