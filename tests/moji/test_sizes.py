"""The models' code at a tiny size, through the real classes' own loaders."""

import numpy as np
import pytest
import torch

from fifa.moji.family import generate, load_sd
from fifa.moji.world import WORLD, caption, scenes
from moji.prompts import FILLERS, vocabulary
from moji.sizes import write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def test_every_word_of_the_world_is_one_token(tiny):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny[0] / "tokenizer")
    for scene in scenes():
        text = caption(scene)
        assert tokenizer.decode(tokenizer(text).input_ids[1:-1]).strip() == text
        assert len(tokenizer(text).input_ids) == len(text.split()) + 2
    for text in vocabulary():
        words = text.replace(",", " ,").replace("8k", "8 k").split()
        assert len(tokenizer.tokenize(text)) == len(words)


@pytest.mark.parametrize("text", ["", "Zażółć gęślą jaźń", "漢字 🎉", "\x00\x01", "a" * 500])
def test_any_text_has_tokens_that_the_encoder_knows(tiny, text):
    pipe = load_sd(tiny[0])
    ids = pipe.tokenizer(text, padding="max_length", truncation=True).input_ids
    assert len(ids) == pipe.tokenizer.model_max_length == 32
    assert min(ids) >= 0 and max(ids) < pipe.text_encoder.config.vocab_size
    assert ids[0] == pipe.tokenizer.bos_token_id and pipe.tokenizer.eos_token_id in ids


def test_a_tiny_pipeline_of_the_real_class_generates(tiny):
    from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel

    pipe = load_sd(tiny[0])
    assert type(pipe) is StableDiffusionPipeline
    assert type(pipe.vae) is AutoencoderTiny and type(pipe.unet) is UNet2DConditionModel
    prompts = ["a fox on a red background", ", ".join(FILLERS)]
    pictures = generate(pipe, prompts, [1, 2], steps=2)
    assert pictures.shape == (2, WORLD.size, WORLD.size, 3) and pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures[1:], generate(pipe, prompts[1:], [2], steps=2))
    assert (pictures[0] != generate(pipe, prompts[:1], [3], steps=2)[0]).any()


def test_the_same_seed_makes_the_same_tiny_models(tiny, tmp_path):
    again, _ = write_tiny(tmp_path)
    for part in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (again / part).read_bytes() == (tiny[0] / part).read_bytes()


def test_a_tiny_clip_is_a_clip_to_the_scorers(tiny):
    from PIL import Image

    from fifa.scoring.rewards import load_reward

    reward = load_reward(f"pickscore:{tiny[1]}", device="cpu")
    image = Image.fromarray(np.full((32, 32, 3), 200, np.uint8))
    pixels = torch.from_numpy(reward.preprocess(image))[None]
    prompts = reward.prompt_features(["a fox on a red background"])
    value = reward.rewards(prompts, reward.image_features(pixels))
    assert value.shape == (1,) and torch.isfinite(value).all()
