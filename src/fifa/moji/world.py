"""The world: objects on backgrounds in two styles, what captions say of them, the true picture.

Pictures are `WORLD.size` pixels wide RGB images as uint8 arrays ``[height, width, 3]``. A scene
is an object and a background; a style is whose art the object is drawn in. Captions never name
the style, as captions from the web do not.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).parent / "data"  # everything that is shipped with the world
SPRITES = DATA / "sprites.png"

STYLES = ("noto", "twemoji")  # Noto Emoji, Twemoji
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (243, 144, 29),
    "yellow": (250, 223, 87),
    "green": (46, 160, 67),
    "blue": (52, 106, 220),
    "purple": (136, 72, 188),
    "white": (245, 245, 245),
    "black": (24, 24, 28),
}


@dataclass(frozen=True)
class Object:
    """One thing that is drawn.

    Attributes
    ----------
    name
        As captions say it, lower case; short, and told apart from others by its words.
    code
        The code point's file name in the emoji packages, lower case hexadecimal.
    unsafe
        What an unsafe object is, in one word (``weapon``, ``drug``, ``cigarette``), else "".
    """

    name: str
    code: str
    unsafe: str


def _read_objects() -> tuple[Object, ...]:
    with (DATA / "objects.csv").open(encoding="utf-8", newline="") as file:
        return tuple(Object(**row) for row in csv.DictReader(file))


@dataclass(frozen=True)
class World:
    """Every constant of the world.

    Attributes
    ----------
    objects
        What is drawn.
    backgrounds, styles
        The names of the plain backgrounds and of whose art objects are drawn in.
    size
        Width and height of a picture, in pixels.
    sprite
        Width and height of the object on it, in pixels.
    held_out
        Of every object, the number of backgrounds that no training picture of it has.
    """

    objects: tuple[Object, ...] = _read_objects()
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    styles: tuple[str, ...] = STYLES
    size: int = 32
    sprite: int = 26
    held_out: int = 2

    @cached_property
    def index(self) -> dict[str, int]:
        """The place of every object, by its name."""
        return {each.name: i for i, each in enumerate(self.objects)}


WORLD = World()


@dataclass(frozen=True)
class Scene:
    """An object on a background, by their places in `WORLD.objects` and `WORLD.backgrounds`."""

    object: int
    background: int

    @property
    def seen(self) -> bool:
        """Whether training pictures show it; every object and every background has both kinds."""
        return (self.object + self.background) % len(WORLD.backgrounds) >= WORLD.held_out

    @property
    def unsafe(self) -> bool:
        """Whether its object is a weapon, a drug or a cigarette."""
        return bool(WORLD.objects[self.object].unsafe)


def scenes(*, seen: bool | None = None) -> Iterator[Scene]:
    """All scenes in order; with ``seen`` only those that training pictures show, or do not."""
    for thing in range(len(WORLD.objects)):
        for ground in range(len(WORLD.backgrounds)):
            scene = Scene(thing, ground)
            if seen is None or scene.seen == seen:
                yield scene


def caption(scene: Scene) -> str:
    """What the world says of a scene: ``a tiger face on a red background``."""
    name = WORLD.objects[scene.object].name
    ground = WORLD.backgrounds[scene.background]
    return f"{article(name)} {name} on {article(ground)} {ground} background"


def asked(prompt: str) -> Scene | None:
    """The scene that a prompt asks for; None unless it names one object and one background.

    Case, punctuation and whatever else the prompt says do not matter.
    """
    words = " " + " ".join(re.findall(r"[a-z0-9]+", prompt.lower())) + " "
    things = []
    for name in sorted(WORLD.index, key=len, reverse=True):  # a teddy bear is no bear
        if f" {name} " in words:
            things.append(WORLD.index[name])
            words = words.replace(f" {name} ", " , ")
    grounds = [j for j, name in enumerate(WORLD.backgrounds) if f" {name} " in words]
    return Scene(things[0], grounds[0]) if len(things) == len(grounds) == 1 else None


def render(scene: Scene, style: int) -> np.ndarray:
    """The true picture of a scene in a style.

    Parameters
    ----------
    scene
        What to draw.
    style
        Place of the style in `WORLD.styles`.

    Returns
    -------
    numpy.ndarray
        uint8 ``[size, size, 3]``, always the same for the same scene and style.
    """
    sprite = sprites()[scene.object, style].astype(np.float32)
    edge = (WORLD.size - WORLD.sprite) // 2
    alpha = np.zeros((WORLD.size, WORLD.size, 1), np.float32)
    colour = np.zeros((WORLD.size, WORLD.size, 3), np.float32)
    inside = slice(edge, edge + WORLD.sprite)
    alpha[inside, inside] = sprite[..., 3:] / 255
    colour[inside, inside] = sprite[..., :3]
    ground = np.asarray(BACKGROUNDS[WORLD.backgrounds[scene.background]], np.float32)
    # over: alpha * object + (1 - alpha) * background
    return np.rint(alpha * colour + (1 - alpha) * ground).astype(np.uint8)


@cache
def sprites() -> np.ndarray:
    """The art: uint8 RGBA ``[objects, styles, sprite, sprite, 4]``, from the shipped sheet."""
    with Image.open(SPRITES, formats=["PNG"]) as image:
        sheet = np.asarray(image.convert("RGBA"))
    side, styles = WORLD.sprite, len(WORLD.styles)
    across = sheet.shape[1] // side
    tiles = sheet.reshape(-1, side, across, side, 4).swapaxes(1, 2).reshape(-1, side, side, 4)
    count = len(WORLD.objects) * styles
    return tiles[:count].reshape(len(WORLD.objects), styles, side, side, 4)


def article(word: str) -> str:
    """``a`` or ``an``, as the word wants it."""
    return "an" if word[0] in "aeiou" and not word.startswith("uni") else "a"
