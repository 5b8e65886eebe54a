"""What is said of generated images beside the reward models: judges, the detector, colours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from fifa.data.decode import BadImage
from fifa.data.images import Images, file_images, read
from fifa.data.prefetch import decode_images
from fifa.errors import FifaError
from fifa.models.hub import CONFIG_AND_WEIGHTS, model_digest, model_folder
from fifa.models.optional import require
from fifa.models.runtime import Parts, Runtime
from fifa.models.transformer import load_model
from fifa.scoring.table import score_path, scored_once
from fifa.shards.files import digest
from fifa.shards.pool import Shard, map_shards

Floats = npt.NDArray[np.float32]
Measure = Callable[[list[str], list[Image.Image]], Any]

# ITU-R BT.709 luma of R'G'B' as they stand in the file
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
COLOURS = ("brightness", "contrast", "saturation")
BATCH = 16  # images in a forward pass of the detector
SHARD = 64  # images measured between two points where a run can be resumed
JudgeImages = Callable[[list[str], list[Image.Image]], dict[str, Any]]


@dataclass(frozen=True)
class Judge:
    """Anything that says a number of an image: a classifier, a rule, the truth of a small world.

    Parameters
    ----------
    name
        For people: the heading of its column.
    measure
        From prompts and RGB images to float32 [n]; NaN where it has nothing to say.
    type
        ``reward``: higher is better, and it enters win rates. ``unsafe``: the probability that
        the image is unsafe.
    scale
        What the number is, in words.
    identity
        JSON that changes whenever a number could; None: it is asked again every time.
    tie
        The largest difference between two images that is too small to matter: a tie.
    """

    name: str
    measure: Measure
    type: Literal["reward", "unsafe"] = "reward"
    scale: str = ""
    identity: Any = None
    tie: float = 0.0


def as_judges(judges: Sequence[Judge] | Mapping[str, Measure | Judge] | None) -> list[Judge]:
    """Judges from a list, or from functions by name."""
    if isinstance(judges, Mapping):
        named = [j if isinstance(j, Judge) else Judge(name, j) for name, j in judges.items()]
    else:
        named = list(judges or ())
    names = [judge.name for judge in named]
    if len(set(names)) < len(names):
        raise FifaError(f"two judges have the same name: {', '.join(names)}")
    return named


def colours(prompts: list[str], images: list[Image.Image]) -> dict[str, Floats]:
    """Brightness, contrast and saturation of images, each in [0, 1], float32 [n]."""
    rows = []
    for image in images:
        rgb = np.asarray(image.convert("RGB"), np.float32) / 255
        # Y = 0.2126 R + 0.7152 G + 0.0722 B; contrast is its standard deviation
        luma = rgb @ LUMA
        high, low = rgb.max(-1), rgb.min(-1)
        # S = (max - min) / max, 0 for black, as in HSV
        saturation = np.where(high > 0, (high - low) / np.where(high > 0, high, 1), 0)
        rows.append((luma.mean(), luma.std(), saturation.mean()))
    table = np.asarray(rows, np.float32).reshape(-1, len(COLOURS))
    return {name: table[:, i] for i, name in enumerate(COLOURS)}


def load_detector(model: str, labels: Sequence[str], runtime: Runtime) -> Judge:
    """A transformers image classifier as a judge of what is unsafe; prompts are not read.

    Parameters
    ----------
    model
        A folder or hub id with safetensors weights and a preprocessor_config.json.
    labels
        Its labels that mean unsafe. The probability is the sum of theirs (softmax), or the
        largest of theirs where each label has one of its own (sigmoid).
    runtime
        Where and how it computes.

    Raises
    ------
    FifaError
        For a model that is not there or no classifier, and for labels that it does not have.
    """
    folder, name = model_folder(model), f"detector {Path(model).name}"
    transformers = require("transformers")
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError) as error:
        raise FifaError(f"cannot load the detector: {error}", where=str(model)) from error
    known = {str(label).lower(): int(i) for i, label in (config.id2label or {}).items()}
    wrong = [label for label in labels if label.lower() not in known]
    if wrong or not labels:
        raise FifaError(
            f"the detector has no label {', '.join(wrong)}"
            if wrong
            else "no unsafe labels are given",
            where=str(model),
            do=f"--unsafe-labels with some of: {', '.join(config.id2label.values())}",
        )
    columns = sorted(known[label.lower()] for label in labels)
    named = [config.id2label[i] for i in columns]

    @cache
    def load() -> tuple[Any, Any]:
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(folder, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise FifaError(f"cannot load the detector: {error}", where=name) from error
        classifier = load_model(transformers.AutoModelForImageClassification, folder)
        return processor, runtime.place(classifier)

    parts = Parts("image")

    def measure(prompts: list[str], images: list[Image.Image]) -> Floats:
        torch = require("torch")
        processor, classifier = load()

        def unsafe(rows: slice) -> Floats:
            some = [image.convert("RGB") for image in images[rows]]
            pixels = processor(images=some, return_tensors="pt")["pixel_values"]
            with torch.inference_mode(), runtime.autocast():
                logits = classifier(pixel_values=runtime.pixels(pixels)).logits.float()
            if config.problem_type == "multi_label_classification":
                found = logits.sigmoid()[:, columns].amax(1)
            else:
                found = logits.softmax(-1)[:, columns].sum(1)
            numbers: Floats = found.cpu().numpy()
            return numbers

        return np.concatenate([np.empty(0, np.float32), *parts.run(unsafe, len(images), BATCH)])

    weights = model_digest(folder, CONFIG_AND_WEIGHTS)
    identity = {"detector": weights, "labels": named, "dtype": runtime.precision}
    return Judge(name, measure, "unsafe", f"probability of {' or '.join(named)}", identity)


def each_image(
    images: pa.Table,
    folder: Path,
    scores: Path | None,
    role: str,
    name: str,
    identity: object,
    judge: JudgeImages,
) -> pa.Table:
    """What a function says of every image, kept and resumable.

    Parameters
    ----------
    images
        Rows of `fifa.evaluation.generate.IMAGES`.
    folder
        What their files are below.
    scores
        Where the finished table is kept; None keeps nothing.
    role, name, identity
        Name the table, and all that its numbers depend on beside the images.
    judge
        From the prompts and images of a shard (RGB) to columns of a float32 each image; `FifaError`
        where it gives something else.
    """
    files, prompts = images["file"].to_pylist(), images["prompt"].to_pylist()
    path = scores and score_path(scores, role, name, identity, files, prompts)

    def measure(part: slice) -> pa.Table:
        count = len(files[part])
        found = judge(prompts[part], open_pictures(generated_images(images[part], folder)))
        columns = {key: np.asarray(value, np.float32) for key, value in found.items()}
        if any(column.shape != (count,) for column in columns.values()):
            shapes = {key: column.shape for key, column in columns.items()}
            raise FifaError(f"{name} gave {shapes} for {count} images", do="one number per image")
        return pa.table(columns)

    shards = [
        Shard(digest(identity, files[part], prompts[part]), len(files[part]), part)
        for part in (slice(i, i + SHARD) for i in range(0, len(files), SHARD))
    ]
    what = f"images through {name}"
    return scored_once(path, lambda ledger: map_shards(what, measure, shards, ledger))


def generated_images(images: pa.Table, folder: Path) -> Images:
    """Rows of `fifa.evaluation.generate.IMAGES` as a table of images; files are named by content.

    ``folder`` is what their files are below.
    """
    return file_images(folder, images["file"].to_pylist(), keyed=True)


def open_pictures(images: Images) -> list[Image.Image]:
    """Generated images, RGB; `FifaError` where one is missing or damaged."""
    pictures: list[Any] = [None] * len(images)
    for row, picture in decode_images(read(images), lambda image, row: image.convert("RGB")):
        if isinstance(picture, BadImage):
            raise FifaError(
                f"cannot open a generated image: {picture}",
                where=str(Path(images.root) / images.place(row)),
                do="delete it, if it is there, and run `fifa evaluate` again",
            )
        pictures[row] = picture
    return pictures
