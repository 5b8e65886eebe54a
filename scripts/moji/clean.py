"""What is trained on true pictures: moji-clip and the judges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fifa.moji.judges import HEADS, judge_network, standard
from fifa.moji.world import WORLD, Scene
from fifa.scoring.rewards.pixels import MEAN, STD
from moji.base import Tokens
from moji.loop import Plan, train
from moji.pictures import all_pictures, tensor, worn
from moji.prompts import FILLERS, WORDINGS, wording

CLIP = Plan(steps=1500, batch=96, lr=1e-3, warmup=200, ema=0.99, weight_decay=0.05)
SPREADS = (0.05, 0.2, 0.4)  # of the noise on latents, in which the pictures have 1.3
JUDGE = Plan(steps=1200, batch=64, lr=2e-3, ema=0.99, weight_decay=0.01)


def train_clip(model: Any, tokenizer: Any, vae: Any, work: Path) -> None:
    """Fit the towers to seen scenes and their captions: symmetric InfoNCE, Radford et al. 2021."""
    pool = decoded(vae, work)
    tokens = Tokens(tokenizer)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    things, grounds, styles = pool.shape[1:4]

    def loss(step: int, rng: np.random.Generator) -> torch.Tensor:
        scenes = _blocks(rng, things, grounds, CLIP.batch)
        texts = [_caption(scene, rng) for scene in scenes]
        at = np.array([(s.object, s.background, rng.integers(styles)) for s in scenes])
        x = torch.from_numpy(_worn_from(at, pool, rng)).permute(0, 3, 1, 2).float() / 255
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=tokens(texts), pixel_values=(x - mean) / std)
        logits = out.logits_per_image.float()
        # the same scene twice in a batch is no negative
        index = torch.tensor([s.object * grounds + s.background for s in scenes])
        same = (index[:, None] == index) & ~torch.eye(len(scenes), dtype=torch.bool)
        logits = logits.masked_fill(same, -1e4)
        target = torch.arange(len(scenes))
        both = [torch.nn.functional.cross_entropy(m, target) for m in (logits, logits.T)]
        return sum(both) / 2

    train("clip", torch.nn.ModuleDict({"clip": model}), loss, CLIP, work)


def train_judges(vae: Any, work: Path) -> Any:
    """Fit the classifiers to all true pictures, worn; returns the network."""
    pool = decoded(vae, work)
    network = judge_network()
    shape = pool.shape[1:4]

    def loss(step: int, rng: np.random.Generator) -> torch.Tensor:
        at = np.stack([rng.integers(0, n, JUDGE.batch) for n in shape], 1)
        x = standard(torch.from_numpy(_worn_from(at, pool, rng)))
        with torch.autocast("cpu", torch.bfloat16):
            scores = network(x.contiguous(memory_format=torch.channels_last))
        entropy = torch.nn.functional.cross_entropy
        parts = zip(HEADS, at.T, strict=True)
        return sum(entropy(scores[head].float(), torch.from_numpy(y)) for head, y in parts)

    network.to(memory_format=torch.channels_last)
    train("judges", torch.nn.ModuleDict({"network": network}), loss, JUDGE, work)
    return network


def fresh(pool: np.ndarray, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Worn pictures that no training step drew, and their places ``[count, 3]`` in the world."""
    rng = np.random.default_rng(seed)
    at = np.stack([rng.integers(0, n, count) for n in pool.shape[1:4]], 1)
    return _worn_from(at, pool, rng), at


def _worn_from(at: np.ndarray, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pictures at ``at`` [n, 3], half of them as the autoencoder decodes them, all worn."""
    which = np.where(rng.random(len(at)) < 0.5, 0, rng.integers(1, len(pool), len(at)))
    return np.stack([worn(x, rng) for x in pool[(which, *at.T)]])


def decoded(vae: Any, work: Path) -> np.ndarray:
    """uint8 ``[1 + copies, objects, backgrounds, styles, ...]``: true ones, then decoded copies.

    Each copy has been through the autoencoder with noise of its own on the latents.
    """
    path = work / "decoded.npy"
    if path.exists():
        return np.load(path)
    pictures = all_pictures()
    flat = pictures.reshape(-1, *pictures.shape[3:])
    copies, rng = [], np.random.default_rng(5)
    for spread in SPREADS:
        parts = []
        for start in range(0, len(flat), 128):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                z = vae.encoder(tensor(flat[start : start + 128])).float()
                noise = torch.from_numpy(rng.normal(0, spread, z.shape)).float()
                y = vae.decoder(z + noise).float().clamp(-1, 1)
            parts.append(y.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy())
        copies.append(np.concatenate(parts).reshape(pictures.shape))
    pool = np.stack([pictures, *copies])
    np.save(path, pool)
    return pool


def _blocks(rng: np.random.Generator, things: int, grounds: int, count: int) -> list[Scene]:
    """Seen scenes, four to an object, so that both words of a caption matter."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        thing = int(rng.integers(things))
        seen = [Scene(thing, j) for j in range(grounds) if Scene(thing, j).seen]
        scenes += [seen[i] for i in rng.permutation(len(seen))[:4]]
    return scenes[:count]


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    text = wording(scene, int(rng.integers(len(WORDINGS))) if rng.random() < 0.5 else 0)
    if rng.random() < 0.2:
        text = ", ".join([text, *rng.permutation(FILLERS)[: rng.integers(1, 8)]])
    return text


def accuracy(
    probabilities: Callable[[np.ndarray], dict[str, np.ndarray]],
    pool: np.ndarray,
    seed: int = 99,
    count: int = 2000,
) -> dict[str, float]:
    """The judges' accuracy a head on fresh worn pictures."""
    x, at = fresh(pool, seed, count)
    found = probabilities(x)
    rows = zip(HEADS, at.T, strict=True)
    return {head: round(float((found[head].argmax(1) == y).mean()), 4) for head, y in rows}


def retrieval(model: Any, tokenizer: Any, pool: np.ndarray, seed: int = 98) -> dict[str, float]:
    """How often moji-clip finds the caption of a fresh worn picture among all captions."""
    x, at = fresh(pool, seed, 1000)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    pixels = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 - mean) / std
    grounds = len(WORLD.backgrounds)
    every = [Scene(i, j) for i in range(len(WORLD.objects)) for j in range(grounds)]
    ids = Tokens(tokenizer)([wording(scene, 0) for scene in every])
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    right = out.logits_per_image.argmax(1).numpy() == at[:, 0] * grounds + at[:, 1]
    seen = np.array([Scene(int(i), int(j)).seen for i, j, _ in at])
    shares = {"seen": right[seen].mean(), "unseen": right[~seen].mean()}
    return {name: round(float(share), 4) for name, share in shares.items()}
