"""LoRAs: found, put into a pipeline and out again, merged, written as web UIs read them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fifa.console import quiet
from fifa.errors import FifaError
from fifa.models.hub import SINGLE_FILE, model_folder
from fifa.models.networks import LIBRARIES, load_parts, named_keys
from fifa.models.optional import require
from fifa.models.runtime import out_of_memory, release_memory
from fifa.shards.files import atomic_path, read_json, write_json
from fifa.shards.mirror import local

LORA_FILE = "pytorch_lora_weights.safetensors"  # what diffusers' and our trainer write
METADATA = "lora_adapter_metadata"  # where diffusers looks for rank, alpha and targets
ADAPTER = "tuned"
FAMILY = "take a LoRA and a base of one family and size, or copy the file again"
SAFE = {"use_safetensors": True, "local_files_only": True}
# A LoRA's two factors, in the names of files and as peft holds them
FACTOR = re.compile(r"lora(_A|_B|[._]down|[._]up)\.weight$")
FACTORS = (f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight")


@contextmanager
def adapted(pipe: Any, file: Path) -> Iterator[None]:
    """A pipeline with all of a LoRA in it while the block lasts.

    Raises `FifaError` for a LoRA that cannot be read, or of which only some is for the pipeline.
    """
    options: dict[str, Any] = {"weight_name": file.name, "use_safetensors": True}
    try:
        read = type(pipe).lora_state_dict(str(file.parent), **options)
        names = list(read[0] if isinstance(read, tuple) else read)
        pipe.load_lora_weights(str(file.parent), adapter_name=ADAPTER, **options)
    except Exception as error:  # diffusers', torch's and safetensors' own
        raise cannot_load("the LoRA", file, error, FAMILY) from error
    try:
        _check_lora(pipe, names, file)
        yield
    finally:
        pipe.unload_lora_weights()


def _check_lora(pipe: Any, names: Sequence[str], file: Path) -> None:
    """Raise `FifaError` unless all of a LoRA is in the pipeline: diffusers only warns.

    ``names`` are those in the file, as diffusers reads them.
    """
    factors: Counter[str] = Counter()
    for name in names:
        if found := FACTOR.search(name):
            factors[name[: found.start()].rstrip("._").replace(".processor.", ".")] += 1
    loaded = Counter(
        f"{part}.{name.partition('.lora_')[0]}"
        for part, adapters in pipe.get_list_adapters().items()
        if ADAPTER in adapters
        for name, _ in getattr(pipe, part).named_parameters()
        if name.endswith(FACTORS)
    )
    if not loaded:
        raise FifaError("the LoRA has no weights for this model", where=str(file))
    if loaded.total() == factors.total() and all(n == 2 for n in factors.values()):
        return
    raise FifaError(
        "only some of the LoRA's weights are for this model: "
        + named_keys(
            unused=[key for key in factors if key not in loaded],
            missing=[key for key, count in factors.items() if count != 2],
        ),
        where=str(file),
        do="evaluate it on the base that it was trained on, or copy the file again",
    )


def cannot_load(what: str, path: Path, error: Exception, do: str | None = None) -> FifaError:
    """What a library said of weights that it could not load."""
    brief = (str(error) or type(error).__name__).strip().splitlines()[0][:300]
    if out_of_memory(error):
        do = "a device with more memory, or --dtype float16"
    return FifaError(f"cannot load {what}: {brief}", where=str(path), do=do)


def find_lora(source: str) -> Path:
    """The file of a LoRA: named itself, or in a folder or on the hub.

    Raises `FifaError` where there is none, and for a file of whole weights.
    """
    path = local(source)
    if not path.is_file():
        folder = model_folder(source, ("*.json", "*.safetensors"))
        loose = sorted(folder.glob("*.safetensors"))
        path = folder / LORA_FILE if (folder / LORA_FILE).is_file() else folder
        path = loose[0] if len(loose) == 1 else path
    if not path.is_file():
        raise FifaError("no LoRA here", where=str(path), do="name its file")
    if path.suffix != ".safetensors":
        raise FifaError(
            "weights are read from .safetensors only", where=source, do="convert the file"
        )
    if not is_lora(path):
        raise FifaError(
            "the file holds whole weights, and is no LoRA",
            where=str(path),
            do=f"name its folder, or {SINGLE_FILE}",
        )
    return path


def is_lora(path: Path) -> bool:
    """Whether a safetensors file is a LoRA; a damaged one is told when it is loaded."""
    safetensors = require("safetensors")
    with suppress(OSError, safetensors.SafetensorError), safetensors.safe_open(path, "pt") as file:
        return any("lora" in name.lower() or "lokr" in name for name in file.keys())  # noqa: SIM118 - no dict
    return True


def merge_lora(base: Path, file: Path, out: Path, dtypes: Mapping[str, Any] | None = None) -> None:
    """Write the networks that a LoRA adapts, with the LoRA in their weights, as ``out/PART``.

    W + (alpha / rank) B A, computed in float32 on the CPU.

    Parameters
    ----------
    base
        The pipeline's folder.
    file
        The LoRA.
    out
        An existing folder.
    dtypes
        By part, the torch dtype that is written, if not float32.

    Raises
    ------
    FifaError
        As `adapted`, and for a pipeline that takes no LoRA.
    """
    torch, diffusers = require("torch"), require("diffusers", "train")
    index = read_json(base / "model_index.json", "the pipeline's index")
    cls = getattr(diffusers, str(index["_class_name"]))
    takes = getattr(cls, "_lora_loadable_modules", ())
    # what no LoRA adapts stays where it is: a T5 of 10 GB, a VAE
    absent = [n for n, v in index.items() if isinstance(v, list) and n not in takes and _is_net(n)]
    options: dict[str, Any] = {**dict.fromkeys(absent), "dtype": torch.float32, **SAFE}
    if "safety_checker" in index:
        options["requires_safety_checker"] = False
    with quiet(*(require(name, "train") for name in LIBRARIES)):
        try:
            options |= load_parts(base, torch.float32, options)
            pipe = cls.from_pretrained(base, **options)
        except FifaError:
            raise
        except Exception as error:  # diffusers', torch's and safetensors' own
            raise cannot_load("the pipeline", base, error) from error
        with adapted(pipe, file):
            parts = list(pipe.get_list_adapters())
            pipe.fuse_lora(components=parts)
            pipe.unload_lora_weights()  # what is fused stays
            for part in parts:
                network = getattr(pipe, part)
                # not by diffusers' own ``to``, which warns of weights to be kept, if of none
                torch.nn.Module.to(network, (dtypes or {}).get(part, torch.float32))
                network.save_pretrained(out / part)
                forget_origin(out / part)
    release_memory()


def forget_origin(folder: Path) -> None:
    """Leave out of a network's settings where it was trained, which is no part of what it is."""
    config = read_json(folder / "config.json", "the model's settings")
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", config)


