import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import PROMPTS, drawing, images, write_clip
from transformers import CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fifa.data import read_pairs
from fifa.errors import FifaError
from fifa.models.transformer import ModelEncoder
from fifa.scoring.encoders import keep_embeddings, make_encoder, prompt_embeddings
from fifa.scoring.rewards import load_reward, score
from fifa.scoring.rewards.clip import clean


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    return folder, write_clip(folder)


@pytest.fixture(scope="module")
def pickscore(clip):
    return load_reward(f"pickscore:{clip[0]}", device="cpu")


def embeddings(clip, prompts, pictures):
    """Unit vectors of both towers, the way of PickScore's README."""
    folder, model = clip
    opaque = [Image.fromarray(np.asarray(picture.convert("RGB"))) for picture in pictures]
    pixels = CLIPImageProcessorPil()(opaque, return_tensors="pt")
    read = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.inference_mode():
        image = model.get_image_features(**pixels).pooler_output
        text = model.get_text_features(**read).pooler_output
    return (e / torch.norm(e, dim=-1, keepdim=True) for e in (text, image))


def test_pickscore_is_its_readme(clip, pickscore):
    pictures = images()
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(pictures))]
    text, image = embeddings(clip, prompts, pictures)
    theirs = clip[1].logit_scale.exp() * (text * image).sum(-1)
    ours = score(pickscore, prompts, pictures)
    assert np.abs(ours - theirs.detach().numpy()).max() < 1e-5 * 97
    assert ours.std() > 1  # the model tells them apart


def test_one_by_one_is_as_in_a_batch(pickscore):
    pictures, prompts = images()[:6], PROMPTS
    batch = score(pickscore, prompts, pictures)
    alone = [score(pickscore, [p], [i])[0] for p, i in zip(prompts, pictures, strict=True)]
    assert np.abs(batch - alone).max() < 1e-5 * 97


def test_clipscore_is_that_of_torchmetrics(clip):
    model = load_reward(f"clipscore:{clip[0]}", device="cpu")
    pictures, prompts = images()[:6], PROMPTS
    text, image = embeddings(clip, prompts, pictures)
    theirs = torch.maximum(100 * (text * image).sum(-1), torch.zeros(()))
    ours = score(model, prompts, pictures)
    assert np.abs(ours - theirs.numpy()).max() < 1e-5 * 100
    assert (ours == 0).any() and (ours > 0).any()


def test_clipscore_b32_is_that_of_its_authors(clip):
    model = load_reward(f"clipscore-b32:{clip[0]}", device="cpu")
    pictures, prompts = [drawing(i, 224, 224) for i in range(6)], PROMPTS
    text, image = embeddings(clip, ["A photo depicts " + clean(p) for p in prompts], pictures)
    theirs = 2.5 * np.clip((text * image).sum(-1).numpy(), 0, None)
    assert np.abs(score(model, prompts, pictures) - theirs).max() < 1e-5


def test_prompts_are_mended_as_by_open_clips_tokenizer():
    assert clean(" a&amp;amp;b \n\t it\u2019s  schÃ¶n ") == "a&b it's schön"


def test_prompt_features_are_the_vectors_of_the_encoder(clip, pickscore):
    encoder = make_encoder(f"clip:{clip[0]}", device="cpu")
    assert encoder == pickscore.encoder and encoder.identity == pickscore.encoder.identity
    assert np.array_equal(pickscore.prompt_features(PROMPTS).numpy(), encoder.embed(PROMPTS))
    assert load_reward(f"clipscore-b32:{clip[0]}", device="cpu").encoder is None  # adds a prefix


def test_the_diversity_step_finds_the_vectors_that_a_scorer_made(
    clip, pickscore, shipped, tmp_path, monkeypatch
):
    pairs = read_pairs(shipped)
    prompts = pairs.prompts["prompt"].to_pylist()
    made = pickscore.prompt_features(prompts).numpy()
    keep_embeddings(pairs, pickscore.encoder, made, tmp_path)
    monkeypatch.setattr(ModelEncoder, "embed", None)  # nothing is embedded again
    found = prompt_embeddings(pairs, f"clip:{clip[0]}", tmp_path)
    assert np.abs(found - made).max() < 1e-3  # they are kept in float16


