"""Fine-tuning a CLIP on preference pairs: PickScore's recipe, on any transformers CLIP."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fifa.config import Reward
from fifa.console import echo, note, progress
from fifa.data.images import unique_images
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.models.hub import CONFIG_AND_WEIGHTS, model_digest, model_folder
from fifa.models.optional import require
from fifa.models.runtime import Runtime, make_runtime
from fifa.models.transformer import load_model
from fifa.scoring.rewards.calibrate import accuracy, fit_temperature, measure, nll
from fifa.scoring.rewards.card import model_card
from fifa.scoring.rewards.clip import ImageTower
from fifa.scoring.rewards.engine import EngineOptions, distinct_images
from fifa.scoring.rewards.features import image_batches
from fifa.scoring.rewards.fit import training_facts
from fifa.scoring.rewards.head import Comparisons, prompt_weights
from fifa.scoring.rewards.pixels import standardise
from fifa.scoring.rewards.proxy import CARD, FORMAT, MODEL, SETTINGS
from fifa.scoring.rewards.split import prompt_folds
from fifa.scoring.rewards.weights import TOKENIZER_FILES, load_tokenizer
from fifa.shards.files import atomic_folder, reserve, write_json, write_text

if TYPE_CHECKING:
    from torch import Tensor

EVALUATE = 64  # images or prompts in a forward pass without gradients

Integers = npt.NDArray[np.int64]


def preference_loss(reward_0: Tensor, reward_1: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Softmax cross-entropy of two rewards against ``(label, 1 - label)``.

    PickScore's criterion (`clip_criterion.py`): each example by its weight, the weights
    normalised in the batch. A tie's target is (1/2, 1/2).

    Parameters
    ----------
    reward_0, reward_1, label, weight
        float [b].
    """
    torch = require("torch")
    # log softmax(r_0, r_1)
    log_p = torch.stack([reward_0, reward_1], -1).log_softmax(-1)
    losses = -(label * log_p[:, 0] + (1 - label) * log_p[:, 1])
    loss: Tensor = (losses * weight).sum() / weight.sum()
    return loss


