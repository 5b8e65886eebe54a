"""A diffusion model put together from what people have: one file, another VAE, a LoRA in its base.

Whatever it is, it becomes a folder in diffusers' layout, most of it links, in the cache; all else
sees folders only. What is converted or merged is kept under what names its content, so it is made
once, and every fingerprint is of the weights that are used.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fifa.config import Convert, Generate, Train
from fifa.console import echo, quiet
from fifa.errors import FifaError
from fifa.models.families import PIPELINES, Family
from fifa.models.frozen import quantized_parts
from fifa.models.hub import (
    CONFIG_AND_WEIGHTS,
    HUB_SETTINGS,
    PART_FILES,
    fetch_variants,
    model_digest,
    model_folder,
    pipeline_folder,
    weight_copies,
    weight_files,
)
from fifa.models.lora import find_lora, is_lora, merge_lora, write_kohya
from fifa.models.networks import LIBRARIES, loading, named_keys, weights_in
from fifa.models.optional import require
from fifa.shards.files import (
    atomic_folder,
    cache_folder,
    check_free,
    content_digest,
    digest,
    read_json,
    write_json,
)
from fifa.shards.mirror import local

INDEX = "model_index.json"
PIECES = ("parts", "variant", "vae", "init_lora")  # what `assembled` reads beside the model
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# of weights that are nothing without them: ComfyUI's scaled fp8, bitsandbytes' 4 bits
SCALES = re.compile(r"(scale_weight|weight_scale|scaled_fp8|comfy_quant|\.absmax|\.quant_map)$")
# kinds that diffusers takes for one model: Z-Image for Turbo, klein for dev
SIBLINGS = ("z-image", "flux-2")
PREFIX = "model.diffusion_model."  # what ComfyUI puts before a denoiser's names
Entries = dict[str, Path]  # of a folder to be: what stands where


def assembled(model: str, asked: Train | Generate | Convert) -> Path:
    """The folder of a model in diffusers' layout, with everything in it that was asked for.

    Parameters
    ----------
    model
        A folder in diffusers' layout, a hub id, or a ``.safetensors`` file in the layout that the
        model's authors use.
    asked
        Its ``parts``, ``variant``, ``vae`` and ``init_lora`` are read.

    Raises
    ------
    FifaError
        For what is not there or does not fit: a file in a layout that diffusers does not know or
        of another family than ``parts``, parts that neither has, a variant that no part has, a
        VAE that is none, a LoRA of another model.
    """
    file = local(model)
    if file.is_file():
        if asked.variant:
            raise FifaError("a single file has no variants", where=model, do="leave out --variant")
        folder = _of_file(file, asked.parts)
    elif file.suffix == ".safetensors":
        raise FifaError("there is no such file", where=str(file.absolute()))
    elif asked.parts:
        raise FifaError(
            "only a single file takes its other parts from elsewhere",
            where=model,
            do="leave out --parts",
        )
    else:
        folder = pipeline_folder(model, asked.variant)
    if not (folder / INDEX).is_file():
        return folder  # whoever opens it says what it lacks
    if asked.variant:
        folder = _linked(_with_variant(folder, asked.variant))
    if asked.vae:
        folder = _linked({**_entries(folder), "vae": _vae(asked.vae, folder)})
    if asked.init_lora:
        folder = _linked({**_entries(folder), **_merged(folder, find_lora(asked.init_lora))})
    return folder


def convert(asked: Convert, out: Path) -> Path:
    """Write a model's folder with all that its links lead to, or a LoRA's file; returns ``out``.

    Raises `FifaError` as `assembled` and `fifa.models.lora.write_kohya`, and where ``out`` is
    there already.
    """
    if asked.layout == "kohya":
        if out.suffix != ".safetensors" or out.exists():
            raise FifaError("--out names a new .safetensors file", where=str(out))
        write_kohya(find_lora(asked.source), out)
        return out
    check_free(out, "model")
    folder = assembled(asked.source, asked)
    if not (folder / INDEX).is_file():
        raise FifaError(f"not a diffusion model: there is no {INDEX}", where=str(folder))
    with atomic_folder(out) as made:
        shutil.copytree(folder, made, dirs_exist_ok=True)
    return out


def _place(*names: object) -> Path:
    return cache_folder() / "models" / digest(*names)


def _entries(folder: Path) -> Entries:
    return {path.name: path for path in folder.iterdir()}


def _linked(entries: Mapping[str, Path], index: Mapping[str, Any] | None = None) -> Path:
    """A folder of links; ``index`` is its ``model_index.json`` if it is not among the entries."""
    real = {name: str(path.resolve()) for name, path in sorted(entries.items())}
    place = _place("links", real, index)
    if not place.is_dir():
        with atomic_folder(place) as made:
            for name, path in real.items():
                (made / name).parent.mkdir(exist_ok=True)
                (made / name).symlink_to(path)
            if index is not None:
                write_json(made / INDEX, index)
    return place


def _with_variant(folder: Path, variant: str) -> Entries:
    """The folder's files, of weights with that variant only where a part has it."""
    entries, found = {INDEX: folder / INDEX}, set[str | None]()
    for part in (path for path in folder.iterdir() if path.is_dir()):
        copies = weight_copies(part)
        found |= set(copies)
        wanted = variant if variant in copies else weight_files(part).variant
        others = [path for name, paths in copies.items() if name != wanted for path in paths]
        for path in part.iterdir():
            # diffusion_pytorch_model.safetensors.index.fp16.json
            of_index = path.name.partition(".index.")[2].rpartition(".")[0] or None
            index = ".safetensors.index." in path.name
            if path.is_file() and path not in others and (not index or of_index == wanted):
                entries[f"{part.name}/{path.name}"] = path
    if variant not in found:
        has = ", ".join(sorted(name for name in found if name))
        raise FifaError(
            f"no part of the model has weights of the variant {variant}",
            where=str(folder),
            do=f"--variant {has.replace(', ', ' or ')}" if has else "leave out --variant",
        )
    return entries


