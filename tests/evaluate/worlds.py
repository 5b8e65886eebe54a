"""Evaluations made of drawn numbers: an index, its measures, and images if they are asked for."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
from PIL import Image

from fifa.evaluate.generate import IMAGES, png
from fifa.evaluate.judges import LOOKS
from fifa.evaluate.measure import DIVERSITY, MEASURES, Measured, Scale
from fifa.evaluate.prompts import draw_seeds
from fifa.pairs.ids import prompt_id
from fifa.shards.files import write_table

CATEGORIES = ("animals", "places", None)


def draw_index(models, prompts=6, seeds=3, first_seed=0, categories=CATEGORIES):
    """`IMAGES` of some models."""
    rows = []
    for model in models:
        for i in range(prompts):
            prompt = f"a cat number {i}"
            name = prompt_id(prompt)
            for seed in draw_seeds(name, seeds, first_seed):
                file = f"images/{model}/{name}-{seed:08x}.png"
                rows.append((model, name, prompt, seed, file, categories[i % len(categories)]))
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
        kind = "look" if name in LOOKS else "unsafe" if name in unsafe else "reward"
        scales.append(Scale(name, name, kind, "", name in picked))
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
    """Write what `fifa.evaluate.measure.load_measured` reads."""
    plain = json.dumps([asdict(scale) for scale in found.scales])
    table = found.table.replace_schema_metadata({"fifa.scales": plain})
    write_table(folder / MEASURES.replace(".parquet", f"{suffix}.parquet"), table)
    write_table(folder / DIVERSITY.replace(".parquet", f"{suffix}.parquet"), found.diversity)


def picture(colour, size=(16, 16)):
    """An image of one colour."""
    return Image.new("RGB", size, colour)
