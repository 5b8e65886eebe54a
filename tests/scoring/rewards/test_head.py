import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from fifa.scoring.rewards.head import Comparisons, Head, HeadPath, prompt_weights


def drawn(seed=0, images=60, d=7, prompts=12, t=5, pairs=150, ties=True):
    draw = np.random.default_rng(seed)
    label = draw.integers(0, 11, pairs) / 10 if ties else draw.integers(0, 2, pairs).astype(float)
    data = Comparisons(
        draw.integers(0, images, (pairs, 2)), draw.integers(0, prompts, pairs), label
    )
    features = draw.normal(3, 2, (images, d)).astype(np.float32)
    return features, draw.normal(size=(prompts, t)).astype(np.float32), data


def test_weights_are_one_over_the_examples_of_the_prompt():
    prompt = np.array([7, 3, 7, 7, 9])
    expected = [1 / list(prompt).count(p) for p in prompt]
    assert prompt_weights(prompt).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("reads_prompts", [False, True])
def test_the_gradient_is_that_of_pickscores_loss(reads_prompts):
    images, prompts, data = drawn()
    path = HeadPath(images, prompts, data, reads_prompts=reads_prompts)
    at = torch.randn(path._x.shape[1], dtype=torch.float64, requires_grad=True)
    reward = torch.from_numpy(path._x) @ at
    logits = torch.stack([reward[path._first], reward[path._second]], -1)
    target = torch.from_numpy(np.stack([data.label, 1 - data.label], -1))
    each = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    weight = torch.from_numpy(prompt_weights(data.prompt))
    loss = (each * weight).sum() / weight.sum() + 0.05 * at @ at
    loss.backward()
    ours, gradient = path._loss(at.detach().numpy(), 0.1)
    assert ours == pytest.approx(loss.item())
    assert gradient == pytest.approx(at.grad.numpy(), abs=1e-12)


@pytest.mark.parametrize("images", [60, 6])  # more rows than columns, and fewer
def test_a_linear_head_is_scikit_learns_logistic_regression(images):
    features, prompts, data = drawn(images=images, ties=False)
    head = HeadPath(features, prompts, data, reads_prompts=False).fit(0.01)
    used = features[np.unique(data.image)].astype(float)
    x = (features - used.mean(0)) / used.std(0) / np.sqrt(features.shape[1])
    difference = x[data.image[:, 0]] - x[data.image[:, 1]]
    weight = prompt_weights(data.prompt)
    theirs = LogisticRegression(C=1 / (0.01 * weight.sum()), fit_intercept=False, tol=1e-10)
    theirs.fit(difference, data.label, sample_weight=weight)
    expected = theirs.decision_function(difference)
    assert head.logits(features, prompts, data) == pytest.approx(expected, abs=1e-5)


def test_one_path_ends_where_a_fresh_start_does():
    images, prompts, data = drawn()
    walked = HeadPath(images, prompts, data, reads_prompts=True)
    for penalty in (0.1, 0.03, 0.01):
        head = walked.fit(penalty)
    fresh = HeadPath(images, prompts, data, reads_prompts=True).fit(0.01)
    expected = fresh.logits(images, prompts, data)
    assert head.logits(images, prompts, data) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("penalty", [0.1, 1e-6])
@pytest.mark.parametrize("images", [60, 9])  # more rows than pairs, and fewer
def test_scipy_finds_no_better_coefficients(images, penalty):
    features, prompts, data = drawn(images=images, d=40, pairs=400)
    path = HeadPath(features, prompts, data, reads_prompts=True)
    path.fit(penalty)
    x = path._x[path._first] - path._x[path._second]
    weight = prompt_weights(data.prompt) / prompt_weights(data.prompt).sum()

    def loss(at):
        z = x @ at
        each = np.logaddexp(0, z) - data.label * z
        return weight @ each + penalty / 2 * at @ at

    def slope(at):
        return x.T @ (weight * (expit(x @ at) - data.label)) + penalty * at

    def hessian(at):
        s = expit(x @ at)
        return (x.T * (weight * s * (1 - s))) @ x + penalty * np.eye(len(at))

    start = np.zeros(x.shape[1])
    theirs = minimize(loss, start, jac=slope, hess=hessian, method="trust-exact", tol=1e-11)
    assert x @ path._at == pytest.approx(x @ theirs.x, abs=1e-4)


