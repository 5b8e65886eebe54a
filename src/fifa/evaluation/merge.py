"""A checkpoint as a whole pipeline: what a further training, or any other program, starts from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fifa.errors import FifaError
from fifa.evaluation.models import Model, part_name
from fifa.models.lora import forget_origin, merge_lora
from fifa.shards.files import atomic_folder, read_json, write_json
from fifa.shards.manifest import write_manifest

INDEX = "model_index.json"


def merge_checkpoint(model: Model, out: Path) -> Path:
    """Write the base with a checkpoint's weights in it, in diffusers' layout; returns ``out``.

    A LoRA is added to the weights that it adapts, W + (alpha / rank) B A, in float32 on the CPU.
    The other parts are hard links to the base's files where the file system has them, and copies
    elsewhere. The folder is there whole or not at all, and left alone where it is there.

    Parameters
    ----------
    model
        A LoRA, or a UNet or transformer.
    out
        The pipeline's folder.

    Raises
    ------
    FifaError
        For weights that do not fit the base, for a checkpoint that is a pipeline already, and
        where the folder cannot be written.
    """
    if (out / INDEX).is_file():
        return out
    if model.method not in ("lora", "part"):
        raise FifaError("there are no weights to put into the base", where=model.source)
    index = read_json(model.base / INDEX, "the pipeline's index")
    with atomic_folder(out) as made:
        if model.method == "lora":
            merge_lora(model.base, model.path, made)
        else:
            part = part_name(model.path)
            shutil.copytree(model.path, made / part, copy_function=_link)
            forget_origin(made / part)
        for name in index:
            if name[0] != "_" and not (made / name).exists() and (model.base / name).is_dir():
                shutil.copytree(model.base / name, made / name, copy_function=_link)
        for name, value in index.items():
            if isinstance(value, list) and not (made / name).is_dir():
                index[name] = [None, None]  # so diffusers tells a part that is not there
        write_json(made / INDEX, index)
        write_manifest(made, [made])
    return out


def _link(source: str, target: str) -> str:
    """A hard link to a file, its links followed, or a copy."""
    real = os.path.realpath(source)
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)
    return target
