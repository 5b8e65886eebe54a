"""What the data-set card says beyond the recipe."""

import pyarrow as pa
import pytest
import yaml
from worlds import make_pairs

import fifa
from fifa.data.table import Origin, Pairs
from fifa.scoring.table import QUALITY, Scores
from fifa.selection.card import source_licence
from fifa.selection.export import export


def card_of(pairs, scores, folder, **knobs):
    selection = fifa.select(pairs, scores, strategy="random", **knobs)
    export(pairs, selection, scores, folder)
    card = (folder / "README.md").read_text("utf-8")
    yaml.safe_load(card.split("---\n")[1])
    return card


def with_columns(pairs, origin=None, **columns):
    table = pairs.table
    for name, values in columns.items():
        if name in table.column_names:
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(name), [values])
        else:
            table = table.append_column(name, pa.array(values))
    return Pairs(table=table, prompts=pairs.prompts, origin=origin or pairs.origin)


def test_agreement_is_the_share_of_votes_for_the_winner(tmp_path):
    pairs = make_pairs(4)
    label, votes = pa.array([0.9, 0.2, 1.0, 0.0], pa.float32()), pa.array([10, 5, 1, 1], pa.int32())
    pairs = with_columns(pairs, label=label, votes=votes, repeat=[False] * 4)
    card = card_of(pairs, Scores(), tmp_path / "out")
    assert "2 pairs have several votes, of which 85% are for the winner on average" in card
    pairs = with_columns(pairs, votes=pa.array([1] * 4, pa.int32()))
    assert "one label for each pair" in card_of(pairs, Scores(), tmp_path / "out")


def test_generators_are_counted_with_their_wins(tmp_path):
    pairs = make_pairs(4)
    pairs = with_columns(
        pairs,
        label=pa.array([1, 1, 0, 0], pa.float32()),
        repeat=[False] * 4,
        model_0=["a|b", "a|b", "sdxl", "a|b"],
        model_1=["sdxl", "sdxl", "a|b", None],
    )
    card = card_of(pairs, Scores(), tmp_path / "out")
    assert "| a\\|b | 4 | 3 |\n| sdxl | 3 | 0 |" in card  # the last pair's winner has no name
    assert "| generator |" not in card_of(make_pairs(4), Scores(), tmp_path / "other")


def test_unsafe_prompts_are_counted_here_and_where_they_were_left_out(tmp_path):
    pairs = make_pairs(60)
    flags = ["sexual", "", "violence,nonsense", *[""] * 8, None]
    ids = pairs.prompts["prompt_id"].combine_chunks()
    rating = pa.array([3.0] * 12, pa.float32())
    scores = Scores(quality=pa.table([ids, rating, pa.array(flags)], schema=QUALITY))
    prompt = pairs.table["prompt_index"].to_pylist()
    label = pairs.table["label"].to_pylist()
    eligible = [p for p, share in zip(prompt, label, strict=True) if share != 0.5]
    card = card_of(pairs, scores, tmp_path / "out", drop_duplicates=False)
    harm = sum(p in (0, 2) for p in eligible)
    rated = sum(p not in (0, 2, 11) for p in eligible)
    assert harm and f"0 of {rated} rated pairs here have a prompt that the rater" in card
    assert f"flagged; {harm} of the source's 60 pairs ({harm / 60:.1%}) were left out" in card
    card = card_of(
        pairs, scores, tmp_path / "out", drop_duplicates=False, drop_nonsense=False, unsafe_flags=()
    )
    assert f"{harm} of {sum(p != 11 for p in eligible)} rated pairs here" in card
    assert "the prompts were not rated" in card_of(pairs, Scores(), tmp_path / "out")


@pytest.mark.parametrize(
    ("front", "stated", "in_front"),
    [
        ("license: cc-by-4.0", "cc-by-4.0", {"license": "cc-by-4.0"}),
        ("license: [mit, apache-2.0]", "mit, apache-2.0", {"license": ["mit", "apache-2.0"]}),
        (
            "license: other\nlicense_name: pick-terms\nlicense_link: https://a.org/l",
            "other, pick-terms, https://a.org/l",
            {"license": "other", "license_name": "pick-terms", "license_link": "https://a.org/l"},
        ),
        (
            "license: Mine | only,\n  <b>ask</b> me",
            "Mine \\| only, \\<b\\>ask\\</b\\> me",
            {"license": "other", "license_name": "Mine | only, <b>ask</b> me"},
        ),
        ("license: {a: b}", "not stated", {}),
        ("license: [1, [x]]", "not stated", {}),
        ("license: &a [*a]", "not stated", {}),
        ("license: 3", "not stated", {}),
        ("pretty_name: x", "not stated", {}),
        ("- a list", "not stated", {}),
        ("license: [", "not stated", {}),
    ],
)
def test_the_licence_is_what_the_sources_readme_states(tmp_path, front, stated, in_front):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/README.md").write_text(f"---\n{front}\n---\n# Pairs\n", "utf-8")
    pairs = with_columns(make_pairs(4), Origin("s", str(tmp_path / "source")))
    card = card_of(pairs, Scores(), tmp_path / "out")
    assert f"| licence, as the source's README states it | {stated} |" in card
    known = yaml.safe_load(card.split("---\n")[1])
    assert {name: known[name] for name in known if name.startswith("license")} == in_front


def test_labels_of_reward_models_are_no_preferences_of_people(tmp_path):
    (tmp_path / "generate.yaml").write_text("margin: [pickscore, 'proxy:my|folder']\n")
    pairs = with_columns(make_pairs(4), Origin("s", str(tmp_path)))
    card = card_of(pairs, Scores(), tmp_path / "out")
    assert "pairs of a reward model's preferences" in card and "people's" not in card
    told = "no person was asked: the labels are what pickscore, proxy:my\\|folder says"
    assert f"| agreement of the annotators | {told} |" in card
    assert "pairs of people's preferences" in card_of(make_pairs(4), Scores(), tmp_path / "other")


def test_without_a_readme_or_front_matter_nothing_is_stated(tmp_path):
    assert source_licence(Origin(root=str(tmp_path))) == {}
    assert source_licence(Origin(root="https://example.org/data")) == {}
    (tmp_path / "README.md").write_text("# Pairs\nlicense: mit\n")
    assert source_licence(Origin(root=str(tmp_path))) == {}


def test_the_readme_of_a_data_set_on_the_hub_is_that_of_the_whole(monkeypatch):
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/someone/pairs/README.md", b"---\nlicense: mit\n---\n")
    asked = []

    def remote(url):
        asked.append(url)
        return system, url.removeprefix("hf://datasets")

    monkeypatch.setattr("fifa.data.remote.open_store", remote)
    root = "hf://datasets/someone/pairs/data/train"
    assert source_licence(Origin(root=root)) == {"license": "mit"}
    assert asked == ["hf://datasets/someone/pairs/README.md"]
