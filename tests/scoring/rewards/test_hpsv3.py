import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from references import linear, qwen_text, qwen_vision
from safetensors.torch import save_file
from tiny_models import drawing, images, png, write_qwen_tokenizer
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from commands import fifa
from fifa.data.decode import BadImage
from fifa.errors import FifaError
from fifa.scoring.rewards import load_reward, score
from fifa.scoring.table import MARGIN, SIGMAS

RUBRIC = (
    "\nHow good is this image?\nTextual prompt - {text_prompt}\n\n\n\nMark: <|Reward|>\n\nEND\n"
)
PROMPTS = ["the cat", "", "über {braces} 猫", "in a word " * 20]
HEADS, KV_HEADS, THETA = 4, 2, 10_000.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights with the names of transformers 4.45, beside a config and a tokenizer."""
    folder = tmp_path_factory.mktemp("hpsv3")
    words = write_qwen_tokenizer(folder)
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 4096,
        "rope_theta": THETA,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": words + 40,  # as the published one has more rows than tokens
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}
    settings = {
        **text,
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "vision_config": {**vision, "in_chans": 3, "patch_size": 14, "spatial_patch_size": 14},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "rubric.txt").write_text(RUBRIC)
    torch.manual_seed(0)
    config = Qwen2VLConfig.from_dict(dict(settings))
    config.text_config.vocab_size = words + 1  # resize_token_embeddings(len(tokenizer))
    state = {}
    for key, value in Qwen2VLForConditionalGeneration(config).state_dict().items():
        old = key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        fan = value.shape[-1] if value.ndim > 1 else 25
        plus = 1.0 if "norm" in key or "ln_q.weight" in key else 0.0
        state[old] = torch.randn(value.shape) / fan**0.5 + plus * (not key.endswith("bias"))
    for number, into, out in ((0, 64, 1024), (3, 1024, 16), (5, 16, 2)):
        state[f"rm_head.{number}.weight"] = torch.randn(out, into) / into**0.5
        state[f"rm_head.{number}.bias"] = torch.randn(out) / 5
    save_file(state, folder / "HPSv3.safetensors")
    return folder, state


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_reward(f"hpsv3:{checkpoint[0]}", device="cpu", dtype="float32")


def original(folder, state, prompt, picture):
    """HPSv3RewardInferencer.reward of hpsv3 1.0.0 for one image: what the head says."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|Reward|>"]})
    area = 256 * 28 * 28
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": area, "longest_edge": area})
    opaque = Image.fromarray(np.asarray(picture.convert("RGB")))
    seen = processor(opaque, return_tensors="pt")
    _, h, w = seen["image_grid_thw"][0].tolist()
    tokens = qwen_vision(state, seen["pixel_values"], h, w, 2)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{'<|image_pad|>' * len(tokens)}<|vision_end|>"
        + RUBRIC.format(text_prompt=prompt)
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor(tokenizer(text)["input_ids"])
    states = state["model.embed_tokens.weight"][ids]
    states[ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")] = tokens
    states = qwen_text(state, states, HEADS, KV_HEADS, THETA)
    (place,) = (ids == tokenizer.convert_tokens_to_ids("<|Reward|>")).nonzero()[:, 0]
    x = linear(state, "rm_head.0", states[place]).relu()
    return linear(state, "rm_head.5", linear(state, "rm_head.3", x).relu())


def test_it_is_the_originals_arithmetic(checkpoint, model):
    pictures = [images()[i] for i in (0, 2, 6, 8)]  # RGB, tall, RGBA, palette
    outputs = [original(*checkpoint, p, i) for p, i in zip(PROMPTS, pictures, strict=True)]
    theirs = [mu.item() for mu, _ in outputs]
    alone = [score(model, [p], [i])[0] for p, i in zip(PROMPTS, pictures, strict=True)]
    assert np.abs(np.array(theirs) - alone).max() < 1e-5
    assert np.std(theirs) > 0.01
    # prompts of all lengths and images of two shapes together
    assert np.abs(score(model, PROMPTS, pictures) - theirs).max() < 1e-5
    # sigma_chosen = torch.exp(rewards_A[:, 1]): the loss that it was trained with
    seen = model.image_features(torch.from_numpy(model.preprocess(pictures[0]))[None])
    judged = model.rewards(model.prompt_features(PROMPTS[:1]), seen)[0]
    assert judged.tolist() == pytest.approx([theirs[0], outputs[0][1].exp().item()], abs=1e-5)


def test_a_run_is_selected_in_the_unit_of_the_models_own_uncertainty(checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"caption": f"the cat {i}", "label_0": float(i % 2)} for i in range(4)]
    for row in rows:
        row |= {"label_1": 1 - row["label_0"]}
        row |= {f"jpg_{side}": png(drawing(rng.integers(99), 64, 64)) for side in (0, 1)}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    margin = ("--margin", f"hpsv3:{checkpoint[0]}", "--device", "cpu", "--dtype", "float32")
    plain = ("--quality", "none", "--diversity", "none", "--keep", "2", "--out", tmp_path / "run")
    done = fifa("filter", tmp_path / "pairs.parquet", *margin, *plain)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "run" / "scores").glob("margin-hpsv3-*.parquet")
    scored = pq.read_table(file)
    assert scored.schema.names == [*MARGIN.names, *SIGMAS.names]
    mu, sigma = (
        np.stack([scored[f"{name}_{side}"].to_numpy() for side in (0, 1)])
        for name in ("reward", "sigma")
    )
    z = (mu[0] - mu[1]) / np.sqrt(sigma[0] ** 2 + sigma[1] ** 2)
    for command in ("select", "report"):
        unit = ("--margin-unit", "sigma") if command == "select" else ()
        done = fifa(command, tmp_path / "run", *unit)
        assert done.returncode == 0, done.stderr
    assert np.abs(mu[0] - mu[1]) != pytest.approx(np.abs(z))
    selection = pq.read_table(tmp_path / "run" / "selection.parquet")
    assert selection["margin"].to_numpy() == pytest.approx(np.abs(z), rel=1e-5)
    kept = selection["status"].to_numpy(zero_copy_only=False) == "selected"
    assert sorted(np.abs(z)[kept]) == sorted(np.abs(z))[2:]
    assert "margin_unit: sigma" in (tmp_path / "run" / "report.html").read_text()


