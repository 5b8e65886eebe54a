"""A checkpoint as a whole pipeline: what a further training, or any other program, starts from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fifa.errors import FifaError
from fifa.evaluation.models import Model, class_name, part_name
from fifa.evaluation.sampling import PipelineLoader, Settings
from fifa.models.families import PIPELINES
from fifa.models.runtime import release_memory
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
    part = _trained_part(model)
    index = read_json(model.base / INDEX, "the pipeline's index")
    with atomic_folder(out) as made:
        for name in index:
            if name[0] != "_" and name != part and (model.base / name).is_dir():
                shutil.copytree(model.base / name, made / name, copy_function=_link)
        if model.method == "part":
            shutil.copytree(model.path, made / part, copy_function=_link)
        else:
            _add(model, part, made / part)
        config = read_json(made / part / "config.json", "the model's settings")
        config.pop("_name_or_path", None)  # where it was trained is no part of what it is
        write_json(made / part / "config.json", config)
        for name, value in index.items():
            if isinstance(value, list) and not (made / name).is_dir():
                index[name] = [None, None]  # so diffusers tells a part that is not there
        write_json(made / INDEX, index)
        write_manifest(made, [made])
    return out


def _trained_part(model: Model) -> str:
    """``unet`` or ``transformer``."""
    if model.method == "part":
        return part_name(model.path)
    return PIPELINES[class_name(model.base)].part


def _add(model: Model, part: str, out: Path) -> None:
    """Write the network with the LoRA in its weights."""
    settings = Settings(None, None, _sampler(model.base), None, None, "", "cpu", "float32")
    loader = PipelineLoader(model.base, settings, "cpu")
    with loader.use(model) as pipe:
        others = [name for name in pipe.get_list_adapters() if name != part]
        if others:
            raise FifaError(
                f"the LoRA also adapts {', '.join(others)}, which is not merged",
                where=str(model.path),
            )
        network = getattr(pipe, part)
        network.fuse_lora()
        network.unload_lora()  # what is fused stays
        network.save_pretrained(out)
    release_memory()


def _sampler(base: Path) -> str:
    config = read_json(base / "scheduler" / "scheduler_config.json", "the scheduler's settings")
    return str(config["_class_name"])


def _link(source: str, target: str) -> str:
    """A hard link to a file, its links followed, or a copy."""
    real = os.path.realpath(source)
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)
    return target
