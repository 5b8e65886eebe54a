import numpy as np
import pytest
import torch
from references import linear_stack
from safetensors.torch import save_file
from tiny_models import head_state, images, write_clip

from fifa.errors import FifaError
from fifa.scoring.rewards import load_reward, score
from fifa.scoring.rewards.pixels import crop_convert, standardise


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aesthetic")
    clip = write_clip(folder / "clip", projection=32)
    state = head_state("layers", 32)
    torch.save(state, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder, clip, state


def test_it_is_the_stack_on_unit_vectors_of_clip(predictor):
    folder, clip, state = predictor
    pictures = images()
    pixels = standardise(torch.from_numpy(np.stack([crop_convert(p, 224) for p in pictures])))
    with torch.inference_mode():
        features = clip.get_image_features(pixels).pooler_output.numpy()
    # simple_inference.py: normalized(image_features), then the MLP
    unit = features / np.linalg.norm(features, 2, -1, keepdims=True)
    theirs = linear_stack(state, "layers", torch.from_numpy(unit))[:, 0].numpy()
    model = load_reward(f"aesthetic:{folder}", device="cpu")
    ours = score(model, ["a"] * len(pictures), pictures)
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.array_equal(ours, score(model, ["something else"] * len(pictures), pictures))


def test_head_as_safetensors_is_the_same(predictor, tmp_path):
    folder, _, state = predictor
    (tmp_path / "clip").symlink_to(folder / "clip")
    save_file(state, tmp_path / "sac+logos+ava1-l14-linearMSE.safetensors")
    pictures = images()[:2]
    models = [load_reward(f"aesthetic:{place}", device="cpu") for place in (folder, tmp_path)]
    first, second = (score(model, ["", ""], pictures) for model in models)
    assert np.allclose(first, second, atol=1e-6)


def test_a_head_for_another_clip_is_refused(predictor, tmp_path):
    (tmp_path / "clip").symlink_to(predictor[0] / "clip")
    state = head_state("layers", 48)
    del state["layers.7.bias"]
    save_file(state, tmp_path / "head.safetensors")
    model = load_reward(f"aesthetic:{tmp_path}", device="cpu")
    with pytest.raises(FifaError, match=r"1 missing \(7\.bias"):
        score(model, [""], images()[:1])
