"""Raters that run on this machine: the small default with its heads, and any causal LM."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from importlib.resources import files
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.console import echo, note
from fifa.models.hub import model_digest
from fifa.models.transformer import ModelEncoder
from fifa.scoring.encoders import make_encoder
from fifa.scoring.raters.logits import (
    LogitReader,
    Numbers,
    Reading,
    find_model,
    load_reader,
    precision,
    smollm_path,
)
from fifa.scoring.rubric import RATINGS, load_rubric, shortened
from fifa.scoring.specs import Spec
from fifa.shards.files import digest

HARMFUL = 0.5  # a predicted toxicity that is graded 1
LOW = 2.0  # a language model's expected grade below this raises the flag
# What stands between the clauses of a prompt; marks that words have too, only before a space.
SEPARATORS = re.compile(
    r"[,;|/\\#+*~=\r\n\t()\[\]{}<>]+|[\u2014\u2022\u2026\u00b7\u2192\u3001\u3002\uff0c\uff1b\uff5c]+"
    r"|(?<![.:!?])[.:!?]++(?=\s|$)|\s[-\u2013&]+\s|--+|::+"
)
WORDS = 12  # words that a part of a prompt has at most: a tail may come without separators
PARTS = 64  # parts that a prompt is embedded in at most


class LogitRater:
    """Any causal language model by its logits alone: the expected grade over the digits.

    Flags ``nonsense`` and ``unsafe`` where it expects less than 2 for clarity or harmlessness.

    Parameters
    ----------
    model
        A folder or hub id with safetensors weights, or a GGUF file of a Llama; by default that of
        SmolLM2-135M-Instruct.
    dtype
        ``float32``, ``bfloat16`` or ``float16``; None: what is fastest here.
    device
        Where it computes; None: a GPU if there is one.
    """

    def __init__(
        self, model: str = "", dtype: str | None = None, device: str | None = None
    ) -> None:
        self.model, self._dtype, self._device = model, dtype, device
        self.name = f"local-{Path(model).name}" if model else "local"

    @cached_property
    def _path(self) -> Path:
        return find_model(self.model) if self.model else smollm_path()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it loads its model anew, in the precision that names its ratings."""
        return type(self), (self.model, self._precision[1], self._device)

    @cached_property
    def _precision(self) -> tuple[str, str]:
        device, dtype = precision(self._device)
        return device, self._dtype or dtype

    @cached_property
    def _reader(self) -> LogitReader:
        echo(f"{self.name}: {', '.join(self._precision)}")
        return load_reader(self._path, *self._precision)

    @property
    def identity(self) -> dict[str, object]:
        """The model by its files' content, not its path, the rubric by its text."""
        return {
            "model": model_digest(self._path),
            "precision": self._precision[1],
            "rubric": load_rubric().identity,
        }

    def rate(self, prompts: Sequence[str]) -> pa.Table:
        """`RATINGS` of ``prompts``."""
        return logit_ratings(self._reader.read(prompts))


class DefaultRater(LogitRater):
    """SmolLM2-135M read by its logits, helped by its perplexity and harm heads on MiniLM.

    The language model is too small to see harm, and its grades hardly leave the middle, so

    - ``clarity = 1 + 4 p``, p a logistic regression on nats a byte, length and its own grades;
    - ``specificity = 1 + 4 d p``, d its expected grade for detail, stretched so that 5 % and
      95 % of ordinary prompts are at 0 and 1; nonsense settles nothing;
    - ``harmlessness = 5 - 4 max(min(1, toxicity / 0.5), h)``, the toxicity that a head predicts,
      and h the largest 1 / (1 + exp(t - x)) over the kinds of harm, a head's x, its threshold t.

    The heads see a prompt twice, as a whole and without its style (`content_vectors`), and what is
    larger counts: words of style turn a whole prompt's embedding to themselves.

    Flags: ``nonsense``, and the kinds of harm whose head is above its threshold or which a word of
    the prompt names, with the false alarms that docs/quality.md reports.
    """

    @cached_property
    def encoder(self) -> ModelEncoder:
        """MiniLM, that of the diversity step's default."""
        return make_encoder("minilm", device=self._device or "auto")

    @property
    def identity(self) -> dict[str, object]:
        """Models by their files' content, heads and rubric by their text."""
        return {
            **super().identity,
            "encoder": self.encoder.identity,
            "heads": digest(json.dumps(load_heads(), sort_keys=True).encode()),
            "parts": digest(SEPARATORS.pattern, WORDS, PARTS),
            "words": load_words()[2],
        }

    def rate(self, prompts: Sequence[str], vectors: Numbers | None = None) -> pa.Table:
        """`RATINGS` of ``prompts``; ``vectors`` are their MiniLM embeddings, if at hand."""
        if vectors is None:
            vectors = self.encoder.embed(list(prompts)).astype(np.float16).astype(np.float32)
        contents = content_vectors(prompts, vectors, self.encoder.embed)
        table = default_ratings(self._reader.read(prompts), vectors, contents)
        flags = add_word_flags(list(map(shortened, prompts)), table["flags"].to_pylist())
        place = table.schema.get_field_index("flags")
        return table.set_column(place, table.schema.field(place), pa.array(flags, pa.string()))