def test_a_long_prompt_is_cut_at_77_tokens(clip, pickscore):
    long = "word " * 200
    tokens = CLIPTokenizer.from_pretrained(clip[0])(long, truncation=True, max_length=77)
    assert len(tokens["input_ids"]) == 77
    features = pickscore.prompt_features([long, "word " * 300, "word"])
    assert torch.equal(features[0], features[1]) and not torch.allclose(features[0], features[2])


def test_identity_names_weights_formula_and_precision(clip, pickscore, tmp_path):
    other = tmp_path / "elsewhere"
    write_clip(other)
    same = load_reward(f"pickscore:{other}", device="cpu")
    assert same.identity == pickscore.identity  # content, not place
    write_clip(other, seed=1)
    different = [
        load_reward(f"pickscore:{other}", device="cpu"),
        load_reward(f"clipscore:{clip[0]}", device="cpu"),
        load_reward(f"pickscore:{clip[0]}", device="cpu", dtype="bfloat16"),
    ]
    assert all(model.identity != pickscore.identity for model in different)
    assert "logit_scale" in pickscore.scale


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"channels_last": True}, 1e-3),
        ({"compile": "eager"}, 1e-3),
        ({"dtype": "bfloat16"}, 5.0),
        ({"dtype": "bfloat16", "channels_last": True, "compile": "eager"}, 5.0),
    ],
)
def test_switches_change_nothing_but_rounding(clip, pickscore, options, tolerance):
    model = load_reward(f"pickscore:{clip[0]}", device="cpu", **options)
    pictures, prompts = images()[:4], PROMPTS[:4]
    ours, plain = score(model, prompts, pictures), score(pickscore, prompts, pictures)
    assert ours.dtype == np.float32
    assert np.abs(ours - plain).max() < tolerance
    if "dtype" in options:
        assert not np.array_equal(ours, plain)


def test_an_image_of_another_size_of_model(tmp_path):
    write_clip(tmp_path / "m", image_size=96)
    model = load_reward(f"pickscore:{tmp_path / 'm'}", device="cpu")
    assert model.preprocess(drawing(0, 300, 200)).shape == (3, 96, 96)
    assert np.isfinite(score(model, ["a"], [drawing(0, 300, 200)])).all()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("pickscor", "no such reward model"),
        ("pickscore:", "no such reward model"),
        ("hpsv2:/nowhere/at/all", "no such model"),
    ],
)
def test_what_is_not_there_is_said(spec, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FifaError, match=said):
        load_reward(spec, device="cpu")


def test_odd_devices_precisions_and_processors_are_refused(clip, tmp_path):
    with pytest.raises(FifaError, match="no such precision"):
        load_reward(f"pickscore:{clip[0]}", dtype="int8")
    with pytest.raises(FifaError, match="no such device"):
        load_reward(f"pickscore:{clip[0]}", device="abacus")
    write_clip(tmp_path / "m")
    CLIPImageProcessorPil(image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path / "m")
    with pytest.raises(FifaError, match="image_mean"):
        load_reward(f"pickscore:{tmp_path / 'm'}", device="cpu")
    CLIPImageProcessorPil().save_pretrained(tmp_path / "m")
    load_reward(f"pickscore:{tmp_path / 'm'}", device="cpu")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"text_config": "x"}),
        ("config.json", {"vision_config": -1}),
        ("tokenizer_config.json", {"model_max_length": "x"}),
        ("tokenizer_config.json", {"model_max_length": -1}),
    ],
)
def test_what_a_folder_says_wrong_is_told(tmp_path, file, change):
    write_clip(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FifaError, match="settings"):
        load_reward(f"pickscore:{tmp_path}", device="cpu").prompt_features(["a"])