def _vae(source: str, base: Path) -> Path:
    """The folder of a VAE: it itself, within a pipeline, of the hub, or converted from a file."""
    file = Path(source).expanduser()
    settings = read_json(base / "vae" / "config.json", "the settings of the model's vae")
    if file.is_file():
        return _converted_vae(file, base, str(settings.get("_class_name")))
    names = ("config.json", "diffusion_pytorch_model*.safetensors")
    folder = model_folder(source, (*names, *(f"vae/{name}" for name in names)))
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    known = read_json(folder / "config.json", "the settings of the VAE", missing={})
    if not str(known.get("_class_name", "")).startswith("Autoencoder"):
        raise FifaError("no VAE here", where=str(folder), do="name its folder, with config.json")
    return folder


def _converted_vae(file: Path, base: Path, class_name: str) -> Path:
    diffusers = require("diffusers", "train")
    readable = require("diffusers.loaders.single_file_model", "train").SINGLE_FILE_LOADABLE_CLASSES
    if class_name not in readable:
        raise FifaError(
            f"diffusers reads no {class_name} from a single file",
            where=str(file),
            do="name the VAE's folder, with config.json",
        )
    place = _place("vae", content_digest(file), model_digest(base / "vae", (".json",)))
    if not place.is_dir():
        with _library("the VAE", file), atomic_folder(place) as made:
            options = {
                "config": str(base),
                "subfolder": "vae",
                "local_files_only": True,
                "dtype": _dtype([file], "float32"),
            }
            network = getattr(diffusers, class_name).from_single_file(str(file), **options)
            network.save_pretrained(made)
    return place


def _merged(folder: Path, lora: Path) -> Entries:
    """The parts that a LoRA adapts, with it in their weights, in the types of the model's own."""
    if parts := quantized_parts(folder):
        raise FifaError(
            f"a LoRA is not merged into quantised weights ({', '.join(parts)})",
            where=str(folder),
            do="--model with the full weights; --quantize makes them small afterwards",
        )
    networks = {path.name: path for path in folder.iterdir() if weight_files(path).paths}
    weights = {name: model_digest(path, CONFIG_AND_WEIGHTS) for name, path in networks.items()}
    place = _place("lora", content_digest(lora), weights)
    if not place.is_dir():
        echo(f"merging {lora.name} into its base, in {place}")
        dtypes = {n: _dtype(weight_files(path).paths, "float32") for n, path in networks.items()}
        with atomic_folder(place) as made:
            merge_lora(folder, lora, made, dtypes)
    return _entries(place)


