"""A frozen network in less memory: weights in 4 or 8 bits, or in CPU memory until their turn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.shards.files import read_json

OFFLOAD = "offload"
# Bytes a weight of a linear layer, with the scales that belong to it. nf4: half a byte, a byte for
# 64 weights, and four for 256 of these (double quantisation). int8: a row's scale is next to none.
BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
BLOCK = re.compile(r"(\w+\.\d+)\.")  # of a list of blocks, by its weights' names


def quantization(kind: str | None, dtype: Any, device: Any) -> dict[str, Any]:
    """What ``from_pretrained`` of diffusers takes to load weights quantised by bitsandbytes.

    Linear layers are quantised, all else has ``dtype``.

    Parameters
    ----------
    kind
        ``nf4`` (arXiv:2305.14314, scales quantised as well) or ``int8`` (arXiv:2208.07339); None
        for weights that are quantised in their files.
    dtype
        The torch dtype that is computed in.
    device
        Where they go: a quantised layer is loaded there.

    Raises
    ------
    FifaError
        On a processor, and where bitsandbytes is not installed.
    """
    check_quantizer(device)
    place = {"device_map": {"": device}}
    if kind is None:
        return place
    config = require("diffusers", "train").BitsAndBytesConfig
    settings: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    return {"quantization_config": config(**settings), **place}


def quantized_parts(folder: Path) -> list[str]:
    """The parts of a model's folder whose files hold quantised weights.

    Raises `FifaError` for weights that are quantised by anything but bitsandbytes.
    """
    parts = []
    for path in sorted(folder.glob("*/config.json")):
        known = read_json(path, "the settings of a part").get("quantization_config")
        if known is None:
            continue
        method = known.get("quant_method") if isinstance(known, dict) else known
        if method != "bitsandbytes":
            raise FifaError(
                f"weights quantised by {method} are not read, bitsandbytes' are",
                where=str(path.parent),
                do="name the model's full weights; --quantize makes them small",
            )
        parts.append(path.parent.name)
    return parts


def check_quantizer(device: Any) -> None:
    """Raise `FifaError` where quantised weights cannot be loaded: no GPU, or no bitsandbytes."""
    require("bitsandbytes", "quant", what="a quantised model")
    need_gpu(device)


def need_gpu(device: Any) -> None:
    """Raise `FifaError` on a processor, for which diffusers refuses bitsandbytes."""
    if device.type == "cpu":
        raise FifaError(
            "quantised weights need a GPU",
            do="leave out --quantize, or name a model that is not quantised",
        )


def offload_blocks(network: Any, device: Any) -> None:
    """Keep a network's blocks in CPU memory, each layer on the device while it computes.

    The rest of the network is moved there. By diffusers' group offloading, applied before there
    are adapters, so that these stay on the device. For gradients every block has to be computed
    again in the backward pass (gradient checkpointing). On CUDA layers are prefetched on a stream.
    """
    torch = require("torch")
    apply = require("diffusers.hooks", "train").apply_group_offloading
    blocks = [child for child in network.children() if isinstance(child, torch.nn.ModuleList)]
    for child in network.children():
        if child not in blocks:
            child.to(device)
    for own in (*network._parameters.values(), *network._buffers.values()):
        if own is not None:
            own.data = own.data.to(device)
    for block in (one for some in blocks for one in some):
        for layer in block.modules():
            if layer._parameters:
                layer.forward = _aliased(layer)
        apply(
            block,
            onload_device=device,
            offload_type="leaf_level",
            use_stream=device.type == "cuda",
        )


def _aliased(layer: Any) -> Callable[..., Any]:
    """The layer's forward pass with other tensors over the same memory for its weights.

    Of a weight autograd keeps the tensor itself, whose memory is another one by the time of the
    backward pass; of the other tensor it keeps what was on the device.
    """
    forward, own = layer.forward, layer._parameters

    def run(*inputs: Any, **options: Any) -> Any:
        kept = dict(own)
        own.update(
            {name: value if value is None else value.detach() for name, value in own.items()}
        )
        try:
            return forward(*inputs, **options)
        finally:
            own.update(kept)

    return run


def kept_bytes(shapes: Mapping[str, tuple[int, ...]], kept: str | None, size: int) -> int:
    """Bytes on the device of a frozen network's weights.

    Parameters
    ----------
    shapes
        By name.
    kept
        ``nf4``, ``int8``, ``offload`` (two blocks at a time: one computes, the next one comes), or
        None.
    size
        Bytes of a number that is not quantised.
    """
    counts = {name: prod(shape) for name, shape in shapes.items()}
    if kept in BYTES:
        linear = sum(n for name, n in counts.items() if len(shapes[name]) == 2)
        return int(linear * BYTES[str(kept)]) + size * (sum(counts.values()) - linear)
    if kept == OFFLOAD:
        blocks: Counter[str] = Counter()
        for name, count in counts.items():
            found = BLOCK.match(name)
            blocks[found[1] if found else ""] += count
        rest = blocks.pop("", 0)
        return size * (rest + 2 * max(blocks.values(), default=0))
    return size * sum(counts.values())
