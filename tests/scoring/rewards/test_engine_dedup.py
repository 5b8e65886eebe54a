"""Which images and prompts are asked for, against plain dictionaries."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from fifa.data.table import PROMPTS, Pairs
from fifa.scoring.rewards.dedup import ask, image_keys, places

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
def test_images_and_asks_are_those_of_a_dictionary(rows, contents):
    pairs = pairs_of(rows)
    keys = image_keys(pairs)
    slots = [key for a, b, _ in rows for key in (a, b)]
    order = list(dict.fromkeys(slots))
    assert keys.names.to_pylist() == order
    assert keys.first.tolist() == [slots.index(key) for key in order]
    assert [order[i] for i in keys.of_slot] == slots

    same = pa.array([contents.get(key, key) for key in order], pa.string())
    asked = ask(pairs, keys, same)
    content = {key: contents.get(key, key) or key for key in order}
    images = list(dict.fromkeys(content[key] for key in slots))
    assert asked.images.to_pylist() == images
    assert [images[i] for i in asked.of_key] == [content[key] for key in order]
    first = [next(s for s, key in enumerate(slots) if content[key] == image) for image in images]
    assert asked.first.tolist() == first
    wanted = [(images.index(content[key]), rows[s // 2][2]) for s, key in enumerate(slots)]
    asks = list(zip(asked.image.tolist(), asked.prompt.tolist(), strict=True))
    assert asks == sorted(set(wanted))
    assert [asks[i] for i in asked.of_slot] == wanted


@given(ROWS)
def test_places_hold_one_reference_a_row_and_no_prompts(rows):
    pairs = pairs_of(rows)
    keys = image_keys(pairs)
    part, sides = places(pairs, keys.first)
    assert part.prompts.num_rows == 0
    for i, (slot, side) in enumerate(zip(keys.first.tolist(), sides, strict=True)):
        assert part.table[f"image_{side}_ref"][i].as_py() == f"{slot // 2}-{side}"
        assert part.table[f"image_{1 - side}_ref"][i].as_py() is None
