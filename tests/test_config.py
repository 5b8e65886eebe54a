from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fifa.config import STRATEGIES, Read, Recipe, Score, Select, changed
from fifa.errors import FifaError

ROOT = Path(__file__).parents[1]
recipes = st.builds(
    Recipe,
    read=st.builds(Read, source=st.text(), columns=st.dictionaries(st.text(), st.text())),
    score=st.builds(Score, margin=st.lists(st.text()).map(tuple), k=st.integers(1, 99)),
    select=st.builds(
        Select,
        keep=st.integers(1, 10**9) | st.floats(1e-6, 1, exclude_min=True),
        strategy=st.sampled_from(list(STRATEGIES)),
        alpha=st.floats(0, 1e6),
        margin_window=st.tuples(st.none() | st.floats(-9, 9), st.none() | st.floats(-9, 9)),
    ),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("recipe") / "recipe.yaml"


@given(recipe=recipes)
def test_yaml_gives_the_same_recipe_back(path, recipe):
    path.write_text(recipe.to_yaml(), "utf-8")
    assert Recipe.from_yaml(path) == recipe


def test_a_count_stays_a_count_and_a_fraction_a_fraction():
    for keep in (1, 1.0, 0.5, 5000):
        kept = changed(Recipe(), select={"keep": keep}).select.keep
        assert (kept, type(kept)) == (keep, type(keep))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("select: {kepe: 5}", "kepe"),
        ("select: {keep: -1}", "keep"),
        ("select: {keep: 1.5}", "keep"),
        ("select: {keep: .nan}", "keep"),
        ("select: {normalize: zscore}", "normalize"),
        ("scoring: {}", "scoring"),
        ("select: [1, 2]", "select"),
        ("[", "cannot read the recipe"),
        ("select: {alpha: .inf}", "alpha"),
    ],
)
def test_a_wrong_recipe_is_told_by_file_and_knob(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(FifaError, match=message) as caught:
        Recipe.from_yaml(path)
    assert str(path) in str(caught.value)


def test_what_is_left_out_has_its_default_and_none_changes_nothing(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("select:\n  keep: 0.01\n")
    recipe = Recipe.from_yaml(path)
    assert recipe == Recipe(select=Select(keep=0.01))
    assert changed(recipe, select={"keep": None, "alpha": 2.0}).select == Select(0.01, alpha=2.0)


def test_differences_name_every_knob_that_differs():
    there, here = Recipe(), changed(Recipe(), select={"keep": 7}, score={"k": 3})
    assert there.differences(there) == []
    assert there.differences(here) == ["score.k: 10 / 3", "select.keep: 5000 / 7"]


@pytest.mark.parametrize(
    "example",
    sorted(set((ROOT / "examples").glob("*.yaml")) - {ROOT / "examples" / "sky.yaml"}),
    ids=lambda p: p.name,
)
def test_the_example_recipes_are_valid(example):
    assert Recipe.from_yaml(example) != Recipe()


@pytest.mark.parametrize(
    "select",
    [
        "margin_percentiles: [-5, 100]",
        "margin_percentiles: [0, 101]",
        "margin_percentiles: [90, 10]",
        "margin_percentiles: [.nan, 10]",
        "margin_window: [.nan, null]",
        "margin_window: [null, .nan]",
        "min_quality: .nan",
        "keep: 2001-99-99",
        "keep: " + 5000 * "9",
        "keep: " + 2000 * "[",
        "keep: {2001-02-30: &a [*a]}",
        "? [keep]\n: 1",
    ],
)
def test_a_recipe_of_nonsense_is_named(tmp_path, select):
    path = tmp_path / "recipe.yaml"
    path.write_text("select:\n  " + select.replace("\n", "\n  "))
    with pytest.raises(FifaError) as caught:
        Recipe.from_yaml(path)
    assert len(str(caught.value)) < 2000
    Select(margin_percentiles=(5, 5), margin_window=(None, 1.0), min_quality=1.0)
