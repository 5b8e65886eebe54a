"""The demo at its smallest: every chapter for real, too short to show an effect."""

import csv
import io

import pyarrow.parquet as pq
import pytest
from PIL import Image

from fifa.demo import ARMS, Demo, demo
from fifa.demo.story import test_prompts as write_prompts
from fifa.errors import FifaError
from fifa.moji.prompts import asked
from fifa.moji.world import WORLD

SMALL = Demo(
    keep=8, steps=2, batch=4, draws=1, prompts=2, unsafe=1, images=1, curve=2, sampler_steps=2
)


def test_every_chapter_ends_in_one_report(tmp_path, capsys):
    out = tmp_path / "run"
    report = demo(out, SMALL)
    told = capsys.readouterr().err
    assert [f"[{n}/4]" in told for n in (1, 2, 3, 4)] == [True] * 4
    assert "fifa     beats the base" in told and "fifa     beats random" in told
    assert "hidden utility" in report.read_text("utf-8")
    random = pq.read_table(out / "arms" / "random" / "data")
    assert random.num_rows == pq.read_table(out / "subset" / "data").num_rows == SMALL.keep
    images = pq.read_table(out / "evaluate" / "images.parquet")
    assert set(images["model"].to_pylist()) == {"base", "fifa", "random"}
    with Image.open(out / "picture.png") as picture:
        picture.verify()
    assert (out / "train" / "fifa" / "train.json").exists()


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
    with pytest.raises(FifaError, match=r"arms.*'fifa', 'margin', .* not 'best'"):
        Demo(arms=("fifa", "best"))
    assert set(Demo().arms) <= set(ARMS)
