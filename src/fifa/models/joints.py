"""How the parts of a diffusion model fit together, as their settings say; nothing is loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fifa.errors import FifaError
from fifa.models.families import Family
from fifa.shards.files import read_json

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # of diffusers' schedulers
# Of text encoders, where their settings say nothing: CLIP's and T5's words, and CLIP's tokens
WORDS = {"clip_text_model": 49_408, "clip": 49_408, "t5": 32_128}
TOKENS = 77
MOST_TOKENS = 1 << 20  # a tokenizer that says more has no limit


def check_joints(folder: Path, family: Family, denoiser: Path | None = None) -> None:
    """Raise `FifaError` where one part of a model does not take what another gives.

    Settings that are not there are not compared.

    Parameters
    ----------
    folder
        In diffusers' layout.
    family
        What it is; its `Family.joints` and `Family.requires` are looked at.
    denoiser
        The folder of a UNet or transformer that takes the place of the model's own.
    """
    parts = _Parts(folder, {family.part: denoiser or folder / family.part})
    wrong = [
        *_schedule(parts.settings("scheduler"), family),
        *_vae(parts.settings("vae")),
        *_joints(parts, family),
        *_texts(parts),
    ]
    if wrong:
        raise FifaError(
            f"the parts of the model do not fit: {'; '.join(wrong)}",
            where=str(denoiser or folder),
            do=f"take all of its parts from one {family.title} model, with the settings and "
            "weights that belong together",
        )


class _Parts:
    """The settings of a model's parts, read once."""

    def __init__(self, folder: Path, elsewhere: dict[str, Path]) -> None:
        self.folder, self._elsewhere = folder, elsewhere
        self._read: dict[str, dict[str, Any]] = {}

    def settings(self, part: str) -> dict[str, Any]:
        if part not in self._read:
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            path = self._elsewhere.get(part, self.folder / part) / name
            found = read_json(path, f"the settings of {part}", missing={})
            inner = found.get("text_config")  # of a whole CLIP
            self._read[part] = found | inner if isinstance(inner, dict) else found
        return self._read[part]

    def number(self, name: str) -> int | None:
        """``PART.SETTING``, where it is a number."""
        part, _, setting = name.partition(".")
        value = self.settings(part).get(setting)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def _joints(parts: _Parts, family: Family) -> Iterator[str]:
    own = parts.settings(family.part)
    for setting, allowed in family.requires.items():
        value = own.get(setting)
        if own and value not in allowed:
            yield f"{family.part}: {setting} is {_brief(value)}, not {allowed[0]}"
    for setting, giving in family.joints.items():
        takes = parts.number(f"{family.part}.{setting}")
        gives = [parts.number(name) for name in giving]
        # a projection of its own stands between the text and the UNet
        projected = setting == "cross_attention_dim" and own.get("encoder_hid_dim")
        if takes is None or projected or None in gives:
            continue
        total = sum(number for number in gives if number is not None)
        if takes != total:
            often = Counter(zip(giving, gives, strict=True)).items()
            given = " + ".join(
                f"{times} x {name} {n}" if times > 1 else f"{name} {n}"
                for (name, n), times in often
            )
            yield f"{family.part}: {setting} is {takes}, but it is given {total} ({given})"


def _vae(known: dict[str, Any]) -> Iterator[str]:
    for setting in ("in_channels", "out_channels"):
        if known.get(setting, 3) != 3:
            yield f"vae: {setting} is {_brief(known[setting])}, not 3 for an image's colours"
    scale = known.get("scaling_factor")
    plain = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale is not None and not (plain and 0 < abs(scale) < math.inf):
        yield f"vae: scaling_factor is {_brief(scale)}"


def _schedule(known: dict[str, Any], family: Family) -> Iterator[str]:
    name = str(known.get("_class_name", ""))
    flow = "FlowMatch" in name or bool(known.get("use_flow_sigmas"))
    if name and flow != (family.schedule == "flow"):
        kind = "a flow's" if family.schedule == "flow" else "no flow's"
        yield f"scheduler: {_brief(name)}, where {kind} is needed"
    steps = known.get("num_train_timesteps", 1)
    if not isinstance(steps, int) or isinstance(steps, bool) or not 0 < steps <= 1_000_000:
        yield f"scheduler: num_train_timesteps is {_brief(steps)}"
    prediction = known.get("prediction_type", PREDICTIONS[0])
    if family.schedule == "diffusion" and prediction not in PREDICTIONS:
        yield f"scheduler: prediction_type is {_brief(prediction)}, not {', '.join(PREDICTIONS)}"


def _texts(parts: _Parts) -> Iterator[str]:
    for number in ("", "_2", "_3"):
        encoder, tokenizer = f"text_encoder{number}", f"tokenizer{number}"
        known = parts.settings(encoder)
        kind = known.get("model_type")
        if not known or not (parts.folder / tokenizer).is_dir():
            continue
        words, largest = known.get("vocab_size", WORDS.get(str(kind))), _words(parts, tokenizer)
        if isinstance(words, int) and largest > words:
            yield f"{tokenizer} has {largest:,} words, {encoder} knows {words:,}"
        if not str(kind).startswith("clip"):
            continue  # T5's prompts have lengths of the pipeline's
        limit = _tokenizer(parts, tokenizer, "tokenizer_config.json")
        length: Any = limit.get("model_max_length", limit.get("max_len"))
        reads = parts.number(f"{encoder}.max_position_embeddings") or TOKENS
        given = isinstance(length, int | float) and length < MOST_TOKENS
        if limit and not (given and 2 < length <= reads):
            cuts = "nowhere" if length is None else f"at {_brief(length)}"
            yield f"{tokenizer} cuts prompts {cuts} (model_max_length), {encoder} reads {reads}"


def _words(parts: _Parts, tokenizer: str) -> int:
    """How many words a tokenizer may find, without those that were added; 0 if not known."""
    words: Any = _tokenizer(parts, tokenizer, "vocab.json")
    if not words:
        model = _tokenizer(parts, tokenizer, "tokenizer.json").get("model")
        words = model.get("vocab", {}) if isinstance(model, dict) else {}
    if isinstance(words, list):
        return len(words)
    numbers = [n for n in words.values() if isinstance(n, int)] if isinstance(words, dict) else []
    return max(numbers, default=-1) + 1


def _tokenizer(parts: _Parts, tokenizer: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(parts.folder / tokenizer / name, tokenizer, missing={})
    return found


def _brief(value: object) -> str:
    return repr(value)[:60]
