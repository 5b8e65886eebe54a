"""What a training will take, by its family's figures; what does not fit is refused early."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from tiny_diffusion import write_model
from trainings import quick

import fifa.training.job as job_module
from fifa.errors import FifaError
from fifa.models.families import FAMILIES, Activations
from fifa.training.backbones import load_backbone
from fifa.training.job import make_accelerator, make_job
from fifa.training.plan import Memory, memory_of

GB = 10**9
CUDA = torch.device("cuda")
# a SD1.5 LoRA in bfloat16 at 512 pixels, about
MEMORY = Memory(
    weights=2 * GB,
    training=0,
    fixed=GB // 2,
    pair=2 * GB,
    pair_checkpointed=GB // 2,
    text=GB // 4,
    vae=GB // 4,
    prompts=GB // 4,
    images=3 * GB,
)


def planned(world, tmp_path, free, device=CUDA, **knobs):
    train = quick(world, **knobs)
    plan = make_job(train, tmp_path / "out", make_accelerator(train)).plan
    train = replace(train, batch=knobs.get("batch", 32), micro_batch=knobs.get("micro_batch"))
    return replace(plan, train=train, memory=MEMORY, device=device, free=free)


@pytest.mark.parametrize(
    ("free", "fit"),
    [
        (80, (32, False)),  # 0.8 * 78 - 0.5 are 30 pairs: 2 parts of 16
        (45, (16, False)),
        (12, (3, False)),
        (4, (1, True)),  # 0.8 * 4 - 2 - 0.5 are not one pair
        (2, (0, True)),
    ],
)
def test_a_micro_batch_is_planned_for_the_free_memory(world, tmp_path, free, fit):
    expected = (16, False) if free == 80 else fit
    plan = planned(world, tmp_path, free * GB)
    assert plan.fit == expected
    auto = {0: "as large as fit"}.get(fit[0], f"of up to {expected[0]} each (auto)")
    assert auto in str(plan)
    assert ("computed twice" in str(plan)) == (fit == (1, True))


def test_what_is_given_is_planned(world, tmp_path):
    plan = planned(world, tmp_path, 80 * GB, micro_batch=4)
    assert plan.fit == (4, False)
    # 2 of weights, 0.5 and 4 x 2 of activations
    assert "memory      10.50 GB (weights 2.00 GB" in str(plan)
    assert "activations 8.50 GB" in str(plan)
    assert "encoding    3.25 GB before that (text encoders 500.0 MB, then VAE 3.25 GB)" in str(plan)
    twice = planned(world, tmp_path, 80 * GB, micro_batch=4, gradient_checkpointing=True)
    assert twice.fit == (4, True)
    assert "memory      4.50 GB" in str(twice)
    # what is not given is chosen so that the rest fits
    assert planned(world, tmp_path, 9 * GB, micro_batch=4).fit == (4, True)
    once = {"micro_batch": 4, "gradient_checkpointing": False}
    assert planned(world, tmp_path, 9 * GB, **once).fit == (4, False)


def test_too_little_memory_is_told_before_anything_is_encoded(world, tmp_path):
    once = {"micro_batch": 4, "gradient_checkpointing": False}
    planned(world, tmp_path, 11 * GB, **once).check()
    with pytest.raises(FifaError, match=r"training needs about 10\.50 GB, 10\.00 GB are free"):
        planned(world, tmp_path, 10 * GB, **once).check()
    planned(world, tmp_path, 10 * GB).check()
    with pytest.raises(FifaError, match=r"training needs about 3\.00 GB, 2\.00 GB are free"):
        planned(world, tmp_path, 2 * GB).check()
    large = planned(world, tmp_path, 4 * GB)
    with pytest.raises(FifaError, match=r"encoding needs about 5\.00 GB, 4\.00 GB are free"):
        replace(large, memory=replace(MEMORY, text=5 * GB)).check()
    # on a processor activations are not measured: only what is sure is refused
    cpu = torch.device("cpu")
    planned(world, tmp_path, 3 * GB, cpu, micro_batch=4).check()
    with pytest.raises(FifaError, match=r"training needs about 2\.00 GB"):
        planned(world, tmp_path, GB, cpu, micro_batch=4).check()
    planned(world, tmp_path, None).check()


def test_what_the_process_held_before_takes_no_memory_from_a_training(world, tmp_path, monkeypatch):
    class Model:
        """Refers to itself, as models do by their hooks and bound methods."""

        def __init__(self):
            self.own = self

    before = Model()
    held = weakref.ref(before)
    del before
    monkeypatch.setattr(job_module, "free_bytes", lambda device: GB if held() else 80 * GB)
    gc.disable()
    try:
        train = quick(world)
        assert make_job(train, tmp_path / "out", make_accelerator(train)).plan.free == 80 * GB
    finally:
        gc.enable()


def test_activations_follow_the_familys_row(tmp_path, monkeypatch):
    train = quick(tmp_path, "sd15")
    backbone = load_backbone(write_model(tmp_path / "sd15"))
    numbers = sum(p.numel() for p in backbone.denoiser.parameters())
    row = Activations(numbers, 1000, 100, 20, 3, 5)
    object.__setattr__(backbone, "family", replace(backbone.family, activations=row))
    half = memory_of(train, backbone, 64, "bfloat16")
    # latents of 8 x 8 pixels
    assert (half.fixed, half.pair, half.pair_checkpointed) == (1000, 100 * 64, 20 * 64)
    # the encoders are in float32 on a processor: 8 images and 16 prompts at once
    assert (half.images, half.prompts) == (2 * 3 * 8 * 64**2, 2 * 5 * 16)
    assert memory_of(train, backbone, 64, "float32").pair == 2 * half.pair
    assert memory_of(train, backbone, 128, "bfloat16").pair == 4 * half.pair
    # twice the width and depth: 8 times the numbers, 4 times the activations
    smaller = replace(row, numbers=numbers // 8)
    object.__setattr__(backbone, "family", replace(backbone.family, activations=smaller))
    assert memory_of(train, backbone, 64, "bfloat16").pair == pytest.approx(4 * half.pair, rel=0.01)
    train = replace(train, method="full")
    full = memory_of(train, backbone, 64, "bfloat16")
    assert memory_of(train, backbone, 64, "bfloat16", shards=4).training == full.training // 4
    assert full.fixed == pytest.approx(4000 + 2 * numbers, rel=0.01)


def test_a_family_without_figures_has_its_weights_counted(world, tmp_path):
    plan = planned(world, tmp_path, 80 * GB, micro_batch=2)
    bare = replace(MEMORY, fixed=0, pair=0, pair_checkpointed=0)
    plan = replace(plan, memory=bare)
    assert plan.fit == (2, False)
    assert "2.00 GB at least, activations come on top" in str(plan)
    plan.check()


def test_every_family_that_was_measured_has_figures():
    measured = [family.activations for family in FAMILIES if family.activations]
    assert len(measured) >= 4
    for known in measured:
        assert known.pair > known.pair_checkpointed > 0
        assert known.numbers > 5e8 and known.vae > 0 and known.prompt > 0
