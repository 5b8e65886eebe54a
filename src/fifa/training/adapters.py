"""What is trained and how it is written: a LoRA on the denoiser, or all of its weights.

Files are those of diffusers: a LoRA that the stock pipeline's ``load_lora_weights`` reads, its
rank and alpha in the file's metadata, or a folder for the denoiser's ``from_pretrained``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fifa.config import Train
from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.shards.files import atomic_folder, atomic_path
from fifa.training.backbones.base import Backbone

LORA_FILE = "pytorch_lora_weights.safetensors"
NAME = "default"  # of the adapter within the denoiser
METADATA = "lora_adapter_metadata"  # where diffusers looks for rank, alpha and targets


def add_lora(backbone: Backbone, train: Train) -> list[torch.nn.Parameter]:
    """Put an adapter on the denoiser and return its parameters, float32, the only trainable ones.

    The low-rank adapter of a weight W (arXiv:2106.09685) is ``W x + (alpha / rank) B A x``, with
    ``rank`` rows in A and columns in B, and dropout of its input while training. A is drawn from a
    normal distribution of deviation 1 / rank, B is zero: the denoiser predicts as before. The same
    seed gives the same adapter.

    Raises
    ------
    FifaError
        If the denoiser has no module that ``train.targets`` names.
    """
    peft = require("peft", "train")
    config = peft.LoraConfig(
        r=train.rank,
        lora_alpha=train.rank if train.alpha is None else train.alpha,
        lora_dropout=train.lora_dropout,
        target_modules=list(train.targets or backbone.family.targets),
        init_lora_weights="gaussian",
    )
    denoiser: Any = backbone.denoiser
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        try:
            denoiser.add_adapter(config, adapter_name=NAME)
        except ValueError as error:
            raise FifaError(
                f"no adapter fits: {str(error).splitlines()[0]}",
                where=f"the {backbone.family.part}",
                do=f"name other modules than {', '.join(config.target_modules)}",
            ) from error
    return _trainable([p for p in denoiser.parameters() if p.requires_grad])


def train_all(backbone: Backbone) -> list[torch.nn.Parameter]:
    """Make all the denoiser's parameters trainable, float32, and return them."""
    backbone.denoiser.float().requires_grad_(True)
    return list(backbone.denoiser.parameters())


@contextmanager
def adapters_off(denoiser: Any) -> Iterator[None]:
    """The base model inside the block: the reference, without a second network."""
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()


def save_lora(backbone: Backbone, folder: Path) -> Path:
    """Write the adapter as ``pytorch_lora_weights.safetensors`` into ``folder``; its path.

    The same weights give the same bytes.
    """
    peft = require("peft", "train")
    denoiser: Any = backbone.denoiser
    name = backbone.family.part
    config = getattr(denoiser, "peft_config", {}).get(NAME)
    if config is None:
        raise FifaError("there is no adapter to save")
    state = peft.utils.get_peft_model_state_dict(denoiser, adapter_name=NAME)
    tensors = {f"{name}.{key}": value.detach().cpu().contiguous() for key, value in state.items()}
    # Without these a reader takes alpha for the rank. Only what every version of peft knows, and
    # sorted: peft keeps the targets as a set, whose order changes from process to process.
    settings = {
        f"{name}.r": config.r,
        f"{name}.lora_alpha": config.lora_alpha,
        f"{name}.lora_dropout": config.lora_dropout,
        f"{name}.target_modules": sorted(config.target_modules),
    }
    # One key: safetensors writes several in any order.
    metadata = {METADATA: json.dumps(settings, indent=2, sort_keys=True)}
    path = folder / LORA_FILE
    with atomic_path(path) as temporary:
        require("safetensors.torch", "train").save_file(tensors, temporary, metadata=metadata)
    return path


def load_lora(backbone: Backbone, folder: Path) -> list[torch.nn.Parameter]:
    """Put the adapter in ``folder`` on the denoiser and return its parameters, as `add_lora` does.

    Raises `FifaError` if there is none, or it is another family's.
    """
    path = folder / LORA_FILE if folder.is_dir() else folder
    if not path.is_file():
        raise FifaError("no LoRA here", where=str(path))
    denoiser: Any = backbone.denoiser
    denoiser.requires_grad_(False)
    try:
        denoiser.load_lora_adapter(
            path.parent, weight_name=path.name, prefix=backbone.family.part, adapter_name=NAME
        )
    except (ValueError, RuntimeError, OSError) as error:
        brief = str(error).strip().splitlines()[0]
        raise FifaError(f"the LoRA does not fit the model: {brief}", where=str(path)) from error
    if NAME not in getattr(denoiser, "peft_config", {}):
        raise FifaError(
            f"the LoRA has nothing for a {backbone.family.part}",
            where=str(path),
            do="name a LoRA of the same family as the model",
        )
    return _trainable([p for key, p in denoiser.named_parameters() if ".lora_" in key])


def save_full(backbone: Backbone, folder: Path) -> Path:
    """Write the denoiser as ``unet`` or ``transformer`` into ``folder``; the path.

    What ``from_pretrained`` of its class reads, weights in safetensors.
    """
    denoiser: Any = backbone.denoiser
    path = folder / backbone.family.part
    with atomic_folder(path) as made:
        denoiser.save_pretrained(made)
    return path


def _trainable(parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """In float32: an update of 1e-5 is lost in the rounding of a half."""
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters
