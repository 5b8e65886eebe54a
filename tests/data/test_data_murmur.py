"""The hash in numpy against published values and against plain integers, key by key."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from murmur_by_hand import murmur3_by_hand

from fifa.data.ids import NEAR, murmur3

KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def hashes_of(keys: list[str]) -> list[tuple[int, int]]:
    one, two = murmur3(pa.array(keys, pa.string())).tolist()
    return list(zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("key", "h1", "h2"),
    [
        ("", 0, 0),
        ("hello", 0xCBD8A7B341BD9B02, 0x5B1E906A48AE1D19),
        (
            "The quick brown fox jumps over the lazy dog",
            0xE34BBC7BBC071B6C,
            0x7A433CA9C49A9347,
        ),
    ],
)
def test_published_values(key: str, h1: int, h2: int) -> None:
    assert hashes_of([key]) == [(h1, h2)] == [murmur3_by_hand(key.encode())]


@given(st.lists(KEYS, max_size=12), st.integers(0, 3))
def test_keys_of_any_lengths_as_one_by_one(keys: list[str], start: int) -> None:
    sliced = pa.array(keys, pa.string()).slice(start)
    expected = [murmur3_by_hand(key.encode()) for key in keys[start:]]
    assert list(zip(*murmur3(sliced).tolist(), strict=True)) == expected


@given(st.integers(0, 70), st.integers(1, 5), st.randoms(use_true_random=False))
def test_keys_of_one_length_as_one_by_one(length: int, n: int, random: object) -> None:
    keys = ["".join(random.choices("0123456789abcdef-", k=length)) for _ in range(n)]  # type: ignore[attr-defined]
    assert hashes_of(keys) == [murmur3_by_hand(key.encode()) for key in keys]


def test_rows_beyond_the_first_thousands() -> None:
    even = [f"{i:036d}" for i in range(NEAR + 3)]
    mixed = [f"images/{i}.jpg" for i in range(NEAR + 3)]
    for keys in (even, mixed, [*even[:NEAR], *mixed]):
        found = murmur3(pa.array(keys))
        for i in (0, 1, NEAR - 1, NEAR, len(keys) - 1):
            assert tuple(found[:, i].tolist()) == murmur3_by_hand(keys[i].encode())
