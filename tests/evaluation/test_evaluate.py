import json
import shutil

import numpy as np
import pytest
from checkpoints import SMALL, write_clip, write_pairs
from test_curves import write_training

import fifa
from fifa.cli import main
from fifa.errors import FifaError
from fifa.evaluation.generate import CURVE, read_index
from fifa.evaluation.measure import CURVE_SUFFIX, MEASURES, load_measured
from fifa.evaluation.results import RESULTS, load_results
from fifa.evaluation.stats import outcomes, win_rate

LIGHT = {**SMALL, "seeds": 2, "encoder": "none"}


def red(prompts, images):
    return np.array([np.asarray(image)[..., 0].mean() for image in images])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    lines = [{"prompt": f"a {c} cat {i}", "tag": c} for c in ("red", "blue") for i in range(3)]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def training(lora, tmp_path_factory):
    """A LoRA with the same weights at every step."""
    weights = (lora / "pytorch_lora_weights.safetensors").read_bytes()
    return write_training(tmp_path_factory.mktemp("out") / "ours", "x", weights=weights)


def test_an_evaluation_from_models_to_the_page(base, lora, unet, prompts, tmp_path):
    tuned = {"lora": lora, "full": unet}
    done = fifa.evaluate(base, tuned, prompts, tmp_path / "run", judges={"red": red}, **LIGHT)
    assert [(c.ours, c.theirs) for c in done.comparisons] == [
        ("lora", "base"),
        ("full", "base"),
        ("lora", "full"),
    ]
    for comparison in done.comparisons:
        values = {
            name: done.measured.table.filter(
                [model == name for model in done.measured.table["model"].to_pylist()]
            )["judge:red"].to_numpy()
            for name in (comparison.ours, comparison.theirs)
        }
        won = values[comparison.ours] > values[comparison.theirs]
        assert comparison.wins.wins == won.sum()
        assert set(comparison.categories) == {"red", "blue"}
    assert read_index(done.folder / "evaluate").equals(done.images)
    text = (done.folder / "report.html").read_text("utf-8")
    assert "data:image/png;base64," in text
    again = fifa.evaluate(base, tuned, prompts, tmp_path / "run", judges={"red": red}, **LIGHT)
    assert again.images.equals(done.images)
    assert again.measured.table.equals(done.measured.table)


def test_a_checkpoint_against_itself_ties_exactly(base, lora, prompts, tmp_path):
    shutil.copytree(lora, tmp_path / "copy")
    tuned = {"one": lora, "two": tmp_path / "copy"}
    done = fifa.evaluate(base, tuned, prompts, tmp_path / "run", judges={"red": red}, **LIGHT)
    last = done.comparisons[-1]
    assert (last.ours, last.theirs) == ("one", "two")
    assert (last.wins.share, last.wins.ties, last.wins.n, last.wins.p) == (0.5, 12, 12, 1.0)


def test_a_damaged_evaluation_is_named_by_readers_and_made_again(base, lora, prompts, tmp_path):
    def again():
        fifa.evaluate(base, lora, prompts, tmp_path / "run", judges={"red": red}, **LIGHT)

    again()
    folder = tmp_path / "run" / "evaluate"
    right = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    readers = {RESULTS: load_results, MEASURES: load_measured, "images.parquet": read_index}
    random = np.random.default_rng(0)

    def damaged(data):
        place = random.integers(len(data))
        rest = data[place + 1 :] if random.integers(2) else b""
        return data[:place] + bytes([data[place] ^ 1]) + rest

    for name, read in {**readers, "diversity.parquet": load_measured}.items():
        for _ in range(20):
            (folder / name).write_bytes(damaged(right[folder / name]))
            with pytest.raises(FifaError, match=name):
                read(folder)
        (folder / name).write_bytes(right[folder / name])
    for path, data in right.items():  # all at once
        path.write_bytes(damaged(data))
    again()
    assert {path: path.read_bytes() for path in right} == right


def test_two_seeds_of_one_model_are_not_told_apart(base, lora, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"a cat number {i}\n" for i in range(24)))
    values = []
    for first in (0, 2):
        out = tmp_path / str(first)
        done = fifa.evaluate(base, lora, path, out, judges={"red": red}, first_seed=first, **LIGHT)
        table = done.measured.table
        values.append(table.filter([name == "base" for name in table["model"].to_pylist()]))
    a, b = (table["judge:red"].to_numpy() for table in values)
    assert not np.isclose(a, b).all()  # other noise, other images
    wins = win_rate(outcomes(a, b), values[0]["prompt_id"].to_pylist())
    assert wins.low <= 0.5 <= wins.high


