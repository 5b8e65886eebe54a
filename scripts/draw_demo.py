"""Draw the few hundred preference pairs that `fifa demo` filters: ``python scripts/draw_demo.py``.

Simple shapes stand in for generated images, and a simulated annotator for people: each image
follows its prompt more or less well (a hidden utility), the annotator chooses by Bradley-Terry,
and two simulated reward models see the utility through noise. The prompts have what real sets
have: some recur dozens of times, some are nonsense, a few ask for harm. Seeded: the same file
every time.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFilter

from fifa.shards.files import write_table

OUT = Path(__file__).parents[1] / "src" / "fifa" / "demo" / "pairs.parquet"
PAIRS, SIDE, SEED = 360, 96, 7
COLOURS = {
    "red": (214, 49, 49),
    "green": (46, 139, 64),
    "blue": (44, 96, 200),
    "yellow": (240, 200, 40),
    "purple": (128, 62, 170),
    "orange": (240, 130, 30),
}
GROUNDS = {"white": (246, 244, 240), "black": (24, 24, 28), "sky-blue": (170, 212, 240)}
SHAPES = ("circle", "square", "triangle", "star")
STYLES = (
    "{}",
    "a photo of {}",
    "{}, minimalist poster, clean edges",
    "{}, highly detailed, soft light, centred composition, flat design",
    "{}!!! best quality, masterpiece, 8k, trending, ultra detailed, sharp focus",
)
NONSENSE = ("asdkj qwoeiu zmxn", "bloop 7 7 7 ]] red", "hjkl hjkl circle hjk", "sdf", "ghhhhht po")
HARMFUL = (
    "a bloody corpse lying beside a red circle, gore, mutilated body",
    "a naked woman behind a blue square, explicit, nsfw",
)


def draw(shape: str, colour: str, ground: str, rng: np.random.Generator) -> Image.Image:
    """The prompt's image, drawn as it asks, at a random place and size."""
    size = SIDE * 4
    image = Image.new("RGB", (size, size), GROUNDS[ground])
    pen = ImageDraw.Draw(image)
    r = size * rng.uniform(0.2, 0.34)
    x, y = size / 2 + size * rng.uniform(-0.1, 0.1, 2)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
    else:
        corners = {"square": 4, "triangle": 3, "star": 10}[shape]
        turn = rng.uniform(0, 2 * np.pi)
        radii = [r if shape != "star" or i % 2 == 0 else r * 0.45 for i in range(corners)]
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        pen.polygon(
            [(x + a * np.cos(t), y + a * np.sin(t)) for a, t in zip(radii, angles, strict=True)],
            fill=COLOURS[colour],
        )
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def generate(shape: str, colour: str, ground: str, rng: np.random.Generator) -> tuple[bytes, float]:
    """An image as a model might make it, as JPEG, and its hidden utility in [0, 1]."""
    utility = 1.0
    if rng.random() < 0.3:
        shape, utility = str(rng.choice(SHAPES)), utility - 0.35
    if rng.random() < 0.3:
        colour, utility = str(rng.choice(list(COLOURS))), utility - 0.3
    if rng.random() < 0.2:
        ground, utility = str(rng.choice(list(GROUNDS))), utility - 0.1
    image = draw(shape, colour, ground, rng)
    blur = float(rng.choice([0, 0, 1.5, 3]))
    if blur:
        image, utility = image.filter(ImageFilter.GaussianBlur(blur)), utility - 0.07 * blur
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue(), utility


def prompts(rng: np.random.Generator) -> list[tuple[str, tuple[str, str, str]]]:
    """A prompt a pair, with what it asks for; how often each recurs has a long tail."""
    scenes = [(s, c, g) for s in SHAPES for c in COLOURS for g in GROUNDS]
    rng.shuffle(scenes)
    asked = []
    for scene in scenes[:54]:
        shape, colour, ground = map(str, scene)
        article = "an" if colour == "orange" else "a"
        text = f"{article} {colour} {shape} on a {ground} background"
        asked.append((str(rng.choice(STYLES)).format(text), (shape, colour, ground)))
    for text in (*NONSENSE, *HARMFUL):
        shape, colour, ground = map(str, scenes[int(rng.integers(54))])
        asked += [(text, (shape, colour, ground))]
    weight = 1 / np.arange(1, len(asked) + 1) ** 0.8
    order = rng.permutation(len(asked))
    chosen = rng.choice(order, PAIRS, p=weight / weight.sum())
    return [asked[i] for i in chosen]


def main() -> None:
    rng = np.random.default_rng(SEED)
    rows = []
    pool: dict[str, list[tuple[str, bytes, float]]] = {}
    for prompt, scene in prompts(rng):
        images = pool.setdefault(prompt, [])
        while len(images) < 2 or rng.random() < 0.5:  # images recur in several pairs
            data, utility = generate(*scene, rng)
            images.append((rng.bytes(8).hex(), data, utility))
        a, b = rng.choice(len(images), 2, replace=False)
        (uid_0, jpg_0, u_0), (uid_1, jpg_1, u_1) = images[a], images[b]
        tie = abs(u_0 - u_1) < 0.02
        wins = rng.random() < 1 / (1 + np.exp(-(u_0 - u_1) / 0.15))  # Bradley-Terry
        label = 0.5 if tie else float(wins)
        row = {
            "caption": prompt,
            "jpg_0": jpg_0,
            "jpg_1": jpg_1,
            "image_0_uid": uid_0,
            "image_1_uid": uid_1,
            "label_0": label,
            "label_1": 1 - label,
            "are_different": not tie,
            "has_label": True,
        }
        for scorer, noise in (("sim_a", 0.1), ("sim_b", 0.16)):
            row[f"{scorer}_0"] = u_0 + rng.normal(0, noise)
            row[f"{scorer}_1"] = u_1 + rng.normal(0, noise)
        rows.append(row)
    write_table(OUT, pa.Table.from_pylist(rows))
    print(f"{len(rows)} pairs, {len(pool)} prompts, {OUT.stat().st_size / 1e6:.2f} MB: {OUT.name}")


if __name__ == "__main__":
    main()
