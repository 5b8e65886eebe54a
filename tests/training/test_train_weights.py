"""What a training writes, in the hands of stock diffusers."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from trainings import QUICK, furthest, quick, weights_of

from fifa.config import Generate, changed
from fifa.errors import FifaError
from fifa.evaluation.models import find_models
from fifa.models.assemble import assembled
from fifa.training.job import run_training
from fifa.training.metrics import read_stats
from neighbours import helper

write_file = helper("models", "original").write_file


def draw(pipeline, **more):
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        "the cat number 1",
        num_inference_steps=2,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **more,
    )
    return made.images[0]


@pytest.fixture
def base(world):
    return DiffusionPipeline.from_pretrained(world / "sd15", safety_checker=None)


def test_a_lora_changes_the_image_and_at_scale_zero_does_not(world, tmp_path, base):
    out = run_training(quick(world, lr=1e-2), tmp_path / "out")
    before = draw(base)
    base.load_lora_weights(out)
    assert np.abs(draw(base) - before).max() > 1e-3
    assert np.array_equal(draw(base, cross_attention_kwargs={"scale": 0.0}), before)
    base.unload_lora_weights()
    assert np.array_equal(draw(base), before)


def test_full_weights_load_with_from_pretrained(world, tmp_path, base):
    out = run_training(quick(world, method="full", lr=1e-3), tmp_path / "out")
    before = draw(base)
    unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    tuned = DiffusionPipeline.from_pretrained(world / "sd15", unet=unet, safety_checker=None)
    assert np.abs(draw(tuned) - before).max() > 1e-3


def test_a_single_file_and_its_pieces_are_trained_like_their_folder(world, tmp_path):
    """The same weights from a file in another layout, a LoRA merged beforehand in the reference."""
    file = write_file(world / "sd15", tmp_path / "sd15.safetensors", "sd15")
    pieces = {"model": str(file), "parts": str(world / "sd15")}
    first = run_training(quick(world, lr=1e-2), tmp_path / "first")
    again = run_training(changed(quick(world, lr=1e-2), **pieces), tmp_path / "again")
    assert furthest(weights_of(first), weights_of(again)) == 0.0
    # what was trained is the start of another training, whose reference it is
    pieces["init_lora"] = str(first)
    second = run_training(changed(quick(world, lr=1e-2), **pieces), tmp_path / "second")
    assert read_stats(second)[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert json.loads((second / "train.json").read_text())["options"]["init_lora"] == str(first)
    assert "--init-lora" in (second / "README.md").read_text()
    with pytest.raises(FifaError, match="with a LoRA in it"):
        find_models(str(file), {"second": str(second)}, Generate(parts=pieces["parts"]))
    # nor on a base with another LoRA, or one where there was none
    for name, lora, words in (
        ("second", second, r"with another one[\s\S]*--init-lora .*first"),
        ("again", first, r"without one[\s\S]*leave out --init-lora"),
    ):
        given = Generate(parts=pieces["parts"], init_lora=str(lora))
        with pytest.raises(FifaError, match=words):
            find_models(str(file), {name: str(tmp_path / name)}, given)
    given = Generate(parts=pieces["parts"], init_lora=str(first))
    _, found = find_models(str(file), {"second": str(second)}, given)
    assert found.name == "second"
    merged = assembled(pieces["model"], changed(QUICK, **pieces))
    base = DiffusionPipeline.from_pretrained(world / "sd15", safety_checker=None)
    base.load_lora_weights(first)
    whole = DiffusionPipeline.from_pretrained(merged, safety_checker=None)
    assert np.abs(draw(base) - draw(whole)).max() < 1e-4
