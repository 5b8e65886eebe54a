"""Raters that run on this machine: the small default with its two heads, and any causal LM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.console import note
from fifa.score.encoders import make_encoder
from fifa.score.raters.logits import LogitReader, Numbers, Reading, load_reader, precision
from fifa.score.raters.logits import smollm_path as smollm_path
from fifa.score.rubric import RATINGS, load_rubric
from fifa.shards.files import digest

HARMFUL = 0.5  # a predicted toxicity that is graded 1
WORDLESS = 20.0  # nats of a prompt that is graded 1 for specificity; each doubling adds a grade
LOW = 2.0  # a language model's expected grade below this raises the flag


class DefaultRater:
    """SmolLM2-135M read by its logits, helped by its perplexity and a harm head on MiniLM.

    The language model is too small to see harm and barely tells nonsense from prompts, so

    - ``clarity = 1 + 4 p``, p a logistic regression on nats a byte, length and its own grades;
    - ``specificity = 1 + (s - 1) p``, ``s = 1 + log2(nats / 20)`` within [1, 5]: what the prompt
      settles, in the model's own information, a grade a doubling, and nothing if it is nonsense;
    - ``harmlessness = 5 - 4 min(1, toxicity / 0.5)``, the toxicity that the harm head predicts.

    Flags: ``nonsense`` and ``unsafe``, with the false alarms that docs/quality.md reports. What
    kind of harm it is, it does not know.
    """

    name = "local"

    @cached_property
    def _precision(self) -> tuple[str, str]:
        return precision()

    @cached_property
    def _reader(self) -> LogitReader:
        return load_reader(None, *self._precision)

    @cached_property
    def _encoder(self) -> Any:
        return make_encoder("minilm")

    @property
    def identity(self) -> dict[str, object]:
        """Models by their files' sizes, heads and rubric by their text."""
        return {
            "model": f"{smollm_path().name} {smollm_path().stat().st_size}",
            "precision": self._precision[1],
            "encoder": self._encoder.identity,
            "heads": digest(json.dumps(load_heads(), sort_keys=True).encode()),
            "rubric": load_rubric().identity,
        }

    def rate(self, prompts: Sequence[str], vectors: Numbers | None = None) -> pa.Table:
        """`RATINGS` of ``prompts``; ``vectors`` are their MiniLM embeddings, if at hand."""
        if vectors is None:
            vectors = self._encoder.embed(list(prompts)).astype(np.float16).astype(np.float32)
        reading = self._reader.read(prompts)
        heads = load_heads()
        sense = _line(nonsense_features(reading), heads["nonsense"])
        harm = _line(vectors.astype(np.float64), heads["harm"])
        # p = 1 / (1 + e^-x): the probability that it is a prompt
        p = 1 / (1 + np.exp(-sense))
        informed = np.clip(1 + np.log2(np.maximum(reading.nats, 1) / WORDLESS), 1, 5)
        toxicity = np.clip(harm, 0, 1) ** 2  # the head predicts its square root
        grades = np.stack(
            [1 + 4 * p, 1 + (informed - 1) * p, 5 - 4 * np.minimum(1, toxicity / HARMFUL)], axis=1
        )
        nonsense = sense < heads["nonsense"]["threshold"]
        return _table(grades, nonsense, harm > heads["harm"]["threshold"])


class LogitRater:
    """Any causal language model by its logits alone: the expected grade over the digits.

    Flags ``nonsense`` and ``unsafe`` where it expects less than 2 for clarity or harmlessness.

    Parameters
    ----------
    model
        A folder or hub id with safetensors weights, or a GGUF file of a Llama.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.name = f"local-{Path(model).name}"

    @cached_property
    def _precision(self) -> tuple[str, str]:
        return precision()

    @cached_property
    def _reader(self) -> LogitReader:
        return load_reader(self.model, *self._precision)

    @property
    def identity(self) -> dict[str, object]:
        """The model by its name and its files' sizes and times, the rubric by its text."""
        path = Path(self.model).expanduser()
        found = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found]
        name = str(path.resolve()) if found else self.model
        return {
            "model": [name, stats],
            "precision": self._precision[1],
            "rubric": load_rubric().identity,
        }

    def rate(self, prompts: Sequence[str]) -> pa.Table:
        """`RATINGS` of ``prompts``."""
        grades = self._reader.read(prompts).grades
        return _table(grades, grades[:, 0] < LOW, grades[:, 2] < LOW)


def nonsense_features(reading: Reading) -> npt.NDArray[np.float64]:
    """What the nonsense head reads, float64 [n, 5].

    Nats a byte, the reciprocal and the logarithm of the length (a short prompt has little to
    warm up on), and the model's expected clarity and specificity.
    """
    units = reading.units.astype(np.float64)
    columns = (reading.nats / units, 1 / units, np.log(units), *reading.grades[:, :2].T)
    return np.stack(columns, axis=1).astype(np.float64)


@cache
def load_heads() -> dict[str, Any]:
    """The two heads that the package ships (``harm_head.json``)."""
    raw = files("fifa.score").joinpath("harm_head.json").read_text("utf-8")
    heads: dict[str, Any] = json.loads(raw)
    return heads


def _line(x: npt.NDArray[np.float64], head: dict[str, Any]) -> npt.NDArray[np.float64]:
    line: npt.NDArray[np.float64] = x @ np.array(head["weights"]) + head["bias"]
    return line


def _table(grades: npt.NDArray[Any], nonsense: Any, unsafe: Any) -> pa.Table:
    note(prompts_rated=len(grades))
    flags = [
        ",".join(name for name, on in (("nonsense", n), ("unsafe", u)) if on)
        for n, u in zip(nonsense, unsafe, strict=True)
    ]
    grades = grades.astype(np.float32)
    columns = [grades.mean(1), pa.array(flags, pa.string()), *grades.T]
    return pa.table([pa.array(column) for column in columns], schema=RATINGS)