def _of_file(file: Path, parts: str | None) -> Path:
    """The folder of a model in one file, converted where it is not yet."""
    if file.suffix != ".safetensors":
        raise FifaError(
            "weights are read from .safetensors only", where=str(file), do="convert the file"
        )
    if scales := [name for name, _ in weights_in([file]) if SCALES.search(name)]:
        raise FifaError(
            f"the file's weights are scaled or quantised ({named_keys(scales=scales)}), which is "
            "not read",
            where=str(file),
            do="take the file in bf16, fp16 or fp8 without scales",
        )
    if is_lora(file):
        raise FifaError(
            "a LoRA is no model", where=str(file), do="--model its base, --init-lora this file"
        )
    source = parts or _usual_parts(file)
    try:
        settings = model_folder(source, HUB_SETTINGS)
    except FifaError as error:
        if parts:
            raise
        raise FifaError(
            f"the file has no settings and tokenizers, and {source} cannot be had: {error}",
            where=str(file),
            do="--parts with a folder in diffusers' layout of the same kind of model",
        ) from error
    index = read_json(settings / INDEX, "the index of the parts")
    family = PIPELINES.get(str(index.get("_class_name")))
    if family is None:
        raise FifaError(
            f"a model of class {index.get('_class_name')} is not known",
            where=str(settings),
            do=f"--parts with one of {', '.join(PIPELINES)}",
        )
    # what it is converted to depends on the settings, not on the weights beside them
    named = {part: model_digest(settings / part, PART_FILES[1:]) for part in _networks(family)}
    place = _place("file", content_digest(file), named)
    if not place.is_dir():
        echo(f"{file.name} is converted once to a folder of parts, in {place}")
        with atomic_folder(place) as made:
            _convert(file, settings, index, family, made)
    made_here = _entries(place)
    lacking = [part for part in _networks(family) if part not in made_here]
    if lacking:
        settings = fetch_variants(source, settings, HUB_SETTINGS, ("", "fp16", "bf16"))
    entries, missing = {}, []
    for part in (*family.parts, *family.optional):
        if part in made_here:
            entries[part] = made_here[part]
        elif part not in lacking or weight_files(settings / part).paths:
            entries[part] = settings / part
        elif part not in family.optional:
            missing.append(part)
    if missing:
        raise FifaError(
            f"the file has no {', '.join(missing)}, and {source} has no weights of them",
            where=str(file),
            do="--parts with a folder in diffusers' layout, or a hub id, that has them",
        )
    own = {
        name: value
        if not isinstance(value, list) or (name in entries and entries[name].is_dir())
        else [None, None]  # so diffusers tells a part that is not there
        for name, value in index.items()
    }
    whole = {name: path for name, path in entries.items() if path.is_dir()}
    return _linked(whole, own)


def _networks(family: Family) -> list[str]:
    """The parts of a family that have weights."""
    parts = (*family.parts, *family.optional)
    return [part for part in parts if not part.startswith(("tokenizer", "scheduler", "processor"))]


def _usual_parts(file: Path) -> str:
    """The hub id of the model that a file's names and shapes are of, as diffusers tells it."""
    single = require("diffusers.loaders.single_file_utils", "train")
    torch = require("torch")
    shapes = {
        name: torch.empty(entry.get_shape(), device="meta") for name, entry in weights_in([file])
    }
    kind = single.infer_diffusers_model_type(shapes)
    # what it knows nothing of is SD1 to it
    if kind == "v1" and not any(name.startswith(single.LDM_UNET_KEY) for name in shapes):
        raise FifaError(
            "the model is a single file in no layout that diffusers knows",
            where=str(file),
            do="name a folder in diffusers' layout; of a network alone, the folder it is in",
        )
    if kind.startswith(SIBLINGS):
        raise FifaError(
            "the file's weights do not tell which of its family's models it is",
            where=str(file),
            do="--parts with the folder or hub id of that model: what differs is in its settings",
        )
    source = str(single.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])
    echo(f"{file.name} is of the kind {kind}: what it lacks is of {source} (--parts names another)")
    return source


def _convert(
    file: Path, settings: Path, index: Mapping[str, Any], family: Family, out: Path
) -> None:
    """Write the networks that a file has, with the settings of a folder in diffusers' layout."""
    diffusers = require("diffusers", "train")
    api = require("diffusers.loaders.single_file", "train")
    known = require("diffusers.loaders.single_file_utils", "train")
    vae = tuple(known.LDM_VAE_KEYS)
    with _library(f"a {family.title} model in one file", file):
        weights = api.load_single_file_checkpoint(str(file), local_files_only=True)
        for part in _networks(family):
            library, class_name = index.get(part) or (None, None)
            absent = part == "vae" and not any(name.startswith(vae) for name in weights)
            if library not in LIBRARIES or absent:
                continue
            own = dict(weights)  # which is emptied
            if part == "transformer":
                own = {name.removeprefix(PREFIX): value for name, value in own.items()}
            try:
                network = api.load_single_file_sub_model(
                    library_name=library,
                    class_name=class_name,
                    name=part,
                    checkpoint=own,
                    pipelines=diffusers.pipelines,
                    is_pipeline_module=False,
                    cached_model_config_path=str(settings),
                    local_files_only=True,
                    torch_dtype=_dtype([file], family.half),
                )
            except known.SingleFileComponentError:
                if part == family.part:
                    raise
                continue
            network.save_pretrained(out / part)


@contextmanager
def _library(what: str, file: Path) -> Iterator[None]:
    """diffusers without its notes, and what it raises as ours."""
    own = "copy the file again, or --parts with the settings of its own family"
    libraries = [require(name, "train") for name in LIBRARIES]
    with quiet(*libraries), loading(what, file, own):
        try:
            yield
        except NotImplementedError as error:  # torch, of what is still on the device "meta"
            raise FifaError(f"the file lacks weights of {what}", where=str(file), do=own) from error


def _dtype(paths: Sequence[Path], otherwise: str) -> Any:
    """The torch dtype of most of the weights; ``otherwise`` where it is none to compute in."""
    often = Counter(entry.get_dtype() for _, entry in weights_in(paths)).most_common(1)
    return getattr(require("torch"), FLOATS.get(often[0][0] if often else "", otherwise))
