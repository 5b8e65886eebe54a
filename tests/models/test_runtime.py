"""Where and how models compute: precision, memory, and batches that fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fifa.errors import FifaError
from fifa.models import runtime
from fifa.models.runtime import (
    Parts,
    Runtime,
    even_batch,
    even_batches,
    largest_batch,
    make_runtime,
    pinned,
)

GB = 10**9


class Card:
    """What torch.cuda says of a card of so many bytes, and what a batch takes there."""

    def __init__(self, total, fixed, row, held=0, fraction=1.0):
        self.total, self.fixed, self.row, self.held, self.fraction = (
            *(total, fixed, row, held),
            fraction,
        )
        self.peak, self.tried = held, []

    def attempt(self, size):
        self.tried.append(size)
        wanted = self.held + self.fixed + size * self.row
        if wanted > self.fraction * self.total:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.peak = max(self.peak, wanted)

    def use(self, monkeypatch):
        cuda = torch.cuda
        fakes = {
            "current_device": lambda: 0,
            "mem_get_info": lambda device: (self.total - self.held, self.total),
            "memory_reserved": lambda device: self.held,
            "memory_allocated": lambda device: self.held,
            "max_memory_allocated": lambda device: self.peak,
            "get_per_process_memory_fraction": lambda device: self.fraction,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.held),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(cuda, name, fake)
        return torch.device("cuda")


@pytest.mark.parametrize(
    ("card", "most", "expected"),
    [
        (Card(80 * GB, GB, 2 * GB), 16, 16),  # no more than is of use
        (Card(24 * GB, GB, 2 * GB), 64, 9),  # 1 + 9 * 2 = 19 of 19.2
        (Card(24 * GB, GB, 2 * GB, held=4 * GB), 64, 7),  # 4 + 1 + 7 * 2 = 19 of 19.2
        (Card(80 * GB, GB, 2 * GB, fraction=0.3), 64, 9),  # a card of 24 imitated
        (Card(24 * GB, 0, 20 * GB), 8, 0),  # not even one
        (Card(24 * GB, 0, 30 * GB), 8, 0),
    ],
)
def test_the_largest_batch_that_fits_is_found_by_trying(monkeypatch, card, most, expected):
    device = card.use(monkeypatch)
    assert largest_batch(card.attempt, range(1, most + 1), device) == expected
    assert len(card.tried) <= 4


def test_what_takes_more_than_its_beginning_says_is_found_all_the_same(monkeypatch):
    card = Card(24 * GB, GB, GB)
    device = card.use(monkeypatch)

    def attempt(size):
        card.row = GB if size < 8 else 2 * GB  # another algorithm from 8 on
        card.attempt(size)

    assert largest_batch(attempt, range(1, 65), device) == 8  # 9 seem too many from there
    assert len(card.tried) <= 6


def test_a_batch_that_cannot_be_tried_for_another_reason_says_so(monkeypatch):
    device = Card(24 * GB, GB, GB).use(monkeypatch)

    def attempt(size):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        largest_batch(attempt, [1, 2, 4], device)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_even_parts_are_as_few_as_possible_and_nearly_equal(whole, largest):
    size = even_batch(whole, largest)
    parts = -(-whole // size)
    assert size <= largest
    assert parts == -(-whole // largest)
    assert whole - (parts - 1) * size > 0  # none is empty


def test_only_even_batches_are_of_use():
    assert even_batches(32) == [1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 32]
    assert even_batches(1) == [1]


def test_parts_become_smaller_once_memory_has_run_out(capsys):
    seen = []

    def function(part):
        if part.stop - part.start > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append((part.start, part.stop))
        return list(range(part.start, part.stop))

    parts = Parts("image")
    assert [row for part in parts.run(function, 10, 8) for row in part] == list(range(10))
    assert max(stop - start for start, stop in seen) == 2  # 8, 4, 2
    assert [len(part) for part in parts.run(function, 4, 8)] == [2, 2]  # and stay so
    assert capsys.readouterr().err.count("out of memory") == 2


def test_parts_of_one_row_cannot_be_halved():
    def function(part):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(FifaError, match="out of memory with a single image"):
        list(Parts("image").run(function, 3, 2))


def test_what_cannot_be_pinned_is_copied_as_it_is(monkeypatch):
    rows, message = torch.arange(3), "CUDA error: out of memory"

    def pin(self):
        raise RuntimeError(message)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    assert pinned(rows, "cuda:0") is rows
    message = "Cannot pin a sparse tensor"
    with pytest.raises(RuntimeError, match="sparse"):
        pinned(rows, "cuda:0")


def test_precision_of_products_is_as_before_also_after_an_error():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ValueError, match="out"), Runtime("cuda", "float32").autocast():
        raise ValueError("out")
    assert torch.get_float32_matmul_precision() == before


def test_a_processor_computes_in_float32_and_its_products_are_left_alone():
    made = make_runtime("cpu")
    before = torch.get_float32_matmul_precision()
    with made.autocast():
        assert torch.get_float32_matmul_precision() == before
        assert not torch.is_autocast_enabled("cpu")
    assert (made.dtype, made.precision) == ("float32", "float32")


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_cuda_computes_in_bfloat16_where_it_is_native(monkeypatch, native, expected):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.MonkeyPatch.context())
    assert runtime.best_dtype("cuda:1") == expected


def test_float32_on_cuda_is_tf32_while_a_model_runs_and_has_its_own_name():
    made = Runtime("cuda", "float32")
    before = torch.get_float32_matmul_precision()
    with made.autocast():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    assert made.precision == "tf32"
    assert Runtime("cuda", "bfloat16").precision == "bfloat16"
