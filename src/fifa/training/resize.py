"""From images of any size to the few sizes that a model trains on; a pair is treated as one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from fifa.errors import FifaError

Size = tuple[int, int]  # height, width
MAX_ASPECT = 2.0  # of a bucket; images beyond it lose their ends
MAX_RESIZED = 64_000_000  # pixels; beyond that only what the crop keeps is resized


class Frame(NamedTuple):
    """What part of an image is trained on: SDXL's size and crop conditioning (arXiv:2307.01952).

    Parameters
    ----------
    height, width
        Of the original.
    top, left
        The corner of the crop, in pixels of the resized image.
    target_height, target_width
        Of the crop.
    """

    height: int
    width: int
    top: int
    left: int
    target_height: int
    target_width: int


@dataclass(frozen=True)
class Resize:
    """How images become training images: scaled to cover the target, then cropped at the centre.

    Parameters
    ----------
    resolution
        The side of a square, in pixels; with buckets, the root of the largest area.
    multiple
        Sides are multiples of it (`Backbone.pixels_per_latent`).
    buckets
        False: every image becomes a square. True: of the sizes of `bucket_sizes` it becomes the
        one nearest to its aspect, so that little is cut.
    """

    resolution: int
    multiple: int
    buckets: bool = False

    def __post_init__(self) -> None:
        if self.resolution < self.multiple or self.resolution % self.multiple:
            raise FifaError(
                f"a resolution of {self.resolution} pixels does not fit the model",
                do=f"choose a multiple of {self.multiple}",
            )

    @property
    def sizes(self) -> list[Size]:
        """All sizes that a training image can have."""
        square = (self.resolution, self.resolution)
        return bucket_sizes(self.resolution, self.multiple) if self.buckets else [square]

    def frames(self, *images: Size) -> tuple[Frame, ...]:
        """The frames of a pair's images of these sizes (height, width): one target for both.

        The target is the size nearest to the geometric mean of both aspects.
        """
        aspect = sum(math.log(height / width) for height, width in images) / len(images)
        # ties (an aspect in the middle of two) go to the first, whatever the order of the pair
        target = min(self.sizes, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))
        return tuple(_frame(size, target) for size in images)


def bucket_sizes(resolution: int, multiple: int) -> list[Size]:
    """(height, width) of all buckets, tall ones last.

    Sides are multiples of ``multiple`` and of about a sixteenth of the resolution, aspects at
    most `MAX_ASPECT`, and the area at most that of the square, as near to it as the steps allow.
    """
    step = max(multiple, round(resolution / 16 / multiple) * multiple)
    area = resolution * resolution
    sizes = {(resolution, resolution)}
    for short in range(step, resolution, step):
        long = area // short // step * step
        if long <= MAX_ASPECT * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda size: size[0] / size[1])


def cut(image: Image.Image, frame: Frame, flip: bool = False) -> npt.NDArray[np.uint8]:
    """The pixels of ``frame``, uint8 ``[3, h, w]``: RGB, Lanczos, centre crop.

    EXIF's rotation is not applied and transparency is dropped, as reward models do it.
    ``flip`` mirrors left and right.
    """
    rgb = image.convert("RGB")
    h, w = frame.target_height, frame.target_width
    rows, columns = _cover((frame.height, frame.width), (h, w))
    if rows * columns <= MAX_RESIZED:
        resized = rgb.resize((columns, rows), Image.Resampling.LANCZOS)
        crop = resized.crop((frame.left, frame.top, frame.left + w, frame.top + h))
    else:
        x, y = frame.width / columns, frame.height / rows
        box = (frame.left * x, frame.top * y, (frame.left + w) * x, (frame.top + h) * y)
        crop = rgb.resize((w, h), Image.Resampling.LANCZOS, box=box)
    pixels = np.asarray(crop)
    if flip:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _frame(size: Size, target: Size) -> Frame:
    rows, columns = _cover(size, target)
    top, left = (rows - target[0]) // 2, (columns - target[1]) // 2
    return Frame(*size, top, left, *target)


def _cover(size: Size, target: Size) -> Size:
    """The size to which an image is scaled, its aspect kept, to cover the target exactly."""
    # scale = max(target_h / h, target_w / w); the side that decides is exact
    if target[0] * size[1] >= target[1] * size[0]:
        return target[0], max(target[1], round(size[1] * target[0] / size[0]))
    return max(target[0], round(size[0] * target[1] / size[1])), target[1]
