"""A small data set with a known taste: people like the redder picture."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image

from fifa.data import read_pairs


def tinted(red: float, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 120, (20, 20, 3), np.uint8)
    pixels[..., 0] = np.clip(pixels[..., 0] + 130 * red, 0, 255)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_feedback(folder, *, prompts=8, each=3, seed=0, broken=()):
    """``each`` pairs a prompt, every pair two pictures of its own; label 1 for the redder."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    lines = []
    for prompt in range(prompts):
        for pair in range(each):
            names, reds = [], draw.permutation([0.1, 0.9])
            for side in (0, 1):
                name = f"{prompt}-{pair}-{side}.png"
                data = tinted(reds[side], seed=len(lines) * 2 + side)
                (folder / name).write_bytes(b"not a picture" if name in broken else data)
                names.append(name)
            row = {"prompt": f"a thing number {prompt}", "image_0": names[0], "image_1": names[1]}
            lines.append(json.dumps({**row, "label": float(reds[0] > reds[1])}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return read_pairs(folder)
