"""`fifa loop` in a tiny world: what each round starts from, what is left alone, what is refused."""

import json
import re
import shutil
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner

import fifa
from fifa.cli import cli
from fifa.config import Loop, build
from fifa.errors import FifaError
from fifa.evaluation.judges import Judge
from fifa.evaluation.merge import merge_checkpoint
from fifa.evaluation.models import find_models
from fifa.evaluation.sampling import PipelineLoader, make_images, settings_for
from fifa.moji.world import caption, scenes
from forked import die_at, finish, start
from moji.sizes import write_tiny

DEATH = ("round-1/checkpoint/pipeline", 1)  # just before the round's model is there
SAME = ("generated/pairs.parquet", "selection.parquet", "data/*.parquet", "*.safetensors", "*.png")


def write_recipe(folder):
    """A recipe for a tiny model, and its path."""
    sd, clip = write_tiny(folder)
    for name, seen in (("train.txt", True), ("test.txt", False)):
        lines = [caption(scene) for scene in islice(scenes(seen=seen), 8)]
        (folder / name).write_text("\n".join(lines))
    sampler = {"steps": 2, "guidance": 1.0, "batch": 8, "device": "cpu"}
    knobs = {
        "rounds": 2,
        "generate": {
            "model": str(sd),
            "prompts": str(folder / "train.txt"),
            "margin": [f"pickscore:{clip}"],
            "per_prompt": 2,
            "images": sampler,
        },
        "score": {"quality": "none", "diversity": "none"},
        "select": {"keep": 4},
        "train": {
            **{"steps": 2, "batch": 4, "micro_batch": 4, "lr": 0.01, "rank": 2},
            **{"device": "cpu", "tracker": "none"},
        },
        "evaluate": {
            "prompts": str(folder / "test.txt"),
            "seeds": 2,
            "limit": 4,
            "generate": sampler,
            "measure": {"scorers": [f"clipscore:{clip}"], "encoder": f"clip:{clip}"},
        },
        "compute": {"device": "cpu"},
    }
    path = folder / "loop.yaml"
    path.write_text(yaml.safe_dump(knobs))
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def looped(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("loop") / "out"
    torch.set_num_threads(1)
    done = CliRunner().invoke(cli, ["loop", str(recipe), "--out", str(out)], catch_exceptions=False)
    assert done.stdout == f"{out / 'loop.html'}\n"
    assert re.search(r"round-2 +8 +4 ", done.stderr)
    return out


def generated(looped, number):
    path = looped / f"round-{number}" / "generated" / "pairs.parquet"
    return pq.read_table(path), json.loads(pq.read_schema(path).metadata[b"fifa.generate"])


def test_a_round_begins_with_the_model_of_the_round_before(looped, recipe):
    knobs = Loop.from_yaml(recipe)
    (first, by_base), (second, by_round) = generated(looped, 1), generated(looped, 2)
    assert (by_base["model"], by_round["model"]) == ("moji-sd", "round-1")
    seeds = [
        set(t["noise_seed_0"].to_pylist() + t["noise_seed_1"].to_pylist()) for t in (first, second)
    ]
    assert len(seeds[0] | seeds[1]) == 32, "a round draws noise of its own"
    trained = [
        yaml.safe_load((looped / f"round-{n}/checkpoint/train.yaml").read_text()) for n in (1, 2)
    ]
    assert trained[0]["model"] == knobs.generate.model
    assert trained[1]["model"] == str(looped / "round-1" / "checkpoint" / "pipeline")
    base, *rounds = find_models(
        knobs.generate.model,
        {f"round-{n}": str(looped / f"round-{n}" / "checkpoint" / "pipeline") for n in (1, 2)},
    )
    assert by_base["made_of"]["weights"] == {"moji-sd": base.weights}
    assert by_round["made_of"]["weights"] == {"round-1": rounds[0].weights}


def test_a_pipeline_draws_what_the_lora_on_its_base_draws(looped, recipe):
    knobs = Loop.from_yaml(recipe)
    checkpoint = looped / "round-1" / "checkpoint"
    base, lora, whole = find_models(
        knobs.generate.model, {"lora": str(checkpoint), "whole": str(checkpoint / "pipeline")}
    )
    settings = settings_for(knobs.generate.images, base.base)
    loader, drawn = PipelineLoader(base.base, settings, "cpu"), []
    for model in (base, lora, whole):
        with loader.use(model) as pipe:
            drawn.append(make_images(pipe, settings, ["an owl"] * 4, [1, 2, 3, 4]).astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() > 0
    assert np.abs(drawn[1] - drawn[2]).max() <= 1
    with pytest.raises(FifaError, match="no weights to put into the base"):
        merge_checkpoint(whole, checkpoint / "again")


def test_the_page_shows_every_round_and_marks_the_judge(looped):
    page = (looped / "loop.html").read_text("utf-8")
    assert page.count("<svg") == 3
    for name in ("loop.html", "report.html"):
        (looped / name).unlink()
    told = CliRunner().invoke(cli, ["report", str(looped)], catch_exceptions=False)
    assert told.stdout == f"{looped / 'loop.html'}\n"
    assert (looped / "report.html").is_file() and (looped / "loop.html").read_text() == page
    assert "pickscore (moji-clip) *" in page
    assert "clipscore (moji-clip) *" not in page
    for name in ("round-1", "round-2"):
        assert f">{name}<" in page
    found = json.loads((looped / "evaluate" / "results.json").read_text())
    assert [m["name"] for m in found["models"]] == ["base", "round-1", "round-2"]
    assert {s["name"]: s["picked"] for s in found["scales"]} == {
        "clipscore (moji-clip)": False,
        "pickscore (moji-clip)": True,
    }


def test_finished_rounds_are_left_alone_and_more_may_follow(looped, recipe):
    def made():
        rounds = [looped / "round-1", looped / "round-2"]
        files = [f for place in rounds for f in place.rglob("*") if f.is_file()]
        return {f: f.stat().st_mtime_ns for f in files}

    before = made()
    red = Judge("red", lambda prompts, images: [np.asarray(i)[..., 0].mean() for i in images])
    done = fifa.loop(recipe, looped, rounds=1, judges=[red])
    assert made() == before
    assert len(done.models) == 2
    assert done.results.scales[0].name == "red"


def go_on(recipe, out, *death):
    torch.set_num_threads(1)
    if death:
        die_at("os.rename", *death)
    fifa.loop(recipe, out)


def test_a_killed_loop_goes_on_to_the_same_bytes(looped, recipe, tmp_path):
    finish(start(go_on, recipe, tmp_path / "out", *DEATH), -signal.SIGKILL)
    finish(start(go_on, recipe, tmp_path / "out"))

    def contents(folder):
        files = {file for pattern in SAME for file in folder.rglob(pattern)}
        return {
            # what the file of pairs says of itself beside its rows has the loop's path in it
            file.relative_to(folder): pq.read_table(file)
            if file.name == "pairs.parquet"
            else file.read_bytes()
            for file in files
        }

    expected, found = contents(looped), contents(tmp_path / "out")
    names = {name.name for name in expected}
    assert {"pytorch_lora_weights.safetensors", "pairs.parquet", "selection.parquet"} <= names
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("generate", {"per_prompt": 3}, "another recipe.*generate.per_prompt: 2 / 3"),
        ("train", {"lr": 0.5}, "another recipe.*train.lr: 0.01 / 0.5"),
        ("train", {"model": "m"}, "the loop itself sets train.model"),
        ("generate", {"margin": []}, "the recipe has no generate.margin"),
        ("score", {"margin": ["picscore"]}, "another recipe.*score.margin"),
        ("generate", {"per_prompt": 1}, "greater than or equal to 2"),
        ("evaluate", {"prompts": "nothing.txt"}, "cannot open the prompts"),
    ],
)
def test_another_recipe_is_refused(looped, recipe, tmp_path, section, change, message):
    knobs = yaml.safe_load(recipe.read_text())
    knobs[section] |= change
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump(knobs))
    before = (looped / "loop.yaml").read_bytes()
    with pytest.raises(FifaError, match=message):
        fifa.loop(tmp_path / "loop.yaml", looped)
    assert (looped / "loop.yaml").read_bytes() == before


