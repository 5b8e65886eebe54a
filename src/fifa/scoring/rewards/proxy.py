"""A reward model trained here, in a folder: loaded like any other, wherever the folder goes.

``reward.json`` says what it is, ``README.md`` (its model card) what it is worth. Beside them is
either ``head.safetensors``, a small head on frozen encoders, or ``model/``, a fine-tuned CLIP.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fifa.config import Reward, Rubric
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.models.hub import MODEL_FILES
from fifa.models.networks import named_keys
from fifa.models.optional import require
from fifa.models.runtime import Runtime, Tensor
from fifa.scoring.encoders import Encoder, make_encoder
from fifa.scoring.rewards import RewardModel
from fifa.scoring.rewards.clip import ClipReward
from fifa.scoring.rewards.head import Comparisons, Head
from fifa.scoring.rewards.image_encoders import ImageEncoder, make_image_encoder
from fifa.scoring.rewards.metrics import measure
from fifa.scoring.rewards.pixels import Preprocess
from fifa.scoring.rewards.weights import read_weights
from fifa.scoring.specs import REWARDS, Spec
from fifa.shards.files import files_digest, read_json, write_bytes, write_json, write_text
from fifa.shards.manifest import check_manifest, write_manifest

FORMAT = 1
SCALE = REWARDS.parse("proxy:FOLDER").entry.scale
HEAD, SETTINGS, CARD = "head.safetensors", "reward.json", "README.md"
MODEL, ENCODERS = "model", "encoders"


def load_proxy(place: Spec | str | Path, runtime: Runtime | None = None) -> RewardModel:
    """The reward model in a folder that `fifa.scoring.rewards.fit.train_reward` wrote.

    Parameters
    ----------
    place
        The folder, wherever it is now, or the spec that names it.
    runtime
        Where and how it computes.

    Raises
    ------
    FifaError
        For a folder that holds no reward of ours, an encoder that is not installed or is not the
        one it was trained on.
    """
    folder = Path(place.model if isinstance(place, Spec) else place).expanduser()
    settings = read_json(folder / SETTINGS, "the reward model")
    check_manifest(folder)
    if settings.get("format") != FORMAT or settings.get("kind") not in ("head", "clip"):
        raise FifaError(
            "not a reward model of this version of fifa",
            where=str(folder / SETTINGS),
            do="train one: fifa reward train SOURCE --out FOLDER",
        )
    if settings["kind"] == "head":
        return HeadReward(folder, settings, runtime or Runtime())
    return ClipProxy(folder, runtime or Runtime())


class HeadReward:
    """A head on frozen encoders: a `fifa.scoring.rewards.RewardModel`.

    Parameters
    ----------
    folder
        Where it lies.
    settings
        Its ``reward.json``.
    runtime
        Where and how the image encoder computes; the head always in float32.
    """

    name = "proxy"
    scale = SCALE

    def __init__(self, folder: Path, settings: dict[str, Any], runtime: Runtime) -> None:
        self.runtime, self._weights = runtime, folder / HEAD
        image, text = (_encoder(settings, side, folder) for side in ("image", "text"))
        if image is None:
            raise _damaged("it names no image encoder", folder)
        self._images: ImageEncoder = make_image_encoder(_found(folder, image["spec"]), runtime)
        _check_same(image["identity"], self._images.identity, folder)
        self._texts: Encoder | None = None
        if text is not None:
            spec, device = _found(folder, text["spec"]), runtime.device
            self._texts = make_encoder(spec, device=device, dtype="float32")  # as it was trained
            _check_same(text["identity"], self._texts.identity, folder)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Digest of the head, and the identities of the encoders."""
        return {
            "scorer": self.name,
            "weights": files_digest({"head": self._weights}),
            "image": self._images.identity,
            "text": self._texts.identity if self._texts else None,
            "scale": self.scale,
        }

    @property
    def preprocess(self) -> Preprocess:
        """From an image of any mode to pixels for the image encoder."""
        return self._images.preprocess

    @property
    def side(self) -> int:
        """Of the image encoder's input, in pixels."""
        return self._images.side

    def image_features(self, pixels: Tensor) -> Tensor:
        """``[b, 1 + p]``: the image's own reward, and what a prompt is multiplied with."""
        head = self._head
        joint: Tensor = self._images.embed(pixels) @ head["image"] + head["image_bias"]
        return joint

    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """``[n, p]``; one idle column for a reward of the image alone."""
        torch = require("torch")
        head = self._head
        features: Tensor = torch.zeros(len(prompts), 1, device=self.runtime.device)
        if self._texts is not None:
            vectors = torch.from_numpy(self._texts.embed(prompts)).to(self.runtime.device)
            features = vectors @ head["prompt"] + head["prompt_bias"]
        return features

    def rewards(self, prompts: Tensor, images: Tensor) -> Tensor:
        """float32 ``[n]``: a + v . u (`fifa.scoring.rewards.head.Head`)."""
        return images[:, 0] + (images[:, 1:] * prompts).sum(-1)

    @cached_property
    def _head(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = read_weights(self._weights)
        wanted = {"image", "image_bias", "prompt", "prompt_bias"}
        if wanted != set(tensors):
            raise FifaError(
                "the weights are not those of the head: "
                + named_keys(missing=wanted - set(tensors), unused=set(tensors) - wanted),
                where=str(self._weights),
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        (_, *one), (_, *two) = shapes["image"] or (0,), shapes["prompt"] or (0,)
        if (tuple(one), tuple(two)) != (shapes["image_bias"], shapes["prompt_bias"]):
            raise FifaError(f"the head's shapes do not fit: {shapes}", where=str(self._weights))
        return {name: tensor.to(self.runtime.device) for name, tensor in tensors.items()}


class ClipProxy(ClipReward):
    """A CLIP fine-tuned on the feedback: ``exp(logit_scale) * cos``, the temperature within.

    Parameters
    ----------
    folder
        Where it lies; its ``model`` is a transformers CLIP, which ``pickscore:FOLDER/model``
        reads as well.
    runtime
        Where and how it computes.
    """

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        super().__init__(REWARDS.parse(f"pickscore:{folder / MODEL}"), runtime)
        self.name, self.scale = "proxy", f"{self.scale}: {SCALE}"


def reward_facts(
    pairs: Pairs,
    readable: npt.NDArray[np.bool_],
    data: Comparisons,
    held_out: Comparisons,
    logits: npt.NDArray[np.float64],
    temperature: float,
    options: Reward | Rubric,
) -> dict[str, Any]:
    """What ``reward.json`` and the card say of a training, whatever was trained.

    Parameters
    ----------
    pairs, readable
        The source, and which of its pairs have both images.
    data, held_out
        What was trained on, and what it is judged on.
    logits
        reward_0 - reward_1 of the pairs held out, before calibration.
    temperature
        What they are divided by.
    options
        How it was trained.
    """
    before, after = (
        measure(logits / t, held_out.label, held_out.prompt, seed=options.seed)
        for t in (1.0, temperature)
    )
    return {
        "options": options.settings(),
        "training": {
            "source": Path(pairs.origin.source).name or "memory",
            "fingerprint": pairs.origin.fingerprint,
            "pairs": len(data.label),
            "of them ties": int((data.label == 0.5).sum()),
            "prompts": len(np.unique(data.prompt)),
            "pairs without both images": int((~readable).sum()),
        },
        "temperature": temperature,
        "metrics": {"before": asdict(before), "after": asdict(after)},
    }


def save_head(folder: Path, head: Head, settings: dict[str, Any]) -> None:
    """Write a head's folder.

    Encoders that are local folders are copied in, so that the folder can go anywhere; those of
    the hub or of a wheel stay where they are.
    """
    save = require("safetensors.numpy").save
    arrays = {name: np.ascontiguousarray(a, np.float32) for name, a in vars(head).items()}
    for part in ("image", "text"):
        if own := settings[part]:
            settings = {**settings, part: {**own, "spec": _carried(folder, own["spec"])}}
    write_bytes(folder / HEAD, save(arrays, metadata={"format": "pt"}))
    save_settings(folder, "head", settings)


def save_settings(folder: Path, family: str, settings: dict[str, Any]) -> None:
    """Write ``reward.json``, by which a reward is recognised, digests and the card, last of all."""
    settings = {"format": FORMAT, "kind": family, **settings}
    write_json(folder / SETTINGS, settings)
    write_manifest(folder, [folder])  # but of the card, which people may change
    write_text(folder / CARD, model_card(settings))


def model_card(settings: dict[str, Any]) -> str:
    """README.md of a reward's folder.

    Parameters
    ----------
    settings
        What goes into ``reward.json``: ``options``, ``training``, ``metrics`` with ``before`` and
        ``after`` (`fifa.scoring.rewards.metrics.Metrics` as dicts), ``temperature``.
    """
    before, after = settings["metrics"]["before"], settings["metrics"]["after"]
    training = settings["training"]
    facts = "\n".join(f"| {name} | {_plain(value)} |" for name, value in training.items())
    options = "\n".join(f"| {name} | {_plain(v)} |" for name, v in settings["options"].items())
    low, high = after["low"], after["high"]
    kind = "rubric" if settings.get("kind") == "rubric" else "proxy"
    cross = " `--margin proxy` scores them\nby cross-fitting instead." if kind == "proxy" else ""
    return f"""---
library_name: fifa-align
pipeline_tag: image-classification
tags: [reward-model, human-preference, text-to-image]
---

# A {kind} of people's preference

{settings["what"]}

A reward is the log-odds that people prefer the image: `sigmoid(reward_0 - reward_1)` is the
probability that they prefer image 0. Rewards compare within one prompt only.

## How good it is

On {after["pairs"]:,} pairs of {after["prompts"]:,} prompts, {settings["judged"]}:

| | |
|---|---|
| accuracy against the majority | {after["accuracy"]:.3f} |
| 95 % interval (bootstrap of prompts) | {low:.3f} to {high:.3f} |
| cross-entropy, nats | {before["nll"]:.3f} before calibration, {after["nll"]:.3f} after |
| expected calibration error | {before["ece"]:.3f} before calibration, {after["ece"]:.3f} after |
| temperature | {settings["temperature"]:.3f} |

The temperature was fitted on the same held-out pairs, one number for all of them.

## What it was trained on

| | |
|---|---|
{facts}

| option | |
|---|---|
{options}

## Where it ends

{settings["limits"]}
It says what the people in its training data preferred, with their habits and prejudices. Do not
score the pairs it was trained on with it: it has seen their labels.{cross}

## Use

```bash
fifa score SOURCE --margin {kind}:FOLDER
```
"""


def _carried(folder: Path, spec: str) -> str:
    """``spec`` with a local model copied into ``folder``; as it is for any other."""
    name, _, model = spec.partition(":")
    local = Path(model).expanduser()
    if not model or model.isdigit() or not local.is_dir():
        return spec
    local = local.resolve()
    for file in sorted(p for p in local.rglob("*") if p.suffix in MODEL_FILES and p.is_file()):
        copy = folder / ENCODERS / local.name / file.relative_to(local)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return f"{name}:{ENCODERS}/{local.name}"


def _encoder(settings: dict[str, Any], side: str, folder: Path) -> dict[str, Any] | None:
    """What ``reward.json`` says of an encoder; None for a head without it."""
    known = settings.get(side)
    if known is None and side in settings:
        return None
    found: dict[str, Any] = known if isinstance(known, dict) else {}
    if not isinstance(found.get("spec"), str) or not isinstance(found.get("identity"), dict):
        raise _damaged(f"it does not say which {side} encoder", folder)
    return found


def _damaged(why: str, folder: Path) -> FifaError:
    return FifaError(
        f"the reward model is damaged: {why}",
        where=str(folder / SETTINGS),
        do="copy it again, or train one: fifa reward train SOURCE --out FOLDER",
    )


def _found(folder: Path, spec: str) -> str:
    """``spec`` with the place of an encoder that lies in ``folder``."""
    name, _, model = spec.partition(":")
    inside = folder / model
    if model.startswith(f"{ENCODERS}/") and inside.is_dir():
        return f"{name}:{inside}"
    return spec


def _check_same(trained: dict[str, Any], here: dict[str, Any], folder: Path) -> None:
    """Raise `FifaError` unless an encoder is the one that the head was trained on."""
    different = [k for k in trained if k != "dtype" and trained[k] != here.get(k)]
    if different:
        raise FifaError(
            f"the encoder {here.get('encoder')} is not the one that this reward was trained on "
            f"(another {', '.join(different)})",
            where=str(folder / SETTINGS),
            do="install that one, or train the reward again",
        )


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
