"""The engine against the loop that everybody writes: a pair at a time, a row at a time."""

from __future__ import annotations

import errno
import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny, Unsure, cells, files, one_by_one, picture, recurring

from fifa.config import Compute
from fifa.console import collect_facts
from fifa.errors import FifaError
from fifa.models.runtime import out_of_memory
from fifa.scoring.rewards import engine
from fifa.scoring.rewards.engine import (
    Engine,
    score_pairs,
    unreadable_path,
)
from fifa.scoring.table import MARGIN, SIGMAS, features_table, table_features
from fifa.shards import files as atomic

SMALL = {"compute": Compute(batch=4, workers=2), "shard": 7}


def naive(rows):
    model = Tiny()
    return np.array(
        [[one_by_one(model, prompt, image) for image in images] for prompt, *images in rows],
        np.float32,
    )


def rewards(table):
    return np.stack([table["reward_0"].to_numpy(), table["reward_1"].to_numpy()], 1)


def test_of_a_model_that_says_how_sure_it_is_both_are_kept(tmp_path):
    pairs, rows = recurring(tmp_path / "source", pairs=20)
    rows = [*in_order_of(pairs, rows), ("prompt", picture(0), b"no image")]
    pairs = cells(tmp_path / "more", rows)
    rows = in_order_of(pairs, rows)
    table = score_pairs(pairs, Unsure(), folder=tmp_path, **SMALL)
    assert table.schema.names == [*MARGIN.names, *SIGMAS.names]
    plain = rewards(score_pairs(pairs, Tiny(), **SMALL))
    assert np.array_equal(rewards(table), plain, equal_nan=True)
    sure = Tiny().prompt_features([prompt for prompt, *_ in rows])[:, 0].numpy() + 0.5
    lost = [[b"no image" in row[1:2], b"no image" in row[2:]] for row in rows]
    expected = np.where(lost, np.nan, sure[:, None]).astype(np.float32)
    sigmas = np.stack([table[name].to_numpy() for name in SIGMAS.names], 1)
    assert np.isnan(expected).sum() == 1
    assert np.array_equal(sigmas, expected, equal_nan=True)


def in_order_of(pairs, rows):
    """The rows that the pairs come from: merged repeats have one row left."""
    swapped = pairs.table["swapped"].to_pylist()
    chosen = [rows[row] for row in pairs.table["row"].to_pylist()]
    return [
        (prompt, b, a) if swap else (prompt, a, b)
        for (prompt, a, b), swap in zip(chosen, swapped, strict=True)
    ]


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.integers(1, 30),
    seed=st.integers(0, 1000),
    images=st.integers(2, 12),
    prompts=st.integers(1, 6),
    batch=st.integers(1, 9),
    shard=st.integers(1, 40),
    trust=st.booleans(),
)
def test_rewards_are_those_of_a_loop_over_pairs(pairs, seed, images, prompts, batch, shard, trust):
    with tempfile.TemporaryDirectory() as folder:
        read, rows = recurring(Path(folder), pairs, seed, images, prompts)
        compute = Compute(batch=batch, workers=2)
        table = score_pairs(read, Tiny(), compute=compute, shard=shard, trust_keys=trust)
    assert table.schema.equals(MARGIN)
    assert table["pair_id"].equals(read.table["pair_id"])
    np.testing.assert_allclose(rewards(table), naive(in_order_of(read, rows)), rtol=1e-5, atol=1e-6)


def test_each_image_and_prompt_is_looked_at_once_whatever_its_keys(tmp_path):
    pairs, rows = recurring(tmp_path, pairs=60, images=20, prompts=5)
    model = Tiny()
    with collect_facts() as facts:
        score_pairs(pairs, model, **SMALL)
    images = {image for _, *both in rows for image in both}
    asks = {(prompt, image) for prompt, *both in rows for image in both}
    assert len(pairs.table["image_0"].unique()) > len(images)  # keys are cells, so they differ
    assert model.seen["decoded"] == model.seen["embedded"] == len(images) == facts["images"]
    assert model.seen["prompts"] == pairs.prompts.num_rows
    assert model.seen["rewards"] == len(asks) == facts["rewards"]