def test_two_pictures_in_every_second_pair_do_not_stop_it():
    draw = np.random.default_rng(2)
    images = np.zeros((2000, 64), np.float32)  # all features lie in a plane
    images[:2] = draw.normal(size=(2, 64))
    image = draw.integers(2, 2000, (2000, 2))
    image[::2, 0] = draw.integers(0, 2, 1000)
    label = draw.integers(0, 2, 2000).astype(float)
    data = Comparisons(image, draw.integers(0, 50, 2000), label)
    prompts = np.empty((50, 0), np.float32)
    head = HeadPath(images, prompts, data, reads_prompts=False).fit(1e-6)
    assert np.isfinite(head.logits(images, prompts, data)).all()


def test_a_tie_pulls_towards_even_odds():
    images, prompts, data = drawn(ties=False)
    tied = Comparisons(data.image, data.prompt, np.full_like(data.label, 0.5))
    logits = (
        HeadPath(images, prompts, tied, reads_prompts=False).fit(0.01).logits(images, prompts, tied)
    )
    assert np.abs(logits).max() < 1e-3


def test_a_taste_that_depends_on_the_prompt_is_learned_only_by_a_head_that_reads_it():
    draw = np.random.default_rng(1)
    images = draw.normal(size=(400, 3)).astype(np.float32)
    prompts = draw.normal(size=(80, 2)).astype(np.float32)
    image, prompt = draw.integers(0, 400, (1500, 2)), draw.integers(0, 80, 1500)
    taste = images[image][..., 0] * prompts[prompt][:, :1]  # red for some, blue for others
    data = Comparisons(image, prompt, (taste[:, 0] > taste[:, 1]).astype(float))

    def right(reads_prompts):
        train, test = data.part(prompt < 60), data.part(prompt >= 60)
        head = HeadPath(images, prompts, train, reads_prompts=reads_prompts).fit(1e-5)
        assert head.reads_prompts == reads_prompts
        return np.mean((head.logits(images, prompts, test) > 0) == test.label)

    assert right(True) > 0.9
    assert right(False) < 0.65


def test_dividing_by_a_temperature_divides_every_reward():
    draw = np.random.default_rng(0)
    shapes = ((4, 3), (3,), (5, 2), (2,))
    head = Head(*(draw.normal(size=shape) for shape in shapes))
    images, prompts = draw.normal(size=(9, 4)), draw.normal(size=(9, 5))
    expected = head.rewards(images, prompts) / 2.5
    assert head.over(2.5).rewards(images, prompts) == pytest.approx(expected)


def test_a_feature_that_never_changes_is_left_out():
    images, prompts, data = drawn()
    images[:, 2] = 4.0
    head = HeadPath(images, prompts, data, reads_prompts=False).fit(0.01)
    assert head.image[2].tolist() == [0.0]
    assert np.isfinite(head.logits(images, prompts, data)).all()


def test_in_a_shared_space_the_head_finds_that_pictures_should_fit_prompts():
    draw = np.random.default_rng(1)
    images, prompts = (
        (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        for vectors in (draw.normal(size=(400, 24)), draw.normal(size=(200, 24)))
    )
    image, prompt = draw.integers(0, 400, (900, 2)), draw.integers(0, 200, 900)
    fit = (images[image] * prompts[prompt][:, None]).sum(-1)
    data = Comparisons(image, prompt, (fit[:, 0] > fit[:, 1]).astype(float))
    learn, asked = np.arange(600), np.arange(600, 900)
    right = {}
    for shared in (False, True):
        path = HeadPath(images, prompts, data.part(learn), reads_prompts=True, shared=shared)
        logits = path.fit(0.01).logits(images, prompts, data.part(asked))
        right[shared] = np.mean((logits > 0) == (data.label[asked] > 0.5))
    assert right[True] > 0.95 > right[False]


def test_the_head_of_a_shared_space_is_its_design_times_its_coefficients():
    images, _, data = drawn(d=6)
    prompts = np.random.default_rng(2).normal(size=(12, 6)).astype(np.float32)
    path = HeadPath(images, prompts, data, reads_prompts=True, shared=True)
    head = path.fit(0.01)
    rewards = path._x @ path._at
    expected = rewards[path._first] - rewards[path._second]
    assert head.logits(images, prompts, data) == pytest.approx(expected, abs=1e-6)
    halved = head.over(2.0).logits(images, prompts, data)
    assert halved == pytest.approx(expected / 2, abs=1e-6)