def _is_net(name: str) -> bool:
    return not name.startswith(("_", "tokenizer", "scheduler", "processor"))


def write_kohya(file: Path, out: Path) -> None:
    """Write a LoRA of diffusers' names as ComfyUI and the web UIs read it.

    Of a UNet in kohya's names. Of a transformer in diffusers' own, which ComfyUI reads; it does
    not read alpha where diffusers writes it, so the weights are multiplied by it: alpha is the
    rank in both.

    Raises
    ------
    FifaError
        For a LoRA in other names, or whose alpha differs from layer to layer.
    """
    safetensors = require("safetensors.torch", "train")
    tensors = safetensors.load_file(file)
    with require("safetensors").safe_open(file, "pt") as opened:
        known = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    if not all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors):
        raise FifaError("not a LoRA in the names of diffusers and peft", where=str(file))
    if any(value for name, value in known.items() if name.endswith("_pattern")):
        raise FifaError("alpha or rank differ from layer to layer", where=str(file))
    for name, value in tensors.items():
        part = name.partition(".")[0]
        alpha, rank = known.get(f"{part}.lora_alpha"), known.get(f"{part}.r")
        if name.endswith("lora_B.weight") and alpha and rank:
            tensors[name] = value * (alpha / rank)
    if any(name.startswith("unet.") for name in tensors):
        tensors = require("diffusers.utils", "train").convert_state_dict_to_kohya(tensors)
    with atomic_path(out) as temporary:
        tensors = {name: value.contiguous() for name, value in sorted(tensors.items())}
        safetensors.save_file(tensors, temporary)
