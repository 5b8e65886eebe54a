"""Which images are different, against plain dictionaries."""

from __future__ import annotations

import pickle

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from fifa.data.images import unique_images
from fifa.data.table import PROMPTS, Pairs
from fifa.scoring.rewards.engine import tell_apart

ROWS = st.lists(st.tuples(*[st.sampled_from("abcdef")] * 2, st.integers(0, 3)), max_size=25)


def pairs_of(rows):
    n = len(rows)
    table = {
        "image_0": pa.array([a for a, _, _ in rows], pa.string()),
        "image_1": pa.array([b for _, b, _ in rows], pa.string()),
        "prompt_index": pa.array([p for _, _, p in rows], pa.int32()),
        "file": pa.array(["x"] * n, pa.string()).dictionary_encode(),
        "row": pa.array(range(n), pa.int64()),
        "swapped": pa.array([False] * n),
        "image_0_ref": pa.array([f"{i}-0" for i in range(n)], pa.string()),
        "image_1_ref": pa.array([f"{i}-1" for i in range(n)], pa.string()),
    }
    prompts = pa.table({"prompt_id": list("0123"), "prompt": list("0123")}, schema=PROMPTS)
    return Pairs(pa.table(table), prompts)


@given(ROWS, st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["u", "v", None])))
def test_different_images_are_those_of_a_dictionary(rows, contents):
    images, of_slot = unique_images(pairs_of(rows))
    slots = [key for a, b, _ in rows for key in (a, b)]
    order = list(dict.fromkeys(slots))
    assert images.table["key"].to_pylist() == order
    assert [order[i] for i in of_slot] == slots

    same = pa.array([contents.get(key, key) for key in order], pa.string())
    distinct = tell_apart(images, same)
    content = {key: contents.get(key, key) or key for key in order}
    names = list(dict.fromkeys(content[key] for key in order))
    assert distinct.contents.to_pylist() == names
    assert [names[i] for i in distinct.of_image] == [content[key] for key in order]
    assert [order[i] for i in distinct.first] == [
        next(key for key in order if content[key] == name) for name in names
    ]


@given(ROWS)
def test_every_image_stands_where_its_key_comes_first(rows):
    pairs = pairs_of(rows)
    images, _ = unique_images(pairs)
    slots = [key for a, b, _ in rows for key in (a, b)]
    first = [slots.index(key) for key in dict.fromkeys(slots)]
    assert images.table["ref"].to_pylist() == [f"{slot // 2}-{slot % 2}" for slot in first]
    assert images.table["row"].to_pylist() == [slot // 2 for slot in first]


def test_a_part_of_a_large_table_is_small_enough_to_travel():
    rows = [(f"a{i}", f"b{i}", 0) for i in range(20_000)]
    images, _ = unique_images(pairs_of(rows))
    part = images.take([7, 1])
    assert part.table["key"].to_pylist() == ["b3", "b0"]
    assert len(pickle.dumps(part)) < 5_000
