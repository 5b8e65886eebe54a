"""A transformer's text encoder: batched, pooled as its own files say, from safetensors alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fifa.console import echo_once, note, quiet
from fifa.errors import FifaError
from fifa.models.hub import model_digest
from fifa.models.networks import load_network, loading
from fifa.models.optional import require
from fifa.models.runtime import Parts, best_device, best_dtype
from fifa.shards.files import read_json

Vectors = npt.NDArray[np.float32]

BATCH_TOKENS = 8192  # padded tokens a forward pass
CUDA_TOKENS = 65_536  # on a GPU, which is not busy before
CHARACTERS_PER_TOKEN = 100  # a prompt is cut here before tokenizing: a 10 MB prompt costs nothing
POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean",  # the mean times sqrt(tokens): one direction
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class ModelEncoder:
    """A transformer's text encoder in a local folder, loaded when it is first used.

    Parameters
    ----------
    name
        For people and file names.
    folder
        Safetensors weights, config and tokenizer.
    tower
        ``text``: token states, pooled as the folder's ``modules.json`` says (their mean where
        there is none). ``clip``: the projected text embedding.
    device
        ``auto`` (cuda, then mps, then cpu) or a torch device.
    dtype
        What the model computes in: ``float32``, ``bfloat16`` or ``float16``; None for what is
        fastest on the device (`fifa.models.runtime.best_dtype`).
    """

    name: str
    folder: Path
    tower: str
    device: str = "auto"
    dtype: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it loads its model anew, in the precision that names its vectors."""
        return ModelEncoder, (self.name, self.folder, self.tower, self.device, self.precision)

    @cached_property
    def precision(self) -> str:
        """The dtype that it computes in."""
        return self.dtype or best_dtype(self._device)

    @property
    def _device(self) -> str:
        return best_device() if self.device == "auto" else self.device

    @cached_property
    def identity(self) -> dict[str, object]:
        """Name, tower, precision and a digest of the model's files: content, not path."""
        return {
            "encoder": self.name,
            "kind": self.tower,
            "dtype": self.precision,
            "files": model_digest(self.folder, nested=True),
        }

    def embed(self, prompts: Sequence[str]) -> Vectors:
        """The L2-normalised vectors of ``prompts``, float32 [n, d].

        Prompts are sorted by length and batched by their tokens (fewer once memory runs
        out), so little is padding; one longer than the model reads is cut, and counted as
        ``prompts_at_token_limit``.
        """
        settings = self._settings
        tokenizer, model, device = self._loaded
        limit = int(settings["max_tokens"])
        texts = [settings["prefix"] + p[: limit * CHARACTERS_PER_TOKEN] for p in prompts]
        if settings["lower"]:
            texts = [text.lower() for text in texts]
        tokens = tokenizer(texts, truncation=True, max_length=limit)["input_ids"] if texts else []
        filler = tokenizer.pad_token_id or 0
        tokens = [ids or [filler] for ids in tokens]  # some tokenizers give "" no token at all
        note(prompts_at_token_limit=sum(len(ids) >= limit for ids in tokens))
        vectors = np.empty((len(tokens), 0), np.float32)
        budget = CUDA_TOKENS if device.startswith("cuda") else BATCH_TOKENS
        for batch in length_batches([len(ids) for ids in tokens], budget):

            def forward(part: slice, batch: list[int] = batch) -> Vectors:
                return self._forward(model, [tokens[i] for i in batch[part]], filler, device)

            found = np.concatenate(list(self._parts.run(forward, len(batch), len(batch))))
            if vectors.shape[1] == 0:
                vectors = np.empty((len(tokens), found.shape[1]), np.float32)
            vectors[batch] = found
        if not np.isfinite(vectors).all():
            raise FifaError(
                f"the encoder {self.name} gives numbers that are not finite in {self.precision}",
                where=str(self.folder),
                do="compute in float32, or choose another",
            )
        return normalised(vectors)

    def _forward(self, model: Any, tokens: list[list[int]], filler: int, device: str) -> Vectors:
        torch = require("torch")
        padded, rows = torch.nn.utils.rnn.pad_sequence, [torch.tensor(ids) for ids in tokens]
        ids = padded(rows, batch_first=True, padding_value=filler).to(device)
        mask = padded([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        with torch.inference_mode():
            out = model(input_ids=ids, attention_mask=mask)
            if self.tower == "clip":
                pooled = out.text_embeds
            else:
                pooled = _pool(out.last_hidden_state.float(), mask, self._settings["pooling"])
        vectors: Vectors = pooled.float().cpu().numpy()
        return vectors

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """Pooling, prefix, case and token limit, from the folder's own files."""
        with loading("the encoder's settings", self.folder):
            return self._read_settings()

    def _read_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"pooling": "mean", "prefix": "", "lower": False}
        modules = _read(self.folder / "modules.json", list)
        if self.tower == "text":
            settings |= _sentence_settings(self.folder, modules)
        config = _read(self.model_folder / "config.json")
        config = config.get("text_config") or config
        reads = _read(self.model_folder / "tokenizer_config.json")
        limits = [
            settings.get("max_tokens"),
            config.get("max_position_embeddings", 77 if self.tower == "clip" else None),
            reads.get("model_max_length"),
            512,
        ]
        settings["max_tokens"] = min(limit for limit in limits if limit)
        if settings["max_tokens"] < 1:
            raise ValueError(f"it reads {settings['max_tokens']} tokens")
        return settings

    @property
    def model_folder(self) -> Path:
        """Where the transformer lies: the folder, or the place that its modules.json names."""
        modules = _read(self.folder / "modules.json", list) if self.tower == "text" else []
        return self.folder / (modules[0].get("path", "") if modules else "")

    @cached_property
    def _loaded(self) -> tuple[Any, Any, str]:
        require("torch")
        transformers = require("transformers")
        folder = self.model_folder
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        with quiet(transformers), loading("the encoder", folder):
            config = transformers.AutoConfig.from_pretrained(folder, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        if self.tower == "clip" and config.model_type not in ("clip", "clip_text_model"):
            raise FifaError(
                f"this is a {config.model_type} model, not a CLIP",
                where=str(folder),
                do="name it text:..., or choose a CLIP",
            )
        model_class = transformers.AutoModel
        if self.tower == "clip":
            model_class = transformers.CLIPTextModelWithProjection
        elif config.is_encoder_decoder:
            model_class = transformers.AutoModelForTextEncoding
        echo_once(f"{self.name}: {self._device}, {self.precision}")
        model = load_model(model_class, folder, self.precision)
        return tokenizer, model.eval().to(self._device), self._device

    @cached_property
    def _parts(self) -> Parts:
        return Parts("prompt")


def load_model(model_class: Any, folder: Path, dtype: str = "float32") -> Any:
    """A transformers model from a local folder, from safetensors and no remote code.

    See `fifa.models.networks.load_network` for what of its weights may be missing or left over.

    Parameters
    ----------
    model_class
        A class with ``from_pretrained``.
    folder
        Config and weights.
    dtype
        What it computes in; ``auto`` for what its weights are in.

    Raises
    ------
    FifaError
        For weights that are missing, damaged or incomplete.
    """
    torch, transformers = require("torch"), require("transformers")
    with quiet(transformers), loading("the model", folder):
        kind = dtype if dtype == "auto" else getattr(torch, dtype)
        return load_network(model_class, folder, kind, trust_remote_code=False)


def normalised(vectors: Vectors) -> Vectors:
    """``vectors`` (float32) over their L2 norms, in place; a zero vector stays zero."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
    vectors /= np.maximum(norms, np.finfo(np.float32).tiny)
    return vectors


def _pool(states: Any, mask: Any, mode: str) -> Any:
    """Token states [n, t, d] to vectors [n, d], as sentence-transformers does it."""
    torch = require("torch")
    weight = mask.unsqueeze(-1).to(states.dtype)
    if mode == "cls":
        return states[:, 0]
    if mode == "max":
        return states.masked_fill(weight == 0, -torch.inf).amax(1)
    if mode == "lasttoken":  # the padding is on the right
        return states[torch.arange(len(states)), mask.sum(1) - 1]
    return (states * weight).sum(1) / weight.sum(1)


def _sentence_settings(folder: Path, modules: list[dict[str, Any]]) -> dict[str, Any]:
    """What a sentence-transformers folder says of pooling, case, prefix and length."""
    if not modules:
        return {}
    types = [str(module["type"]).rpartition(".")[2] for module in modules]
    unsupported = [name for name in types if name not in ("Transformer", "Pooling", "Normalize")]
    limits = _read(folder / modules[0].get("path", "") / "sentence_bert_config.json")
    prompts = _read(folder / "config_sentence_transformers.json")
    prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name") or "", "")
    modes = ["mean"]
    if "Pooling" in types:
        config = _read(folder / modules[types.index("Pooling")]["path"] / "config.json")
        named = config.get("pooling_mode", [m for m in POOLINGS if config.get(m)] or ["mean"])
        named = [named] if isinstance(named, str) else list(named)
        modes = [POOLINGS.get(mode, mode.removesuffix("_sqrt_len_tokens")) for mode in named]
        if config.get("include_prompt", True) is False and prompt:
            unsupported.append("a prompt left out of the pooling")
        if config.get("pooling_mode_weightedmean_tokens"):
            modes.append("weightedmean")
    if unsupported or len(modes) != 1 or modes[0] not in POOLINGS.values():
        raise FifaError(
            "the encoder has parts that are not supported: "
            + (", ".join(unsupported) or " + ".join(modes)),
            where=str(folder),
            do=f"a model of one transformer, pooled by one of {sorted(set(POOLINGS.values()))}",
        )
    limit = limits.get("max_seq_length")
    lower = bool(limits.get("do_lower_case"))
    return {"pooling": modes[0], "prefix": prompt, "lower": lower, "max_tokens": limit}


def length_batches(
    lengths: Sequence[int], budget: int, most: int | None = None
) -> Iterator[list[int]]:
    """Rows in order of length, in batches of ``most`` rows and ``budget`` padded tokens at most."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == most or (len(batch) + 1) * lengths[row] > budget):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _read(path: Path, of: type[Any] = dict) -> Any:
    """What is in a settings file of the encoder; empty where there is no such file."""
    return read_json(path, "the encoder's settings", of, of())
