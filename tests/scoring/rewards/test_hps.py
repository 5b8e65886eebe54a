import json
import shutil

import numpy as np
import pytest
import torch
from references import gelu, open_clip_image, open_clip_text, quick_gelu
from safetensors.torch import save_file
from tiny_models import PROMPTS, images, open_clip_state, write_clip_tokenizer
from transformers import CLIPTokenizer

from fifa.errors import FifaError
from fifa.scoring.rewards import load_reward, score
from fifa.scoring.rewards.clip import clean
from fifa.scoring.rewards.hps import convert_open_clip
from fifa.scoring.rewards.pixels import pad, standardise


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FIFA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_checkpoint(folder, name="HPS_v2.1_compressed.pt", quick=False):
    words = write_clip_tokenizer(folder)
    state = open_clip_state(words)
    if name.endswith(".pt"):
        torch.save({"epoch": 3, "name": "hps", "state_dict": state}, folder / name)
    else:
        save_file(state, folder / name)
    cfg = {"vision_cfg": {"head_width": 20}, "text_cfg": {"heads": 4}, "quick_gelu": quick}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    return state


def original(state, folder, prompts, pictures, act):
    """hpsv2.score: unit vectors of both towers of open_clip, then their dot product."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = torch.zeros(len(prompts), 77, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        read = tokenizer(clean(prompt), truncation=True, max_length=77)["input_ids"]
        ids[row, : len(read)] = torch.tensor(read)  # open_clip fills up with zeros
    pixels = standardise(torch.from_numpy(np.stack([pad(p, 224) for p in pictures])))
    text = open_clip_text(state, ids, 4, act)
    image = open_clip_image(state, pixels, 2, act)
    return (torch.nn.functional.normalize(text) * torch.nn.functional.normalize(image)).sum(-1)


@pytest.mark.parametrize(
    ("name", "file", "quick"),
    [
        ("hpsv2", "HPS_v2_compressed.pt", False),
        ("hpsv2.1", "HPS_v2.1_compressed.pt", False),
        ("hpsv2.1", "HPS_v2.1_compressed.safetensors", True),
    ],
)
def test_hps_is_open_clips_arithmetic(cache, tmp_path, name, file, quick):
    state = write_checkpoint(tmp_path / "hps", file, quick)
    model = load_reward(f"{name}:{tmp_path / 'hps'}", device="cpu")
    pictures = images() if name == "hpsv2" else images()[:6]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(pictures))]
    theirs = original(state, tmp_path / "hps", prompts, pictures, quick_gelu if quick else gelu)
    ours = score(model, prompts, pictures)
    assert np.abs(ours - theirs.numpy()).max() < 1e-5
    assert ours.std() > 0.01
    assert model.name == name


def test_the_checkpoint_is_converted_once(cache, tmp_path):
    write_checkpoint(tmp_path / "hps")
    first = load_reward(f"hpsv2.1:{tmp_path / 'hps'}", device="cpu")
    (folder,) = cache.iterdir()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    again = load_reward(f"hpsv2.1:{tmp_path / 'hps' / 'HPS_v2.1_compressed.pt'}", device="cpu")
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert first.identity == again.identity
    # what it was converted to is a model like any other
    shutil.copytree(folder, tmp_path / "copy")
    copy = load_reward(f"hpsv2.1:{tmp_path / 'copy'}", device="cpu")
    assert copy.identity == first.identity


def test_every_tensor_has_its_place():
    state = open_clip_state(20)
    config, converted = convert_open_clip(state, head_width=20, text_heads=4)
    values = sorted(t.numel() for t in converted.values())
    assert sum(values) == sum(t.numel() for t in state.values())
    assert config["vision_config"]["image_size"] == 224
    assert config["vision_config"]["hidden_act"] == "gelu"


def test_shapes_of_vit_h_14_are_read_from_its_weights():
    state = open_clip_state(9, width=1280, text_width=1024, dimension=1024, layers=1, patch=14)
    config, _ = convert_open_clip({name: t.to("meta") for name, t in state.items()})
    vision, text = config["vision_config"], config["text_config"]
    assert (vision["num_attention_heads"], vision["patch_size"], vision["image_size"]) == (
        16,
        14,
        224,
    )
    assert (text["num_attention_heads"], text["intermediate_size"]) == (16, 4096)


def test_other_weights_are_refused(cache, tmp_path):
    with pytest.raises(FifaError, match="bogus"):
        convert_open_clip({"bogus.weight": torch.zeros(1)})
    with pytest.raises(FifaError, match="missing"):
        convert_open_clip({"logit_scale": torch.zeros(())})
    write_clip_tokenizer(tmp_path)
    (tmp_path / "HPS_v2_compressed.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(FifaError, match="cannot read the weights"):
        load_reward(f"hpsv2:{tmp_path}", device="cpu")


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_code_in_a_checkpoint_is_not_executed(cache, tmp_path):
    write_clip_tokenizer(tmp_path)
    torch.save({"state_dict": Evil()}, tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(FifaError, match="cannot read the weights"):
        load_reward(f"hpsv2:{tmp_path}", device="cpu")
