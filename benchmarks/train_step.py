"""What diffusers' train_diffusion_dpo.py does for its pairs at every step, its parts timed."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

VAE_BATCH = 8  # the script's default
BETA = 2500  # the script's default


class PeerStep:
    """The models and the optimiser of the script, with its defaults.

    Parameters
    ----------
    folder
        The model.
    resolution
        Pixels a side.
    rank
        Of the adapters on the UNet's attention.
    device, dtype
        Where, and what frozen weights are kept and networks run in: the script's weight_dtype.
    """

    def __init__(
        self,
        folder: Path,
        resolution: int,
        rank: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        kind = {"dtype": dtype}
        self.resolution, self.device, self.dtype = resolution, device, dtype
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.schedule = DDPMScheduler.from_pretrained(folder / "scheduler")
        self.text = CLIPTextModel.from_pretrained(folder / "text_encoder", **kind)
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", **kind)
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", **kind)
        for model in (self.text, self.vae, self.unet):
            model.requires_grad_(False).to(device)
        self.unet.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=rank,
                init_lora_weights="gaussian",
                target_modules=["to_k", "to_q", "to_v", "to_out.0"],
            )
        )
        self.learned = [p for p in self.unet.parameters() if p.requires_grad]
        for parameter in self.learned:
            parameter.data = parameter.to(torch.float32)
        self.optimizer = torch.optim.AdamW(self.learned, lr=1e-5)
        self.seconds: dict[str, float] = {}

    def train(self, data: Path, batch: int, epochs: int) -> dict[str, float]:
        """Train on the pairs of a Parquet file: seconds in all, of the processor, of each part."""
        rows = pq.read_table(data).to_pylist()
        draw = np.random.default_rng(0)
        self.unet.train()
        begun, busy = time.perf_counter(), time.process_time()
        for _ in range(epochs):
            order = draw.permutation(len(rows))
            for start in range(0, len(rows), batch):
                self.step([rows[i] for i in order[start : start + batch]])
        total = time.perf_counter() - begun
        return {"seconds": total, "processor": time.process_time() - busy, **self.seconds}

    def step(self, rows: list[dict[str, Any]]) -> float:
        """One step on some pairs; its loss."""
        with self.timed("decode"):
            pixels = torch.stack([self.pixels(row) for row in rows])
            pixels = torch.cat(pixels.chunk(2, dim=1)).to(self.device, self.dtype)
            tokens = self.tokenizer(
                [row["caption"] for row in rows],
                truncation=True,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids.to(self.device)
        with self.timed("vae"), torch.no_grad():
            parts = pixels.split(VAE_BATCH)
            latents = torch.cat([self.vae.encode(part).latent_dist.sample() for part in parts])
            latents = latents * self.vae.config.scaling_factor
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        time_of = torch.randint(0, 1000, (len(rows),), device=self.device).repeat(2)
        noisy = self.schedule.add_noise(latents, noise, time_of)
        with self.timed("text"), torch.no_grad():
            prompt = self.text(tokens)[0].repeat(2, 1, 1)
        with self.timed("policy"):
            policy = self.difference(noisy, time_of, prompt, noise)
        with self.timed("reference"), torch.no_grad():
            self.unet.disable_adapters()
            reference = self.difference(noisy, time_of, prompt, noise)
            self.unet.enable_adapters()
        with self.timed("policy"):
            loss = -F.logsigmoid(BETA * (reference - policy)).mean()
            loss.backward()
        with self.timed("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()

    def difference(
        self, noisy: torch.Tensor, time_of: torch.Tensor, prompt: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The winner's error less the loser's, of the UNet as it is, [pairs]."""
        half = self.dtype is not torch.float32
        with torch.autocast(self.device, self.dtype, enabled=half):
            predicted = self.unet(noisy, time_of, prompt).sample
        errors = F.mse_loss(predicted.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
        winner, loser = errors.chunk(2)
        return winner - loser

    def policy(self, pairs: int) -> None:
        """The policy's forward and backward on ready latents of some pairs, and nothing else."""
        side = self.resolution // 8
        noise = torch.randn(2 * pairs, 4, side, side, device=self.device)
        prompt = torch.randn(
            2 * pairs, 77, self.unet.config.cross_attention_dim, device=self.device
        )
        time_of = torch.randint(0, 1000, (2 * pairs,), device=self.device)
        policy = self.difference(torch.randn_like(noise), time_of, prompt, noise)
        (-F.logsigmoid(-BETA * policy).mean()).backward()
        self.optimizer.zero_grad()

    def pixels(self, row: dict[str, Any]) -> torch.Tensor:
        """Winner and loser, [6, h, w]: shorter side resized bilinearly, centre crop, mirrored."""
        images = [self.transformed(row[name]) for name in ("jpg_0", "jpg_1")]
        return torch.cat(images if row["label_0"] else images[::-1])

    def transformed(self, data: bytes) -> torch.Tensor:
        """torchvision's Resize, CenterCrop, RandomHorizontalFlip, ToTensor and Normalize."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        side = self.resolution
        scale = side / min(image.size)
        wide, high = (round(length * scale) for length in image.size)
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
        left, top = (wide - side) // 2, (high - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
        return (tensor - 0.5) / 0.5

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the block's seconds to a part's."""
        begun = time.perf_counter()
        yield
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begun
