"""Evaluated runs drawn with Pillow: an index and images, as `fifa evaluate` leaves them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, PngImagePlugin

from fifa.run.folder import begin
from fifa.shards.files import write_table

COLOURS = ("crimson", "royalblue", "seagreen", "goldenrod", "purple", "teal", "coral", "slategray")
SHAPES = ("circle", "square", "triangle")


def make_run(
    folder: Path,
    *,
    models: tuple[str, ...] = ("base", "tuned-secret"),
    prompts: int = 10,
    seeds: int = 2,
    size: int = 64,
    category: bool = True,
    prompt: str = "a {colour} {shape} on grass, number {i}",
) -> Path:
    """An evaluated run: a shape a prompt, shaky by the base and steady by the others."""
    rows = []
    begin(folder)
    for m, model in enumerate(models):
        for i in range(prompts):
            colour, shape = COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]
            for seed in range(seeds):
                name = f"images/{model}/{i:04d}-{seed}.png"
                path = folder / "evaluate" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(draw(colour, shape, shaky=not m, seed=97 * i + seed, size=size))
                rows.append(
                    {
                        "model": model,
                        "prompt_id": f"p{i}",
                        "prompt": prompt.format(colour=colour, shape=shape, i=i),
                        "seed": seed,
                        "file": name,
                        "category": None if not category else f"{shape}s",
                    }
                )
    write_index(folder, rows)
    return folder


def write_index(folder: Path, rows: list[dict[str, object]]) -> None:
    write_table(folder / "evaluate" / "images.parquet", pa.Table.from_pylist(rows))


def read_index(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(
        folder / "evaluate" / "images.parquet"
    ).to_pylist()
    return rows


def draw(colour: str, shape: str, *, shaky: bool, seed: int, size: int = 64) -> bytes:
    """A PNG whose text chunk gives its model away, as some generators write it."""
    rng = np.random.default_rng([seed, shaky])
    image = Image.new("RGB", (size, size), (206 + int(rng.integers(30)), 222, 230))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, size * 0.66, size, size), fill=(96, 150 + int(rng.integers(30)), 84))
    middle = np.array([0.5, 0.52]) + rng.uniform(-0.06, 0.06, 2)
    corners = {"circle": 40, "square": 4, "triangle": 3}[shape]
    turn = np.pi / 4 if shape == "square" else -np.pi / 2
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + turn
    ring = np.stack([np.cos(angles), np.sin(angles)], 1) * 0.3
    if shaky:
        ring *= 1 + rng.normal(0, 0.16, (corners, 1))
    pen.polygon([tuple(point) for point in ((middle + ring) * size).tolist()], fill=colour)
    secret = PngImagePlugin.PngInfo()
    secret.add_text("parameters", "model: base-secret" if shaky else "model: tuned-secret")
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=secret)
    return out.getvalue()
