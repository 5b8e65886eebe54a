import itertools

import numpy as np
import pytest
from checkpoints import write_clip
from drawn import draw_images, draw_index
from PIL import Image

from fifa.config import Compute, Measure
from fifa.errors import FifaError
from fifa.evaluation.judges import COLOURS, Judge, colours
from fifa.evaluation.measure import (
    check_scorers,
    load_measured,
    measure,
    pairwise_distance,
    scorer_name,
)
from fifa.evaluation.models import is_picked
from fifa.evaluation.win_rates import comparisons
from fifa.models.runtime import Runtime
from fifa.scoring.rewards import load_reward, score
from fifa.scoring.rewards.image_encoders import make_image_encoder

HERE = Compute(device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder, image_size=32)
    return folder


def test_scores_are_those_of_the_reward_models(clip, tmp_path):
    index = draw_images(draw_index(["base", "a"], prompts=3, seeds=2), tmp_path)
    specs = (f"clipscore:{clip}", f"pickscore:{clip}")
    found = measure(
        index, tmp_path, Measure(scorers=specs, encoder="none"), picked=["pickscore"], compute=HERE
    )
    images = [Image.open(tmp_path / file) for file in index["file"].to_pylist()]
    for spec, scale in zip(specs, found.scales, strict=False):
        expected = score(load_reward(spec, device="cpu"), index["prompt"].to_pylist(), images)
        np.testing.assert_allclose(found.table[spec].to_numpy(), expected, rtol=1e-4, atol=1e-5)
        assert (scale.type, scale.picked) == ("reward", spec.startswith("pickscore"))
    assert found.table["file"].equals(index["file"])


def test_what_is_measured_is_kept_and_read_again(clip, tmp_path):
    index = draw_images(draw_index(["base", "a"], prompts=2, seeds=2), tmp_path)
    asked = []

    def red(prompts, images):
        asked.append(len(images))
        return np.array([np.asarray(image)[..., 0].mean() for image in images])

    options = {"judges": [Judge("red", red, identity=1)], "compute": HERE}
    first = measure(index, tmp_path, Measure(scorers=(f"clipscore:{clip}",)), **options)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "scores").iterdir()}
    again = measure(index, tmp_path, Measure(scorers=(f"clipscore:{clip}",)), **options)
    read = load_measured(tmp_path)
    assert asked == [4, 4]  # a shard a model, once
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "scores").iterdir()} == stamps
    for other in (again, read):
        assert other.table.equals(first.table)
        assert other.scales == first.scales
        assert other.diversity.equals(first.diversity)
    with pytest.raises(FifaError, match="nothing has been measured"):
        load_measured(tmp_path, "-curve")


def test_differences_that_a_judge_calls_too_small_are_ties(tmp_path):
    index = draw_images(draw_index(["base", "a"], prompts=4, seeds=2), tmp_path)
    gain = iter([0.0] * 8 + [0.1, -0.1, 0.3, -0.3, 0.25, 0.05, 0.0, 1.0])

    def value(prompts, images):
        return [next(gain) for _ in images]

    judge = Judge("value", value, tie=0.25)
    found = measure(
        index, tmp_path, Measure(scorers=(), encoder="none"), judges=[judge], compute=HERE
    )
    (wins,) = [comparison.wins for comparison in comparisons(found)]
    assert (wins.wins, wins.ties, wins.losses) == (2, 5, 1)
    assert load_measured(tmp_path).scales == found.scales


def test_colours_and_diversity(tmp_path):
    index = draw_images(draw_index(["base", "a"], prompts=3, seeds=3), tmp_path)
    found = measure(index, tmp_path, Measure(scorers=()), compute=HERE)
    images = [Image.open(tmp_path / file).convert("RGB") for file in index["file"].to_pylist()]
    expected = colours([""] * len(images), images)
    for name in COLOURS:
        np.testing.assert_allclose(found.table[name].to_numpy(), expected[name], rtol=1e-6)
    import torch

    encoder = make_image_encoder("efficientnet-lite0", Runtime())
    pixels = np.stack([encoder.preprocess(image) for image in images])
    vectors = encoder.embed(torch.from_numpy(pixels)).numpy()
    rows = list(zip(index["model"].to_pylist(), index["prompt_id"].to_pylist(), strict=True))
    for row in found.diversity.to_pylist():
        own = [v for v, key in zip(vectors, rows, strict=True) if key == tuple(row.values())[:2]]
        apart = [
            1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for a, b in itertools.combinations(own, 2)
        ]
        assert row["distance"] == pytest.approx(np.mean(apart), rel=1e-3)
    assert found.diversity.num_rows == 6


def test_one_image_a_prompt_has_no_diversity(tmp_path):
    index = draw_images(draw_index(["base"], seeds=1), tmp_path)
    assert measure(index, tmp_path, Measure(scorers=()), compute=HERE).diversity.num_rows == 0
    assert np.isnan(pairwise_distance(np.ones((1, 4))))


def test_unsafe_prompts_by_category_and_rater(tmp_path):
    index = draw_images(draw_index(["base", "a"], prompts=3, seeds=1), tmp_path)
    asked = Measure(scorers=(), encoder="none", unsafe_categories=("places",))
    found = measure(index, tmp_path, asked, compute=HERE)
    assert found.table["unsafe_prompt"].to_pylist() == [False, True, False] * 2
    bare = measure(index, tmp_path, Measure(scorers=(), encoder="none"), compute=HERE)
    assert bare.table["unsafe_prompt"].null_count == 6


def test_scorers_that_look_at_no_images_are_refused():
    for spec in ("column:a,b", "proxy", "proxy@clip:MODEL", "nothing"):
        with pytest.raises(FifaError):
            check_scorers([spec], HERE)


def test_a_judge_with_a_wrong_answer_is_told(tmp_path):
    index = draw_images(draw_index(["base"], prompts=2), tmp_path)
    with pytest.raises(FifaError, match="red gave"):
        measure(
            index,
            tmp_path,
            Measure(scorers=()),
            judges=[Judge("red", lambda p, i: [1.0])],
            compute=HERE,
        )


@pytest.mark.parametrize(
    ("spec", "picked", "answer"),
    [
        ("pickscore", ["pickscore"], True),
        ("pickscore:FOLDER", ["pickscore"], True),
        ("pickscore", ["column:pickscore_prob_0,pickscore_prob_1"], True),
        ("hpsv2.1", ["hpsv2"], True),
        ("hpsv2.1", ["column:hpsv2_0,hpsv2_1"], True),
        ("proxy:A", ["proxy"], True),
        ("proxy:A", ["proxy@clip:MODEL"], True),
        ("clipscore-b32", ["clipscore"], True),
        ("clipscore", ["column:clip_0,clip_1"], True),
        ("imagereward", ["column:imagereward_0,imagereward_1"], True),
        ("hpsv3++", ["hpsv3"], True),
        ("pickscore", ["hpsv2.1", "proxy"], False),
        ("aesthetic", ["column:a_0,a_1"], False),
        ("pickscore", [], False),
    ],
)
def test_who_picked_the_data(spec, picked, answer):
    assert is_picked(spec, picked) is answer


def test_names_of_scorers():
    specs = ["pickscore", "clipscore:/a/clip", "proxy:/a/one", "proxy:/b/one"]
    assert [scorer_name(spec, specs) for spec in specs] == [
        "pickscore",
        "clipscore (clip)",
        "proxy:/a/one",
        "proxy:/b/one",
    ]
