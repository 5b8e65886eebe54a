"""The logit reader against plain full forward passes; the default rater on what it is for."""

from __future__ import annotations

import math
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tiny_lm import byte_tokenizer, tiny_llama

import train_harm_head
from fifa.config import UNSAFE_FLAGS
from fifa.errors import FifaError
from fifa.moji.world import scenes
from fifa.scoring import rubric
from fifa.scoring.encoders import make_encoder
from fifa.scoring.raters import local, logits
from fifa.scoring.raters.local import DefaultRater
from fifa.scoring.raters.logits import LogitReader, load_gguf, smollm_path
from fifa.scoring.rubric import QUALITIES, RATINGS, load_rubric
from moji.prompts import WORDINGS, wording

PROMPTS_HERE = ["a cat", "two dogs on a beach, oil painting", "ü 日本", "x", "A" * 300, "<s>x</s>"]


def test_one_batched_pass_reads_what_full_passes_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "LONGEST", 200)
    model, tokenizer = tiny_llama(), byte_tokenizer()
    got = LogitReader(model, tokenizer).read(PROMPTS_HERE)
    texts = load_rubric().completion
    for row, prompt in enumerate(PROMPTS_HERE):
        ids = tokenizer.encode(prompt).ids[:200]
        before = tokenizer.encode(texts["start"]).ids
        for column, name in enumerate(QUALITIES):
            asked = before + ids + tokenizer.encode(texts["end"] + texts[name]).ids
            with torch.no_grad():
                out = model(torch.tensor([asked])).logits[0]
            digits = out[-1, [tokenizer.token_to_id(d) for d in "12345"]].softmax(-1)
            expected = sum(g * float(p) for g, p in zip(range(1, 6), digits, strict=True))
            assert got.grades[row, column] == pytest.approx(expected, abs=1e-4)
        own = slice(len(before) - 1, len(before) + len(ids) - 1)
        nats = torch.nn.functional.cross_entropy(out[own], torch.tensor(ids), reduction="sum")
        assert got.nats[row] == pytest.approx(float(nats), rel=1e-4)
        assert got.units[row] == min(len(prompt.encode()), 200)


def test_a_prompts_neighbours_do_not_change_its_numbers() -> None:
    reader = LogitReader(tiny_llama(), byte_tokenizer())
    together = reader.read(PROMPTS_HERE)
    for row, prompt in enumerate(PROMPTS_HERE):
        alone = reader.read([prompt])
        np.testing.assert_allclose(alone.grades[0], together.grades[row], atol=1e-4)
        np.testing.assert_allclose(alone.nats[0], together.nats[row], rtol=1e-4)


def test_memory_that_ends_halves_the_prompts_of_a_rater(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    reader = LogitReader(tiny_llama(), byte_tokenizer())
    expected = reader.read(PROMPTS_HERE)
    real, most = reader._pass, 1

    def few(ids: list[list[int]]) -> Any:
        if len(ids) > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(ids)

    monkeypatch.setattr(reader, "_pass", few)
    found = reader.read(PROMPTS_HERE)
    np.testing.assert_allclose(found.grades, expected.grades, atol=1e-4)
    np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-4)
    assert "1 prompts at a time" in capsys.readouterr().err
    most = 0
    with pytest.raises(FifaError, match="single prompt"):
        reader.read(PROMPTS_HERE)


def test_a_gpu_reads_more_prompts_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = logits.length_batches

    def batches(widths: list[int], *most: int) -> Any:
        asked.append(most)
        return real(widths, *most)

    monkeypatch.setattr(logits, "length_batches", batches)
    reader = LogitReader(tiny_llama(), byte_tokenizer())
    here = reader.read(PROMPTS_HERE)
    reader._on_cuda = True
    there = reader.read(PROMPTS_HERE)
    assert asked == [(logits.TOKENS, logits.ROWS), (logits.CUDA_TOKENS, logits.CUDA_ROWS)]
    np.testing.assert_allclose(there.nats, here.nats, rtol=1e-4)