def test_the_curve_of_a_training(base, training, prompts, tmp_path):
    done = fifa.evaluate(base, training, prompts, tmp_path, judges={"red": red}, curve=2, **LIGHT)
    folder = tmp_path / "evaluate"
    curve = load_measured(folder, CURVE_SUFFIX)
    names = list(dict.fromkeys(curve.table["model"].to_pylist()))
    assert names == ["base", "ours@10", "ours@20", "ours@30", "ours@40"]
    assert len(set(curve.table["prompt_id"].to_pylist())) == 2
    # the same weights and whole groups: the images of the main evaluation, not new ones
    assert set(curve.table["file"].to_pylist()) <= set(done.images["file"].to_pylist())
    assert "accelerator hours" in (tmp_path / "report.html").read_text("utf-8")
    fifa.evaluate(base, training, prompts, tmp_path, judges={"red": red}, **LIGHT)
    with pytest.raises(FifaError, match="nothing has been measured"):  # no curve was asked for
        load_measured(folder, CURVE_SUFFIX)
    assert load_results(folder).curves == ()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_our_trainer_leaves_is_evaluated_with_its_curve_and_cost(
    base, prompts, tmp_path, method
):
    pairs = write_pairs(tmp_path / "pairs.parquet")
    knobs = {"method": method, "steps": 4, "batch": 2, "checkpoint_every": 2, "lr": 1e-2}
    quiet = {"device": "cpu", "tracker": "none", "resolution": 32}
    out = fifa.train(pairs, base, tmp_path / "ours", **knobs, **quiet)
    done = fifa.evaluate(
        base, out, prompts, tmp_path / "run", judges={"red": red}, curve=2, **LIGHT
    )
    assert done.comparisons[0].wins.ties < done.comparisons[0].wins.n  # it has learnt something
    folder = tmp_path / "run" / "evaluate"
    results = load_results(folder)
    assert repr(results) == repr(done.results)  # a null is read back as NaN
    assert results.models[1].method == {"lora": "lora", "full": "part"}[method]
    (curve,) = results.curves
    assert [(point.step, point.pairs) for point in curve.points] == [(0, 0), (2, 4), (4, 8)]
    (cost,) = results.costs
    assert (cost.steps, cost.pairs) == (4, 8)
    assert curve.points[-1].hours == pytest.approx(cost.hours, abs=0.01 / 3600)  # to 10 ms
    # the last checkpoint has the final weights: the same images
    last = {
        row["file"] for row in read_index(folder, CURVE).to_pylist() if row["model"] == "ours@4"
    }
    assert last <= set(done.images["file"].to_pylist())


def test_who_picked_the_data_is_in_the_facts(base, training, prompts, tmp_path):
    fifa.evaluate(
        base, training, prompts, tmp_path, judges={"red": red}, picked=["pickscore"], **LIGHT
    )
    results = load_results(tmp_path / "evaluate")
    assert results.picked == ("pickscore",)
    assert results.names == ["base", "ours"]
    assert results.costs[0].pairs == 320
    assert results.settings.guidance == 7.5


def test_a_folder_that_is_no_run_is_left_alone(base, lora, prompts, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FifaError, match="not empty"):
        fifa.evaluate(base, lora, prompts, tmp_path, judges={"red": red}, **LIGHT)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"seed": 3}, "seed"),
        ({"seeds": 0}, "seeds"),
        ({"sampler": "magic"}, "sampler"),
        ({"scorers": ["column:a,b"]}, "does not look at images"),
        ({"detector": "/nowhere"}, "no such model"),
        ({"encoder": "magic"}, "no such image encoder"),
        ({"rater": "magic"}, "no such rater"),
    ],
)
def test_wrong_knobs_are_told_before_an_image_is_made(base, lora, prompts, tmp_path, knobs, told):
    with pytest.raises(FifaError, match=told):
        fifa.evaluate(
            base, lora, prompts, tmp_path / "run", judges={"red": red}, **{**LIGHT, **knobs}
        )
    assert not list(tmp_path.rglob("*.png"))


def test_default_scorers_that_are_not_here_are_told(base, lora, prompts, tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FifaError, match="the default scorers are not available") as told:
        fifa.evaluate(base, lora, prompts, tmp_path / "run", **LIGHT)
    assert "--score none" in str(told.value)
    done = fifa.evaluate(base, lora, prompts, tmp_path / "run", scorers=["none"], **LIGHT)
    assert done.comparisons == ()
    assert (
        "nothing was measured that says which are better"
        in (done.folder / "report.html").read_text()
    )


def test_the_command(base, lora, prompts, tmp_path, monkeypatch, capsys):
    write_clip(tmp_path / "clip", image_size=32)
    run = tmp_path / "run"
    options = ["--base", base, "--tuned", f"mine={lora}", "--prompts", prompts, "--limit", "2"]
    options += ["--score", f"clipscore:{tmp_path / 'clip'}", "--encoder", "none", "--steps", "2"]
    options += ["--width", "32", "--height", "32", "--seeds", "2", "--out", run]

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["fifa", *map(str, arguments)])
        capsys.readouterr()
        main()
        return capsys.readouterr()

    told = command("evaluate", *options)
    assert told.out.strip() == str(run / "report.html")
    assert "mine wins" in told.err
    knobs = (run / "evaluate" / "evaluation.yaml").read_bytes()
    again = command("evaluate", "--recipe", run / "evaluate" / "evaluation.yaml", "--out", run)
    assert again.out == told.out
    assert (run / "evaluate" / "evaluation.yaml").read_bytes() == knobs
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert command("report", run).out.strip() == str(run / "report.html")
    assert (run / "report.html").read_bytes() == before
    with pytest.raises(SystemExit):
        command("evaluate", *options, "--score", "magic")
    assert "no such reward model: magic" in capsys.readouterr().err
