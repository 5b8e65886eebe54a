"""From an image to the numbers that a model sees, with the arithmetic of each original.

Orientation tags (EXIF) are not applied: none of the originals applies them, they open the file
with Pillow and go on. Transparency is dropped by ``convert("RGB")``, as in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fifa.data.decode import BadImage
from fifa.models.optional import require
from fifa.models.runtime import Tensor

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
# a function of a module, or a `partial` of one, can be called in other processes; a method cannot
Preprocess = Callable[[Image.Image], np.ndarray]
Channels = tuple[float, ...]

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP; all scorers here use them
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_RESIZED = 16_000_000  # pixels; a larger one would be cropped to a sliver anyway
MAX_ASPECT = 200  # of Qwen2-VL's smart_resize


def convert_crop(image: Image.Image, size: int) -> Pixels:
    """RGB, shortest side to ``size``, centre crop: transformers' `CLIPImageProcessor`.

    Transformers 4, with which these models were published, dropped transparency; transformers
    5 puts white behind it. This is the former.
    """
    resized, left, top = _shortest_side(_rgb(image), size, lambda space: space // 2)
    return _uint8(resized.crop((left, top, left + size, top + size)))


def crop_convert(image: Image.Image, size: int) -> Pixels:
    """Shortest side to ``size``, centre crop, RGB: the order of OpenAI's CLIP and torchvision.

    Palette images are resized before they have colours (Pillow takes the nearest pixel then),
    and the crop's corner is rounded to the even number.
    """
    resized, left, top = _shortest_side(image, size, lambda space: round(space / 2.0))
    return _uint8(resized.crop((left, top, left + size, top + size)).convert("RGB"))


def square(image: Image.Image, size: int) -> Pixels:
    """RGB, the whole picture squeezed to ``size`` x ``size``, uint8."""
    squeezed = _rgb(image).resize((size, size), Image.Resampling.BICUBIC)
    return _uint8(squeezed)


def refuse_slivers(image: Image.Image) -> Image.Image:
    """The image; raises `BadImage` where one side is more than `MAX_ASPECT` times the other."""
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise BadImage(f"{image.width:,} x {image.height:,} pixels: too long and thin")
    return image


def prepared(preprocess: Preprocess, image: Image.Image, row: int) -> np.ndarray:
    """What ``preprocess`` makes of an image that is no sliver; travels if ``preprocess`` does."""
    return preprocess(refuse_slivers(image))


def pad(image: Image.Image, size: int) -> Pixels:
    """RGB, longest side to ``size``, black around it: hpsv2's ``ResizeMaxSize``.

    The original resizes floats, not bytes, so this does: bicubic with antialias, which is what
    torchvision does to tensors since 0.17 (before, it did not antialias unless told to).

    Returns
    -------
    numpy.ndarray
        float32 ``[3, size, size]``, about 0 to 1: bicubic overshoots a little.
    """
    torch = require("torch")
    pixels = torch.from_numpy(_uint8(_rgb(image))).float().div(255)
    height, width = pixels.shape[1:]
    scale = size / float(max(height, width))
    if scale != 1.0:
        # an original of 20,000 x 1 would have no height left
        target = [max(1, round(side * scale)) for side in (height, width)]
        pixels = torch.nn.functional.interpolate(
            pixels[None], size=target, mode="bicubic", antialias=True, align_corners=False
        )[0]
        height, width = target
    left, top = (size - width) // 2, (size - height) // 2
    edges = (left, size - width - left, top, size - height - top)
    padded: Pixels = torch.nn.functional.pad(pixels, edges).numpy()
    return padded


def fit_area(image: Image.Image, *, area: int, factor: int) -> Pixels:
    """RGB, sides that are multiples of ``factor``, about ``area`` pixels: qwen-vl-utils.

    Returns uint8 ``[3, h, w]``; raises `BadImage` for an image longer than 200 times its width.
    """
    rgb = _rgb(image)
    width, height = rgb.size
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise BadImage(f"one side is more than {MAX_ASPECT} times the other")
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > area:
        # beta = sqrt(h w / area); each side down to a multiple of the factor
        beta = math.sqrt(height * width / area)
        h, w = (math.floor(side / beta / factor) * factor for side in (height, width))
    elif h * w < area:
        beta = math.sqrt(area / (height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    if min(h, w) == 0:
        raise BadImage(f"{width} x {height} is too narrow")
    return _uint8(rgb.resize((w, h), Image.Resampling.BICUBIC))


def fit_twice(image: Image.Image, *, area: int, factor: int, then: int) -> Pixels:
    """`fit_area`, and again to multiples of ``then``, with torch's bicubic on bytes."""
    functional = require("torch.nn.functional")
    pixels = fit_area(image, area=area, factor=factor)
    size = [max(then, round(side / then) * then) for side in pixels.shape[1:]]
    if size == list(pixels.shape[1:]):
        return pixels
    bytes_ = require("torch").from_numpy(pixels)[None]
    fitted = functional.interpolate(
        bytes_, size=size, mode="bicubic", antialias=True, align_corners=False
    )
    again: Pixels = fitted[0].numpy()
    return again


PREPROCESSING: dict[str, Callable[..., Pixels]] = {
    "convert-crop": convert_crop,
    "crop-convert": crop_convert,
    "pad": pad,
}


def standardise(pixels: Tensor, mean: Channels = MEAN, std: Channels = STD) -> Tensor:
    """``(x - mean) / std`` of pixels ``[b, 3, h, w]``: uint8 counts to 255, floats to 1."""
    unit = pixels if pixels.is_floating_point() else pixels.float().div(255)
    standard: Tensor = (unit - by_channel(mean, pixels.device)) / by_channel(std, pixels.device)
    return standard


@cache
def by_channel(values: Channels, device: Any) -> Tensor:
    """One number a channel, float32 ``[3, 1, 1]``; made once, as each copy makes a device wait."""
    torch = require("torch")
    with torch.inference_mode(False):  # whoever asks first: training may be next
        made: Tensor = torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
    return made


def _shortest_side(
    image: Image.Image, size: int, halve: Callable[[int], int]
) -> tuple[Image.Image, int, int]:
    """The resized image, and the left and top of its centre crop."""
    width, height = image.size
    short, long = sorted(image.size)
    longer = int(size * long / short)
    w, h = (size, longer) if width <= height else (longer, size)
    left, top = halve(w - size), halve(h - size)
    if w * h <= MAX_RESIZED:
        return image.resize((w, h), Image.Resampling.BICUBIC), left, top
    # 20,000 x 1 would become 4,480,000 x 224: resize only what the crop keeps
    box = (
        left * width / w,
        top * height / h,
        (left + size) * width / w,
        (top + size) * height / h,
    )
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box), 0, 0


def _rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: itself where it is, for Pillow would copy it."""
    return image if image.mode == "RGB" else image.convert("RGB")


def _uint8(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 ``[3, h, w]`` of an RGB image."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
