"""A reward model of a few hundred numbers, and data sets to score with it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from fifa.data import read_pairs

SIDE = 8
WIDTH = 6


class Tiny:
    """Two towers: a linear layer over 8 x 8 pixels, and a digest of the prompt.

    ``seconds`` an image makes it slow, ``memory`` images are the most it takes at a time.
    """

    name = "tiny"
    scale = "a dot product"

    def __init__(self, seconds: float = 0.0, memory: int = 1 << 30) -> None:
        self.identity = {"tiny": 1}
        self.seconds, self.memory = seconds, memory
        self.seen = Counter()
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3 * SIDE * SIDE, WIDTH, generator=draw)

    def preprocess(self, image):
        self.seen["decoded"] += 1
        return np.asarray(image.convert("RGB").resize((SIDE, SIDE))).transpose(2, 0, 1).copy()

    def image_features(self, pixels):
        if len(pixels) > self.memory:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.seen["embedded"] += len(pixels)
        self.seen["batches"] += 1
        time.sleep(self.seconds * len(pixels))
        # row by row, so that a reward does not depend on who shares the batch
        return torch.stack([row.float().flatten() / 255 @ self.weight for row in pixels])

    def prompt_features(self, prompts):
        self.seen["prompts"] += len(prompts)
        digests = [hashlib.sha256(prompt.encode()).digest()[:WIDTH] for prompt in prompts]
        return torch.tensor([list(digest) for digest in digests]) / 255.0

    def rewards(self, prompts, images):
        self.seen["rewards"] += len(prompts)
        return (prompts * images).sum(-1)


class Unsure(Tiny):
    """Says how sure it is: the less, the larger the first number of the prompt."""

    name, has_sigma = "unsure", True

    def rewards(self, prompts, images):
        return torch.stack([super().rewards(prompts, images), prompts[:, 0] + 0.5], 1)


class Fragile(Tiny):
    """Takes its whole process with it, once: where ``death`` names a file not there yet."""

    def __init__(self, death: Path) -> None:
        super().__init__()
        self.death = death

    def image_features(self, pixels):
        if self.seen["batches"] == 2 and not self.death.exists():
            self.death.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().image_features(pixels)


def picture(seed: int, size=(16, 12), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def cells(folder: Path, rows, row_group: int = 16):
    """Pairs whose images are cells of a Parquet file; ``rows`` of (prompt, bytes, bytes)."""
    prompts, first, second = zip(*rows, strict=True)
    table = {
        "caption": list(prompts),
        "jpg_0": pa.array(first, pa.binary()),
        "jpg_1": pa.array(second, pa.binary()),
        "label_0": [1.0] * len(rows),
        "label_1": [0.0] * len(rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "pairs.parquet").exists():
        pq.write_table(pa.table(table), folder / "pairs.parquet", row_group_size=row_group)
    return read_pairs(folder / "pairs.parquet")


def files(folder: Path, rows):
    """Pairs whose images are files: ``rows`` of (prompt, name, name)."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("prompt", "image_0", "image_1")
    lines = [json.dumps({**dict(zip(names, row, strict=True)), "label": 1}) for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return read_pairs(folder / "pairs.jsonl")


def recurring(folder: Path, pairs: int = 40, seed: int = 0, images: int = 0, prompts: int = 0):
    """Random pairs in which images and prompts recur, and the (prompt, bytes, bytes) of each."""
    draw = np.random.default_rng(seed)
    images, prompts = images or max(2, pairs // 2), prompts or max(1, pairs // 8)
    pictures = [picture(i) for i in range(images)]
    rows = []
    for _ in range(pairs):
        a, b = draw.choice(images, 2, replace=False)
        rows.append((f"prompt {draw.integers(prompts)} of {seed}", pictures[a], pictures[b]))
    return cells(folder, rows), rows


def one_by_one(model, prompt: str, data: bytes) -> float:
    """The loop everybody writes: one prompt, one image."""
    pixels = torch.from_numpy(model.preprocess(Image.open(io.BytesIO(data))))[None]
    return float(model.rewards(model.prompt_features([prompt]), model.image_features(pixels)))
