import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fifa.errors import FifaError
from fifa.scoring.rewards.head import prompt_folds


def ids(n):
    return pa.array([f"prompt-{i}" for i in range(n)])


@given(
    st.lists(st.tuples(st.integers(0, 19), st.integers(0, 30), st.integers(0, 30)), min_size=40),
    st.integers(2, 5),
    st.integers(0, 3),
)
def test_every_pair_has_a_fold_and_no_prompt_is_in_two(rows, folds, seed):
    prompt = np.array([row[0] for row in rows])
    images = np.array([row[1:] for row in rows])
    if len(np.unique(prompt)) < folds:
        return
    fold = prompt_folds(ids(20), prompt, images, folds=folds, seed=seed)
    assert fold.shape == (20,)
    assert set(fold[prompt]) == set(range(folds))
    assert (fold[np.setdiff1d(np.arange(20), prompt)] == -1).all()


def test_prompts_that_share_an_image_are_not_separated():
    draw = np.random.default_rng(0)
    prompt = np.repeat(np.arange(40), 3)
    images = draw.permutation(240).reshape(-1, 2)
    for a, b in ((0, 5), (5, 11), (11, 30)):  # a chain: 0 and 30 have no image in common
        images[3 * b, 0] = images[3 * a, 1] = 1000 + a
    for seed in range(10):
        fold = prompt_folds(ids(40), prompt, images, folds=5, seed=seed)
        assert len({fold[p] for p in (0, 5, 11, 30)}) == 1
        for k in range(5):
            ours, theirs = (set(images[m].ravel()) for m in (fold[prompt] == k, fold[prompt] != k))
            assert not ours & theirs


def test_images_shared_by_all_give_way_with_a_warning(capsys):
    prompt = np.arange(10)
    fold = prompt_folds(ids(10), prompt, np.zeros((10, 2), np.int64), folds=5)
    assert np.bincount(fold).tolist() == [2] * 5
    assert "too many prompts share images" in capsys.readouterr().err


def test_folds_follow_the_prompts_wherever_they_stand():
    prompt, images = np.repeat(np.arange(30), 2), np.arange(120).reshape(-1, 2)
    fold = prompt_folds(ids(30), prompt, images, seed=3)
    order = np.random.default_rng(0).permutation(30)
    place = np.argsort(order)
    moved = prompt_folds(ids(30).take(pa.array(order)), place[prompt], images, seed=3)
    assert moved.tolist() == fold[order].tolist()
    assert fold.tolist() != prompt_folds(ids(30), prompt, images, seed=4).tolist()


def test_folds_are_of_like_size():
    draw = np.random.default_rng(0)
    prompt = np.repeat(np.arange(300), draw.integers(1, 20, 300))
    images = np.arange(2 * len(prompt)).reshape(-1, 2)
    pairs = np.bincount(prompt_folds(ids(300), prompt, images)[prompt])
    assert pairs.max() - pairs.min() < 40


def test_too_few_prompts_are_refused():
    with pytest.raises(FifaError, match="there are 3"):
        prompt_folds(ids(3), np.arange(3), np.arange(6).reshape(-1, 2))
