"""What is trained on true pictures: moji-clip and the judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fifa.moji.judges import HEADS, judge_network, standard
from fifa.moji.prompts import FILLERS, WORDINGS, wording
from fifa.moji.world import WORLD, Scene
from fifa.rewards.pixels import MEAN, STD
from moji.base import Tokens
from moji.loop import Plan, train
from moji.pictures import all_pictures, tensor, worn

CLIP = Plan(steps=2000, batch=128, lr=1e-3, warmup=200, ema=0.99, weight_decay=0.05)
JUDGE = Plan(steps=1000, batch=128, lr=2e-3, ema=0.99, weight_decay=0.01)


def train_clip(model: Any, tokenizer: Any, vae: Any, work: Path) -> None:
    """Fit the towers to seen scenes and their captions: symmetric InfoNCE, Radford et al. 2021."""
    pictures = all_pictures()
    tokens = Tokens(tokenizer)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    things, grounds, styles = pictures.shape[:3]

    def loss(step: int, rng: np.random.Generator) -> torch.Tensor:
        scenes = _blocks(rng, things, grounds, CLIP.batch)
        texts = [_caption(scene, rng) for scene in scenes]
        which = [pictures[s.object, s.background, rng.integers(styles)] for s in scenes]
        x = torch.from_numpy(_wear(np.stack(which), vae, rng)).permute(0, 3, 1, 2).float() / 255
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
    pictures = all_pictures()
    network = judge_network()
    shape = pictures.shape[:3]

    def loss(step: int, rng: np.random.Generator) -> torch.Tensor:
        at = [rng.integers(0, n, JUDGE.batch) for n in shape]
        x = standard(torch.from_numpy(_wear(pictures[tuple(at)], vae, rng)))
        with torch.autocast("cpu", torch.bfloat16):
            scores = network(x.contiguous(memory_format=torch.channels_last))
        entropy = torch.nn.functional.cross_entropy
        parts = zip(HEADS, at, strict=True)
        return sum(entropy(scores[head].float(), torch.from_numpy(y)) for head, y in parts)

    network.to(memory_format=torch.channels_last)
    train("judges", torch.nn.ModuleDict({"network": network}), loss, JUDGE, work)
    return network


def fresh(vae: Any, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Worn pictures that no training step drew, and their places ``[count, 3]`` in the world."""
    rng = np.random.default_rng(seed)
    pictures = all_pictures()
    at = np.stack([rng.integers(0, n, count) for n in pictures.shape[:3]], 1)
    return _wear(pictures[tuple(at.T)], vae, rng), at


def _wear(pictures: np.ndarray, vae: Any, rng: np.random.Generator) -> np.ndarray:
    """Shift, blur and noise; half of them also through the autoencoder with noise on latents."""
    out = np.stack([worn(picture, rng) for picture in pictures])
    half = rng.random(len(out)) < 0.5
    if half.any():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z = vae.encoder(tensor(out[half])).float()
            noise = torch.from_numpy(rng.normal(0, 1, z.shape)).float()
            spread = torch.from_numpy(rng.uniform(0, 0.3, (len(z), 1, 1, 1))).float()
            y = vae.decoder(z + spread * noise).float().clamp(-1, 1)
        out[half] = y.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return out


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


def accuracy(network: Any, vae: Any, seed: int = 99, count: int = 2000) -> dict[str, float]:
    """The judges' accuracy a head on fresh worn pictures."""
    x, at = fresh(vae, seed, count)
    with torch.no_grad():
        scores = network(standard(torch.from_numpy(x)))
    rows = zip(HEADS, at.T, strict=True)
    return {head: float((scores[head].argmax(1).numpy() == y).mean()) for head, y in rows}


def retrieval(model: Any, tokenizer: Any, vae: Any, seed: int = 98) -> dict[str, float]:
    """How often moji-clip finds the caption of a fresh worn picture among all captions."""
    x, at = fresh(vae, seed, 1000)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    pixels = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 - mean) / std
    grounds = len(WORLD.backgrounds)
    every = [Scene(i, j) for i in range(len(WORLD.objects)) for j in range(grounds)]
    ids = Tokens(tokenizer)([wording(scene, 0) for scene in every])
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    right = out.logits_per_image.argmax(1).numpy() == at[:, 0] * grounds + at[:, 1]
    seen = np.array([Scene(int(i), int(j)).seen for i, j, _ in at])
    return {"seen": float(right[seen].mean()), "unseen": float(right[~seen].mean())}
