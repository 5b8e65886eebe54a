import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from references import gelu, linear, qwen3_text, qwen3_vision
from safetensors.torch import save_file
from tiny_models import images, write_qwen_tokenizer
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fifa.errors import FifaError
from fifa.scoring.rewards import load_reward, score

RUBRIC = "\nHow good is this?\nTextual prompt - {text_prompt}\n\n\n\nMark: <|Reward|>\n\nEND\n"
PROMPTS = ["the cat", "", "über {braces} 猫", "in a word " * 20]
HEADS, KV_HEADS, THETA, SECTIONS, INNER = 4, 2, 10_000.0, (4, 2, 2), [0, 1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights with the names of transformers 4.57, beside config, tokenizer and rubric."""
    folder = tmp_path_factory.mktemp("hpsv3++")
    words = write_qwen_tokenizer(folder)
    settings = {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": 16,
            "rope_theta": THETA,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_interleaved": True,
                "mrope_section": SECTIONS,
            },
            "vocab_size": words + 40,
            "rms_norm_eps": 1e-6,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": INNER,
        },
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "rubric.txt").write_text(RUBRIC)
    torch.manual_seed(0)
    config = Qwen3VLConfig.from_dict(dict(settings))
    config.text_config.vocab_size = words + 1
    state = {}
    for key, value in Qwen3VLForConditionalGeneration(config).state_dict().items():
        fan = value.shape[-1] if value.ndim > 1 else 25
        plus = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        state[key] = torch.randn(value.shape) / fan**0.5 + plus
    sizes = {
        "rm_head": ((0, 64, 1024), (3, 1024, 16), (5, 16, 2)),
        "cond_encoder": ((0, 2, 8), (2, 8, 8)),
        "film_gen": ((0, 8, 64), (2, 64, 128)),
        "cap_encoder": (("proj", 64, 8), ("pool_attn", 8, 1), ("out_proj", 8, 1)),
    }
    for part, layers in sizes.items():
        for name, into, out in layers:
            state[f"{part}.{name}.weight"] = torch.randn(out, into) / into**0.5
            state[f"{part}.{name}.bias"] = torch.randn(out) / 5
    torch.save({"model": state}, folder / "hpsv3++.pth")
    return folder, state


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_reward(f"hpsv3++:{checkpoint[0]}", device="cpu", dtype="float32")


def pixels_of(picture):
    """Fitted by qwen-vl-utils' smart_resize with a factor of 28, then by Qwen3-VL's processor."""
    area = 256 * 28 * 28
    first = Qwen2VLImageProcessorPil(
        size={"shortest_edge": area, "longest_edge": area}, do_normalize=False, do_rescale=False
    )
    opaque = picture.convert("RGB")
    _, h, w = first(opaque, return_tensors="pt")["image_grid_thw"][0].tolist()
    fitted = np.array(opaque.resize((14 * w, 14 * h), Image.Resampling.BICUBIC))
    size = [round(side / 32) * 32 for side in fitted.shape[:2]]
    channels = torch.from_numpy(fitted).permute(2, 0, 1)[None]
    return F.interpolate(channels, size, mode="bicubic", antialias=True)[0]


def original(folder, state, prompt, picture):
    """HPSv3RewardInferencer.reward of HPSv3-PlusPlus for one image: what the head says."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|Reward|>"]})
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_resize=False
    )
    seen = processor(pixels_of(picture).numpy(), return_tensors="pt")
    _, h, w = seen["image_grid_thw"][0].tolist()
    tokens, deep = qwen3_vision(state, seen["pixel_values"], h, w, 2, INNER)
    text = (
        f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * len(tokens)}<|vision_end|>"
        + RUBRIC.format(text_prompt=prompt)
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor(tokenizer(text)["input_ids"])
    image = ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    start = int(image.nonzero()[0])
    positions, counted = torch.empty(3, len(ids), dtype=torch.long), 0
    for place in range(len(ids)):
        if image[place]:
            row, column = divmod(place - start, w // 2)
            positions[:, place] = torch.tensor([start, start + row, start + column])
            counted = start + max(h, w) // 2
        else:
            positions[:, place] = counted
            counted += 1
    states = state["model.language_model.embed_tokens.weight"][ids]
    states[image] = tokens
    states = qwen3_text(state, states, positions, image, deep, HEADS, KV_HEADS, THETA, SECTIONS)
    (place,) = (ids == tokenizer.convert_tokens_to_ids("<|Reward|>")).nonzero()[:, 0]
    x = states[place]
    capability = linear(state, "cap_encoder.out_proj", linear(state, "cap_encoder.proj", x))
    condition = torch.cat([torch.sigmoid(capability), torch.zeros(1)])
    condition = linear(state, "cond_encoder.2", gelu(linear(state, "cond_encoder.0", condition)))
    film = linear(state, "film_gen.2", linear(state, "film_gen.0", condition).relu())
    gamma, beta = film.chunk(2)
    y = linear(state, "rm_head.0", x * (1 + gamma) + beta).relu()
    return linear(state, "rm_head.5", linear(state, "rm_head.3", y).relu())


def test_it_is_the_originals_arithmetic(checkpoint, model):
    pictures = [images()[i] for i in (0, 2, 6, 8)]  # RGB, tall, RGBA, palette
    theirs = torch.stack(
        [original(*checkpoint, p, i) for p, i in zip(PROMPTS, pictures, strict=True)]
    )
    mu = theirs[:, 0].numpy()
    alone = [score(model, [p], [i])[0] for p, i in zip(PROMPTS, pictures, strict=True)]
    assert np.abs(mu - alone).max() < 1e-5
    assert mu.std() > 0.01
    # prompts of all lengths and images of three shapes together: nothing depends on neighbours
    assert np.abs(score(model, PROMPTS, pictures) - mu).max() < 1e-5
    seen = model.image_features(torch.from_numpy(model.preprocess(pictures[1]))[None])
    judged = model.rewards(model.prompt_features(PROMPTS[1:2]), seen)[0]
    assert judged.tolist() == pytest.approx([mu[1], theirs[1, 1].exp().item()], abs=1e-5)
    for picture in pictures:
        assert np.array_equal(model.preprocess(picture), pixels_of(picture).numpy())


def test_bfloat16_is_near(checkpoint, model):
    half = load_reward(f"hpsv3++:{checkpoint[0]}", device="cpu")
    assert half.identity["dtype"] == "bfloat16" and half.identity != model.identity
    first, second = (score(m, ["the cat"], images()[:1]) for m in (half, model))
    assert 0 < abs(first - second) < 0.3


def test_other_files_are_told(checkpoint, tmp_path):
    folder, state = checkpoint
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())

    def told(change, without="nothing"):
        left = {k: v for k, v in (state | change).items() if not k.startswith(without)}
        save_file(left, tmp_path / "hpsv3++.safetensors")
        model = load_reward(f"hpsv3++:{tmp_path}", device="cpu")
        with pytest.raises(FifaError) as error:
            model.image_features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        return str(error.value)

    assert "1 unused (group_encoder.x)" in told({"group_encoder.x": torch.zeros(1)})
    assert "1 missing (film_gen.)" in told({}, "film_gen.")
    assert "1 missing (visual.pos_embed.weight)" in told({}, "model.visual.pos_embed")
    assert "1 unused (1.weight)" in told({"cond_encoder.1.weight": torch.zeros(8, 8)})
    # no rubric: the package hpsv3 has another model's
    with pytest.raises(FifaError, match=r"data_collator_qwen\.py of PlantPotatoOnMoon"):
        load_reward(f"hpsv3++:{tmp_path}", device="cpu").prompt_features(["a"])
    head, _, tail = RUBRIC.partition("\n\n\n\n")
    (tmp_path / "data_collator_qwen.py").write_text(
        f"raise SystemExit('run')\nINSTRUCTION = {head + chr(10) * 3!r}\n"
        f"prompt_with_special_token = {chr(10) + tail!r}\n"
    )
    own = load_reward(f"hpsv3++:{tmp_path}", device="cpu").prompt_features(["a"])
    there = load_reward(f"hpsv3++:{folder}", device="cpu").prompt_features(["a"])
    assert torch.equal(own, there)
    save_file(state, tmp_path / "hpsv3++.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    for part, change in (
        ("vision_config", 3),
        ("vision_config", settings["vision_config"] | {"patch_size": "x"}),
        ("vision_config", settings["vision_config"] | {"patch_size": 0}),
        ("vision_config", settings["vision_config"] | {"num_heads": 0}),
        ("text_config", None),
        ("text_config", settings["text_config"] | {"num_attention_heads": 0}),
        ("text_config", settings["text_config"] | {"rope_scaling": 7}),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings | {part: change}))
        with pytest.raises(FifaError, match=r"cannot load the|do not fit"):
            score(load_reward(f"hpsv3++:{tmp_path}", device="cpu"), ["a"], images()[:1])
    # the settings that the weights are published with are those of their training
    (tmp_path / "config.json").write_text('{"model_type": "film_hybrid"}')
    with pytest.raises(FifaError, match="of a film_hybrid model, not of Qwen3-VL"):
        load_reward(f"hpsv3++:{tmp_path}", device="cpu")
