"""Fine-tuning a CLIP on preference pairs: PickScore's recipe, on any transformers CLIP."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fifa.config import Reward
from fifa.console import echo, note, progress
from fifa.data.decoders import choose_decoders
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.models.hub import CONFIG_AND_WEIGHTS, model_digest, model_folder
from fifa.models.optional import require
from fifa.models.runtime import Parts, Runtime, Tensor, make_runtime, out_of_memory
from fifa.models.transformer import load_model
from fifa.scoring.rewards.clip import ImageTower
from fifa.scoring.rewards.engine import Engine
from fifa.scoring.rewards.features import image_batches
from fifa.scoring.rewards.head import Comparisons, prompt_folds, prompt_weights
from fifa.scoring.rewards.metrics import accuracy, fit_temperature, nll
from fifa.scoring.rewards.pixels import prepared, standardise
from fifa.scoring.rewards.proxy import MODEL, reward_facts, save_settings
from fifa.scoring.rewards.weights import TOKENIZER_FILES, load_tokenizer
from fifa.shards.files import atomic_folder, cannot_write, make_folder, reserve

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
class _Tower:
    """One half of a CLIP in training, and what it is fed.

    Parameters
    ----------
    pool
        From what it is fed to pooled states, [n, d].
    projection
        From pooled states to the common space.
    inputs
        Of every prompt or image, [rows, ...]; once frozen, pooled states.
    runtime
        Device and precision.
    sizes
        How many go together, once memory has run out.
    """

    pool: Callable[[Any], Any]
    projection: Any
    inputs: npt.NDArray[Any]
    runtime: Runtime
    sizes: Parts = field(default_factory=lambda: Parts("image or prompt"))

    def vectors(self, rows: Integers) -> Tensor:
        """Unit vectors of some rows, [n, d]."""
        vectors = self.projection(self.pooled(rows))
        # x / |x|
        unit: Tensor = vectors / vectors.norm(dim=-1, keepdim=True)
        return unit

    def pooled(self, rows: Integers) -> Any:
        """Pooled states of some rows, before the projection."""
        inputs = require("torch").from_numpy(np.ascontiguousarray(self.inputs[rows]))
        return self.pool(inputs.to(self.runtime.device))

    def freeze(self) -> None:
        """Keep the pooled states of all rows; from here on only the projection computes."""
        pooled = self.in_parts(self.pooled, np.arange(len(self.inputs)))
        self.inputs, self.pool = pooled.astype(np.float32), lambda states: states

    def in_parts(
        self, function: Callable[[Integers], Tensor], rows: Integers
    ) -> npt.NDArray[np.float64]:
        """What ``function`` gives of some rows, without gradients, a few at a time."""
        with require("torch").inference_mode(), self.runtime.autocast():
            parts = list(
                self.sizes.run(
                    lambda i: function(rows[i]).float().cpu().numpy(), len(rows), EVALUATE
                )
            )
        return np.concatenate(parts).astype(np.float64)


class _Clip:
    """A CLIP in training.

    Parameters
    ----------
    model
        A transformers CLIPModel.
    tokens
        Ids and mask of every prompt, int64 [prompts, 2, t].
    pixels
        Of every image, uint8 [images, 3, s, s].
    runtime
        Device and precision.
    """

    def __init__(self, model: Any, tokens: Integers, pixels: Any, runtime: Runtime) -> None:
        def read(tokens: Any) -> Any:
            ids, mask = tokens.unbind(1)
            return model.text_model(input_ids=ids, attention_mask=mask).pooler_output

        def see(pixels: Any) -> Any:
            return model.vision_model(pixel_values=standardise(pixels)).pooler_output

        self.model, self.runtime = model, runtime
        self._prompts = _Tower(read, model.text_projection, tokens, runtime)
        self._images = _Tower(see, model.visual_projection, pixels, runtime)

    def rewards(self, data: Comparisons) -> tuple[Tensor, Tensor]:
        """The rewards of both sides; each prompt and each image goes through once."""
        prompts, of_prompt, images, of_image = _once(data)
        with self.runtime.autocast():
            t, v = self._prompts.vectors(prompts), self._images.vectors(images)
        t, v = t.float()[of_prompt], v.float()[of_image]
        # exp(logit_scale) * cos(prompt, image)
        both = self.model.logit_scale.float().exp() * (t[:, None] * v).sum(-1)
        return both[:, 0], both[:, 1]

    def logits(self, data: Comparisons) -> npt.NDArray[np.float64]:
        """reward_0 - reward_1 of many pairs, without gradients."""
        prompts, of_prompt, images, of_image = _once(data)
        t = self._prompts.in_parts(self._prompts.vectors, prompts)[of_prompt]
        v = self._images.in_parts(self._images.vectors, images)[of_image]
        difference: npt.NDArray[np.float64] = (t * (v[:, 0] - v[:, 1])).sum(-1)
        return float(self.model.logit_scale.detach().exp()) * difference

    def freeze(self) -> None:
        """Run both towers once and keep what they say; from here on only the heads compute."""
        self._prompts.freeze()
        self._images.freeze()


def _once(data: Comparisons) -> tuple[Integers, Integers, Integers, Integers]:
    """Each prompt once and where it stands [pairs], each image once and where [pairs, 2]."""
    prompts, of_prompt = np.unique(data.prompt, return_inverse=True)
    images, of_image = np.unique(data.image, return_inverse=True)
    return prompts, of_prompt.reshape(-1), images, of_image.reshape(-1, 2)


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` while the block lasts; who writes ``out`` removes one left by a kill.

    No name of a `sweep`, which would remove it while it lives.
    """
    folder = out.with_name(f".fifa-pixels-{out.name}")
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def finetune_clip(pairs: Pairs, out: Path, options: Reward) -> dict[str, Any]:
    """Fine-tune the CLIP ``options.base`` and write it to ``out``; returns ``reward.json``."""
    transformers = require("transformers")
    base = model_folder(options.base)
    runtime = make_runtime(options.device, "bfloat16" if options.bf16 else "float32")
    tower = ImageTower(base, "convert-crop", runtime)
    model = load_model(transformers.CLIPModel, base).float().to(runtime.device)
    make_folder(out.parent)
    with _scratch(out) as place:
        images, of_pair, unreadable = _pixels(pairs, tower, place, options)
        data, readable = Comparisons.of(pairs, of_pair, unreadable)
        data = data.part(readable)
        clip = _Clip(model, _tokens(pairs, base, model), images, runtime)
        if options.parts == "heads":
            clip.freeze()
        folds = min(max(2, round(1 / options.held_out)), len(np.unique(data.prompt)))
        ids = pairs.prompts["prompt_id"]
        fold = prompt_folds(ids, data.prompt, data.image, folds=folds, seed=options.seed)
        held_out = data.part(fold[data.prompt] == 0)
        try:
            best_step = _optimise(clip, data.part(fold[data.prompt] != 0), held_out, options)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise FifaError(
                f"out of memory with {options.batch} pairs a step",
                where=runtime.device,
                do="a smaller --batch, --bf16 or --parts heads",
            ) from error
        logits = clip.logits(held_out)
    temperature = fit_temperature(logits, held_out.label)
    model.logit_scale.data -= float(np.log(temperature))  # exp(s - log T) = exp(s) / T
    name = Path(options.base).name
    trained = "both towers" if options.parts == "full" else "the projections and logit_scale"
    settings = {
        "base": {"name": name, "files": model_digest(base, CONFIG_AND_WEIGHTS)},
        **reward_facts(pairs, readable, data, held_out, logits, temperature, options),
        "judged": "held out of its training; the best step was chosen on them, too",
        "what": f"The CLIP {name}, fine-tuned ({trained}).",
        "limits": "",
    }
    settings["options"]["base"] = name
    settings["training"]["best step"] = best_step
    with atomic_folder(out) as folder:
        model.save_pretrained(folder / MODEL)
        for name in (*TOKENIZER_FILES, "preprocessor_config.json"):
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / MODEL / name)
        save_settings(folder, "clip", settings)
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
        echo(
            "no step improved the result on held-out prompts: "
            "only the temperature differs from the base model"
        )
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
) -> tuple[Any, Integers, npt.NDArray[np.bool_]]:
    """Every unique image decoded once, into a file; the images of each pair; the unreadable."""
    download = options.read.allow_download
    images, of_pair = Engine(allow_download=download).distinct_of(pairs)
    n = len(images)
    path, shape = scratch / "pixels.npy", (n, 3, tower.side, tower.side)
    try:
        pixels = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    except OSError as error:
        raise cannot_write(path, error) from error
    reserve(path)
    bad: dict[int, str] = {}
    decoders = choose_decoders(partial(prepared, tower.preprocess))
    with closing(decoders), progress("reading images", n) as advance:
        batches = image_batches(images, decoders, bad, allow_download=download)
        for numbers, part in batches:
            pixels[numbers] = part
            advance(len(numbers))
    if len(bad) == n:
        raise FifaError(
            f"no image could be read; the first reason: {bad[0]}", where=pairs.origin.source
        )
    note(images_unreadable=len(bad))
    return pixels, of_pair, np.isin(np.arange(n), list(bad))