def schedule(step: int, warmup: int, steps: int) -> float:
    """The share of the learning rate at a step (from 0): linear up, then linear down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


@dataclass
class _Clip:
    """A CLIP in training, and what it is fed.

    Parameters
    ----------
    model
        A transformers CLIPModel.
    tokens
        Ids and mask of every prompt, [prompts, t] each, or (heads only) pooled states.
    images
        Pixels of every image, uint8 [images, 3, s, s], or (heads only) pooled states.
    runtime
        Device and precision.
    frozen
        True where tokens and images are pooled states: the towers have done their part.
    """

    model: Any
    tokens: Any
    images: Any
    runtime: Runtime
    frozen: bool = False

    def prompt_vectors(self, rows: Integers) -> Tensor:
        """Unit vectors of prompts, [n, d]."""
        pooled = self._tensor(self.tokens[rows]) if self.frozen else self.pooled_prompts(rows)
        return _unit(self.model.text_projection(pooled))

    def image_vectors(self, rows: Integers) -> Tensor:
        """Unit vectors of images, [n, d]."""
        pooled = self._tensor(self.images[rows]) if self.frozen else self.pooled_images(rows)
        return _unit(self.model.visual_projection(pooled))

    def pooled_prompts(self, rows: Integers) -> Tensor:
        """What the text tower says of prompts, before the projection."""
        ids, mask = (self._tensor(part) for part in np.moveaxis(self.tokens[rows], 1, 0))
        out: Tensor = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return out

    def pooled_images(self, rows: Integers) -> Tensor:
        """What the image tower says of images, before the projection."""
        pixels = standardise(self._tensor(self.images[rows]))
        out: Tensor = self.model.vision_model(pixel_values=pixels).pooler_output
        return out

    def rewards(self, data: Comparisons) -> tuple[Tensor, Tensor]:
        """The rewards of both sides; each prompt and each image goes through once."""
        prompts, of_prompt = np.unique(data.prompt, return_inverse=True)
        images, of_image = np.unique(data.image, return_inverse=True)
        with self.runtime.autocast():
            t = self.prompt_vectors(prompts)
            v = self.image_vectors(images)
        t, v = t.float()[of_prompt.reshape(-1)], v.float()[of_image.reshape(-1, 2)]
        # exp(logit_scale) * cos(prompt, image)
        both = self.model.logit_scale.float().exp() * (t[:, None] * v).sum(-1)
        return both[:, 0], both[:, 1]

    def logits(self, data: Comparisons) -> npt.NDArray[np.float64]:
        """reward_0 - reward_1 of many pairs, without gradients."""
        torch = require("torch")
        prompts, of_prompt = np.unique(data.prompt, return_inverse=True)
        images, of_image = np.unique(data.image, return_inverse=True)
        with torch.inference_mode():
            t = self._in_parts(self.prompt_vectors, prompts)[of_prompt.reshape(-1)]
            v = self._in_parts(self.image_vectors, images)[of_image.reshape(-1, 2)]
            scale = float(self.model.logit_scale.exp())
        difference: npt.NDArray[np.float64] = (t * (v[:, 0] - v[:, 1])).sum(-1)
        return scale * difference

    def freeze(self) -> None:
        """Run both towers once and keep what they say; from here on only the heads compute."""
        torch = require("torch")
        with torch.inference_mode():
            tokens = self._in_parts(self.pooled_prompts, np.arange(len(self.tokens)))
            images = self._in_parts(self.pooled_images, np.arange(len(self.images)))
        self.tokens, self.images, self.frozen = (
            tokens.astype(np.float32),
            images.astype(np.float32),
            True,
        )

    def _in_parts(
        self, function: Callable[[Integers], Tensor], rows: Integers
    ) -> npt.NDArray[np.float64]:
        with self.runtime.autocast():
            parts = [
                function(rows[i : i + EVALUATE]).float().cpu().numpy()
                for i in range(0, len(rows), EVALUATE)
            ]
        return np.concatenate(parts).astype(np.float64)

    def _tensor(self, values: npt.NDArray[Any]) -> Tensor:
        torch = require("torch")
        there: Tensor = torch.from_numpy(np.ascontiguousarray(values)).to(self.runtime.device)
        return there


def finetune_clip(pairs: Pairs, out: Path, options: Reward) -> dict[str, Any]:
    """Fine-tune the CLIP ``options.base`` and write it to ``out``; returns ``reward.json``."""
    transformers = require("transformers")
    base = model_folder(options.base)
    runtime = make_runtime(options.device, "bfloat16" if options.bf16 else None)
    tower = ImageTower(base, "convert-crop", runtime)
    model = load_model(transformers.CLIPModel, base).float().to(runtime.device)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fifa-tmp-pixels-", dir=out.parent) as scratch:
        images, of_pair, bad = _pixels(pairs, tower, Path(scratch), options)
        data = Comparisons(
            of_pair,
            pairs.table["prompt_index"].to_numpy().astype(np.int64),
            pairs.table["label"].to_numpy().astype(np.float64),
        )
        lost = np.isin(of_pair, bad)
        readable = ~(lost[:, 0] | lost[:, 1])
        data = data.part(readable)
        clip = _Clip(model, _tokens(pairs, base, model), images, runtime)
        if options.parts == "heads":
            clip.freeze()
        folds = min(max(2, round(1 / options.held_out)), len(np.unique(data.prompt)))
        ids = pairs.prompts["prompt_id"]
        fold = prompt_folds(ids, data.prompt, data.image, folds=folds, seed=options.seed)
        held_out = data.part(fold[data.prompt] == 0)
        best_step = _optimise(clip, data.part(fold[data.prompt] != 0), held_out, options)
        logits = clip.logits(held_out)
    temperature = fit_temperature(logits, held_out.label)
    before, after = (
        measure(logits / t, held_out.label, held_out.prompt, seed=options.seed)
        for t in (1.0, temperature)
    )
    model.logit_scale.data -= float(np.log(temperature))  # exp(s - log T) = exp(s) / T
    trained = "both towers" if options.parts == "full" else "the projections and logit_scale"
    settings: dict[str, Any] = {
        "format": FORMAT,
        "kind": "clip",
        "base": {"name": Path(options.base).name, "files": model_digest(base, CONFIG_AND_WEIGHTS)},
        "options": {**options.settings(), "base": Path(options.base).name},
        "training": training_facts(pairs, data.label, data.prompt, int((~readable).sum()))
        | {"best step": best_step},
        "temperature": temperature,
        "metrics": {"before": before.as_dict(), "after": after.as_dict()},
        "judged": "held out of its training; the best step was chosen on them, too",
        "what": f"The CLIP {Path(options.base).name}, fine-tuned ({trained}).",
        "limits": "",
    }
    with atomic_folder(out) as folder:
        model.save_pretrained(folder / MODEL)
        for name in (*TOKENIZER_FILES, "preprocessor_config.json"):
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / MODEL / name)
        write_text(folder / CARD, model_card(settings))
        write_json(folder / SETTINGS, settings)
    return settings


def _optimise(clip: _Clip, data: Comparisons, held_out: Comparisons, options: Reward) -> int:
    """Train until held-out prompts stop gaining, put the best weights back, return their step."""
    torch = require("torch")
    model = clip.model.train()
    chosen = ("text_projection", "visual_projection", "logit_scale")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(options.parts == "full" or name.startswith(chosen))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=options.lr, weight_decay=options.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule(step, options.warmup, options.steps)
    )
    weight = prompt_weights(data.prompt)
    batches = _batches(len(data.label), options)
    best, kept, since = _standing(clip, held_out), _copy(learned), 0
    best_step = 0
    with progress("fine-tuning", options.steps) as advance:
        for step in range(1, options.steps + 1):
            rows = next(batches)
            label, share = (
                torch.tensor(values[rows], dtype=torch.float32, device=clip.runtime.device)
                for values in (data.label, weight)
            )
            loss: Any = preference_loss(*clip.rewards(data.part(rows)), label, share)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, options.clip)
            optimizer.step()
            scheduler.step()
            advance(1)
            if step % options.evaluate_every and step != options.steps:
                continue
            standing = _standing(clip, held_out)
            if standing > best:
                best, kept, since, best_step = standing, _copy(learned), 0, step
            elif (since := since + 1) >= options.patience:
                break
    with torch.no_grad():
        for parameter, values in zip(learned, kept, strict=True):
            parameter.copy_(values)
    model.eval()
    if not best_step:
        echo("held-out prompts never gained: only the temperature differs from the base model")
    note(reward_steps=step, reward_best_step=best_step)
    return best_step


def _standing(clip: _Clip, held_out: Comparisons) -> tuple[float, float]:
    """Accuracy on held-out prompts; among equals the smaller loss. The worst for broken weights."""
    clip.model.eval()
    with np.errstate(all="ignore"):
        logits = clip.logits(held_out)
    clip.model.train()
    if not np.isfinite(logits).all():
        return -1.0, -np.inf
    return accuracy(logits, held_out.label), -nll(logits, held_out.label)


def _copy(parameters: list[Any]) -> list[Any]:
    return [parameter.detach().to("cpu", copy=True) for parameter in parameters]


def _batches(n: int, options: Reward) -> Any:
    """Rows of one batch after the other, every pair once an epoch, in the seed's order."""
    rng = np.random.default_rng(options.seed)
    size = min(options.batch, n)
    while True:
        order = rng.permutation(n)
        for start in range(0, n - size + 1, size):
            yield np.sort(order[start : start + size])


