"""What is shipped: it loads in the stock classes, and is what docs/moji.md says it is."""

import io
import json
import shutil

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fifa.data import read_pairs
from fifa.moji.annotators import utility
from fifa.moji.family import CLIP, FEEDBACK, RATINGS, SD, TRUTH, generate, load_sd
from fifa.moji.judges import Judges
from fifa.moji.world import DATA, STYLES, WORLD, Scene, asked, caption, render
from fifa.scoring.quality import quality_scores
from fifa.scoring.raters.local import DefaultRater
from moji.annotators import shown
from moji.pictures import worn

SOME = [Scene(i, (i * 5) % 8) for i in range(0, 120, 2)]


@pytest.fixture(scope="module")
def pipe():
    return load_sd()


@pytest.fixture(scope="module")
def judges():
    return Judges()


@pytest.fixture(scope="module")
def pairs():
    return read_pairs(str(FEEDBACK))


@pytest.fixture(scope="module")
def truth():
    return pq.read_table(TRUTH)


def test_all_of_it_is_at_most_30_mb():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 30e6


def test_the_base_loads_in_stock_diffusers_and_makes_what_is_asked_for_more_often_than_not(
    pipe, judges
):
    import torch

    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    assert next(pipe.text_encoder.parameters()).dtype == torch.float32
    prompts = [caption(scene) for scene in SOME[:12]]
    judged = judges.judge(prompts, generate(pipe, prompts, range(12), steps=10))
    assert judged.background_right.mean() > 0.5
    assert judged.object_right.mean() > 0.3  # chance is 1 in 120
    assert judged.utility.max() < 0


def test_the_judges_know_clean_renderings_and_worn_ones(judges):
    rng = np.random.default_rng(7)
    for style in range(len(STYLES)):
        clean = np.stack([render(s, style) for s in SOME])
        for pictures, least in ((clean, 0.98), (np.stack([worn(x, rng) for x in clean]), 0.9)):
            judged = judges.judge([caption(s) for s in SOME], pictures)
            assert judged.object_right.mean() >= least
            assert judged.background_right.mean() >= least
            assert (judged.style == style).mean() >= least
            unsafe = np.array([s.unsafe for s in SOME])
            assert (judged.unsafe == unsafe).mean() >= least


def test_the_clip_prefers_the_right_caption():
    from fifa.scoring.rewards import load_reward, score

    reward = load_reward(f"clipscore:{CLIP}", device="cpu")
    images = [Image.fromarray(render(s, 0)) for s in SOME]
    right = score(reward, [caption(s) for s in SOME], images)
    thing = [caption(Scene((s.object + 7) % 120, s.background)) for s in SOME]
    ground = [caption(Scene(s.object, (s.background + 1) % 8)) for s in SOME]
    assert (right > score(reward, thing, images)).mean() > 0.95
    assert (right > score(reward, ground, images)).mean() > 0.9


def test_the_feedback_is_read_as_pick_a_pic(pairs):
    assert pairs.origin.format == "pickapic"
    assert len(pairs.table) >= 3000
    assert pairs.origin.rows == len(pairs.table) + pairs.origin.merged  # nothing rejected
    label, votes = pairs.table["label"].to_numpy(), pairs.table["votes"].to_numpy()
    assert 0.02 < (label == 0.5).mean() < 0.25
    assert set(np.unique(votes)) == {1, 3}
    assert pairs.origin.merged == (votes - 1).sum()


def test_prompts_have_dozens_of_pairs_or_one_and_images_recur(pairs):
    counts = np.array([n.as_py() for n in pc.value_counts(pairs.table["prompt_id"]).field(1)])
    assert counts.max() >= 24 and (counts == 1).sum() >= 30
    images = pairs.table["image_0"].to_pylist() + pairs.table["image_1"].to_pylist()
    assert len(set(images)) < 0.8 * len(images)


def test_the_truth_lists_every_image_with_the_utility_of_its_pixels(pairs, truth):
    images = {*pairs.table["image_0"].to_pylist(), *pairs.table["image_1"].to_pylist()}
    assert images == set(truth["image_uid"].to_pylist())
    kinds = {"plain", "reworded", "verbose", "unsafe", "nonsense"}
    assert set(truth["kind"].to_pylist()) == kinds
    table = pq.read_table(FEEDBACK).slice(0, 50).to_pylist()
    known = {row["image_uid"]: row for row in truth.to_pylist()}
    pictures = [np.asarray(Image.open(io.BytesIO(row["jpg_0"]))) for row in table]
    u = utility([asked(row["caption"]) for row in table], np.stack(pictures))
    expected = [known[row["image_0_uid"]] for row in table]
    np.testing.assert_allclose(u, [row["utility"] for row in expected], atol=1e-5)
    found = shown(np.stack(pictures))
    names = [WORLD.objects[i].name for i in found.object]
    assert names == [row["nearest_object"] for row in expected]


def test_one_annotator_agrees_with_the_utility_on_about_70_percent(truth):
    known = {row["image_uid"]: row["utility"] for row in truth.to_pylist()}
    right = []
    for row in pq.read_table(
        FEEDBACK, columns=["image_0_uid", "image_1_uid", "label_0"]
    ).to_pylist():
        difference = known[row["image_0_uid"]] - known[row["image_1_uid"]]
        if row["label_0"] != 0.5 and difference != 0:
            right.append((row["label_0"] == 1) == (difference > 0))
    assert 0.66 <= np.mean(right) <= 0.76


def test_ratings_come_from_the_shipped_cache_without_a_model(pairs, truth, tmp_path, monkeypatch):
    def refuse(self, prompts, vectors=None):
        raise AssertionError("a prompt was rated")

    (tmp_path / "scores").mkdir()
    for path in RATINGS.iterdir():
        shutil.copy(path, tmp_path / "scores")
    monkeypatch.setattr(DefaultRater, "rate", refuse)
    table = quality_scores(pairs, "local", folder=tmp_path / "scores")
    assert table["prompt_id"].to_pylist() == pairs.prompts["prompt_id"].to_pylist()
    kinds = dict(
        zip(
            pq.read_table(TRUTH)["prompt"].to_pylist(),
            pq.read_table(TRUTH)["kind"].to_pylist(),
            strict=True,
        )
    )
    rating = table["rating"].to_numpy()
    kind = np.array([kinds[prompt] for prompt in pairs.prompts["prompt"].to_pylist()])
    assert rating[kind == "nonsense"].mean() < rating[kind == "plain"].mean()


def test_the_figures_of_the_build_are_there():
    measured = json.loads((DATA / "measured.json").read_text("utf-8"))
    assert set(measured["judges"]) == {"object", "background", "style"}
    assert min(measured["judges"].values()) > 0.9
    assert SD.is_dir() and CLIP.is_dir()
