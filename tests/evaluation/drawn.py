"""Evaluations made of drawn numbers: an index, its measures, and images if they are asked for."""

import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
from PIL import Image

from fifa.config import Evaluate
from fifa.data.ids import prompt_id
from fifa.evaluation.generate import IMAGES, png
from fifa.evaluation.judges import COLOURS
from fifa.evaluation.measure import DIVERSITY, MEASURES, Measured, Scale, load_measured
from fifa.evaluation.models import Training
from fifa.evaluation.prompts import Prompts, draw_seeds
from fifa.evaluation.results import ModelFacts, make_results, save_results
from fifa.evaluation.sampling import Settings
from fifa.run.folder import begin
from fifa.shards.files import write_table

CATEGORIES = ("animals", "places", None)


def draw_index(
    models, prompts=6, seeds=3, first_seed=0, categories=CATEGORIES, prompt="a cat number {}"
):
    """`IMAGES` of some models."""
    rows = []
    for model in models:
        for i in range(prompts):
            text = prompt.format(i)
            name = prompt_id(text)
            for seed in draw_seeds(name, seeds, first_seed):
                file = f"images/{model}/{name}-{seed:08x}.png"
                rows.append((model, name, text, seed, file, categories[i % len(categories)]))
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=IMAGES)


def draw_images(index, folder, seed=0):
    """A small picture for every row of an index."""
    draw = np.random.default_rng(seed)
    for row in index.to_pylist():
        path = folder / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = draw.integers(0, 256, 3)
        pixels = np.clip(shade + draw.normal(0, 30, (24, 20, 3)), 0, 255).astype(np.uint8)
        path.write_bytes(png(pixels))
    return index


def measured(index, columns, *, picked=(), unsafe=(), diversity=None):
    """`Measured` with given float columns by name; ``unsafe`` are detectors' names."""
    scales, table = [], index.select(["model", "prompt_id", "seed", "file", "category"])
    table = table.append_column("unsafe_prompt", pa.array([None] * len(index), pa.bool_()))
    for name, values in columns.items():
        type = "colour" if name in COLOURS else "unsafe" if name in unsafe else "reward"
        scales.append(Scale(name, name, type, "", name in picked))
        table = table.append_column(name, pa.array(np.asarray(values, np.float32)))
    schema = pa.schema(
        [("model", pa.string()), ("prompt_id", pa.string()), ("distance", pa.float32())]
    )
    rows = [
        {"model": model, "prompt_id": prompt, "distance": distance}
        for (model, prompt), distance in (diversity or {}).items()
    ]
    return Measured(table, tuple(scales), pa.Table.from_pylist(rows, schema=schema))


def save(found, folder, suffix=""):
    """Write what `fifa.evaluation.measure.load_measured` reads."""
    plain = json.dumps([asdict(scale) for scale in found.scales])
    table = found.table.replace_schema_metadata({"fifa.scales": plain})
    write_table(folder / MEASURES.replace(".parquet", f"{suffix}.parquet"), table)
    write_table(folder / DIVERSITY.replace(".parquet", f"{suffix}.parquet"), found.diversity)


def picture(colour, size=(16, 16)):
    """An image of one colour."""
    return Image.new("RGB", size, colour)


SETTINGS = {
    "steps": 2,
    "guidance": 7.5,
    "sampler": "DDIMScheduler",
    "width": 32,
    "height": 32,
    "negative": "",
    "device": "cpu",
    "dtype": "float32",
}


def write_evaluation(
    run,
    models,
    gains,
    *,
    scorers=("s", "t"),
    curve=(),
    curves=1,
    seed=0,
    images=False,
    unsafe=False,
    prompt="a cat number {}",
    spread=0.3,
    **settings,
):
    """A run folder with an evaluation of drawn scores: ``gains`` by model over the base.

    The scorer ``s`` has picked the data. ``unsafe``: the first two prompts are flagged, and a
    detector holds the first image of every other model for unsafe.
    """
    folder = begin(run) / "evaluate"
    index = draw_index(["base", *models], prompts=12, seeds=2, prompt=prompt)
    if images:
        draw_images(index, folder)
    draw = np.random.default_rng(seed)
    taste = np.tile(np.random.default_rng(99).normal(size=24), 1 + len(models))
    level = np.repeat([0.0, *gains], 24)
    columns = {name: taste + level + spread * draw.normal(size=len(index)) for name in scorers}
    colours = {name: draw.random(len(index)) for name in ("brightness", "contrast", "saturation")}
    if unsafe:
        columns["detector"] = [0.9 if i % 48 == 4 else 0.1 for i in range(len(index))]
    names = dict.fromkeys(index["prompt_id"].to_pylist())
    apart = {(m, n): draw.uniform(0.1, 0.3) for m in ("base", *models) for n in names}
    found = measured(
        index, {**columns, **colours}, picked=["s"], unsafe=["detector"], diversity=apart
    )
    if unsafe:
        flags = [name in list(names)[:2] for name in index["prompt_id"].to_pylist()]
        found = replace(found, table=found.table.set_column(5, "unsafe_prompt", pa.array(flags)))
    save(found, folder)
    write_table(folder / "images.parquet", index)
    if curve:
        shown = list(zip(models, gains, strict=True))[:curves]
        names = [f"{name}@{step}" for name, _ in shown for step in curve]
        rise = [gain * (i + 1) / len(curve) for _, gain in shown for i in range(len(curve))]
        steps = draw_index(["base", *names], prompts=6, seeds=2)
        means = np.repeat([0.0, *rise], 12)
        rows = {name: means + 0.01 * draw.normal(size=len(means)) for name in scorers}
        save(measured(steps, rows), folder, "-curve")
    training = Training(
        {"seconds": 60.0, "accelerator_hours": 1 / 60, "pairs_seen": 320, "processes": 1},
        [{"step": float(s), "pairs": 8.0 * s, "seconds": 1.5 * s} for s in curve],
        {"margin": {"seconds": 5.0, "tokens": 0}},
    )
    facts = [ModelFacts("base", "base", "b", "w")]
    facts += [ModelFacts(name, "lora", name, name) for name in models]
    write_results(run, facts, dict.fromkeys(models, training), **settings)
    return run


def write_results(run, models, trainings, **settings):
    """What an evaluation says of the measures in ``run``."""
    folder = run / "evaluate"
    curve = (folder / "measures-curve.parquet").exists()
    results = make_results(
        Evaluate(seeds=2),
        models,
        Settings(**{**SETTINGS, **settings}),
        Prompts("p.txt", pa.table([range(12)], names=["prompt_id"]), 12, {}),
        load_measured(folder),
        load_measured(folder, "-curve") if curve else None,
        trainings,
        ("s",),
    )
    save_results(folder, results)
