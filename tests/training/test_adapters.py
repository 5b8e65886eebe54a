"""What is written is what diffusers reads: the same prediction, the same image, at every scale."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from fifa.config import Train
from fifa.errors import FifaError
from fifa.training import batches
from fifa.training.backbones import load_backbone
from fifa.training.checkpoint import (
    add_lora,
    save_full,
    save_lora,
    train_all,
)

KINDS = ("sd15", "sdxl", "sd3", "flux-dev", "zimage", "qwenimage", "klein", "sana")


def predicted(backbone, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(2, backbone.vae.channels, 8, 8, generator=generator)
    time = torch.stack([backbone.schedule.draw_time(generator) for _ in range(2)])
    prompts = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in backbone.encode_prompts(["a", "b"]).items()
    }
    frames = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)
    return backbone.predict(noisy, time, prompts, frames)


def trained(backbone, train=None, seed=0):
    """An adapter whose B is no longer zero."""
    parameters = add_lora(backbone, train or Train(rank=4, alpha=8.0, seed=seed))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return parameters


def painted(pipeline, **options):
    generator = torch.Generator().manual_seed(1)
    return pipeline(
        prompt="the cat",
        num_inference_steps=2,
        height=64,
        width=64,
        generator=generator,
        output_type="np",
        **options,
    ).images


def stock(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_alone_is_trained(models, kind):
    backbone = load_backbone(models[kind])
    before = predicted(backbone)
    parameters = add_lora(backbone, Train(rank=4))
    assert torch.equal(predicted(backbone), before)
    assert {id(p) for p in parameters} == {
        id(p) for p in backbone.denoiser.parameters() if p.requires_grad
    }
    predicted(backbone).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    again = add_lora(load_backbone(models[kind]), Train(rank=4))
    other = add_lora(load_backbone(models[kind]), Train(rank=4, seed=1))
    assert all(torch.equal(p, q) for p, q in zip(parameters, again, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(parameters, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_with_adapters_off_it_is_the_base(models, kind, monkeypatch):
    backbone = load_backbone(models[kind])
    base = predicted(backbone)
    trained(backbone)
    tuned = predicted(backbone)
    assert not torch.allclose(tuned, base, atol=1e-3)
    monkeypatch.setattr(batches, "predict", lambda backbone, batch: predicted(backbone))
    without = batches.adapters_off(backbone, lambda denoiser: denoiser)
    assert torch.equal(without(None), base)
    assert torch.equal(predicted(backbone), tuned)


@pytest.mark.parametrize("kind", KINDS)
def test_the_lora_loads_in_a_stock_pipeline_and_scale_0_is_the_base(models, kind, tmp_path):
    backbone = load_backbone(models[kind])
    trained(backbone)
    tuned = predicted(backbone)
    save_lora(backbone, tmp_path)
    pipeline = stock(models[kind])
    base = painted(pipeline)
    pipeline.load_lora_weights(tmp_path)
    mine = load_backbone(models[kind])
    mine.denoiser = getattr(pipeline, mine.family.part)
    torch.testing.assert_close(predicted(mine), tuned, atol=1e-6, rtol=1e-6)  # alpha included
    assert np.abs(painted(pipeline) - base).max() > 1e-3
    pipeline.set_adapters(pipeline.get_active_adapters(), 0.0)
    np.testing.assert_array_equal(painted(pipeline), base)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_comes_back_the_same_from_the_same_bytes(models, kind, tmp_path):
    backbone = load_backbone(models[kind])
    parameters = trained(backbone)
    path = save_lora(backbone, tmp_path)
    once = path.read_bytes()
    assert {save_lora(backbone, tmp_path).read_bytes() for _ in range(9)} == {once}
    back = load_backbone(models[kind])
    back.denoiser.load_lora_adapter(tmp_path, weight_name=path.name, prefix=back.family.part)
    loaded = [p for name, p in back.denoiser.named_parameters() if ".lora_" in name]
    assert all(torch.equal(p, q) for p, q in zip(loaded, parameters, strict=True))
    torch.testing.assert_close(predicted(back), predicted(backbone), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_full_weights_load_with_from_pretrained(models, kind, tmp_path):
    backbone = load_backbone(models[kind])
    parameters = train_all(backbone)
    assert all(p.requires_grad for p in parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.01)
    path = save_full(backbone, tmp_path)
    assert path == tmp_path / backbone.family.part
    tuned = predicted(backbone)
    other = load_backbone(models[kind])
    assert not torch.equal(predicted(other), tuned)
    other.denoiser = type(backbone.denoiser).from_pretrained(path)
    assert torch.equal(predicted(other), tuned)


def test_adapters_are_float32_in_a_half_precision_model(models):
    backbone = load_backbone(models["sd15"], dtype="bfloat16")
    parameters = add_lora(backbone, Train(rank=2))
    assert {p.dtype for p in parameters} == {torch.float32}
    prediction = predicted(backbone)
    assert prediction.dtype == torch.float32 and bool(torch.isfinite(prediction).all())


def test_targets_that_are_not_there(models):
    backbone = load_backbone(models["sd15"])
    with pytest.raises(FifaError, match="no adapter fits"):
        add_lora(backbone, Train(targets=("no_such_layer",)))
    with pytest.raises(FifaError, match="no adapter to save"):
        save_lora(load_backbone(models["sd15"]), models["sd15"])
