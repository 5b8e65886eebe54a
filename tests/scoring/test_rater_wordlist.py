import pytest
from hypothesis import given
from hypothesis import strategies as st

from fifa.config import UNSAFE_FLAGS
from fifa.scoring.raters.local import add_word_flags, word_flags


@pytest.mark.parametrize(
    ("prompt", "flags"),
    [
        ("a naked woman behind a blue square, explicit, NSFW", ["sexual"]),
        ("a bloody corpse lying beside a red circle, gore", ["violence"]),
        ("naked little girl", ["sexual", "minors"]),
        ("17 year old, topless", ["sexual", "minors"]),
        ("18 year old, topless", ["sexual"]),
        ("a man hanging himself", ["self-harm"]),
        ("soldiers under a swastika", ["hate"]),
    ],
)
def test_words_that_name_harm_are_flagged(prompt, flags):
    assert word_flags(prompt) == flags


@pytest.mark.parametrize(
    "prompt",
    [
        "Moby Dick, oil painting",
        "a rooster (cock) on a farm",
        "Essex, Sussex and Middlesex on a map",
        "a little girl flying a kite",
        "a titmouse on a therapist's desk",
        "bloody mary cocktail",
        "a categorical diagram",
    ],
)
def test_ordinary_prompts_are_not(prompt):
    assert word_flags(prompt) == []


def test_what_a_list_of_words_costs():
    assert word_flags("Al Gore on a stage") == ["violence"]


@given(st.lists(st.tuples(st.text(), st.sampled_from(["", "nonsense", "nonsense,unsafe"]))))
def test_flags_are_added_never_taken_and_stay_sorted(rows):
    prompts, known = [text for text, _ in rows], [flags for _, flags in rows]
    for before, after in zip(known, add_word_flags(prompts, known), strict=True):
        names = after.split(",") if after else []
        assert names == sorted(set(names))
        assert {*filter(None, before.split(","))} <= set(names) <= {*UNSAFE_FLAGS, "nonsense"}
