"""Neighbours against brute force in float64, the entropy against distributions that know theirs."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import KDTree
from scipy.special import digamma

from fifa.console import collect_facts
from fifa.data.table import PAIRS, PROMPTS, Pairs
from fifa.errors import FifaError
from fifa.models.runtime import Runtime
from fifa.scoring import diversity
from fifa.scoring.diversity import FLOOR, diversity_scores, entropy_estimate
from fifa.scoring.table import DIVERSITY, score_facts
from fifa.shards.pool import LocalPool, Make


def pairs_of(vectors: np.ndarray, repeats: int = 1) -> Pairs:
    """Prompts whose embeddings come with the source, each in ``repeats`` pairs."""
    n = len(vectors)
    index = np.tile(np.arange(n, dtype=np.int32), repeats)
    plain = {name: pa.nulls(len(index), PAIRS.field(name).type) for name in PAIRS.names}
    plain["prompt_index"] = pa.array(index)
    plain["z"] = pa.array([vectors[i].tolist() for i in index], pa.list_(pa.float32()))
    names = [f"{i:016x}" for i in range(n)]
    prompts = pa.table({"prompt_id": names, "prompt": names}, schema=PROMPTS)
    return Pairs(pa.table(plain), prompts)


def naive_distances(vectors: np.ndarray, k: int) -> np.ndarray:
    """The k-th smallest distance to *another* row, by sorting all of them in float64."""
    z = vectors.astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    out = []
    for i in range(len(z)):
        others = sorted(np.linalg.norm(z[i] - z[j]) for j in range(len(z)) if j != i)
        out.append(others[k - 1])
    return np.array(out)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_distances_are_those_of_a_naive_loop(n: int, k: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, d)).astype(np.float32)
    vectors[rng.integers(0, n, n // 2)] = vectors[0]  # duplicates, which push themselves down
    table = diversity_scores(pairs_of(vectors), "column:z", k=k)
    expected = naive_distances(vectors, min(k, n - 1))
    np.testing.assert_allclose(table["distance"].to_numpy(), expected, atol=1e-3)  # kept in float16
    floored = np.log(np.maximum(table["distance"].to_numpy(), FLOOR))
    np.testing.assert_allclose(table["entropy"].to_numpy(), floored, rtol=1e-6)
    assert table.schema.equals(DIVERSITY)


def test_ten_pairs_of_a_prompt_weigh_no_more_than_one() -> None:
    vectors = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
    once = diversity_scores(pairs_of(vectors), "column:z", k=3)
    often = diversity_scores(pairs_of(vectors, repeats=10), "column:z", k=3)
    assert often.equals(once)


def test_only_duplicates_have_a_bounded_logarithm() -> None:
    table = diversity_scores(pairs_of(np.ones((5, 4), np.float32)), "column:z", k=2)
    assert table["distance"].to_pylist() == [0] * 5
    assert table["entropy"].to_pylist() == pytest.approx([math.log(FLOOR)] * 5)


def test_k_beyond_the_prompts_is_the_farthest_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    vectors = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    table = diversity_scores(pairs_of(vectors), "column:z", k=10)
    np.testing.assert_allclose(table["distance"], naive_distances(vectors, 3), atol=5e-4)
    assert "k is 3" in capsys.readouterr().err


@pytest.mark.parametrize("n", [0, 1])
def test_a_prompt_alone_adds_nothing(n: int) -> None:
    table = diversity_scores(pairs_of(np.ones((n, 3), np.float32)), "column:z")
    assert np.isnan(table["distance"].to_numpy()).all()
    assert table["entropy"].to_pylist() == [0.0] * n


def test_facts_say_how_it_was_found_and_what_the_entropy_is() -> None:
    vectors = np.random.default_rng(2).standard_normal((50, 6)).astype(np.float32)
    with collect_facts() as facts:
        table = diversity_scores(pairs_of(vectors), "column:z", k=4)
    known = score_facts(table)
    mean = float(np.mean(np.log(naive_distances(vectors, 4))))
    assert known["mean_log_distance"] == pytest.approx(mean, abs=1e-4)
    log_ball = 3 * math.log(math.pi) - math.lgamma(4)
    expected = digamma(50) - digamma(4) + log_ball + 6 * mean
    assert known["entropy"] == pytest.approx(expected, abs=1e-3)
    assert (known["knn"], known["prompts"], known["k"]) == ("exact", 50, 4)
    assert facts["diversity_entropy"] == known["entropy"]


@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_the_entropy_of_a_gaussian_is_found(k: int, scale: float) -> None:
    x = np.random.default_rng(3).standard_normal((2000, 2)) * scale
    distance = KDTree(x).query(x, k + 1)[0][:, k]
    true = math.log(2 * math.pi * math.e * scale**2)  # of a normal in two dimensions
    assert entropy_estimate(np.log(distance), k, 2) == pytest.approx(true, abs=0.12)


def clustered(n: int, d: int) -> np.ndarray:
    rng = np.random.default_rng(4)
    centres = rng.standard_normal((40, d))
    x = centres[rng.integers(0, 40, n)] + 0.5 * rng.standard_normal((n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("d", [32, 7])
def test_the_approximate_index_finds_nearly_all_and_says_so(
    d: int, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = pairs_of(clustered(1500, d))
    exact = diversity_scores(pairs, "column:z", k=5, knn="exact")
    approx = diversity_scores(pairs, "column:z", k=5, knn="approx")
    facts = score_facts(approx)
    assert facts["knn"] == "approx"
    assert f"{facts['recall']:.3f}" in capsys.readouterr().err
    assert facts["recall"] > 0.95
    # a neighbour that was missed can only make the k-th farther
    assert (approx["distance"].to_numpy() >= exact["distance"].to_numpy() - 1e-6).all()
    assert approx.equals(diversity_scores(pairs, "column:z", k=5, knn="approx"))


@pytest.mark.parametrize("n", [2, 17, 999])
def test_an_approximate_search_of_few_prompts_is_exact(n: int) -> None:
    pairs = pairs_of(clustered(n, 6))
    exact, approx = (diversity_scores(pairs, "column:z", k=3, knn=m) for m in ("exact", "approx"))
    assert approx.equals(exact)
    assert score_facts(approx)["recall"] == 1


def test_auto_is_exact_until_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_of(clustered(200, 8))
    assert score_facts(diversity_scores(pairs, "column:z"))["knn"] == "exact"
    monkeypatch.setattr(diversity, "EXACT_UP_TO", 199)
    assert score_facts(diversity_scores(pairs, "column:z"))["knn"] == "approx"


def test_many_prompts_are_searched_exactly_where_there_is_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pairs_of(clustered(300, 8))
    here = diversity_scores(pairs, "column:z", folder=tmp_path / "cpu")
    monkeypatch.setattr(diversity, "EXACT_UP_TO", 200)
    monkeypatch.setattr(diversity, "ON_CUDA_FROM", 300)
    monkeypatch.setattr(diversity, "make_runtime", lambda device: Runtime(device or "cuda:0"))
    search = diversity.device_search
    asked = []
    monkeypatch.setattr(
        diversity, "device_search", lambda v, device: asked.append(device) or search(v, "cpu")
    )
    there = diversity_scores(pairs, "column:z", folder=tmp_path / "cuda")
    assert asked == ["cuda:0"]
    facts = score_facts(there)
    assert (facts["knn"], facts["device"]) == ("exact", "cuda:0")
    np.testing.assert_allclose(there["distance"], here["distance"], rtol=1e-6)
    # the same up to rounding, so under the same name: what one machine made, another reads
    names = [path.name for path in tmp_path.rglob("*.parquet")]
    assert len(names) == 2
    assert len(set(names)) == 1
    assert score_facts(diversity_scores(pairs, "column:z", device="cpu"))["knn"] == "approx"
    assert score_facts(diversity_scores(pairs, "column:z", device="mps"))["knn"] == "approx"
    fewer = diversity_scores(pairs_of(clustered(299, 8)), "column:z", knn="exact")
    assert score_facts(fewer)["device"] == "cpu"
    assert asked == ["cuda:0"]


def test_an_interrupted_search_goes_on_and_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diversity, "QUERIES", 64)
    pairs = pairs_of(clustered(500, 8))
    diversity_scores(pairs, "column:z", folder=tmp_path / "unbroken")
    (unbroken,) = (tmp_path / "unbroken").glob("diversity-*")

    real, calls = diversity.kth_distances, []

    def stops(*args: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(diversity, "kth_distances", stops)
    with pytest.raises(KeyboardInterrupt):
        diversity_scores(pairs, "column:z", folder=tmp_path / "broken")
    diversity_scores(pairs, "column:z", folder=tmp_path / "broken")
    (broken,) = (tmp_path / "broken").glob("diversity-*")
    assert (broken.name, broken.read_bytes()) == (unbroken.name, unbroken.read_bytes())
    assert len(calls) == 4 + 8 - 3  # three of eight shards were finished
    before = len(calls)
    diversity_scores(pairs, "column:z", folder=tmp_path / "broken")
    assert len(calls) == before


@pytest.mark.parametrize("knn", ["exact", "approx"])
def test_workers_read_vectors_and_index_from_the_disk(
    knn: Literal["exact", "approx"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diversity, "QUERIES", 400)
    pairs = pairs_of(clustered(1100, 8))
    here = diversity_scores(pairs, "column:z", knn=knn, folder=tmp_path / "here")
    sent, lent = [], set[str]()
    real = LocalPool.map

    def sending(pool: LocalPool, make: Make, *given: Any) -> Iterator[str]:
        sent.append(len(pickle.dumps(make)))
        yield from real(pool, make, *given)
        lent.update(path.name for path in Path(given[-1].place).iterdir())

    monkeypatch.setattr(LocalPool, "map", sending)
    with closing(LocalPool(2)) as workers:
        folder = tmp_path / "there"
        there = diversity_scores(pairs, "column:z", knn=knn, folder=folder, executor=workers)
    assert there.equals(here)
    assert max(sent) < 2000  # bytes
    names = {"vectors.npy", "index.faiss"} if knn == "approx" else {"vectors.npy"}
    assert {name for name in lent if not name.endswith(".parquet")} == names
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []


def test_a_killed_search_finds_its_index_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diversity, "QUERIES", 400)
    pairs = pairs_of(clustered(1100, 8))
    memory = diversity_scores(pairs, "column:z", knn="approx")

    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(diversity, "map_shards", stops)
    with pytest.raises(KeyboardInterrupt):
        diversity_scores(pairs, "column:z", knn="approx", folder=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(diversity, "QUERIES", 400)
    monkeypatch.setattr(diversity, "approximate_index", stops)
    found = diversity_scores(pairs, "column:z", knn="approx", folder=tmp_path)
    assert found.equals(memory)


def test_other_prompts_k_and_methods_have_files_of_their_own(tmp_path: Path) -> None:
    pairs = pairs_of(clustered(200, 8))
    for k, knn in [(3, "exact"), (4, "exact"), (3, "approx")]:
        diversity_scores(pairs, "column:z", k=k, knn=knn, folder=tmp_path)  # type: ignore[arg-type]
    diversity_scores(pairs_of(clustered(201, 8)), "column:z", k=3, folder=tmp_path)
    assert len(list(tmp_path.glob("diversity-column-z-k*.parquet"))) == 4


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (np.array([[1.0, math.nan], [1, 2]]), "finite"),
        (np.array([[1.0, math.inf], [1, 2]]), "finite"),
    ],
)
def test_columns_that_are_no_vectors_are_refused(vectors: np.ndarray, says: str) -> None:
    with pytest.raises(FifaError, match=says):
        diversity_scores(pairs_of(vectors), "column:z")


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(FifaError, match="one of: z"):
        diversity_scores(pairs_of(np.ones((2, 2))), "column:y")


def test_ragged_vectors_are_refused() -> None:
    pairs = pairs_of(np.ones((3, 4)))
    ragged = pa.array([[1.0, 2.0], [1.0], [1.0, 2.0, 3.0]], pa.list_(pa.float32()))
    position = pairs.table.schema.get_field_index("z")
    with pytest.raises(FifaError, match="one length"):
        diversity_scores(
            Pairs(pairs.table.set_column(position, "z", ragged), pairs.prompts), "column:z"
        )
