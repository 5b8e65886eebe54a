"""A frozen base in 4 or 8 bits, or in CPU memory: one base for both sides, the same training."""

import json
import shutil
import sys
from types import ModuleType

import diffusers.hooks
import numpy as np
import pytest
import torch
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from tiny_diffusion import write_model
from trainings import assemble, furthest, quick, weights_of

from fifa.config import Train, changed
from fifa.errors import FifaError
from fifa.models import frozen
from fifa.models.frozen import kept_bytes
from fifa.training.backbones import load_backbone
from fifa.training.checkpoint import add_lora
from fifa.training.job import plan_training, run_training
from fifa.training.metrics import read_stats

FAMILIES = ("flux-dev", "sd3", "zimage", "qwenimage", "flux2", "klein", "sana")


@pytest.fixture
def processor(monkeypatch):
    """Quantised layers on a processor, where bitsandbytes computes and diffusers would refuse."""
    pytest.importorskip("bitsandbytes", reason="pip install 'fifa-align[quant]' to test it")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # packs at will
    monkeypatch.setattr(frozen, "need_gpu", lambda device: None)
    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        cls = getattr(bnb_quantizer, name)
        monkeypatch.setattr(cls, "validate_environment", lambda self, **_: None)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_reference_is_the_same_quantised_base(world, tmp_path, processor, kind):
    write_model(world / "flux-dev", "flux-dev")
    out = run_training(quick(world, "flux-dev", quantize=kind, steps=2), tmp_path / "out")
    first, second = read_stats(out)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["kl"] == 0.0
    assert second["kl"] > 0.0
    if kind == "int8":
        # a prediction depends on its batch, so the base is asked in the same one
        held = quick(world, "flux-dev", quantize=kind, holdout=0.5, steps=1, lr=1e-12)
        out = run_training(held, tmp_path / "held")
        assert read_stats(out)[0]["heldout_winner_minus_reference"] == 0.0
        assert not list((out / "cache").glob("reference-*"))
        return
    # draws known beforehand are of the quantised base too, and named by it
    pool = assemble(quick(world, "flux-dev", quantize=kind, draws=2), tmp_path / "pool")
    plain = assemble(quick(world, "flux-dev", draws=2), tmp_path / "pool")
    assert len(list((tmp_path / "pool" / "cache").glob("reference-*.parquet"))) == 2
    batch = pool.source.batch([(0, 0)])
    assert not torch.equal(pool.reference(batch)[0], plain.reference(batch)[0])


@pytest.fixture
def offloaded(monkeypatch, tmp_path):
    """Offloads to files, the folder of which it is: what is off the device is not in memory."""
    real, count = diffusers.hooks.apply_group_offloading, iter(range(10_000))

    def apply(block, **options):
        real(block, **options, offload_to_disk_path=str(tmp_path / "off" / str(next(count))))

    monkeypatch.setattr(diffusers.hooks, "apply_group_offloading", apply)
    return tmp_path / "off"


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_through_offloaded_blocks_are_the_same(tmp_path, offloaded, kind):
    folder = write_model(tmp_path / kind, kind)
    found = []
    for kept in (None, "offload"):
        backbone = load_backbone(folder, kept=kept)
        add_lora(backbone, Train(rank=2))
        network = backbone.denoiser.train()
        network.enable_gradient_checkpointing()
        shapes = {name: (2, *shape) for name, shape in backbone.prompt_shapes().items()}
        torch.manual_seed(0)
        prompts = {name: torch.randn(shape) for name, shape in shapes.items()}
        noisy = torch.randn(2, backbone.vae.channels, 8, 8)
        predicted = backbone.predict(noisy, torch.tensor([0.3, 0.6]), prompts, torch.zeros(2, 6))
        predicted.square().mean().backward()
        learned = [p for p in network.parameters() if p.requires_grad]
        found.append([predicted, *(p.grad for p in learned)])
    assert any(offloaded.rglob("*.safetensors"))
    assert sum(bool(grad.any()) for grad in found[0][1:]) > len(found[0]) // 3
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_an_offloaded_training_ends_with_the_same_weights(world, tmp_path, offloaded):
    write_model(world / "flux-dev", "flux-dev")
    train = quick(world, "flux-dev", lr=1e-2, steps=2, gradient_checkpointing=True)
    plain = run_training(train, tmp_path / "plain")
    knobs = {"offload": True, "gradient_checkpointing": None}
    assert "two blocks at a time" in str(plan_training(changed(train, **knobs), tmp_path / "out"))
    out = run_training(changed(train, **knobs), tmp_path / "out")
    assert furthest(weights_of(plain), weights_of(out)) == 0.0


