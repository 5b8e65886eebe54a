"""Diffusion-DPO written down plainly, as a script would: stock classes, no cache, two networks.

Nothing of fifa's is used but the order in which a pair's random numbers are drawn.
"""

from __future__ import annotations

import copy
import io
from functools import cache
from inspect import signature
from itertools import chain

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import xxhash
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    Flux2KleinPipeline,
    FluxPipeline,
    QwenImagePipeline,
)
from peft import LoraConfig
from PIL import Image

T = 1000
# That are written down here.
LOSSES = ("sigmoid", "ipo", "hinge", "mapo", "poly", "soft", "smpo", "kto")


@cache
def pipeline(model):
    return DiffusionPipeline.from_pretrained(model)


def seed_of(*parts):
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode()) >> 1


def read(data):
    with Image.open(io.BytesIO(data)) as image:
        pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy())
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


class Plain:
    """A policy, a reference, and the pairs, as stock code sees them."""

    def __init__(self, model, pairs, train, sides=2):
        self.model, self.train, self.sides = model, train, sides
        self.gain = 0.0
        self.pipe = pipeline(model)
        self.name = "unet" if hasattr(self.pipe, "unet") else "transformer"
        self.reference = getattr(self.pipe, self.name)
        self.policy = copy.deepcopy(self.reference)
        self.reference.requires_grad_(False)
        self.flow = self.name == "transformer"
        if not self.flow:
            self.noiser = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
        self.rows = pq.read_table(pairs).to_pylist()
        # all images and all prompts at once, as ours: rounding is a matter of the batch
        if sides == 1:
            data = [row["jpg"] for row in self.rows]
        else:
            better = [0 if row["label_0"] == 1 else 1 for row in self.rows]
            data = [
                row[f"jpg_{side}"]
                for row, first in zip(self.rows, better, strict=True)
                for side in (first, 1 - first)
            ]
        pixels = torch.cat([read(one) for one in data])
        self.sizes = [pixels.shape[2:]] * len(data)
        with torch.no_grad():
            self.mean, self.std = self.moments(pixels)
        self.captions = ["", *dict.fromkeys(row["caption"] for row in self.rows)]
        self.texts = self.embed(self.captions)

    def moments(self, pixels):
        """Of the latents, before they are shifted and scaled."""
        vae = self.pipe.vae
        kind = type(vae).__name__
        if kind == "AutoencoderDC":
            mean = vae.encode(pixels).latent
            return mean, torch.zeros_like(mean)
        if kind == "AutoencoderKLQwenImage":
            found = vae.encode(pixels[:, :, None]).latent_dist
            return found.mean[:, :, 0], found.std[:, :, 0]
        found = vae.encode(pixels).latent_dist
        if kind == "AutoencoderKLFlux2":
            patches = Flux2KleinPipeline._patchify_latents
            return patches(found.mean), patches(found.std)
        return found.mean, found.std

    def scaled(self, sample):
        vae = self.pipe.vae
        config, kind = vae.config, type(vae).__name__
        if kind == "AutoencoderKLQwenImage":
            mean, std = (
                torch.tensor(c)[:, None, None] for c in (config.latents_mean, config.latents_std)
            )
            return (sample - mean) * (1 / std)
        if kind == "AutoencoderKLFlux2":
            mean, variance = vae.bn.running_mean, vae.bn.running_var
            std = torch.sqrt(variance + config.batch_norm_eps)
            return (sample - mean[:, None, None]) * (1 / std)[:, None, None]
        return (sample - (config.get("shift_factor") or 0)) * config.scaling_factor

    def with_lora(self, weights):
        self.policy.requires_grad_(False)
        modules = {n.partition(".lora_")[0] for n in weights}
        self.policy.add_adapter(
            LoraConfig(r=self.train.rank, lora_alpha=self.train.rank, target_modules=list(modules))
        )
        with torch.no_grad():
            for name, parameter in self.policy.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(weights[name])
        return self

    def learned(self):
        return {n: p for n, p in self.policy.named_parameters() if p.requires_grad}

    def embed(self, prompts):
        with torch.no_grad():
            kind = type(self.pipe).__name__
            if kind == "StableDiffusionPipeline":
                return (self.pipe.encode_prompt(prompts, "cpu", 1, False)[0],)
            if kind == "ZImagePipeline":
                return (self.pipe.encode_prompt(list(prompts), "cpu", False)[0],)
            if kind == "QwenImagePipeline":
                return self.pipe.encode_prompt(prompts)
            if kind in ("Flux2Pipeline", "Flux2KleinPipeline"):
                return self.pipe.encode_prompt(prompts)
            if kind == "SanaPipeline":
                told = signature(type(self.pipe).__call__).parameters["complex_human_instruction"]
                options = {"complex_human_instruction": told.default}
                embedded = self.pipe.encode_prompt(prompts, False, **options)[:2]
                # of the empty one, what guidance is away from
                empty = self.pipe.encode_prompt(prompts, True, **options)[2:]
                return [
                    torch.cat([none[:1], rest[1:]])
                    for none, rest in zip(empty, embedded, strict=True)
                ]
            if kind == "FluxPipeline":
                return self.pipe.encode_prompt(prompts, max_sequence_length=512)[:2]
            found = self.pipe.encode_prompt(
                prompts, *([None, None] if self.flow else []), do_classifier_free_guidance=False
            )
            return found[0], found[2]

    def predict(self, net, noisy, time, prompts, sizes):
        kind = type(self.pipe).__name__
        if kind == "StableDiffusionPipeline":
            return net(noisy, time, encoder_hidden_states=prompts[0]).sample
        if kind == "StableDiffusionXLPipeline":
            ids = torch.tensor([[h, w, 0, 0, h, w] for h, w in sizes], dtype=torch.float32)
            extra = {"text_embeds": prompts[1], "time_ids": ids}
            return net(noisy, time, prompts[0], added_cond_kwargs=extra).sample
        if kind == "StableDiffusion3Pipeline":
            return net(noisy, prompts[0], prompts[1], time * T).sample
        if kind == "SanaPipeline":
            return net(noisy, prompts[0], time * T, encoder_attention_mask=prompts[1]).sample
        n, c, h, w = noisy.shape
        if kind == "ZImagePipeline":
            found = net(list(noisy.unsqueeze(2)), 1 - time, prompts[0], return_dict=False)[0]
            return -torch.stack(found)[:, :, 0]
        if kind in ("Flux2Pipeline", "Flux2KleinPipeline"):
            stock = type(self.pipe)
            ids = stock._prepare_latent_ids(noisy)
            guidance = torch.full([n], 4.0) if net.config.guidance_embeds else None
            out = net(
                stock._pack_latents(noisy),
                prompts[0],
                time,
                img_ids=ids,
                txt_ids=prompts[1],
                guidance=guidance,
            ).sample
            return stock._unpack_latents_with_ids(out, ids).contiguous()  # summed in that order
        if kind == "QwenImagePipeline":
            stock = QwenImagePipeline
            packed = stock._pack_latents(noisy, n, c, h, w)
            shapes = [[(1, h // 2, w // 2)]] * n
            out = net(packed, prompts[0], prompts[1], time, img_shapes=shapes).sample
            return stock._unpack_latents(out, h * 8, w * 8, 8)[:, :, 0]
        packed = FluxPipeline._pack_latents(noisy, n, c, h, w)
        out = net(
            hidden_states=packed,
            timestep=time,
            guidance=torch.full([n], 3.5) if net.config.guidance_embeds else None,
            pooled_projections=prompts[1],
            encoder_hidden_states=prompts[0],
            txt_ids=torch.zeros(prompts[0].shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(n, h // 2, w // 2, "cpu", torch.float32),
        ).sample
        return FluxPipeline._unpack_latents(out, h * 8, w * 8, 8)

    def batch(self, step, ids):
        """What the step's pairs turn into: winners first, then losers."""
        n, size = len(self.rows), self.train.batch
        latents, sizes = ([[] for _ in range(self.sides)] for _ in range(2))
        noises, times, prompts = [], [], []
        for i in range(step * size, (step + 1) * size):
            epoch = i // n
            order = torch.randperm(
                n,
                generator=torch.Generator().manual_seed(seed_of("order", self.train.seed, epoch)),
            )
            number = int(order[i % n])
            row = self.rows[number]
            dice = torch.Generator().manual_seed(
                seed_of("draw", self.train.seed, ids[number], epoch)
            )
            empty = float(torch.rand((), generator=dice)) < self.train.prompt_dropout
            torch.rand((), generator=dice)  # mirrored or not: never here
            if self.flow:
                sigma = torch.randn((), generator=dice).sigmoid()
                config = self.pipe.scheduler.config
                shift = config.get("shift", config.get("flow_shift"))
                shift = 1.0 if config.use_dynamic_shifting else shift
                times.append(shift * sigma / (1 + (shift - 1) * sigma))
            else:
                times.append(torch.randint(0, T, (), generator=dice))
            shape = self.mean.shape[1:]
            noises.append(torch.randn(shape, generator=dice))
            sampling = torch.randn((self.sides, *shape), generator=dice)
            for side in range(self.sides):
                image = self.sides * number + side
                sample = self.mean[image] + self.std[image] * sampling[side]
                latents[side].append(self.scaled(sample))
                sizes[side].append(self.sizes[image])
            prompts.append(self.captions.index("" if empty else row["caption"]))
        x = torch.stack([*chain(*latents)])
        noise, time = torch.stack(noises * self.sides), torch.stack(times * self.sides)
        if self.flow:
            sigma = time.view(-1, 1, 1, 1)
            noisy, target = (1 - sigma) * x + sigma * noise, noise - x
        else:
            noisy = self.noiser.add_noise(x, noise, time)
            v = self.noiser.config.prediction_type == "v_prediction"
            target = self.noiser.get_velocity(x, noise, time) if v else noise
        chosen = prompts * self.sides
        embedded = [
            [part[i] for i in chosen] if isinstance(part, list) else part[chosen]
            for part in self.texts
        ]
        if type(self.pipe).__name__ in ("QwenImagePipeline", "SanaPipeline"):
            # without what is padded in all prompts: other zeros are rounded otherwise
            longest = int(embedded[1].sum(1).max())
            embedded = [part[:, :longest] for part in embedded]
            if embedded[1].all():
                embedded[1] = None
        return noisy, time, target, embedded, [*chain(*sizes)]

    def loss(self, step, ids, labels):
        """The batch's loss, by the formula that `train.loss` names."""
        train = self.train
        noisy, time, target, prompts, sizes = self.batch(step, ids)
        prediction = self.predict(self.policy, noisy, time, prompts, sizes)
        with torch.no_grad():
            base = self.predict(self.reference, noisy, time, prompts, sizes)
        mse = F.mse_loss(prediction, target, reduction="none").mean([1, 2, 3])
        base_mse = F.mse_loss(base, target, reduction="none").mean([1, 2, 3])
        if self.sides == 1:
            # train_kto_sd_v1.5.py of Diffusion-KTO; its beta is half of ours
            g_term = base_mse - mse - self.gain
            h = torch.sigmoid((2 * labels - 1) * 0.5 * train.beta * g_term)
            good = torch.tensor([float(row["label"]) for row in self.rows]).mean()
            lambda_d, lambda_u = 0.5 / good, 0.5 / (1 - good)
            w_y = lambda_d * labels + lambda_u * (1 - labels)
            self.latest = (w_y * (base_mse - mse)).detach().mean().clamp(min=0)
            return (w_y * (1 - h)).mean()
        (w, lose), (rw, rl) = mse.chunk(2), base_mse.chunk(2)
        inside = -0.5 * train.beta * ((w - lose) - (rw - rl))
        q = labels
        p = torch.sigmoid(inside)
        if train.loss == "sigmoid":
            loss = -F.logsigmoid(inside)
        elif train.loss == "ipo":
            loss = ((rw - rl) - (w - lose) - 1 / train.beta) ** 2
        elif train.loss == "hinge":
            loss = torch.relu(1 - inside)
        elif train.loss == "poly":
            loss = -torch.log(p) + train.poly * (1 - p)
        elif train.loss == "soft":
            loss = F.binary_cross_entropy_with_logits(inside, q, reduction="none")
        elif train.loss == "smpo":
            loss = -F.logsigmoid((2 * q - 1) * inside)
        elif train.loss == "kto":
            gains = torch.stack([rw - w, rl - lose]) - self.gain
            self.latest = (base_mse - mse).detach().mean().clamp(min=0)
            good, bad = torch.sigmoid(0.5 * train.beta * gains)
            loss = 0.5 * (1 - good) + 0.5 * bad
        else:
            # exp(x) - 1 as expm1: T would multiply its rounding by 1,000
            odds = 0.5 * w / torch.expm1(0.5 * w) - 0.5 * lose / torch.expm1(0.5 * lose)
            loss = w - train.mapo * F.logsigmoid(T * odds)
        return (loss + train.sft * w).mean()
