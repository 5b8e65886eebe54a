"""The demo at its smallest: every chapter for real, and a selection that is worth something."""

import csv
import io
import json
import re
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fifa.demo import ARMS, Demo, demo, recipe_of, right, verdict
from fifa.demo import test_prompts as write_prompts
from fifa.errors import FifaError
from fifa.moji.world import WORLD, asked
from fifa.run.folder import start_run

SMALL = Demo(
    keep=8, steps=2, batch=4, draws=1, prompts=2, unsafe=1, images=1, curve=2, sampler_steps=2
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("fifa.demo.echo", said.append)
        assert demo(out, SMALL) == out / "report.html"
    return out, "\n".join(said)


def test_every_chapter_ends_in_one_report(finished):
    out, text = finished
    assert re.findall(r"\[(\d)/4\]", text) == ["1", "2", "3", "4"]
    assert text.index("The first pictures") < text.index("[1/4]")
    assert "hidden utility" in (out / "report.html").read_text("utf-8")
    random = pq.read_table(out / "arms" / "random" / "data")
    assert random.num_rows == pq.read_table(out / "subset" / "data").num_rows == SMALL.keep
    images = pq.read_table(out / "evaluate" / "images.parquet")
    assert set(images["model"].to_pylist()) == {"base", "fifa", "random"}
    with Image.open(out / "picture.png") as picture:
        picture.verify()
    assert (out / "train" / "fifa" / "train.json").exists()


def test_the_best_pairs_are_right_far_more_often_than_random_ones(finished):
    out, _ = finished
    pairs = pq.read_table(out / "pairs.parquet")
    rank = pq.read_table(out / "selection.parquet", columns=["rank"])["rank"]
    best = pairs.filter(pc.less_equal(rank, 300))
    chance = right(pairs).mean()  # what a random subset has, give or take 0.03 for 300 pairs
    assert 0.6 < chance < 0.8
    assert len(right(best)) == 300
    assert right(best).mean() > chance + 0.1


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    """As a read-only one, but also for root."""
    start_run(tmp_path / "run", recipe_of(SMALL)).scores.write_text("no folder")
    with pytest.raises(FifaError, match="cannot write"):
        demo(tmp_path / "run", SMALL)


def test_right_is_told_by_the_utility_and_ties_do_not_count():
    truth = {"image_uid": ["a", "b"], "utility": [-0.1, -0.5]}
    pairs = {"image_0": ["a", "b", "a", "a"], "image_1": ["b", "a", "b", "b"]}
    table = pa.table({**pairs, "label": [1.0, 1.0, 0.5, 0.3]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fifa.demo.pq.read_table", lambda path, columns: pa.table(truth))
        assert right(table).tolist() == [True, False, False]


def compared(ours, theirs, share, low, high):
    return SimpleNamespace(
        ours=ours, theirs=theirs, wins=SimpleNamespace(share=share, low=low, high=high, n=224)
    )


def test_the_verdict_is_what_the_intervals_say():
    found = verdict(
        [
            compared("fifa", "random", 0.4, 0.3, 0.499),
            compared("fifa", "base", 0.87, 0.83, 0.91),
            compared("random", "base", 0.52, 0.46, 0.58),
            compared("full", "random", 0.9, 0.8, 1.0),
        ]
    )
    assert found == [
        "fifa     beats the base    87% of 224 pictures (95 %: 83% to 91%)",
        "random   is level with the base    52% of 224 pictures (95 %: 46% to 58%)",
        "fifa     loses to random      40% of 224 pictures (95 %: 30% to 50%)",
    ]


def test_the_verdict_of_a_run_is_that_of_its_results(finished):
    out, text = finished
    results = json.loads((out / "evaluate" / "results.json").read_text("utf-8"))
    utility = [c for c in results["comparisons"] if c["scale"]["name"] == "hidden utility"]
    assert {(c["ours"], c["theirs"]) for c in utility} >= {("fifa", "base"), ("random", "base")}
    for c in utility:
        low, high = c["wins"]["low"], c["wins"]["high"]
        verb = "beats" if low > 0.5 else "loses to" if high < 0.5 else "is level with"
        theirs = "the base" if c["theirs"] == "base" else c["theirs"]
        assert f"{c['ours']:<8} {verb} {theirs}" in text


def test_test_prompts_ask_for_scenes_of_their_kind():
    rows = list(csv.DictReader(io.StringIO(write_prompts(Demo()))))
    kinds = {"seen": 48, "unseen": 48, "unsafe": 16}
    assert {k: sum(row["category"] == k for row in rows) for k in kinds} == kinds
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        scene = asked(row["prompt"])
        assert scene is not None
        assert scene.unsafe == (row["category"] == "unsafe")
        if row["category"] != "unsafe":
            assert scene.seen == (row["category"] == "seen")
    assert {asked(row["prompt"]).background for row in rows} == set(range(len(WORLD.backgrounds)))


def test_an_arm_that_there_is_not_is_named():
    with pytest.raises(FifaError, match=r"arms.* not 'best'") as caught:
        Demo(arms=("fifa", "best"))
    named = re.search(r"should be (.*?), not 'best'|should be ([^;\[]*)", str(caught.value))[0]
    assert [arm for arm in re.findall(r"'(\w+)'", named) if arm != "best"] == list(ARMS)
