from dataclasses import replace

import pytest

from fifa.config import PRESETS, Train, changed, lora_small, preset
from fifa.errors import FifaError


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_yaml(name, tmp_path):
    train = changed(preset(name), source="run", model="größe ☃", sample_prompts=("a", "b: c"))
    (tmp_path / "train.yaml").write_text(train.to_yaml(), "utf-8")
    assert Train.from_yaml(tmp_path / "train.yaml") == train


def test_the_papers_learning_rate_is_scaled_by_its_batch():
    train = preset("paper-sd15")
    assert train.lr == pytest.approx(2.05e-5, rel=1e-2)
    assert (train.batch, train.steps, train.warmup, train.beta) == (2048, 2000, 500, 5000.0)
    xl = preset("paper-sdxl")
    assert (xl.warmup, xl.optimizer, xl.resolution, xl.prompt_dropout) == (
        200,
        "adafactor",
        1024,
        0.2,
    )


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(FifaError, match=r"no such preset: paper.*\n.*paper-sd15"):
        preset("paper")
    with pytest.raises(FifaError, match="betta"):
        changed(Train(), betta=3)
    (tmp_path / "train.yaml").write_text("loss: orpo\nrank: 0")
    with pytest.raises(FifaError, match=r"(?s)rank.*loss"):
        Train.from_yaml(tmp_path / "train.yaml")
    (tmp_path / "train.yaml").write_text("[")
    with pytest.raises(FifaError, match="cannot read"):
        Train.from_yaml(tmp_path / "train.yaml")


def test_steps_follow_from_epochs_unless_given():
    assert replace(lora_small(), epochs=10.0, batch=32).steps_of(500) == 156
    assert replace(lora_small(), steps=7).steps_of(500) == 7
    assert replace(lora_small(), epochs=0.01).steps_of(5) == 1
    assert changed(preset("paper-sd15"), epochs=2, batch=10).steps_of(100) == 20
    assert changed(preset("paper-sd15"), epochs=2, steps=7).steps_of(100) == 7


def test_differences_name_the_knobs():
    one, other = Train(), Train(beta=1.0, micro_batch=4)
    assert one.differences(other) == ["beta: 5000.0 / 1.0", "micro_batch: None / 4"]
    assert one.differences(other, but=frozenset({"micro_batch"})) == ["beta: 5000.0 / 1.0"]
