"""Which training fits which card: the table of docs/gpu.md, from the rows of `families.py`.

    python scripts/memory_table.py [--write]

Every family's model at its published size is written as headers of safetensors files only, and
planned as `fifa train --dry-run` plans it, on cards that are not there. ``--write`` puts the table
into the page. Nothing is downloaded, loaded or computed.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fifa.config import Train
from fifa.errors import FifaError
from fifa.models.families import FAMILIES, Family
from fifa.training.backbones import load_backbone
from fifa.training.plan import Plan, memory_of
from measure_memory import PUBLISHED

CARDS = (12, 16, 24, 48, 80)  # GB
CONTEXT = 1.0  # GB that the driver, its context and other programs take of a card
COMPUTE = "bfloat16"
PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- memory: python scripts/memory_table.py --write -->\n", "<!-- /memory -->"
CLIP_WORDS = ("<|startoftext|>", "<|endoftext|>")


@dataclass(frozen=True)
class Kind:
    """A training that people run: what they call it, the family, its knobs."""

    title: str
    family: str
    resolution: int
    train: Train


FULL = Train(method="full", dtype=COMPUTE)
LORA = Train(dtype=COMPUTE)
DRAWS = Train(method="full", dtype=COMPUTE, draws=8)
ADAFACTOR = Train(method="full", dtype=COMPUTE, draws=8, optimizer="adafactor")
KINDS = (
    Kind("SD1.5, LoRA", "sd", 512, LORA),
    Kind("SD1.5, full, `--draws 8`", "sd", 512, DRAWS),
    Kind("SD1.5, full, a frozen copy", "sd", 512, FULL),
    Kind("SDXL, LoRA", "sdxl", 1024, LORA),
    Kind("SDXL, full, `--draws 8 --optimizer adafactor`", "sdxl", 1024, ADAFACTOR),
    Kind("SD3 medium, LoRA", "sd3", 1024, LORA),
    Kind("FLUX.1, LoRA", "flux", 1024, LORA),
)


def write_published(family: Family, folder: Path) -> Path:
    """A family's published model without its numbers: configurations, and headers of weights."""
    import diffusers
    import transformers

    published = PUBLISHED[family.name]
    index: dict[str, Any] = {"_class_name": family.pipeline}
    flow = family.schedule == "flow"
    with torch.device("meta"):
        parts = {
            family.part: getattr(diffusers, family.denoiser)(**published.denoiser),
            "vae": diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=16 if flow else 4,
            ),
        }
        for number, (name, settings, _) in enumerate(published.text, 1):
            cls = getattr(transformers, name)
            part = "text_encoder" if number == 1 else f"text_encoder_{number}"
            parts[part] = cls(cls.config_class(**settings))
    for part, module in parts.items():
        config = module.config
        text = config.to_json_string() if hasattr(config, "to_json_string") else None
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(text or module.to_json_string())
        write_headers(module, folder / part / "model.safetensors")
        index[part] = [type(module).__module__.partition(".")[0], type(module).__name__]
        if part.startswith("text_encoder"):
            tokenizer = part.replace("text_encoder", "tokenizer")
            write_words(folder / tokenizer)
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    scheduler = "FlowMatchEulerDiscreteScheduler" if flow else "DDPMScheduler"
    getattr(diffusers, scheduler)().save_config(folder / "scheduler")
    index["scheduler"] = ["diffusers", scheduler]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_headers(module: torch.nn.Module, path: Path) -> None:
    """A safetensors file of a module in float16 whose numbers are a hole: it takes no disk space.

    The format is the header's length (8 bytes), the header (JSON), then all numbers in order.
    """
    entries, place = {}, 0
    for name, tensor in module.state_dict().items():
        end = place + 2 * prod(tensor.shape)
        entries[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + place)


def write_words(folder: Path) -> None:
    """A CLIP tokenizer that knows no words."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(CLIP_WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))


def plan(kind: Kind, model: Path, card: float) -> Plan:
    """What the training would do on a card of so many GB, as `fifa train --dry-run` says it."""
    lora, free = kind.train.method == "lora", int((card - CONTEXT) * 1e9)
    device = torch.device("cuda")
    backbone = load_backbone(
        model, device=device, dtype=COMPUTE if lora else "float32", compute=COMPUTE
    )
    with patch("fifa.training.encoding.free_bytes", lambda _: free):  # the card is not there
        memory = memory_of(kind.train, backbone, kind.resolution, COMPUTE)
    return Plan(
        kind.train,
        pairs=kind.train.batch,
        held=0,
        dropped={},
        processes=1,
        resolution=kind.resolution,
        buckets=False,
        dtype=COMPUTE,
        latents=0,
        prompts=0,
        memory=memory,
        device=device,
        free=free,
    )


def cell(planned: Plan) -> str:
    """Pairs a micro-batch, in italics where activations are computed twice; - where none fits."""
    assert planned.fit is not None
    pairs, checkpointed = planned.fit
    try:
        planned.check()  # what is encoded at once halves where memory runs out
    except FifaError:
        return "-"
    if not pairs:
        return "-"
    return f"*{pairs}*" if checkpointed else str(pairs)


def table() -> str:
    """The page's table."""
    head = ["", *(f"{card} GB" for card in CARDS), "weights, gradients, optimiser", "encoding"]
    rows = [head, ["---"] * len(head)]
    families = {family.name: family for family in FAMILIES}
    with tempfile.TemporaryDirectory() as place:
        for kind in KINDS:
            model = Path(place) / kind.family
            if not model.exists():
                write_published(families[kind.family], model)
            plans = [plan(kind, model, card) for card in CARDS]
            memory = plans[-1].memory
            sizes = [f"{number / 1e9:.1f} GB" for number in (memory.held, memory.encoding)]
            rows.append([f"{kind.title}, {kind.resolution:,}", *map(cell, plans), *sizes])
    return "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in rows)


def in_page(page: str) -> tuple[str, str, str]:
    """The page before the table, the table, and the page after it."""
    before, _, rest = page.partition(BEGIN)
    found, _, after = rest.partition(END)
    return before + BEGIN, found, END + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/gpu.md")
    given = parser.parse_args()
    made = table()
    print(made, end="")
    if given.write:
        before, _, after = in_page(PAGE.read_text("utf-8"))
        PAGE.write_text(before + made + after, "utf-8")


if __name__ == "__main__":
    main()