def _tokens(pairs: Pairs, base: Path, model: Any) -> npt.NDArray[np.int64]:
    """Ids and mask of every prompt, int64 [prompts, 2, t]."""
    tokenizer = load_tokenizer(base)
    limit = model.config.text_config.max_position_embeddings
    prompts = pairs.prompts["prompt"].to_pylist()
    coded = tokenizer(prompts, truncation=True, max_length=limit, padding=True)
    return np.stack([coded["input_ids"], coded["attention_mask"]], 1).astype(np.int64)


def _pixels(
    pairs: Pairs, tower: ImageTower, scratch: Path, options: Reward
) -> tuple[Any, Integers, Integers]:
    """Every unique image decoded once, into a file; the images of each pair; the unreadable."""
    download = options.read.allow_download
    images, of_slot = unique_images(pairs)
    distinct = distinct_images(images, options=EngineOptions(allow_download=download))
    n = len(distinct)
    path, shape = scratch / "pixels.npy", (n, 3, tower.size, tower.size)
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    reserve(path)
    bad: dict[int, str] = {}
    with progress("reading images", n) as advance:
        for numbers, part in image_batches(
            images.take(distinct.first), tower.preprocess, bad, allow_download=download
        ):
            pixels[numbers] = part
            advance(len(numbers))
    if len(bad) == n:
        raise FifaError(
            f"not one image could be read; the first: {bad[0]}", where=pairs.origin.source
        )
    note(images_unreadable=len(bad))
    of_pair = distinct.of_image[of_slot].reshape(-1, 2)
    return pixels, of_pair, np.array(sorted(bad), np.int64)


def _unit(vectors: Tensor) -> Tensor:
    # x / |x|
    unit: Tensor = vectors / vectors.norm(dim=-1, keepdim=True)
    return unit
