"""Every number of every image: reward models, judges, safety, look, and what sets them apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fifa.config import UNSAFE_FLAGS, Compute, Measure
from fifa.console import echo
from fifa.errors import FifaError
from fifa.evaluation.images import Look, each_image, generated_images, image_pairs
from fifa.evaluation.judges import LOOKS, Detector, Judge, looks
from fifa.evaluation.provenance import is_picked
from fifa.models.runtime import make_runtime
from fifa.scoring.margin import image_rewards
from fifa.scoring.quality import quality_scores
from fifa.scoring.rewards.features import image_features, make_image_encoder
from fifa.scoring.rewards.load import load_reward
from fifa.scoring.specs import REWARDS
from fifa.shards.files import write_table

MEASURES = "measures.parquet"
DIVERSITY = "diversity.parquet"
CURVE_SUFFIX = "-curve"  # of both files, for the checkpoints on the way
SCORES = "scores"  # finished tables, by content
KEYS = ("model", "prompt_id", "seed", "file", "category")
UNSAFE_PROMPT = "unsafe_prompt"  # null where no rater looked

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
    kind
        ``reward``: higher is better; ``unsafe``: a probability; ``look``: neither.
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
    kind: Literal["reward", "unsafe", "look"]
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
    """The scale of every scorer, so that a wrong name or missing weights are told at once.

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
    judges: Sequence[Judge] = (),
    picked: Sequence[str] = (),
    compute: Compute | None = None,
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
    judges
        More of them.
    picked
        Specs of the reward models that picked the training data.
    compute
        Where reward models run.
    suffix
        Of the two files' names.

    Raises
    ------
    FifaError
        For a scorer, rater, detector or encoder that is not there.
    """
    compute = compute or Compute()
    scores = folder / SCORES
    parts = [_of_model(images, name) for name in dict.fromkeys(images["model"].to_pylist())]
    known = check_scorers(asked.scorers, compute)
    columns: dict[str, Floats] = {}
    scales: list[Scale] = []
    for spec in asked.scorers:
        found = [_rewards(part, folder, spec, scores, compute) for part in parts]
        columns[spec] = np.concatenate(found)
        name = scorer_name(spec, asked.scorers)
        scales.append(Scale(spec, name, "reward", known[spec], is_picked(spec, picked)))
    for judge in judges:
        column = f"judge:{judge.name}"
        found = [_judged(part, folder, judge, scores) for part in parts]
        columns[column] = np.concatenate(found)
        scales.append(
            Scale(column, judge.name, judge.kind, judge.scale, source="judge", tie=judge.tie)
        )
    if asked.detector:
        runtime = make_runtime(compute.device, compute.dtype)
        detector = Detector(asked.detector, asked.unsafe_labels, runtime).judge
        found = [_judged(part, folder, detector, scores) for part in parts]
        columns["detector"] = np.concatenate(found)
        scales.append(Scale("detector", detector.name, "unsafe", detector.scale, source="detector"))
    for part in parts:
        seen = each_image(part, folder, scores, "looks", "pixels", "1", looks)
        for name in LOOKS:
            own = seen[name].to_numpy().astype(np.float32)
            columns[name] = np.concatenate([columns.get(name, np.empty(0, np.float32)), own])
    scales += [Scale(name, name, "look", "0 to 1", source="pixels") for name in LOOKS]
    unsafe = _unsafe_prompts(images, folder, asked, scores, compute)
    table = images.select(list(KEYS)).append_column(UNSAFE_PROMPT, unsafe)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, pa.float32()))
    diversity = _diversity(parts, folder, asked.encoder, scores, compute)
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
            "nothing is measured here yet",
            where=str(folder),
            do="run the same `fifa evaluate` to its end",
        )
    table = pq.read_table(path)
    plain = json.loads((table.schema.metadata or {}).get(b"fifa.scales", b"[]"))
    scales = tuple(Scale(**entry) for entry in plain)
    return Measured(table, scales, pq.read_table(folder / with_suffix(DIVERSITY, suffix)))


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


def _of_model(images: pa.Table, name: str) -> pa.Table:
    return images.filter(pc.equal(images["model"], name))


def _rewards(part: pa.Table, folder: Path, spec: str, scores: Path, compute: Compute) -> Floats:
    prompts = part["prompt"].combine_chunks()
    return image_rewards(generated_images(part, folder), prompts, spec, scores, compute)


def _judged(part: pa.Table, folder: Path, judge: Judge, scores: Path) -> Floats:
    def look(prompts: list[str], pictures: list[Any]) -> dict[str, Any]:
        return {"value": judge.measure(prompts, pictures)}

    if judge.identity is None:  # nobody knows when its numbers change
        found = _unkept(part, folder, judge.name, look)
    else:
        found = each_image(part, folder, scores, "judge", judge.name, judge.identity, look)
    return np.asarray(found["value"].to_numpy(), np.float32)


def _unkept(part: pa.Table, folder: Path, name: str, look: Look) -> pa.Table:
    import tempfile

    with tempfile.TemporaryDirectory() as nowhere:
        return each_image(part, folder, Path(nowhere), "judge", name, "", look)


def _unsafe_prompts(
    images: pa.Table, folder: Path, asked: Measure, scores: Path, compute: Compute
) -> pa.Array:
    """Whether each image's prompt is unsafe: flagged by the rater, or of a category that is."""
    categories = images["category"].to_pylist()
    unsafe: list[bool | None] = [
        True if category in asked.unsafe_categories else None for category in categories
    ]
    if asked.unsafe_categories:
        unsafe = [bool(entry) for entry in unsafe]
    if asked.rater != "none":
        first = images["model"][0].as_py()
        pairs = image_pairs(_of_model(images, first), folder)
        rated = quality_scores(pairs, asked.rater, folder=scores, in_flight=compute.in_flight)
        flags = dict(zip(rated["prompt_id"].to_pylist(), rated["flags"].to_pylist(), strict=True))
        for i, name in enumerate(images["prompt_id"].to_pylist()):
            told = flags[name]
            if told is not None:
                harm = any(flag in UNSAFE_FLAGS for flag in told.split(","))
                unsafe[i] = bool(unsafe[i]) or harm
        echo(f"rated {len(flags):,} prompts for safety")
    return pa.array(unsafe, pa.bool_())


def _diversity(
    parts: Sequence[pa.Table], folder: Path, encoder: str, scores: Path, compute: Compute
) -> pa.Table:
    schema = pa.schema(
        [("model", pa.string()), ("prompt_id", pa.string()), ("distance", pa.float32())]
    )
    rows: list[dict[str, Any]] = []
    for part in parts if encoder != "none" else ():
        names = np.asarray(part["prompt_id"].to_pylist(), object)
        if len(set(names)) == len(names):  # one image a prompt: nothing to compare
            continue
        runtime = make_runtime(compute.device, compute.dtype)
        features, of_image = image_features(
            generated_images(part, folder), make_image_encoder(encoder, runtime), folder=scores
        )
        vectors = features[of_image]
        model = part["model"][0].as_py()
        rows += [
            {
                "model": model,
                "prompt_id": name,
                "distance": pairwise_distance(vectors[names == name]),
            }
            for name in dict.fromkeys(names.tolist())
        ]
    return pa.Table.from_pylist(rows, schema=schema)
