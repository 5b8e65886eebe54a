"""Searches against brute force in float64: the one for GPUs runs here on the CPU."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fifa.errors import FifaError
from fifa.models.transformer import normalised
from fifa.scoring import neighbours
from fifa.scoring.encoders import Kept
from fifa.scoring.neighbours import (
    approximate_index,
    approximate_search,
    device_search,
    exact_search,
    sampled_recall,
)


def random(n: int, d: int) -> np.ndarray:
    return normalised(np.random.default_rng(n).standard_normal((n, d)).astype(np.float32))


def clustered(n: int, d: int, spread: float = 0.5) -> np.ndarray:
    rng = np.random.default_rng(4)
    centres = rng.standard_normal((max(2, n // 40), d))
    x = centres[rng.integers(0, len(centres), n)] + spread * rng.standard_normal((n, d))
    return normalised(x.astype(np.float32))


def duplicates(n: int, d: int) -> np.ndarray:
    """Half of them one vector, a quarter another, and two without a direction."""
    x = random(n, d)
    x[n // 4 : 3 * n // 4] = x[0]
    x[3 * n // 4 :] = x[1]
    x[[2, n - 1]] = 0
    return x


def squares(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """||q - v||^2 of the rows found, in float64."""
    apart = queries[:, None].astype(np.float64) - vectors[rows]
    return np.square(apart).sum(-1)


def check(vectors: np.ndarray, queries: np.ndarray, k: int, found: np.ndarray) -> None:
    """The neighbours of faiss, where no two are as near as float32 can tell."""
    expected = exact_search(vectors)(queries, k)
    assert found.shape == expected.shape
    assert all(len(set(row)) == k for row in found.tolist())
    ours, theirs = squares(vectors, queries, found), squares(vectors, queries, expected)
    np.testing.assert_allclose(ours, theirs, atol=3e-6)
    truth = squares(vectors, queries, np.tile(np.arange(len(vectors)), (len(queries), 1)))
    in_order = np.sort(truth, axis=1)
    in_order = np.column_stack([in_order, np.full(len(in_order), np.inf)])
    gaps = np.diff(in_order, axis=1)[:, :k]
    clear = (gaps > 1e-5) & (np.column_stack([gaps[:, :1], gaps[:, :-1]]) > 1e-5)
    clear[:, 0] = gaps[:, 0] > 1e-5
    assert (found[clear] == expected[clear]).all()


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
KINDS = {
    "random": random,
    "clustered": clustered,
    "dense": lambda n, d: clustered(n, d, 0.01),
    "duplicates": duplicates,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 11])
def test_the_search_for_gpus_finds_the_neighbours_that_faiss_finds(
    kind: str, k: int, device: str
) -> None:
    vectors = KINDS[kind](3000, 48)
    queries = vectors[::7]
    check(vectors, queries, k, device_search(vectors, device)(queries, k))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(KINDS)),
    st.integers(4, 700),
    st.integers(2, 40),
    st.integers(1, 30),
    st.sampled_from([16, 100, 4096]),
    st.sampled_from([64, 300, 65_536]),
    st.booleans(),
    st.sampled_from(DEVICES),
)
def test_it_does_whatever_the_sizes_of_its_blocks(
    kind: str, n: int, d: int, k: int, queries: int, rows: int, short: bool, device: str
) -> None:
    vectors, k = KINDS[kind](n, d), min(k, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "QUERY_BLOCK", queries)
        patch.setattr(neighbours, "VECTOR_BLOCK", rows // 32 * 32)
        patch.setattr(neighbours, "CANDIDATES", 100_000)
        if short:  # memory for a hundred vectors: a part of them after the other
            width = -(-(d + 1) // 8) * 8
            patch.setattr(neighbours, "free_bytes", lambda device: 1500 * width)
        check(vectors, vectors, k, device_search(vectors, device)(vectors, k))


def test_products_of_halves_suffice_for_nearly_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    real, searched = neighbours._nearest, {True: 0, False: 0}

    def counts(part, queries, k, half):
        searched[half] += len(queries)
        return real(part, queries, k, half)

    monkeypatch.setattr(neighbours, "_nearest", counts)
    vectors = clustered(4000, 384)
    device_search(vectors, "cpu")(vectors[:1000], 11)
    assert searched[True] == 1000
    assert searched[False] < 50
    dense = clustered(4000, 384, 0.001)  # hundreds as near as halves can tell
    device_search(dense, "cpu")(dense[:500], 11)
    assert searched[False] > 400


@pytest.mark.parametrize("device", DEVICES)
def test_products_of_halves_are_as_near_as_their_bound_says(device: str) -> None:
    vectors = random(2000, 384)
    part = neighbours._load(vectors, slice(0, 2000), torch.device(device))
    queries = torch.from_numpy(vectors[:300]).to(device)
    with neighbours._plain_products():
        half, full = (neighbours._group_scores(part, queries, h).double() for h in (True, False))
    bound = neighbours.HALF_ERROR + 384 * neighbours.SUM_ERROR
    assert (half - full).abs().max() < bound < 2**-9
    assert half.shape == (300, 63)


def test_of_equal_vectors_as_many_as_are_asked_for_are_taken() -> None:
    vectors = np.ones((500, 4), np.float32) / 2
    found = device_search(vectors, "cpu")(vectors[:9], 5)
    assert all(len(set(row)) == 5 for row in found.tolist())


def test_it_goes_on_with_fewer_queries_once_memory_has_run_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, sizes = neighbours._nearest, []

    def short(part, queries, k, half):
        sizes.append(len(queries))
        if len(queries) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(part, queries, k, half)

    monkeypatch.setattr(neighbours, "_nearest", short)
    vectors = random(200, 16)
    search = device_search(vectors, "cpu")
    check(vectors, vectors, 4, search(vectors, 4))
    assert sizes == [200, 100, 50, 50, 50, 50]
    assert "50 prompts at a time" in capsys.readouterr().err
    search(vectors, 4)
    assert sizes[6:] == [50] * 4
    monkeypatch.setattr(neighbours, "_nearest", lambda *a: short(a[0], torch.ones(61, 1), 1, True))
    with pytest.raises(FifaError, match="out of memory with a single prompt"):
        search(vectors, 4)


def test_the_precision_of_others_products_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    products, nearest, seen = torch.backends.cuda.matmul, neighbours._nearest, []

    def now() -> tuple[str, bool]:
        reduced = products.allow_fp16_reduced_precision_reduction
        return torch.get_float32_matmul_precision(), reduced

    def watched(*given: Any) -> Any:
        seen.append(now())
        return nearest(*given)

    monkeypatch.setattr(neighbours, "_nearest", watched)
    usual = now()
    torch.set_float32_matmul_precision("high")
    try:
        before = now()
        device_search(random(50, 8), "cpu")(random(3, 8), 2)
        assert now() == before
    finally:
        torch.set_float32_matmul_precision(usual[0])
    assert set(seen) == {("highest", False)}


def test_recall_is_counted_as_a_loop_counts_it() -> None:
    vectors = clustered(500, 8)

    def poor(queries: np.ndarray, k: int) -> np.ndarray:
        itself = np.argmax(queries @ vectors.T, axis=1)
        return (itself[:, None] + np.arange(k)) % len(vectors)

    squares = ((vectors[:, None] - vectors[None]) ** 2).sum(-1)
    truth = np.argsort(squares, axis=1)[:, :6]
    hits = [len(set(t[1:]) & set((i + np.arange(1, 6)) % 500)) for i, t in enumerate(truth)]
    assert sampled_recall(vectors, poor, 5) == pytest.approx(np.mean(hits) / 5, abs=0.01)


def test_a_query_with_too_few_candidates_is_searched_exactly() -> None:
    vectors = clustered(1200, 8)
    found = approximate_search(vectors, approximate_index(vectors))(vectors[:50], 1200)
    assert (np.sort(found, axis=1) == np.arange(1200)).all()


@pytest.mark.parametrize("most", [None, 1000])
def test_kept_vectors_are_widened_on_the_device(most, monkeypatch):
    vectors = Kept(np.concatenate([random(3000, 48), np.zeros((2, 48))]).astype(np.float16))
    plain = vectors[:]
    queries = plain[::7]
    if most:  # memory for so many of them
        monkeypatch.setattr(neighbours, "free_bytes", lambda device: most * 15 * 56)
    monkeypatch.setattr(Kept, "__getitem__", lambda *of: pytest.fail("widened on the host"))
    check(plain, queries, 11, device_search(vectors, "cpu")(queries, 11))


def test_one_block_of_kept_vectors_at_a_time_is_in_float32(monkeypatch):
    vectors = Kept(random(20_000, 64).astype(np.float16))
    expected = exact_search(vectors)(vectors[:5], 4)
    block = 4000 * 64 * 4
    monkeypatch.setattr(neighbours, "EXACT_BLOCK", 4000)
    search = exact_search(vectors)
    tracemalloc.start()
    try:
        found = search(vectors[:5], 4)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found, expected)
    assert peak < 1.5 * block


def test_queries_in_parts_find_what_they_find_together(monkeypatch):
    vectors = clustered(3000, 32)
    index = approximate_index(vectors)
    expected = approximate_search(vectors, index)(vectors, 5)
    monkeypatch.setattr(neighbours, "QUERY_PART", 1024)
    np.testing.assert_array_equal(approximate_search(vectors, index)(vectors, 5), expected)