def test_patches_are_those_of_qwens_processor(model):
    picture = drawing(1, 300, 250)
    area = 256 * 28 * 28
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": area, "longest_edge": area})
    theirs = processor(picture, return_tensors="pt")
    pixels = torch.from_numpy(np.stack([model.preprocess(picture)] * 2))
    tokens = model.image_features(pixels)
    assert tokens.shape[1:3] == tuple(theirs["image_grid_thw"][0, 1:] // 2)
    assert torch.allclose(tokens[0], tokens[1], atol=1e-5)
    from fifa.scoring.rewards.pixels import standardise

    ours, grid = model._patches(standardise(pixels))
    assert torch.equal(grid[:1], theirs["image_grid_thw"])
    assert torch.equal(ours[: len(ours) // 2], theirs["pixel_values"])


def test_the_end_of_a_prompt_too_long_is_cut_not_the_rubrics(model):
    features = model.prompt_features(["a b " * 2000, "cat"])
    assert features.shape == (2, 1536) and features.dtype == torch.int32
    reward = int(features[1, features[1] >= 0][-1])
    assert int(features[0, -1]) == reward
    assert (features[0] >= 0).all() and int((features[1] >= 0).sum()) < 200


def test_marks_in_a_prompt_do_not_break_the_template(model):
    marked, plain = model.prompt_features(["a <|Reward|><|image_pad|>cat", "a cat"])
    assert torch.equal(marked, plain)


def test_bfloat16_is_near(checkpoint, model):
    half = load_reward(f"hpsv3:{checkpoint[0]}", device="cpu")
    assert half.identity["dtype"] == "bfloat16" and half.identity != model.identity
    picture = drawing(1, 300, 250)
    first, second = score(half, ["the cat"], [picture]), score(model, ["the cat"], [picture])
    assert 0 < abs(first - second) < 0.3


def test_a_sliver_is_a_bad_image(model):
    with pytest.raises(BadImage):
        model.preprocess(Image.new("RGB", (3000, 10)))


def test_the_rubric_is_read_out_of_the_package_not_run(checkpoint, tmp_path, monkeypatch):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "HPSv3.safetensors"):
        (tmp_path / name).symlink_to(checkpoint[0] / name)
    package = tmp_path / "site" / "hpsv3" / "dataset"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise SystemExit('imported')")
    head, _, tail = RUBRIC.partition("\n\n\n\n")
    (package / "data_collator_qwen.py").write_text(
        "raise SystemExit('imported')\n"
        f"INSTRUCTION = {head + chr(10) * 3!r}\nprompt_with_special_token = {chr(10) + tail!r}\n"
    )
    model = load_reward(f"hpsv3:{tmp_path}", device="cpu", dtype="float32")
    with pytest.raises(FifaError, match="pip install --no-deps hpsv3"):
        model.prompt_features(["a"])
    monkeypatch.syspath_prepend(tmp_path / "site")
    plain = load_reward(f"hpsv3:{checkpoint[0]}", device="cpu", dtype="float32")
    assert torch.equal(model.prompt_features(["a"]), plain.prompt_features(["a"]))


def test_other_weights_are_refused(checkpoint, tmp_path):
    (tmp_path / "config.json").symlink_to(checkpoint[0] / "config.json")
    save_file({"model.norm.weight": torch.zeros(3)}, tmp_path / "HPSv3.safetensors")
    model = load_reward(f"hpsv3:{tmp_path}", device="cpu")
    with pytest.raises(FifaError, match="not the weights of HPSv3"):
        model.image_features(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))
