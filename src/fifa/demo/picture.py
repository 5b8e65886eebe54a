"""One picture of the models side by side: the same prompts and seeds, chosen by their number."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from fifa.moji.prompts import asked
from fifa.moji.world import render
from fifa.shards.files import atomic_path

PROMPTS = 8  # of each kind, every n-th
SCALE = 3  # screen pixels a pixel
GAP, HEAD, LEFT = 6, 22, 90
WHITE, BLACK = (255, 255, 255), (40, 40, 40)


def write_picture(path: Path, images: pa.Table, folder: Path) -> None:
    """Write a sheet with a column a prompt and a row a model, the true picture on top.

    Parameters
    ----------
    path
        Of the PNG.
    images
        `fifa.evaluation.generate.IMAGES`.
    folder
        What its files are below.
    """
    rows = images.to_pylist()
    models = list(dict.fromkeys(row["model"] for row in rows))
    safe = [row for row in rows if row["category"] != "unsafe"]
    prompts = list(dict.fromkeys(row["prompt"] for row in safe))
    # seen and unseen prompts stand one after the other: every n-th has as many of both
    prompts = prompts[:: max(1, len(prompts) // (2 * PROMPTS))][: 2 * PROMPTS]
    files: dict[tuple[str, str], str] = {}
    for row in safe:  # a prompt's first seed, which is the same for every model
        files.setdefault((row["model"], row["prompt"]), row["file"])
    with Image.open(folder / files[models[0], prompts[0]]) as one:
        side = one.width * SCALE
    width, height = LEFT + len(prompts) * (side + GAP), HEAD + (len(models) + 1) * (side + GAP)
    sheet = Image.new("RGB", (width, height), WHITE)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((GAP, 2), "same prompts, same seeds", BLACK, font)
    for y, model in enumerate(["true", *models]):
        top = HEAD + y * (side + GAP)
        draw.text((GAP, top + side // 2 - 8), model, BLACK, font)
        for x, prompt in enumerate(prompts):
            picture = _true(prompt) if model == "true" else folder / files[model, prompt]
            sheet.paste(_large(picture, side), (LEFT + x * (side + GAP), top))
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG", optimize=True)


def _true(prompt: str) -> Image.Image:
    scene = asked(prompt)
    assert scene is not None, "test prompts ask for scenes"
    return Image.fromarray(render(scene, 0))


def _large(picture: Image.Image | Path, side: int) -> Image.Image:
    if isinstance(picture, Path):
        with Image.open(picture) as opened:
            picture = opened.convert("RGB")
    return picture.resize((side, side), Image.Resampling.NEAREST)
