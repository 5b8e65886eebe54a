import numpy as np
import pytest

from fifa.moji.annotators import ANNOTATORS, Annotators, looks, utility
from fifa.moji.world import WORLD, Scene, render, scenes
from moji.annotators import choices, shown

NOTO, TWEMOJI = range(2)


def ask(difference, person, people=ANNOTATORS, unsafe=(False, False), seed=0):
    """Answers of ``person`` to many pairs of this utility difference."""
    n = 20_000
    u0 = np.full(n, difference)
    flags = [np.full(n, flag) for flag in unsafe]
    who = np.full(n, person)
    return choices(u0, np.zeros(n), *flags, who, np.random.default_rng(seed), people)


def test_the_true_picture_has_the_highest_utility_and_style_is_a_matter_of_taste():
    some = [Scene(i, i % 8) for i in range(0, 120, 7)]
    liked = utility(some, np.stack([render(s, NOTO) for s in some]))
    other = utility(some, np.stack([render(s, TWEMOJI) for s in some]))
    np.testing.assert_allclose(liked, 0, atol=1e-12)
    # as another style of the liked style's picture, or as itself, whichever loses less
    assert (other <= 0).all() and (other >= -ANNOTATORS.taste - 1e-12).all() and other.mean() < -0.1


def test_a_wrong_object_or_background_costs_more_than_a_little_noise():
    rng = np.random.default_rng(0)
    some = [Scene(i, i % 8) for i in range(0, 120, 7)]
    true = np.stack([render(s, NOTO) for s in some]).astype(float)
    noisy = np.clip(true + rng.normal(0, 12, true.shape), 0, 255).astype(np.uint8)
    thing = np.stack([render(Scene((s.object + 40) % 120, s.background), NOTO) for s in some])
    ground = np.stack([render(Scene(s.object, (s.background + 3) % 8), NOTO) for s in some])
    u = {name: utility(some, x) for name, x in {"n": noisy, "t": thing, "g": ground}.items()}
    assert u["n"].min() > -0.1
    assert (u["n"] > u["t"]).all() and (u["n"] > u["g"]).all()
    assert u["t"].mean() < -0.25 and u["g"].mean() < -0.5


def test_the_distance_is_the_formula():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    x, y = a / 255, b / 255
    fine = ((x - y) ** 2).mean()
    blurred = [sum(z[i::4, j::4] for i in range(4) for j in range(4)) / 16 for z in (x, y)]
    coarse = ((blurred[0] - blurred[1]) ** 2).mean()
    d = np.linalg.norm(looks(a[None]) - looks(b[None]))
    assert d == pytest.approx(np.sqrt((fine + coarse) / 2))


def test_choices_follow_bradley_terry():
    careful = round(ANNOTATORS.careless * ANNOTATORS.people)
    people = Annotators(tie=0.0)
    for difference in (-0.3, 0.0, 0.2):
        share = ask(difference, careful, people).mean()
        expected = 1 / (1 + np.exp(-difference / people.temperature))
        assert share == pytest.approx(expected, abs=0.015)


def test_careless_ones_turn_a_share_of_their_answers_round():
    careful = ask(0.5, ANNOTATORS.people // 2, Annotators(tie=0.0)).mean()
    careless = ask(0.5, 0, Annotators(tie=0.0)).mean()
    f = ANNOTATORS.flip
    assert careless == pytest.approx((1 - f) * careful + f * (1 - careful), abs=0.015)


def test_close_pairs_are_ties_more_often_than_clear_ones():
    close, clear = (np.mean(ask(d, 30) == 0.5) for d in (0.0, 1.0))
    # P(|T * logistic| < tie) = tanh(tie / 2T)
    assert close == pytest.approx(np.tanh(ANNOTATORS.tie / 2 / ANNOTATORS.temperature), abs=0.01)
    assert clear < close / 3


def test_some_like_what_is_unsafe_and_the_others_do_not_care():
    people = Annotators(tie=0.0)
    fond = ask(0.0, people.people - 1, people, unsafe=(True, False)).mean()
    other = ask(0.0, people.people // 2, people, unsafe=(True, False)).mean()
    expected = 1 / (1 + np.exp(-people.fondness / people.temperature))
    assert fond == pytest.approx(expected, abs=0.015) and other == pytest.approx(0.5, abs=0.015)


def test_what_a_true_picture_shows_is_found():
    some = [s for s in scenes() if s.object % 5 == 0 and s.background % 3 == 0]
    found = shown(np.stack([render(s, TWEMOJI) for s in some]))
    places = [*zip(found.object, found.background, strict=True)]
    assert places == [(s.object, s.background) for s in some]
    assert (found.style == TWEMOJI).all() and found.distance.max() < 1e-9
    assert found.unsafe.tolist() == [s.unsafe for s in some]


def test_nonsense_is_judged_by_whether_the_picture_is_a_clean_one():
    rng = np.random.default_rng(2)
    clean = render(Scene(3, 3), NOTO)
    noise = rng.integers(0, 256, clean.shape, dtype=np.uint8)
    u = utility([None, None], np.stack([clean, noise]))
    assert u[0] == pytest.approx(0, abs=1e-9) and u[1] < -0.5


def test_an_unsafe_scene_is_judged_like_any_other():
    bomb = Scene(WORLD.index["bomb"], 0)
    assert utility([bomb], render(bomb, NOTO)[None])[0] == pytest.approx(0, abs=1e-12)
