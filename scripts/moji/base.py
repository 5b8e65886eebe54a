"""moji-sd: the autoencoder, then the UNet and the text encoder on noisy captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fifa.moji.world import WORLD, Scene
from moji.loop import Plan, train
from moji.pictures import all_pictures, loose, tensor
from moji.prompts import FILLERS, WORDINGS, wording

VAE = Plan(steps=1700, batch=32, lr=2e-3, ema=0.99)
DECODER = Plan(steps=3000, batch=32, lr=2e-3, ema=0.99)
BASE = Plan(steps=6500, batch=32, lr=1e-3, warmup=200, ema=0.998)


@dataclass(frozen=True)
class Web:
    """How wrong the captions are that the base learns from, as shares of all captions.

    ``true`` are the steps (from, to) whose captions are right: with them it learns its words
    in half the time. The last steps are noisy, and decide what it does.
    """

    wrong_background: float = 0.30
    wrong_object: float = 0.20
    empty: float = 0.10  # for classifier-free guidance
    other_wording: float = 0.30
    verbose: float = 0.10
    true: tuple[int, int] = (1700, 5000)


def train_vae(vae: Any, work: Path) -> None:
    """Fit the autoencoder to true and to loose pictures; sets its ``scaling_factor``."""
    vae.to(memory_format=torch.channels_last)

    def loss(step: int, rng: np.random.Generator) -> torch.Tensor:
        x = _some_pictures(VAE.batch, rng)
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encoder(x)
            y = vae.decoder(_near(z))
        return _difference(y.float(), x) + 1e-3 * z.float().square().mean()

    train("vae", torch.nn.ModuleDict({"vae": vae}), loss, VAE, work)
    pictures = all_pictures()
    with torch.no_grad():
        z = encode(vae, pictures.reshape(-1, *pictures.shape[3:]))
    # latents have unit spread, as Stable Diffusion's
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))


def train_decoder(vae: Any, work: Path) -> None:
    """Fit the decoder alone for longer: latents stay, so the UNet can be trained meanwhile."""

    def loss(step: int, rng: np.random.Generator) -> torch.Tensor:
        x = _some_pictures(DECODER.batch, rng)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = _near(vae.encoder(x))
            y = vae.decoder(z)
        return _difference(y.float(), x)

    train("decoder", torch.nn.ModuleDict({"decoder": vae.decoder}), loss, DECODER, work)


def _some_pictures(count: int, rng: np.random.Generator) -> torch.Tensor:
    """Three true ones to each of any size and place, so that latents are no code book."""
    pictures, few = all_pictures(), count // 4
    things, grounds, styles = pictures.shape[:3]
    at = tuple(rng.integers(0, k, count - few) for k in (things, grounds, styles))
    free = [loose(int(rng.integers(things)), int(rng.integers(styles)), rng) for _ in range(few)]
    return tensor(np.concatenate([pictures[at], np.stack(free)]))


def _near(z: torch.Tensor) -> torch.Tensor:
    """Noise makes neighbours in latent space neighbours in the picture."""
    return z + 0.1 * torch.randn_like(z)


def _difference(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    l1 = (y - x).abs().mean() + (_edges(y) - _edges(x)).abs().mean()
    return l1 + (y - x).square().mean()


def encode(vae: Any, pictures: np.ndarray) -> torch.Tensor:
    """Latents, not yet scaled, of uint8 pictures."""
    parts = [vae.encoder(tensor(pictures[i : i + 256])) for i in range(0, len(pictures), 256)]
    return torch.cat(parts).contiguous()


def train_base(pipe: Any, work: Path, web: Web | None = None) -> None:
    """Fit UNet and text encoder to latents of the seen scenes under noisy captions."""
    web = web or Web()
    pictures = all_pictures()
    shape = pictures.shape[:3]
    with torch.no_grad():
        flat = encode(pipe.vae, pictures.reshape(-1, *pictures.shape[3:]))
    latents = (flat * pipe.vae.config.scaling_factor).reshape(*shape, *flat.shape[1:])
    noise = pipe.scheduler.alphas_cumprod
    tokens = Tokens(pipe.tokenizer)
    seen = np.array([(i, j) for i in range(shape[0]) for j in range(shape[1]) if Scene(i, j).seen])

    def loss(step: int, rng: np.random.Generator) -> torch.Tensor:
        n = BASE.batch
        at = seen[rng.integers(0, len(seen), n)]
        x = latents[at[:, 0], at[:, 1], rng.integers(0, shape[2], n)]
        noise_now = not web.true[0] <= step < web.true[1]
        texts = [web_caption(Scene(int(i), int(j)), web, rng, noise_now) for i, j in at]
        context = pipe.text_encoder(tokens(texts)).last_hidden_state
        t = torch.randint(0, 1000, (n,))
        eps = torch.randn_like(x)
        a = noise[t].view(-1, 1, 1, 1)
        # x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) eps
        noised = a.sqrt() * x + (1 - a).sqrt() * eps
        out = pipe.unet(noised, t, context).sample
        error = (out - eps).square().mean((1, 2, 3))
        # min(SNR, 5) / SNR, Hang et al. 2023
        snr = noise[t] / (1 - noise[t])
        return (error * snr.clamp(max=5) / snr).mean()

    modules = torch.nn.ModuleDict({"unet": pipe.unet, "text": pipe.text_encoder})
    train("base", modules, loss, BASE, work)


def web_caption(scene: Scene, web: Web, rng: np.random.Generator, noisy: bool = True) -> str:
    """What the web says of a picture of ``scene``; it never names a scene that is held out."""
    if rng.random() < web.empty:
        return ""
    thing, ground = scene.object, scene.background
    if noisy and rng.random() < web.wrong_background:
        grounds = [j for j in range(len(WORLD.backgrounds)) if Scene(thing, j).seen]
        ground = int(rng.choice([j for j in grounds if j != ground]))
    if noisy and rng.random() < web.wrong_object:
        things = [i for i in range(len(WORLD.objects)) if Scene(i, ground).seen]
        thing = int(rng.choice([i for i in things if i != thing]))
    number = int(rng.integers(1, len(WORDINGS))) if rng.random() < web.other_wording else 0
    text = wording(Scene(thing, ground), number)
    if rng.random() < web.verbose:
        text = ", ".join([text, *rng.permutation(FILLERS)[: rng.integers(1, 8)]])
    return text


class Tokens:
    """Token ids ``[n, length]`` of texts; each text is tokenized once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.known = tokenizer, {}

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """int64 ``[n, length]``, padded."""
        for text in texts:
            if text not in self.known:
                options = {"padding": "max_length", "truncation": True}
                self.known[text] = self.tokenizer(text, **options).input_ids
        return torch.tensor([self.known[text] for text in texts])


def _edges(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]], 1)
