"""The benchmark of a GPU: here it says that there is none and runs tiny, each side in turn."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import UNet2DConditionModel
from PIL import Image

from fifa.models.families import FAMILIES

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import made
from gpu import Bench, main
from gpu_sides import speeds
from peer_script import run_script
from phases import Phases


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


@pytest.fixture(autouse=True)
def _precision():
    """A process trains in one precision: what a part has chosen is forgotten."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


PARTS = {
    "train": ("speedup", "speedup_draws", "of_limit", "first_step"),
    "score": ("of_limit", "of_tower", "of_decoder", "speedup"),
    "generate": ("of_limit",),
    "rate": ("speedup", "of_limit"),
    "knn": ("speedup", "same"),
    "--memory": ("sdxl_lora_gb", "sd_full_reserved_gb", "sd_lora_gb"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("part", PARTS)
def test_without_cuda_a_part_says_so_and_runs_tiny(part, world, capsys, monkeypatch):
    main([part, "--here", "--folder", str(world)])
    told = capsys.readouterr().out
    assert "no CUDA device" in told
    found = json.loads(next(line for line in told.splitlines() if line.startswith("{")))
    assert found["name"] == f"gpu-{part.strip('-')}"
    for name in PARTS[part]:
        assert found[name] is not None, name  # as where a side has failed


@pytest.mark.parametrize(("size", "family"), [(made.SD, "sd"), (made.SDXL, "sdxl")])
def test_a_model_has_the_numbers_of_the_published_one(size, family):
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(**size["unet"])
    numbers = {one.name: one.activations.numbers for one in FAMILIES if one.activations}
    assert sum(p.numel() for p in denoiser.parameters()) == numbers[family]


def test_a_side_that_fails_ends_no_part(tmp_path, capsys):
    with Bench(tmp_path) as bench:
        assert bench.side("score_tower") == {}
    assert "score_tower failed" in capsys.readouterr().err


def test_a_side_runs_in_a_process_of_its_own(tmp_path):
    with Bench(tmp_path) as bench:
        found = bench.side("knn_search")
    assert found["same"] == 1


def test_a_speed_leaves_out_the_first_quarter_of_the_steps():
    times = [10.0, 19.0, 20.0, 21.0, 23.0, 24.0, 25.0, 26.0]
    assert speeds(times, batch=8) == {"pairs_s": 8.0, "mean_pairs_s": 8 * 6 / 7}


def test_a_phase_inside_another_is_apart(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    phases = Phases()
    inner = phases.wrapped(lambda: "found", "search")
    assert phases.wrapped(inner, "training")() == "found"
    seconds = {name: one["seconds"] for name, one in phases.found.items()}
    assert seconds == {"other": 1, "training": 2, "search": 1}


def test_a_script_is_timed_at_its_optimisers_steps(tmp_path):
    script, record = tmp_path / "script.py", tmp_path / "record.json"
    script.write_text(
        """
import sys
import torch
import wandb
from accelerate import Accelerator

if __name__ == "__main__":
    assert sys.argv[1:] == ["--steps"]
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(3, 2)).sum())
            optimizer.step()
            optimizer.zero_grad()
"""
    )
    try:
        run_script(str(script), ["--steps"], record)
    finally:
        sys.modules.pop("wandb", None)
    times = json.loads(record.read_text())["times"]
    assert len(times) == 3
    assert times == sorted(times)


def test_images_that_come_again_have_bytes_of_their_own():
    images = made.jpegs(5, side=32, drawn=2)
    assert len(set(images)) == 5
    pixels = [Image.open(io.BytesIO(one)).tobytes() for one in images]
    assert pixels == [pixels[i % 2] for i in range(5)]
    assert pixels[0] != pixels[1]