def make_local(spec: Spec, *_: object, device: str | None) -> DefaultRater | LogitRater:
    """The rater ``local``, or ``local:MODEL``."""
    return LogitRater(spec.model, device=device) if spec.model else DefaultRater(device=device)


def default_ratings(reading: Reading, vectors: Numbers, contents: Numbers) -> pa.Table:
    """`RATINGS` as `DefaultRater` gives them, from its two models' outputs."""
    heads = load_heads()
    sense = _line(nonsense_features(reading), heads["nonsense"])
    names, over = harm_scores(vectors, contents)
    # p = 1 / (1 + e^-x): the probability that it is a prompt
    p = 1 / (1 + np.exp(-sense))
    low, high = heads["specificity"]["low"], heads["specificity"]["high"]
    detail = np.clip((reading.grades[:, 1].astype(np.float64) - low) / (high - low), 0, 1)
    toxic = over[:, names.index("toxic")] + heads["harm"]["kinds"]["toxic"]["threshold"]
    toxicity = np.clip(toxic, 0, 1) ** 2  # the head predicts its square root
    named = 1 / (1 + np.exp(-np.delete(over, names.index("toxic"), 1).max(1)))
    harm = np.maximum(np.minimum(1, toxicity / HARMFUL), named)
    grades = np.stack([1 + 4 * p, 1 + 4 * detail * p, 5 - 4 * harm], axis=1)
    return _table(
        grades,
        {
            "nonsense": sense < heads["nonsense"]["threshold"],
            **dict(zip(names, over.T > 0, strict=True)),
        },
    )


def logit_ratings(reading: Reading) -> pa.Table:
    """`RATINGS` as `LogitRater` gives them: the expected grades as they are."""
    grades = reading.grades
    return _table(grades, {"nonsense": grades[:, 0] < LOW, "unsafe": grades[:, 2] < LOW})


def harm_scores(*views: Numbers) -> tuple[list[str], npt.NDArray[np.float64]]:
    """The kinds of harm, and how far MiniLM embeddings are above their thresholds.

    Parameters
    ----------
    views
        float32 [n, 384] each, embeddings of the same prompts in another way; the largest counts.

    Returns
    -------
    list of str, float64 [n, kinds]
        Of ``toxic`` in roots of toxicity, of the others in log-odds; positive is flagged.
    """
    kinds = load_heads()["harm"]["kinds"]
    x = np.stack(views).astype(np.float64)
    over = [_line(x, head).max(0) - head["threshold"] for head in kinds.values()]
    return list(kinds), np.stack(over, axis=1)


