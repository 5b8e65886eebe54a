"""Add what verl-omni's offline DPO needs to ``fifa export --to verl-omni``.

    python scripts/encode_verl_omni.py CHECKOUT FOLDER --model MODEL

Its trainer reads the latents of both images and the text embeddings from the file with the pairs,
made by the model that is trained, a Stable Diffusion 3. CHECKOUT is verl-project/verl-omni: the
functions of its own ``prepare_offline_dpo.py`` make them here. FOLDER/train.parquet is replaced
when all are there.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from fifa.console import progress
from fifa.shards.files import atomic_path

GROUP = 32  # pairs in a row group


def own_functions(checkout: Path) -> Any:
    file = checkout / "examples/dpo_trainer/data_process/prepare_offline_dpo.py"
    spec = importlib.util.spec_from_file_location("prepare_offline_dpo", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise SystemExit(f"no checkout of verl-omni: {file} is not there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def encode(pipe: Any, theirs: Any, row: dict[str, Any], folder: Path, args: Any) -> dict[str, Any]:
    made = theirs._encode_prompt_tensors(pipe, row["prompt"], row["negative_prompt"], args)
    for side in ("img_win", "img_lose"):
        with Image.open(folder / row[side]) as image:
            latent = theirs._encode_image_latent(pipe, image.convert("RGB"), args)
        made[f"{side}_latents"] = theirs._tensor_to_bytes(latent)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--max-sequence-length", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    path = args.folder / "train.parquet"
    if not path.is_file():
        raise SystemExit(f"no export for verl-omni: {path} is not there")
    from diffusers import StableDiffusion3Pipeline

    theirs = own_functions(args.checkout)
    pipe = StableDiffusion3Pipeline.from_pretrained(
        args.model, torch_dtype=getattr(torch, args.dtype), transformer=None
    ).to(args.device)
    table, writer = pq.read_table(path), None
    with atomic_path(path) as temporary, progress("encoding pairs", len(table)) as advance:
        for start in range(0, len(table), GROUP):
            part = table.slice(start, GROUP)
            made = [encode(pipe, theirs, row, args.folder, args) for row in part.to_pylist()]
            for name in made[0]:
                column = pa.array([row[name] for row in made], pa.binary())
                place = part.schema.get_field_index(name)  # made before, for another model
                part = part.drop_columns([name]) if place >= 0 else part
                part = part.append_column(name, column)
            writer = writer or pq.ParquetWriter(temporary, part.schema)
            writer.write_table(part)
            advance(len(part))
        if writer:
            writer.close()
    print(path)


if __name__ == "__main__":
    main()
