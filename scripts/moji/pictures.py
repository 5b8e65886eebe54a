"""True pictures as tensors, and what is done to them so that models see more than 1,920."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image, ImageFilter

from fifa.moji.world import WORLD, Scene, render, sprites


@cache
def all_pictures() -> np.ndarray:
    """uint8 ``[objects, backgrounds, styles, size, size, 3]``: every true picture."""
    things, grounds, styles = map(len, (WORLD.objects, WORLD.backgrounds, WORLD.styles))
    return np.stack(
        [
            np.stack([[render(Scene(i, j), s) for s in range(styles)] for j in range(grounds)])
            for i in range(things)
        ]
    )


def tensor(pictures: np.ndarray) -> torch.Tensor:
    """float32 ``[n, 3, size, size]`` in [-1, 1], channels last in memory."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float()
    return x.div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def loose(thing: int, style: int, rng: np.random.Generator) -> np.ndarray:
    """An object on any colour, smaller or larger, anywhere, perhaps mirrored: uint8 picture."""
    sprite = Image.fromarray(sprites()[thing, style])
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = int(rng.integers(18, 33))
    sprite = sprite.resize((side, side), Image.Resampling.BICUBIC)
    colour = tuple(int(c) for c in rng.integers(0, 256, 3))
    picture = Image.new("RGB", (WORLD.size, WORLD.size), colour)
    room = WORLD.size - side
    at = (int(rng.integers(0, room + 1)), int(rng.integers(0, room + 1))) if room > 0 else (0, 0)
    picture.paste(sprite, at, sprite)
    return np.asarray(picture)


def worn(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture shifted by up to 2 pixels, blurred, and noisy or of other brightness."""
    dy, dx = rng.integers(-2, 3, 2)
    moved = np.pad(picture, ((2, 2), (2, 2), (0, 0)), mode="edge")
    moved = moved[2 + dy : 2 + dy + WORLD.size, 2 + dx : 2 + dx + WORLD.size]
    image = Image.fromarray(moved)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 1.0))))
    x = np.asarray(image, np.float32)
    x = (x - 128) * rng.uniform(0.85, 1.15) + 128 + rng.uniform(-15, 15)
    x = x + rng.normal(0, rng.uniform(0, 16), x.shape)
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)