def test_what_is_missing_is_told_before_an_image_is_made(looped, recipe, tmp_path):
    for section, change, message in [
        ("score", {"margin": ["picscore"]}, "no such reward model: picscore"),
        ("score", {"margin": ["pickscore:nothing"]}, "no such model: nothing"),
        ("score", {"quality": "locl"}, "no such rater: locl"),
        ("score", {"diversity": "text:nothing/at/all"}, "neither a folder nor on the hub"),
        ("evaluate", {"measure": {"scorers": ["x"]}}, "no such reward model: x"),
    ]:
        knobs = yaml.safe_load(recipe.read_text())
        knobs[section] |= change
        (tmp_path / "loop.yaml").write_text(yaml.safe_dump(knobs))
        with pytest.raises(FifaError, match=message):
            fifa.loop(tmp_path / "loop.yaml", tmp_path / "out")
        assert not list((tmp_path / "out").glob("round-*"))


def test_other_prompts_in_the_file_are_told_and_a_pipeline_that_is_gone_is_made_again(
    looped, recipe
):
    pipeline = looped / "round-1" / "checkpoint" / "pipeline"
    weights = next(pipeline.glob("unet/*.safetensors"))
    known, prompts = weights.read_bytes(), Path(Loop.from_yaml(recipe).generate.prompts)
    before = prompts.read_text()
    prompts.write_text(before.replace("\n", " at night\n"))
    with pytest.raises(FifaError, match=r"made in another way .*prompts\.content: "):
        fifa.loop(recipe, looped, rounds=3)
    prompts.write_text(before)
    shutil.rmtree(pipeline)
    fifa.loop(recipe, looped)
    assert weights.read_bytes() == known


def test_the_recipe_in_the_guide_is_one():
    page = Path(__file__).parents[2] / "docs" / "loop.md"
    (text,) = re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    recipe = build(Loop, yaml.safe_load(text), where="the guide")
    assert (recipe.rounds, recipe.generate.images.steps) == (3, 30)
