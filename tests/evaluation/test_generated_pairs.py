"""Pairs of a model's own images: which images, which labels, which noise, and the file."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from checkpoints import SMALL, write_clip
from diffusers import DiffusionPipeline
from drawn import draw_index
from hypothesis import given
from hypothesis import strategies as st
from test_curves import write_training

import fifa
from fifa.cli import main
from fifa.config import GeneratePairs, Read, Recipe, Score
from fifa.errors import FifaError
from fifa.evaluation.generate import png
from fifa.evaluation.models import Model, read_training
from fifa.evaluation.pairs import Judged, choose_pairs, reward_columns
from fifa.run.steps import filter_pairs
from fifa.scoring.margin import committee
from fifa.training.pairs import read_training_pairs

QUICK = {**SMALL, "per_prompt": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    path.write_text("prompt,category\na cat,animals\nA  cat,animals\na house,places\n,\n")
    return path


@pytest.fixture(scope="module")
def judges(clip):
    return [f"clipscore:{clip}", f"pickscore:{clip}"]


@pytest.fixture(scope="module")
def made(base, lora, clip, prompts, judges, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    knobs = {**QUICK, "batch": 1, "tuned": f"mine={lora}", "pairs": "all"}
    return fifa.generate_pairs(base, prompts, judges, out, **knobs)


def judged(*rewards, prompts=2, contents=None, contrast=None):
    """Judged images, as many of each prompt; ``rewards`` of a judge each."""
    n = len(rewards[0])
    index = draw_index(["m"], prompts=prompts, seeds=n // prompts)
    return Judged(
        index,
        {f"judge {i}": np.asarray(r, np.float32) for i, r in enumerate(rewards)},
        contents or [f"{i}" for i in range(n)],
        np.asarray(contrast or [0.2] * n, np.float32),
    )


def chosen(images, **knobs):
    choice = choose_pairs(images, GeneratePairs(**knobs))
    return [*zip(choice.better.tolist(), choice.worse.tolist(), strict=True)], choice.left_out


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("best-worst", [(1, 2), (5, 3)]),
        ("adjacent", [(1, 0), (0, 2), (5, 4), (4, 3)]),
        ("all", [(1, 0), (1, 2), (0, 2), (5, 4), (5, 3), (4, 3)]),
    ],
)
def test_which_images_of_a_prompt_make_a_pair(how, expected):
    images = judged([2.0, 3.0, 1.0, 0.1, 0.2, 0.4])
    assert chosen(images, pairs=how) == (expected, {})


def test_what_makes_no_pair_is_counted():
    nan, inf = float("nan"), float("inf")
    rewards = [1.0, nan, 5.0, 2.0, 1.0, 1.0, 1.0, 1.5, inf, 2.0, 3.0, 4.0]
    contents = [*"abcd", *"eeef", *"ghij"]
    contrast = [0.2, 0.2, 0.0, 0.2, *[0.2] * 8]
    images = judged(rewards, prompts=3, contents=contents, contrast=contrast)
    pairs, left_out = chosen(images, pairs="adjacent", min_margin=1.0)
    assert pairs == [(3, 0), (11, 10), (10, 9)]
    assert left_out == {
        "images to which a judge gave no finite reward": 2,
        "images of one colour": 1,
        "images that are the same as another of their prompt": 2,
        "pairs whose rewards differ by less than 1": 1,
    }


def test_images_of_which_no_pair_can_be_made_are_told_by_reason():
    nan = float("nan")
    with pytest.raises(FifaError, match=r"no pair can be made of 4 images \(1 images to which"):
        chosen(judged([1.0, 1.0, nan, 2.0]))


@given(st.lists(st.tuples(*[st.floats(-9, 9, width=16)] * 2), min_size=8, max_size=8))
def test_pairs_are_those_of_the_committee(rewards):
    first, second = np.array(rewards, np.float32).T
    images = judged(first, second)
    try:
        pairs, _ = chosen(images, pairs="all")
    except FifaError:
        pairs = []
    every = np.array([(i, j) for p in (0, 4) for i in range(p, p + 4) for j in range(i + 1, p + 4)])
    sides = [(r[every[:, 0]], r[every[:, 1]]) for r in (first, second)]
    d = committee(sides, np.ones(len(every))).signed_margin
    want = {
        (i, j) if x > 0 else (j, i): abs(x) for (i, j), x in zip(every.tolist(), d, strict=True)
    }
    assert all(want.get(pair, want.get(pair[::-1])) <= 1e-5 for pair in set(pairs) - set(want))
    assert {pair for pair, x in want.items() if x > 1e-5} <= set(pairs)


def test_every_reader_takes_the_file_without_options(made, judges):
    table = pq.read_table(made.path)
    assert made.margin == ("column:clipscore_0,clipscore_1", "column:pickscore_0,pickscore_1")
    assert made.facts["prompts"] == 2
    assert made.facts["images"] == 6
    assert len(table) == made.facts["pairs"] == 6
    assert set(table["model_0"].to_pylist()) == {"mine"}
    assert set(table["category"].to_pylist()) == {"animals", "places"}
    pairs = fifa.read_pairs(made.path.parent)
    assert (pairs.origin.format, len(pairs), len(pairs.rejected)) == ("pickapic", 6, 0)
    assert pairs.table["label"].to_pylist() == table["label_0"].to_pylist()
    trained = read_training_pairs(made.path.parent)
    assert (len(trained), trained.dropped) == (6, {})


def test_rewards_in_the_file_are_those_of_scoring_it(made, judges):
    pairs = fifa.read_pairs(made.path.parent)
    again = fifa.score(pairs, margin=judges, quality="none", diversity="none").margins
    there = fifa.score(pairs, margin=made.margin, quality="none", diversity="none").margins
    for spec, column in zip(judges, made.margin, strict=True):
        for side in ("reward_0", "reward_1"):
            np.testing.assert_allclose(again[spec][side], there[column][side], rtol=1e-5)
    d = [(t["reward_0"].to_numpy(), t["reward_1"].to_numpy()) for t in there.values()]
    assert (committee(d, pairs.table["label"].to_numpy()).signed_margin > 0).all()


def test_a_trainer_makes_the_noise_again_from_the_seed(made, base, lora):
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(lora)
    pipe.set_progress_bar_config(disable=True)
    row = pq.read_table(made.path).to_pylist()[0]
    for side in (0, 1):
        draw = torch.Generator("cpu").manual_seed(row[f"noise_seed_{side}"])
        factor = pipe.vae_scale_factor
        shape = (1, pipe.unet.config.in_channels, 32 // factor, 32 // factor)
        noise = torch.randn(shape, generator=draw)
        sizes = {"width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 7.5}
        pixels = pipe([row["caption"]], latents=noise, output_type="pt", **sizes).images
        pixels = (pixels.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()[0]
        assert png(pixels) == row[f"jpg_{side}"]


def test_finished_pairs_are_left_alone_and_others_refused(
    made, base, lora, prompts, judges, tmp_path
):
    out, bytes_ = made.path.parent, made.path.read_bytes()
    knobs = {**QUICK, "batch": 1, "tuned": f"mine={lora}", "pairs": "all"}
    copied = shutil.copy(prompts, tmp_path / f"same{prompts.suffix}")
    for same in (knobs, {**knobs, "batch": 2, "device": "cpu"}):
        assert fifa.generate_pairs(base, copied, judges, out, **same) == made
    with pytest.raises(FifaError, match=r"made in another way.*knobs\.pairs: 'all' / 'adjacent'"):
        fifa.generate_pairs(base, prompts, judges, out, **{**knobs, "pairs": "adjacent"})
    assert made.path.read_bytes() == bytes_
    with pytest.raises(FifaError, match="holds no pairs of a model"):
        fifa.generate_pairs(base, prompts, judges, base, **knobs)


def test_damaged_pairs_are_made_again(made, base, lora, prompts, judges, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(made.path.parent, out)
    whole = made.path.read_bytes()
    (out / "pairs.parquet").write_bytes(whole[:99] + b"?" + whole[100:])
    knobs = {**QUICK, "batch": 1, "tuned": f"mine={lora}", "pairs": "all"}
    fifa.generate_pairs(base, prompts, judges, out, **knobs)
    assert "is damaged, and made again" in capsys.readouterr().err
    assert (out / "pairs.parquet").read_bytes() == whole


def test_judges_of_one_name_have_columns_of_their_own():
    specs = ["hpsv2.1", "pickscore:a", "pickscore:b"]
    assert reward_columns(specs) == dict(
        zip(specs, ["hpsv2_1", "pickscore", "pickscore_2"], strict=True)
    )


def broken(base, folder, part, change):
    pipe = DiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        change(getattr(pipe, part))
    pipe.save_pretrained(folder)
    return folder


def test_images_of_one_colour_are_told(base, prompts, judges, tmp_path):
    def whiten(vae):
        for parameter in vae.decoder.conv_out.parameters():
            parameter.zero_()

    model = broken(base, tmp_path / "white", "vae", whiten)
    with pytest.raises(FifaError, match=r"\(6 images of one colour; 2 prompts with fewer than two"):
        fifa.generate_pairs(model, prompts, judges[0], tmp_path / "out", **QUICK)


def test_images_that_are_not_finite_are_told(base, prompts, judges, tmp_path):
    def spoil(unet):
        unet.conv_out.bias.fill_(float("nan"))

    model = broken(base, tmp_path / "nan", "unet", spoil)
    with pytest.raises(FifaError, match="not finite"):
        fifa.generate_pairs(model, prompts, judges[0], tmp_path / "out", **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_prompt": 1}, "greater than or equal to 2"),
        ({"margin": "column:a,b"}, "column:a,b does not look at images"),
        ({"margin": "proxy"}, "proxy does not look at images"),
        ({"margin": "pickskore"}, "no such reward model"),
        ({"prompts": "nothing.txt"}, "cannot open the prompts"),
    ],
)
def test_what_cannot_be_made_is_refused_before_an_image_is(
    base, prompts, judges, tmp_path, options, message
):
    given = {"prompts": prompts, "margin": judges[0], **QUICK, **options}
    with pytest.raises(FifaError, match=message):
        fifa.generate_pairs(base, out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_made_and_filters_without_scoring(
    base, prompts, judges, tmp_path, capsys, monkeypatch
):
    out, run = tmp_path / "out", tmp_path / "run"
    command = ["fifa", "generate-pairs", "--model", str(base), "--prompts", str(prompts)]
    command += ["--margin", judges[1], "--per-prompt", "2", "--steps", "2", "--out", str(out)]
    command += ["--width", "32", "--height", "32", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", command)
    main()
    said = capsys.readouterr()
    assert said.out == f"{out / 'pairs.parquet'}\n"
    assert "2 pairs of 4 images of base, 2 prompts" in said.err
    assert "--margin column:pickscore_0,pickscore_1" in said.err
    score = Score(("column:pickscore_0,pickscore_1",), "none", "none")
    filter_pairs(Recipe(Read(str(out)), score), run)
    kept = pq.read_table(run / "selection.parquet")
    assert kept["status"].to_pylist() == ["selected"] * 2
    assert (kept["signed_margin"].to_numpy() > 0).all()


def test_who_judged_generated_pairs_is_known_to_an_evaluation(base, judges, made, tmp_path):
    out, run = made.path.parent, tmp_path / "run"
    score = Score(("column:noise_seed_0,noise_seed_1",), "none", "none")
    filter_pairs(Recipe(Read(str(made.path)), score), run)
    for source in (out, made.path, run, run / "subset"):
        checkpoint = write_training(tmp_path / f"of {source.name}", source)
        model = Model("m", "lora", "", checkpoint, base, "")
        assert set(judges) <= set(read_training(model).scorers), source
