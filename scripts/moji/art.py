"""The sheet of sprites, from the emoji packages."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from fifa.moji.world import SPRITES, WORLD
from fifa.shards.files import write_bytes

PACKAGES = {"noto": "google", "twemoji": "twitter"}  # style: emoji-datasource-<vendor>
ACROSS = 20  # sprites in a row of the sheet


def draw_sheet(art: Path) -> None:
    """Write `SPRITES` from the 64-px images under ``art``/<vendor>/package/img/<vendor>/64."""
    tiles = [
        _sprite(art / f"{vendor}/package/img/{vendor}/64/{each.code}.png")
        for each in WORLD.objects
        for vendor in (PACKAGES[style] for style in WORLD.styles)
    ]
    side = WORLD.sprite
    rows = -(-len(tiles) // ACROSS)
    sheet = np.zeros((rows * side, ACROSS * side, 4), np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // ACROSS * side, i % ACROSS * side
        sheet[y : y + side, x : x + side] = tile
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG", optimize=True)
    write_bytes(SPRITES, file.getvalue())


def _sprite(path: Path) -> np.ndarray:
    with Image.open(path, formats=["PNG"]) as image:
        small = image.convert("RGBA").resize((WORLD.sprite, WORLD.sprite), Image.Resampling.LANCZOS)
    tile = np.array(small)
    tile[tile[..., 3] == 0] = 0  # what cannot be seen need not be stored
    return tile
