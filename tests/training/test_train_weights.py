"""What a training writes, in the hands of stock diffusers."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from trainings import quick

from fifa.training.job import run_training


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