def content_vectors(
    prompts: Sequence[str], vectors: Numbers, embed: Callable[[Sequence[str]], Numbers]
) -> Numbers:
    """What prompts are about: MiniLM embeddings that words of style do not turn to themselves.

    The mean of a prompt's parts, a part of n words and style s (the log-odds of a linear head that
    it is style) weighing n exp(-s). Every distinct part is embedded once.

    Parameters
    ----------
    prompts
        The texts; their first `LONGEST` characters are read.
    vectors
        Their embeddings, float32 [n, 384]; those of prompts that have one part are kept.
    embed
        Texts to normalised embeddings.

    Returns
    -------
    float32 [n, 384]
        Normalised, rounded to float16.
    """
    texts = [parts(prompt) for prompt in map(shortened, prompts)]
    texts = [own if len(own) > 1 else [] for own in texts]
    places = {text: i for i, text in enumerate(dict.fromkeys(chain(*texts)))}
    if not places:
        return vectors
    embedded = embed(list(places)).astype(np.float64)
    size = np.array([len(text.split()) for text in places])
    weights = size * np.exp(-_line(embedded, load_heads()["style"]))
    contents = vectors.copy()
    for row, own in enumerate(texts):
        if own:
            at = [places[text] for text in own]
            mean = weights[at] @ embedded[at]
            contents[row] = (mean / np.linalg.norm(mean)).astype(np.float16)
    return contents


def clauses(prompt: str) -> list[str]:
    """What `SEPARATORS` leave of a prompt, in lower case, as the encoder reads it."""
    found = (" ".join(text.lower().split()) for text in SEPARATORS.split(prompt))
    return [text for text in found if any(map(str.isalnum, text))]


def parts(prompt: str) -> list[str]:
    """The distinct clauses of a prompt, cut to `WORDS` words and joined to `PARTS` parts."""
    cut = []
    for words in map(str.split, clauses(prompt)):
        size = -(-len(words) // -(-len(words) // WORDS))
        cut += [" ".join(words[i : i + size]) for i in range(0, len(words), size)]
    texts = list(dict.fromkeys(cut))
    size = max(1, -(-len(texts) // PARTS))
    return [", ".join(texts[i : i + size]) for i in range(0, len(texts), size)]


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
    """What the package ships beside the models (``harm_head.json``)."""
    raw = files("fifa.scoring").joinpath("harm_head.json").read_text("utf-8")
    heads: dict[str, Any] = json.loads(raw)
    return heads


@cache
def load_words() -> tuple[dict[str, re.Pattern[str]], re.Pattern[str], str]:
    """A pattern a flag, the one of children, and a digest of both (``words.toml``)."""
    raw = tomllib.loads(files("fifa.scoring").joinpath("words.toml").read_text("utf-8"))

    def pattern(words: str) -> re.Pattern[str]:
        return re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE | re.VERBOSE)

    flags = {flag: pattern(words) for flag, words in raw["flags"].items()}
    return flags, pattern(raw["child"]), digest(raw["flags"], raw["child"])


def word_flags(prompt: str) -> list[str]:
    """The unsafe flags that the prompt's words raise, a subset of `fifa.config.UNSAFE_FLAGS`.

    ``minors`` is raised by its own words, and wherever a child stands beside sexual words.
    """
    patterns, child, _ = load_words()
    flags = [flag for flag, pattern in patterns.items() if pattern.search(prompt)]
    if "sexual" in flags and "minors" not in flags and child.search(prompt):
        flags.append("minors")
    return flags


def add_word_flags(prompts: Sequence[str], flags: Sequence[str]) -> list[str]:
    """``flags`` (comma-joined, a prompt each) with those that the prompts' words raise."""
    return [
        ",".join(sorted({*filter(None, known.split(",")), *word_flags(prompt)}))
        for prompt, known in zip(prompts, flags, strict=True)
    ]


def _line(x: npt.NDArray[np.float64], head: dict[str, Any]) -> npt.NDArray[np.float64]:
    line: npt.NDArray[np.float64] = x @ np.array(head["weights"]) + head["bias"]
    return line


def _table(grades: npt.NDArray[Any], raised: dict[str, npt.NDArray[np.bool_]]) -> pa.Table:
    note(prompts_rated=len(grades))
    rows = np.stack(list(raised.values()), axis=1)
    flags = [",".join(sorted(compress(raised, row))) for row in rows]
    grades = grades.astype(np.float32)
    columns = [grades.mean(1), pa.array(flags, pa.string()), *grades.T]
    return pa.table([pa.array(column) for column in columns], schema=RATINGS)
