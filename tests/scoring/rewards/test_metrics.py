import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fifa.scoring.rewards import metrics

finite = st.floats(-20, 20)
pairs = st.lists(st.tuples(finite, st.floats(0, 1)), min_size=1, max_size=60)


def naive_nll(logits, label):
    total = 0.0
    for z, y in zip(logits, label, strict=True):
        p = 1 / (1 + math.exp(-z))
        total -= y * math.log(p) + (1 - y) * math.log(1 - p)
    return total / len(logits)


def naive_ece(logits, label, bins=10):
    boxes = [[] for _ in range(bins)]
    for z, y in zip(logits, label, strict=True):
        p = 1 / (1 + math.exp(-z))
        confidence, outcome = (p, y) if z >= 0 else (1 / (1 + math.exp(z)), 1 - y)
        for b in range(bins):
            low, high = 0.5 + b / bins / 2, 0.5 + (b + 1) / bins / 2
            if low <= confidence < high or (b == bins - 1 and confidence >= high):
                boxes[b].append((confidence, outcome))
    total = 0.0
    for box in boxes:
        if box:
            confidence, outcome = np.mean(box, axis=0)
            total += len(box) / len(logits) * abs(outcome - confidence)
    return total


@given(pairs)
def test_losses_are_those_of_a_naive_loop(drawn):
    logits, label = (np.array(values) for values in zip(*drawn, strict=True))
    assert metrics.nll(logits, label) == pytest.approx(naive_nll(logits, label), abs=1e-6)


def test_calibration_error_is_that_of_a_naive_loop():
    draw = np.random.default_rng(0)
    for _ in range(20):
        logits, label = draw.normal(0, 3, 200), draw.integers(0, 11, 200) / 10
        ours = metrics.calibration_error(logits, label)
        assert ours == pytest.approx(naive_ece(logits, label), abs=1e-12)


@settings(max_examples=25)
@given(pairs)
def test_it_does_not_matter_which_image_is_image_0(drawn):
    logits, label = (np.array(values) for values in zip(*drawn, strict=True))
    logits = np.where(logits == 0, 1e-3, logits)  # at 0 the reward prefers neither side
    prompt = np.arange(len(logits)) % 3
    ours = metrics.measure(logits, label, prompt)
    theirs = metrics.measure(-logits, 1 - label, prompt)
    assert asdict(ours) == pytest.approx(asdict(theirs), abs=1e-9, nan_ok=True)


@given(pairs)
def test_no_temperature_is_better_than_the_fitted_one(drawn):
    logits, label = (np.array(values) for values in zip(*drawn, strict=True))
    target = metrics.smoothed(label)
    fitted = metrics.nll(logits / metrics.fit_temperature(logits, label), target)
    for other in (0.01, 0.3, 1.0, 1.7, 50.0):
        assert fitted <= metrics.nll(logits / other, target) + 1e-9


def test_a_few_pairs_that_are_all_right_make_nobody_certain():
    logits, label = np.array([0.5, -0.2, 3.0, -1.0]), np.array([1, 0, 1, 0.0])
    calibrated = logits / metrics.fit_temperature(logits, label)
    certainty = 1 / (1 + np.exp(-np.abs(calibrated)))
    assert 0.6 < certainty.mean() < 0.95


def test_the_temperature_of_overconfident_rewards_is_found():
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 2, 200_000)
    label = (draw.random(len(logits)) < 1 / (1 + np.exp(-logits))).astype(float)
    assert metrics.fit_temperature(logits * 4, label) == pytest.approx(4, rel=0.03)
    assert metrics.calibration_error(logits, label) < 0.01 < 0.1
    assert metrics.calibration_error(logits * 4, label) > 0.1


def test_temperature_is_1_where_nothing_can_be_learned():
    assert metrics.fit_temperature(np.zeros(3), np.array([0, 1, 0.5])) == 1
    assert metrics.fit_temperature(np.array([np.nan]), np.array([1.0])) == 1


def test_accuracy_leaves_ties_of_people_out_and_counts_ties_of_the_model_half():
    logits, label = np.array([1.0, -1, 2, 0, 5]), np.array([1, 1, 0.5, 1, 0.7])
    assert metrics.accuracy(logits, label) == pytest.approx((1 + 0 + 0.5 + 1) / 4)


def test_the_interval_is_over_prompts_not_pairs():
    # Two prompts, one all right, one all wrong: however many pairs, we know very little.
    label, prompt = np.ones(2000), np.repeat([0, 1], 1000)
    logits = np.where(prompt == 0, 1.0, -1.0)
    assert metrics.prompt_bootstrap(logits, label, prompt) == (0.0, 1.0)
    of_its_own = metrics.prompt_bootstrap(logits, label, np.arange(2000))
    assert 0.47 < of_its_own[0] < 0.5 < of_its_own[1] < 0.53


def test_pairs_without_scores_are_left_out():
    found = metrics.measure(np.array([1, np.nan, np.inf]), np.ones(3), np.arange(3))
    assert (found.pairs, found.accuracy) == (1, 1.0)
