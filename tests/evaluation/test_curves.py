import json
import math

import numpy as np
import pytest
from drawn import draw_index, measured

from fifa.config import Read, Recipe, Score
from fifa.evaluation.models import Model, cost_of, find_models, read_training, run_scorers
from fifa.evaluation.win_rates import learning_curves, steps_of, time_to_match
from fifa.shards.files import sealed_line

STEPS = (10, 20, 30, 40)


def write_training(folder, source, *, steps=STEPS, processes=2, weights=None):
    """What `fifa train` leaves, but for the weights, which are ``weights``'s bytes."""
    folder.mkdir(parents=True)
    facts = {
        "base_model": "base",
        "method": "lora",
        "steps": steps[-1],
        "pairs_seen": 8 * steps[-1],
        "seconds": 2.0 * steps[-1],
        "processes": processes,
        "accelerator_hours": 2.0 * steps[-1] * processes / 3600,
        "selection": None,
    }
    (folder / "train.json").write_text(json.dumps(facts))
    (folder / "train.yaml").write_text(f"source: {source}\n")
    lines = [{"step": s, "pairs": 8 * s, "seconds": 2.0 * s, "loss": 0.5} for s in steps]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4'
    (folder / "stats.jsonl").write_text(text)
    for place in (folder, *(folder / "checkpoints" / f"step-{s:06d}" for s in steps)):
        place.mkdir(parents=True, exist_ok=True)
        (place / "pytorch_lora_weights.safetensors").write_bytes(weights or b"")
    return folder


def write_run(folder):
    """A run folder as far as the costs and the picking scorer read it."""
    folder.mkdir()
    recipe = Recipe(read=Read(source="x"), score=Score(margin=("pickscore", "column:hpsv2_0,b")))
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    steps = [
        {"step": "read", "seconds": 1.0},
        {"step": "margin", "seconds": 10.0},
        {"step": "margin", "seconds": 2.5},
        {"step": "quality", "seconds": 4.0, "tokens_in": 100, "tokens_out": 7},
        {"step": "select", "seconds": 0.5},
        {"step": "generate", "seconds": 1000.0},
    ]
    (folder / "log.jsonl").write_text("".join(map(sealed_line, steps)) + '{"st')
    return folder


def test_the_checkpoints_on_the_way_are_found_in_order(base, tmp_path):
    folder = write_training(tmp_path / "ours", "x")
    model = find_models(str(base), {"ours": str(folder)})[1]
    assert model.training == folder
    assert [step.name for step in steps_of(model)] == [f"ours@{step}" for step in STEPS]
    assert steps_of(model)[0].path.parent.name == "step-000010"
    other = Model("x", "lora", "x", tmp_path / "nowhere.safetensors", base, "")
    assert (other.training, steps_of(other)) == (None, [])


def test_costs_are_kept_apart(base, tmp_path):
    run = write_run(tmp_path / "run")
    folder = write_training(tmp_path / "ours", run / "subset")
    model = find_models(str(base), {"ours": str(folder)})[1]
    cost = cost_of("ours", read_training(model))
    assert (cost.reading, cost.scoring, cost.rating, cost.choosing) == (1.0, 12.5, 4.0, 0.5)
    assert math.isnan(cost.embedding)
    assert (cost.selecting, cost.training, cost.total) == (18.0, 80.0, 98.0)
    assert (cost.hours, cost.pairs, cost.tokens) == (160 / 3600, 320, 107)
    assert cost.rest == 1.5


def test_of_a_checkpoint_of_others_nothing_is_made_up(base, lora):
    model = find_models(str(base), {"theirs": str(lora)})[1]
    cost = cost_of("theirs", read_training(model))
    assert math.isnan(cost.total)
    assert math.isnan(cost.hours)
    assert (cost.selecting, cost.tokens) == (0, 0)


def test_the_scorers_that_picked_the_data_are_found(base, tmp_path):
    run = write_run(tmp_path / "run")
    named = {"ours": str(write_training(tmp_path / "ours", run))}
    models = find_models(str(base), named)
    assert read_training(models[1]).scorers == ("pickscore", "column:hpsv2_0,b")
    facts = json.loads((tmp_path / "ours" / "train.json").read_text())
    facts["selection"] = {"recipe": {"score": {"margin": ["imagereward"]}}}
    (tmp_path / "ours" / "train.json").write_text(json.dumps(facts))
    (tmp_path / "ours" / "train.yaml").write_text("source: elsewhere\n")
    assert read_training(models[1]).scorers == ("imagereward",)
    assert read_training(models[0]).scorers == ()
    assert run_scorers(run) == ["pickscore", "column:hpsv2_0,b"]


def climb(gains, tmp_path, base):
    """A curve whose mean rises by the given gains over the base."""
    names = [f"ours@{step}" for step in STEPS]
    index = draw_index(["base", *names], prompts=4, seeds=2)
    noise = np.tile(np.random.default_rng(0).normal(size=8), 1 + len(names))
    values = noise + np.repeat([0.0, *gains], 8)
    folder = write_training(tmp_path / "ours", "x")
    facts = read_training(find_models(str(base), {"ours": str(folder)})[1])
    return learning_curves(measured(index, {"s": values}), {"ours": facts})[0]


def test_a_learning_curve(base, tmp_path):
    curve = climb([0.1, 0.4, 0.4, 0.2], tmp_path, base)
    assert [point.step for point in curve.points] == [0, *STEPS]
    start = curve.points[0].mean.mean
    gains = [point.mean.mean - start for point in curve.points]
    assert gains == pytest.approx([0, 0.1, 0.4, 0.4, 0.2], abs=1e-6)
    assert [point.pairs for point in curve.points] == [0, 80, 160, 240, 320]
    hours = [2.0 * step * 2 / 3600 for step in (0, *STEPS)]
    assert [point.hours for point in curve.points] == pytest.approx(hours)
    assert [point.wins.share for point in curve.points[1:]] == [1.0] * 4
    assert curve.points[0].wins is None
    assert curve.best.step in (20, 30)
    assert curve.spread == pytest.approx(np.std([0.1, 0.4, 0.4, 0.2], ddof=1), abs=1e-6)


def test_time_to_match(base, tmp_path):
    curve = climb([0.1, 0.3, 0.2, 0.5], tmp_path, base)
    start = curve.points[0].mean.mean
    assert time_to_match(curve, start + 0.25).step == 20
    assert time_to_match(curve, start + 0.4).step == 40
    assert time_to_match(curve, start - 1).step == 0
    assert time_to_match(curve, start + 0.6) is None
