"""A Llama in a GGUF file as a torch model and its tokenizer: weights only, nothing runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fifa.errors import FifaError
from fifa.models.optional import require

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


def load_gguf(path: Path, dtype: str) -> tuple[Any, Any]:
    """The model (dequantized to ``dtype``) and the tokenizer (`tokenizers.Tokenizer`) in ``path``.

    Special tokens are not special to this tokenizer: ``<|im_end|>`` in a prompt is plain text.
    Raises `FifaError` for anything but a Llama with a SmolLM or GPT-2 byte-level vocabulary.
    """
    gguf, torch, transformers = require("gguf"), require("torch"), require("transformers")
    try:
        reader = gguf.GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError) as error:
        raise FifaError(f"cannot read the GGUF file: {error}", where=str(path)) from error
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
    state = {}
    for tensor in reader.tensors:
        plain = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        weight = plain.to(getattr(torch, dtype))
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = _unpermuted(weight, heads if ".attn_q." in tensor.name else groups)
        state[_renamed(tensor.name)] = weight
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


def _renamed(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, layer, part, ending = name.split(".")
    return f"model.layers.{layer}.{INSIDE[part]}.{ending}"


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
