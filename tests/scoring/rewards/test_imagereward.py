import numpy as np
import pytest
import torch
from references import blip_image, blip_text, linear_stack
from safetensors.torch import save_file
from tiny_models import PROMPTS, blip_state, images, write_bert_vocabulary
from transformers import BertTokenizer

from fifa.errors import FifaError
from fifa.scoring.rewards import load_reward, score
from fifa.scoring.rewards.pixels import crop_convert, standardise


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    # [DEC] and [ENC] come after the vocabulary
    state = blip_state(write_bert_vocabulary(folder) + 2)
    torch.save(state, folder / "ImageReward.pt")
    return folder, state


def original(folder, state, prompts, pictures):
    """ImageReward.score of image-reward 1.5, prompt by prompt."""
    tokenizer = BertTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    rewards = []
    for prompt, picture in zip(prompts, pictures, strict=True):
        read = tokenizer(
            prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        )
        pixels = standardise(torch.from_numpy(crop_convert(picture, 224))[None])
        states = blip_image(state, pixels, 2)
        text = blip_text(state, read["input_ids"], read["attention_mask"], states, 1)
        raw = linear_stack(state, "mlp.layers", text[:, 0])
        rewards.append((raw.item() - 0.16717362830052426) / 1.0333394966054072)
    return np.array(rewards)


def test_it_is_the_originals_arithmetic(checkpoint):
    folder, state = checkpoint
    pictures = images()[::2]
    prompts = [*PROMPTS, "the [ENC] cat [DEC]", "[PAD] two words"]
    model = load_reward(f"imagereward:{folder}", device="cpu")
    theirs = original(folder, state, prompts, pictures)
    ours = score(model, prompts, pictures)
    assert np.abs(ours - theirs).max() < 1e-5
    assert ours.std() > 0.01
    alone = [score(model, [p], [i])[0] for p, i in zip(prompts[:3], pictures[:3], strict=True)]
    assert np.abs(ours[:3] - alone).max() < 1e-5


def test_prompt_features_are_35_tokens_and_their_mask(checkpoint):
    model = load_reward(f"imagereward:{checkpoint[0]}", device="cpu")
    features = model.prompt_features(["", "word " * 100])
    assert features.shape == (2, 2, 35)
    assert features[:, 1].sum(1).tolist() == [2, 35]  # [CLS] [SEP]; as many as there is room for
    assert model.prompt_features([]).shape == (0, 2, 35)


def test_switches_and_safetensors_change_nothing_but_rounding(checkpoint, tmp_path):
    folder, state = checkpoint
    write_bert_vocabulary(tmp_path)
    save_file(state, tmp_path / "ImageReward.safetensors")
    pictures, prompts = images()[:3], PROMPTS[:3]
    plain = score(load_reward(f"imagereward:{folder}", device="cpu"), prompts, pictures)
    model = load_reward(f"imagereward:{tmp_path}", device="cpu", channels_last=True)
    assert np.abs(score(model, prompts, pictures) - plain).max() < 1e-4
    half = load_reward(f"imagereward:{tmp_path}", device="cpu", dtype="bfloat16")
    assert 0 < np.abs(score(half, prompts, pictures) - plain).max() < 0.1
    assert half.identity != model.identity


def test_other_weights_are_refused(tmp_path):
    write_bert_vocabulary(tmp_path)
    save_file({"mlp.layers.0.weight": torch.zeros(2, 2)}, tmp_path / "ImageReward.safetensors")
    model = load_reward(f"imagereward:{tmp_path}", device="cpu")
    with pytest.raises(FifaError, match="not the weights of ImageReward"):
        score(model, ["a"], images()[:1])