def test_what_a_frozen_base_takes():
    blocks = {f"layers.{i}.to_q.weight": (64, 64) for i in range(10)}
    shapes = {**blocks, "norm.weight": (64,), "conv.weight": (8, 4, 3, 3)}
    plain, rest = 10 * 64 * 64, 64 + 8 * 4 * 9
    assert kept_bytes(shapes, None, 2) == 2 * (plain + rest)
    assert kept_bytes(shapes, "int8", 2) == plain + 2 * rest
    assert kept_bytes(shapes, "nf4", 2) == int(plain * 0.515869140625) + 2 * rest
    assert kept_bytes(shapes, "offload", 2) == 2 * (2 * 64 * 64 + rest)


def test_what_cannot_be_quantised_or_offloaded_is_told(world, tmp_path, monkeypatch):
    flux = write_model(world / "flux-dev", "flux-dev")
    halves = shutil.copytree(flux, tmp_path / "quantised")
    config = json.loads((halves / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (halves / "transformer" / "config.json").write_text(json.dumps(config))
    foreign = shutil.copytree(flux, tmp_path / "foreign")
    config["quantization_config"] = {"quant_method": "torchao"}
    (foreign / "transformer" / "config.json").write_text(json.dumps(config))
    for knobs, words in (
        ({"quantize": "nf4", "method": "full"}, "a base that is frozen"),
        ({"offload": True, "sample_every": 2}, "makes no samples"),
        ({"offload": True, "quantize": "int8"}, "offload goes neither with quantize"),
        ({"offload": True, "gradient_checkpointing": False}, "nor without gradient checkpointing"),
    ):
        with pytest.raises(FifaError, match=words):
            quick(world, **knobs)
    for model, knobs, words in (
        ("sd15", {"offload": True}, "only a transformer's blocks"),
        (halves, {"method": "full"}, "quantised weights cannot be trained"),
        (halves, {"quantize": "nf4"}, "quantised already"),
        (halves, {"sample_every": 1}, "neither offloaded nor sampled from"),
        ("flux-dev", {"quantize": "int8", "draws": 2}, "depends on what else is in its batch"),
        (foreign, {}, "quantised by torchao are not read"),
    ):
        with pytest.raises(FifaError, match=words):
            plan_training(changed(quick(world, **knobs), model=str(world / model)), tmp_path / "o")
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    with pytest.raises(FifaError, match=r"need a GPU[\s\S]*--quantize"):
        run_training(quick(world, "flux-dev", quantize="nf4"), tmp_path / "nf4")
    assert not (tmp_path / "nf4" / "cache").exists()  # before anything is encoded
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(FifaError, match=r"needs bitsandbytes[\s\S]*fifa-align\[quant\]"):
        run_training(quick(world, "flux-dev", quantize="nf4"), tmp_path / "none")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_folder_that_is_quantised_already_is_read_as_it_is(world, tmp_path, processor, kind):
    folder = shutil.copytree(write_model(world / "flux-dev", "flux-dev"), tmp_path / kind)
    asked = load_backbone(folder, kept=kind)
    shapes = asked.shapes
    asked.denoiser.save_pretrained(tmp_path / "transformer")
    shutil.rmtree(folder / "transformer")
    shutil.copytree(tmp_path / "transformer", folder / "transformer")
    there = load_backbone(folder)
    there.rehearse(64)
    assert there.shapes == shapes
    assert there.origin.quantized == kind
    train = changed(quick(world, steps=1), model=str(folder))
    assert read_stats(run_training(train, tmp_path / "out"))[0]["kl"] == 0.0