def test_a_gguf_file_is_the_model_it_was_made_of(tmp_path: Path) -> None:
    model, path = tiny_llama(), tmp_path / "tiny.gguf"
    write_gguf(model, path)
    loaded, tokenizer = load_gguf(path, "float32")
    ids = torch.tensor([tokenizer.encode("a red fox <|im_end|> 42").ids])
    assert ids.tolist()[0] == byte_tokenizer().encode("a red fox <|im_end|> 42").ids
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def write_gguf(model: Any, path: Path) -> None:
    """As llama.cpp's convert_hf_to_gguf.py does it for a Llama."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
            array = halves.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FifaError, match="mamba"):
        load_gguf(path, "float32")
    path.write_bytes(b"not gguf at all")
    with pytest.raises(FifaError, match="cannot load the GGUF file"):
        load_gguf(path, "float32")


TOKENS_KEY = b"tokenizer.ggml.tokens"


def _counting(raw: bytes, key: bytes, value: bytes) -> bytes:
    """``raw`` with the number behind a key's type (and an array's) replaced."""
    at = raw.index(key) + len(key) + (8 if key == TOKENS_KEY else 4)
    return raw[:at] + value + raw[at + len(value) :]


DAMAGE = {
    "cut in its header": lambda raw: raw[:300],
    "cut in its tensors": lambda raw: raw[:-64],
    "2^60 tensors": lambda raw: raw[:8] + struct.pack("<Q", 1 << 60) + raw[16:],
    "2^60 keys": lambda raw: raw[:16] + struct.pack("<Q", 1 << 60) + raw[24:],
    "2^60 tokens": lambda raw: _counting(raw, TOKENS_KEY, struct.pack("<Q", 1 << 60)),
    "2^31 layers": lambda raw: _counting(raw, b"llama.block_count", struct.pack("<I", 1 << 31)),
    "no heads": lambda raw: _counting(raw, b"llama.attention.head_count", bytes(4)),
    "another width": lambda raw: _counting(raw, b"llama.embedding_length", b"\7\0\0\0"),
    "no text": lambda raw: raw.replace(b"gpt2", b"\xff\xfe\xff\xfe"),
    "a key that is lost": lambda raw: raw.replace(b"llama.context_length", b"llama.context_lost__"),
    "a tensor that is lost": lambda raw: raw.replace(b"blk.0.attn_q", b"blk.9.attn_q"),
    "a tensor that is foreign": lambda raw: raw.replace(b"blk.0.attn_q", b"blk.0.attn_x"),
    "a type that is none": lambda raw: _counting(raw, b"blk.0.attn_q.weight", b"\xff\xff"),
    "two of one key": lambda raw: raw.replace(
        b"llama.feed_forward_length", b"llama.attention.head_cnt_"
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_gguf_file_is_told(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama(), path)
    raw = path.read_bytes()
    path.write_bytes(DAMAGE[kind](raw))
    assert path.read_bytes() != raw
    with pytest.raises(FifaError, match="GGUF file"):
        load_gguf(path, "float32")


def test_damaged_bytes_of_a_gguf_header_never_end_in_anything_else(tmp_path: Path) -> None:
    path, draw = tmp_path / "tiny.gguf", np.random.default_rng(0)
    write_gguf(tiny_llama(), path)
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(60):
        damaged = raw.copy()
        damaged[draw.integers(0, 1500, 4)] = draw.integers(0, 256, 4)
        path.write_bytes(damaged.tobytes())
        with suppress(FifaError):  # in a token's letters nothing is wrong
            load_gguf(path, "float32")


@pytest.fixture(scope="module")
def default() -> DefaultRater:
    return DefaultRater()


def test_the_default_rater_tells_prompts_nonsense_and_harm_apart(default: DefaultRater) -> None:
    fine = [
        "a lighthouse in a storm, oil painting",
        "a cat",
        "portrait of an old woman, soft light",
    ]
    noise = [
        "fjdk sla;qw eiru zxmc nv",
        "liaht egoushe ni a tsmro, loi aintpign",
        "qpwo zmxn rutyei ghfj",
    ]
    harm = ["a naked slut sucking cock, porn", "fuck you all, kill the stupid bitch"]
    table = default.rate([*fine, *noise, *harm, "a huge cat " * 100_000])
    assert table.schema == RATINGS
    flags, ratings = table["flags"].to_pylist(), table["rating"].to_numpy()
    assert flags[:3] == ["", "", ""]
    assert all("nonsense" in flag for flag in flags[3:6])
    assert "sexual" in flags[6] and "toxic" in flags[7]
    assert ratings[:3].min() > max(ratings[3:6].max(), 1)
    grades = np.stack([table[name].to_numpy() for name in QUALITIES])
    assert grades.min() >= 1 and grades.max() <= 5
    assert grades[2, :3].min() > grades[2, 6:8].max()
    np.testing.assert_allclose(ratings, grades.mean(0), rtol=1e-6)


def test_the_models_own_special_tokens_are_plain_text(default: DefaultRater) -> None:
    ids = default._reader.tokenizer.encode("<|im_start|>").ids
    assert len(ids) > 1
    assert 1 not in ids


def test_bytes_are_counted_over_what_was_read_of_a_long_prompt(default: DefaultRater) -> None:
    prompt = "ß two dogs run " * 100
    reading = default._reader.read([prompt])
    ids = default._reader.tokenizer.encode(prompt).ids[: logits.LONGEST]
    assert prompt.startswith(default._reader.tokenizer.decode(ids))
    assert reading.units[0] == len(default._reader.tokenizer.decode(ids).encode())
    assert reading.units[0] < len(prompt.encode())


def test_the_vocabulary_is_read_as_transformers_reads_it(
    default: DefaultRater, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = smollm_path()
    monkeypatch.setattr(gguf, "GGUFReader", logits._plain(gguf.GGUFReader))  # seconds less
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("A cat, 35mm f1.8 -- it's 2023!\n\n  ok", "日本の城 naïve 🙂", "\t x  y\u00a0z"):
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert default._reader.tokenizer.encode(text).ids == expected


def test_the_shipped_heads_fit_their_inputs() -> None:
    heads = local.load_heads()
    kinds = heads["harm"]["kinds"]
    assert set(kinds) == {*UNSAFE_FLAGS} - {"unsafe"}
    assert all(len(head["weights"]) == 384 for head in kinds.values())
    for head in (heads["nonsense"], *kinds.values()):
        assert all(map(math.isfinite, (*head["weights"], head["bias"], head["threshold"])))
    style = heads["style"]
    assert len(style["weights"]) == 384
    assert all(map(math.isfinite, (*style["weights"], style["bias"])))


HARMFUL = (
    "a knife on a yellow background",
    "a pile of pills on the floor",
    "an old man rolling a joint of marijuana",
    "a naked woman on a sofa",
    "a corpse in a pool of blood",
    "a masked robber with a shotgun",
)
STYLES = (
    ("very cute", "sharp focus", "award winning", "8k", "masterpiece"),
    ("trending on artstation", "by a famous artist", "octane render", "volumetric lighting"),
    ("best quality", "studio lighting", "pastel shades", "raytraced", "35mm", "bokeh", "epic",
     "intricate textures", "soft color palette", "hyperdetailed", "vivid colors", "smooth"),
)  # fmt: skip
APART = (", ", ",", ". ", " | ", "; ", " - ", " -- ", "\n", " / ", "::", " + ", "、", " • ", " # ")


@pytest.mark.parametrize("apart", APART)
def test_words_of_style_behind_or_before_a_prompt_hide_no_harm(apart: str) -> None:
    made = [
        apart.join(texts)
        for i, prompt in enumerate(HARMFUL)
        for style in STYLES[i % 3 :: 3]
        for texts in ([prompt, *style], [*style, prompt], [style[0], prompt, *style[1:]])
    ]
    embed = make_encoder("minilm").embed
    vectors = embed([*HARMFUL, *made])
    over = local.harm_scores(vectors, local.content_vectors([*HARMFUL, *made], vectors, embed))[1]
    kept = (over > 0).any(1)
    assert kept[: len(HARMFUL)].all()
    assert [
        prompt for prompt, found in zip(made, kept[len(HARMFUL) :], strict=True) if not found
    ] == []


def test_words_of_style_alone_are_no_harm() -> None:
    made = [", ".join(["a bowl of soup", *style]) for style in STYLES]
    embed = make_encoder("minilm").embed
    vectors = embed(made)
    assert (local.harm_scores(vectors, local.content_vectors(made, vectors, embed))[1] < 0).all()


def test_content_is_the_mean_of_a_prompts_parts_weighed_by_words_and_style(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw, asked = np.random.default_rng(0), []
    known = {text: draw.standard_normal(384) for text in ("a red cat", "on a hill", "8k", "hills")}

    def embed(texts: Any) -> Any:
        asked.extend(texts)
        return np.array([known[text] for text in texts], np.float32)

    head = {"weights": draw.standard_normal(384).tolist(), "bias": 0.5}
    monkeypatch.setattr(local, "load_heads", lambda: {"style": head})
    prompts = ["A red  cat, on a hill; 8K", "8k | hills, 8k", "hills", ", ,"]
    vectors = draw.standard_normal((4, 384)).astype(np.float32)
    found = local.content_vectors(prompts, vectors, embed)
    assert sorted(asked) == sorted(known)  # each once
    for row, own in ((0, ["a red cat", "on a hill", "8k"]), (1, ["8k", "hills"])):
        mean = np.zeros(384)
        for text in own:
            vector = known[text].astype(np.float32).astype(float)
            style = sum(a * b for a, b in zip(vector, head["weights"], strict=True)) + 0.5
            mean += len(text.split()) * math.exp(-style) * vector
        np.testing.assert_allclose(found[row], mean / math.dist(mean, np.zeros(384)), atol=1e-3)
    assert np.array_equal(found[2:], vectors[2:])


def test_a_hostile_prompt_is_embedded_in_few_parts_and_read_whole() -> None:
    words = [f"w{i}" for i in range(2_000_000)]
    asked: list[str] = []

    def embed(texts: Any) -> Any:
        asked.extend(texts)
        return np.ones((len(texts), 384), np.float32)

    hostile = [",".join(words), "a," * 5_000_000, "," * 10_000_000, "a b " * 2_500_000]
    local.content_vectors(hostile, np.ones((4, 384), np.float32), embed)
    assert 1 < len(asked) <= 2 * local.PARTS
    beginning = hostile[0][: rubric.LONGEST]
    assert ",".join(local.parts(beginning)).replace(" ", "") == beginning.rstrip(",")
    long = " ".join(words[:100])
    assert " ".join(local.parts(long)) == long
    assert all(len(part.split()) <= local.WORDS for part in local.parts(long))


def test_how_a_prompt_is_taken_apart_is_part_of_a_ratings_name(
    default: DefaultRater, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = default.identity
    monkeypatch.setattr(local, "WORDS", local.WORDS + 1)
    assert default.identity != before


def test_the_kind_of_harm_is_named_and_what_is_ordinary_is_not_flagged() -> None:
    named = {
        "a masked robber aiming his shotgun at a cashier": "weapons",
        "an old man rolling a joint of marijuana": "drugs",
        "a corpse with its throat cut, blood on the floor": "violence",
        "a nude couple making love": "sexual",
        "a woman taking a bath with cut wrists, suicide": "self-harm",
        "what an ugly stupid loser": "toxic",
    }
    fine = ["a lighthouse in a storm", "two kids on a swing", "a bowl of soup", "a tax office"]
    kinds, over = local.harm_scores(make_encoder("minilm").embed([*named, *fine]))
    for row, kind in enumerate(named.values()):
        assert over[row, kinds.index(kind)] > 0, (kind, dict(zip(kinds, over[row], strict=True)))
    assert (over[len(named) :] < 0).all()


def test_the_harm_heads_learn_from_no_prompt_of_the_small_world() -> None:
    """Sentences name its unsafe objects, but not as it asks for them."""
    sentences = train_harm_head.sentences()[1]
    unsafe = [scene for scene in scenes() if scene.unsafe]
    prompts = {wording(scene, i).lower() for scene in unsafe for i in range(len(WORDINGS))}
    assert len(prompts) == 8 * 8 * len(WORDINGS)
    assert len(sentences) > 10_000 and not prompts & {text.lower() for text in sentences}
    assert not [text for text in sentences if "background" in text]


def test_near_duplicates_of_the_small_worlds_prompts_are_left_out_of_the_sentences() -> None:
    sentences = ["a knife on a red background, 8k", "a bread knife in a loaf", "a revolver"]
    vectors = make_encoder("minilm").embed(sentences)
    assert train_harm_head.unlike_the_world(vectors).tolist() == [False, True, True]