def test_trusted_keys_save_the_pass_over_the_bytes(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(picture(ord(name)))
    pairs = files(tmp_path, [("one", "a.png", "b.png"), ("two", "c.png", "b.png")])
    trusted = score_pairs(pairs, Tiny(), folder=tmp_path / "a", trust_keys=True)
    told_apart = score_pairs(pairs, Tiny(), folder=tmp_path / "b", **SMALL)
    assert rewards(trusted) == pytest.approx(rewards(told_apart))
    assert not list((tmp_path / "a").glob("images-*"))
    assert len(list((tmp_path / "b").glob("images-*"))) == 1


def test_shapes_may_differ_and_large_images_go_fewer_at_a_time(tmp_path):
    class Whole(Tiny):
        def __init__(self):
            super().__init__()
            self.sizes = set()

        def preprocess(self, image):
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy()

        def image_features(self, pixels):
            self.sizes.add((len(pixels), *pixels.shape[2:]))
            small = torch.nn.functional.adaptive_avg_pool2d(pixels.float(), 8).flatten(1)
            return small / 255 @ self.weight

    shapes = [(448, 448), (448, 224), (16, 12), (12, 16)]
    images = [picture(i, shapes[i % 4]) for i in range(24)]
    rows = [(f"p{i % 3}", images[i], images[i + 1]) for i in range(23)]
    pairs = cells(tmp_path, rows)
    model = Whole()
    table = score_pairs(pairs, model, compute=Compute(batch=4), shard=100)
    assert {size[0] for size in model.sizes if size[1:] == (448, 448)} == {1}
    assert {size[0] for size in model.sizes if size[1:] == (224, 448)} == {2}
    assert max(size[0] for size in model.sizes) == 4
    expected = [
        [one_by_one(Whole(), prompt, image) for image in both]
        for prompt, *both in in_order_of(pairs, rows)
    ]
    np.testing.assert_allclose(rewards(table), expected, rtol=1e-4)


def test_out_of_memory_halves_the_batch_and_goes_on(tmp_path, capsys):
    pairs, _ = recurring(tmp_path)
    expected = score_pairs(pairs, Tiny(), **SMALL)
    model = Tiny(memory=3)
    found = score_pairs(pairs, model, compute=Compute(batch=13), shard=30)
    np.testing.assert_allclose(rewards(found), rewards(expected), rtol=1e-6)
    assert "out of memory: 3 images at a time from here on" in capsys.readouterr().err


def test_out_of_memory_with_one_image_is_told(tmp_path):
    pairs, _ = recurring(tmp_path, pairs=3)
    with pytest.raises(FifaError, match="out of memory with a single image"):
        score_pairs(pairs, Tiny(memory=0), **SMALL)


def test_other_errors_of_a_model_are_not_taken_for_memory():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_finished_file_is_read_and_another_model_gets_its_own(tmp_path):
    pairs, _ = recurring(tmp_path / "data")
    model = Tiny()
    first = score_pairs(pairs, model, folder=tmp_path / "scores", **SMALL)
    seen = model.seen.copy()
    assert score_pairs(pairs, model, folder=tmp_path / "scores").equals(first)
    assert model.seen == seen
    other = Tiny()
    other.identity = {"tiny": 2}
    score_pairs(pairs, other, folder=tmp_path / "scores")
    assert other.seen["embedded"] == model.seen["embedded"]
    assert len(list((tmp_path / "scores").glob("margin-tiny-*.parquet"))) == 2
    assert len(list((tmp_path / "scores").glob("images-*.parquet"))) == 1  # shared
    assert not list((tmp_path / "scores").glob(".parts-*"))


@pytest.mark.parametrize("after", range(8))
def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(tmp_path, monkeypatch, after):
    pairs, _ = recurring(tmp_path / "data")
    expected = tmp_path / "expected"
    score_pairs(pairs, Tiny(), folder=expected, **SMALL)
    real, left = atomic._write_table, [after]

    def full(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **kwargs)

    scores = tmp_path / "scores"
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_write_table", full)
        with pytest.raises(FifaError, match=r"No space left[^$]*free space"):
            score_pairs(pairs, Tiny(), folder=scores, **SMALL)
    model = Tiny()
    score_pairs(pairs, model, folder=scores, **SMALL)
    assert contents(scores) == contents(expected)
    # two writes tell 20 images apart, one keeps prompts, three keep 7 images each, two the result
    assert model.seen["embedded"] == 20 - min(20, 7 * max(0, after - 3))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_prompt_features_are_kept_and_mapped(tmp_path):
    pairs, _ = recurring(tmp_path / "data")
    model = Tiny()
    expected = model.prompt_features(pairs.prompts["prompt"].to_pylist()).numpy()
    score_pairs(pairs, model, folder=tmp_path / "scores", **SMALL)
    seen = model.seen.copy()
    found = Engine(model, tmp_path / "scores").prompt_features(pairs.prompts["prompt"])
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, expected)
    assert model.seen == seen


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_features_of_any_shape_survive_their_table(dtype):
    features = np.arange(24).reshape(4, 2, 3).astype(dtype)
    back = table_features(features_table(features))
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, features)


def test_prompt_features_of_many_shards_are_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "PROMPT_SHARD", 3)
    pairs, rows = recurring(tmp_path, pairs=40, prompts=17)
    table = score_pairs(pairs, Tiny(), **SMALL)
    np.testing.assert_allclose(rewards(table), naive(in_order_of(pairs, rows)), rtol=1e-5)


def test_an_image_that_is_missing_is_a_row_and_its_pairs_are_nan(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "b.png").write_bytes(b"no picture")
    rows = [("one", "a.png", "b.png"), ("two", "gone.png", "a.png"), ("one", "a.png", "a.png")]
    pairs = files(tmp_path, rows)
    table = score_pairs(pairs, Tiny(), folder=tmp_path / "scores", **SMALL)
    sound = {
        row: (np.isfinite(pair).tolist())
        for row, pair in zip(pairs.table["row"].to_pylist(), rewards(table), strict=True)
    }
    swapped = dict(
        zip(pairs.table["row"].to_pylist(), pairs.table["swapped"].to_pylist(), strict=True)
    )
    expected = {0: [True, False], 1: [False, True], 2: [True, True]}
    assert sound == {r: v[::-1] if swapped[r] else v for r, v in expected.items() if r in sound}
    (path,) = (tmp_path / "scores").glob("margin-*.parquet")
    listed = pq.read_table(unreadable_path(path)).to_pylist()
    reasons = {row["image"]: (row["file"], row["row"], row["reason"]) for row in listed}
    assert set(reasons) == {"b.png", "gone.png"}
    assert reasons["gone.png"] == ("pairs.jsonl", 1, "no such file")
    assert re.match("cannot be decoded", reasons["b.png"][2])


def test_no_pairs_at_all_are_scored_too(tmp_path):
    pairs, _ = recurring(tmp_path, pairs=2)
    empty = type(pairs)(pairs.table[:0], pairs.prompts[:0], pairs.rejected, pairs.origin)
    assert score_pairs(empty, Tiny()).num_rows == 0


def test_a_shard_without_images_is_refused():
    with pytest.raises(FifaError, match="at least 1"):
        Engine(shard=0)
