"""`fifa study` in a tiny world: cells, what is shared, kills, the tables, what is refused."""

import json
import re
import threading
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner

from fifa.cli import cli
from fifa.config import Cluster, Part, Study, changed
from fifa.data.read import read_pairs
from fifa.errors import FifaError
from fifa.evaluation.study import CELL, cells_of
from fifa.moji.family import FEEDBACK
from fifa.moji.judges import moji_judges
from fifa.moji.study import BUDGETS, SEEDS, moji_study
from fifa.moji.world import DATA, caption, scenes
from fifa.reporting.study import BEGIN, END, put_table
from fifa.run import study as module
from fifa.run.info import info
from fifa.run.study import Cells, study, turn_labels
from fifa.shards.files import write_json, write_yaml
from moji.sample import sample_feedback
from moji.sizes import write_tiny

TABLE = ["part", "arm", "budget", "noise", "seed", "status", "kept", "turned", "steps", "images"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Two arms and two seeds, then one that keeps nothing and one with labels turned round."""
    folder = tmp_path_factory.mktemp("world")
    sd, clip = write_tiny(folder)
    pq.write_table(pq.read_table(FEEDBACK).slice(0, 40), folder / "feedback.parquet")
    (folder / "prompts.txt").write_text("\n".join(map(caption, islice(scenes(), 4))))
    knobs = {
        "arms": {
            "fifa": {},
            "random": {"select": {"strategy": "random"}},
            "none": {"select": {"margin_window": [1000.0, None]}},
            "all": {"select": {"strategy": "random", "keep": 1.0}, "train": {"loss": "poly"}},
        },
        "parts": [
            {"name": "main", "arms": ["fifa", "random"], "budgets": [0.2]},
            {"name": "rest", "arms": ["none", "all"], "budgets": [0.2], "seeds": [1]}
            | {"noise": [0.5]},
        ],
        "seeds": [1, 2],
        "against": "random",
        "target": ["random"],
        "judge": "moji",
        "read": {"source": str(folder / "feedback.parquet")},
        "score": {"margin": ["column:clipscore_0,clipscore_1"], "quality": "none"}
        | {"diversity": "none"},
        "train": {"model": str(sd), "steps": 4, "batch": 2, "micro_batch": 2, "lr": 0.01}
        | {"checkpoint_every": 2, "rank": 2, "device": "cpu"},
        "evaluate": {"prompts": str(folder / "prompts.txt"), "seeds": 2, "curve": 2}
        | {"generate": {"steps": 2, "guidance": 1.0, "batch": 4, "device": "cpu"}}
        | {"measure": {"scorers": ["none"], "encoder": f"clip:{clip}"}},
        "compute": {"device": "cpu"},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(knobs))
    return path


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    torch.set_num_threads(1)
    page = out.parent / "page.md"
    page.write_text(f"before\n{BEGIN}old\n{END}\nafter")
    command = ["study", str(recipe), "--out", str(out), "--table", str(page)]
    ended = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert ended.stdout == f"{out / 'study.html'}\n"
    assert "6 of 6 cells have run" in ended.stderr
    return out


def test_a_cell_that_a_lost_worker_still_does_is_waited_for(tmp_path, monkeypatch):
    there, ended = threading.Event(), threading.Event()

    def lost():
        with module.only_writer(tmp_path / "cell"):
            there.set()
            ended.wait(60)

    worker = threading.Thread(target=lost)
    worker.start()
    there.wait(60)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with pytest.raises(FifaError, match="is writing here"), module.alone_in(tmp_path / "cell"):
        pass
    monkeypatch.setattr(module.time, "sleep", lambda seconds: (ended.set(), worker.join()))
    with module.alone_in(tmp_path / "cell"):
        assert not worker.is_alive()


def test_a_worker_has_no_workers_of_its_own(recipe, tmp_path, monkeypatch):
    """An actor that waited for others would hold the processors that these wait for."""
    asked = Study.from_yaml(recipe)
    for executor in ("local", "ray"):
        many = {"executor": executor, "actors": 2, "store": "shared"}
        both = {"compute": {**asdict(asked.compute), **many}, "train": {"cluster": many}}
        given = changed(asked, **both)
        seen, cell = [], cells_of(given)[1]
        monkeypatch.setattr(module, "train", lambda *more, seen=seen: seen.append(more[3].cluster))
        cells = Cells(given, tmp_path, [])
        monkeypatch.setattr(cells, "_selected", lambda *more: ("source", {}))
        monkeypatch.setattr(module, "read_stats", lambda out: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cells._trained(cell, tmp_path)
        here = executor == "local"
        assert cells._asked.compute.executor == "local"
        assert cells._asked.compute.store == ("shared" if here else None)
        assert seen == [given.train.cluster if here else Cluster()]


def test_a_row_a_cell_and_the_same_after_a_kill(recipe, done, tmp_path, monkeypatch):
    table = pq.read_table(done / "study.parquet")
    assert table.column_names == [*CELL.names, "gain", "wins"]
    status = table["status"].to_pylist()
    assert [status.count(one) for one in ("base", "trained", "refused")] == [1, 5, 1]
    rows = {(r["arm"], r["seed"]): r for r in table.to_pylist()}
    assert "no pair" in rows["none", 1]["reason"]
    assert rows["all", 1]["budget"] == 1 and rows["fifa", 1]["budget"] == 0.2
    assert rows["fifa", 1]["kept"] == 8 < rows["all", 1]["kept"]
    assert rows["all", 1]["turned"] == pytest.approx(rows["all", 1]["kept"] / 2, abs=1)
    # the same pairs, and other weights by another seed; everything is judged on the same images
    one, two = rows["fifa", 1]["images"], rows["fifa", 2]["images"]
    assert [i["seed"] for i in one] == [i["seed"] for i in two] and one != two
    assert {i["step"] for i in one} == {2, 4}
    assert not (done / "work").exists()

    told, trained = [], Cells._trained

    def killed(self, cell, place):
        told.append(cell.name)
        if len(told) == 2:
            raise KeyboardInterrupt
        return trained(self, cell, place)

    monkeypatch.setattr(Cells, "_trained", killed)
    asked, out = Study.from_yaml(recipe), tmp_path / "out"
    asked = replace(asked, parts=asked.parts[:1], seeds=(1,))
    with pytest.raises(KeyboardInterrupt):
        study(asked, out, judges=moji_judges)
    for _ in range(2):
        assert study(asked, out, judges=moji_judges) == out / "study.html"
    assert len(told) == 2 + 1  # one that was killed, and nothing the last time
    other = pq.read_table(out / "study.parquet").select(TABLE)
    assert other == table.filter(pc.less(table["seed"], 2)).select(TABLE).slice(0, 3)


def test_the_page_and_the_table(done):
    page, text = (done / "study.html").read_text(), (done.parent / "page.md").read_text()
    assert all(
        f"<h2>{title}</h2>" in page for title in ("Part: main", "Part: rest", "Cost", "Stability")
    )
    assert "none, 20 %, 50% turned: 1 refused" in page
    assert page.count("Win rate: the share of images") == 1  # a note once, and the main part open
    assert page.count("<details>") == page.count("<section") - 2 - page.count('id="figures"')
    assert CliRunner().invoke(cli, ["report", str(done)]).stdout == f"{done / 'study.html'}\n"
    assert (done / "study.html").read_text() == page
    assert text.startswith("before\n<!--") and text.endswith("\nafter") and "old" not in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 4
    with pytest.raises(FifaError, match="no place for the table"):
        put_table(done, done / "study.yaml")


def test_what_was_planned_and_did_not_run_is_told(done, tmp_path):
    asked = Study.from_yaml(done / "study.yaml", sealed=True)
    more = Part(name="later", arms=("random",), budgets=(0.5,))
    with pytest.raises(FifaError, match="holds another study"):
        study(replace(asked, train=replace(asked.train, lr=0.1)), done, judges=moji_judges)
    assert [(part.found, part.state) for part in info(done).parts] == [("6 of 6", "done")]
    later = replace(asked, parts=(*asked.parts, more))
    made = done / "feedback" / "scored.json"
    known = json.loads(made.read_text())
    other = {name: {**one, "files": {"quality": "another rater's"}} for name, one in known.items()}
    made.write_text(json.dumps(other))
    with pytest.raises(FifaError, match="were made of other scores"):
        study(later, done, judges=moji_judges)
    made.write_text(json.dumps(known))
    write_yaml(done / "study.yaml", later.to_yaml())
    (cells,) = info(done).parts
    assert (cells.found, cells.state) == ("6 of 8", "open")
    ended = CliRunner().invoke(cli, ["study", "--out", str(done), "--report"])
    assert "6 of 8 cells have run" in ended.stderr
    assert "not run" in (done / "study.html").read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"parts": [{"name": "a", "arms": ["who"], "budgets": [0.1]}]}, "no arm is named who"),
        ({"against": "who"}, "no arm is named who"),
        ({"arms": {"fifa": {"select": {"alpah": 1}}, "random": {}}}, "arm fifa, select.*alpah"),
        ({"arms": {"fifa": {"train": {"lr": -1}}, "random": {}}}, "arm fifa, train.*lr"),
        ({"parts": [{"name": "a", "arms": ["fifa"], "budgets": [2]}]}, "less than or equal to 1"),
        ({"parts": [{"name": "a", "arms": ["fifa"], "budgets": [0.1], "noice": 1}]}, "noice"),
        ({"parts": [{"name": "a", "arms": ["fifa"], "budgets": [0.1]}] * 2}, "the same name"),
        ({"train": {"source": "x", "model": "y"}}, "the study itself sets source"),
        ({"judge": None}, "nothing judges the images"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_told(recipe, tmp_path, change, told):
    plain = yaml.safe_load(recipe.read_text()) | change
    plain["target"] = []
    if "arms" in change:
        plain["parts"] = plain["parts"][:1]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(plain))
    ended = CliRunner().invoke(cli, ["study", str(path), "--out", str(tmp_path / "out")])
    assert isinstance(ended.exception, FifaError)
    assert re.search(told, str(ended.exception), re.DOTALL)
    assert not (tmp_path / "out" / "study.yaml").exists()


def test_labels_are_turned_round_in_steps_that_hold_each_other():
    pairs = read_pairs(FEEDBACK)
    label = pairs.table["label"].to_numpy()
    (few, tenth), (_, third) = (turn_labels(pairs, share, 5) for share in (0.1, 0.3))
    untied = int((label != 0.5).sum())
    assert tenth.sum() == round(0.1 * untied) and third.sum() == round(0.3 * untied)
    assert (third | ~tenth).all() and not (tenth & (label == 0.5)).any()
    assert np.array_equal(few.table["label"].to_numpy() != label, tenth)


def test_the_study_of_the_small_world_is_that_of_its_protocol():
    asked = moji_study(DATA)
    cells = cells_of(asked)[1:]
    assert asked.seeds == SEEDS == (2711, 3948, 5067, 7193, 8426)
    assert {cell.seed for cell in cells} == set(SEEDS)
    assert not set(SEEDS) & set(moji_study().seeds)
    first = [cell.arm for cell in cells[:16]]
    assert first[:2] == ["fifa", "random"] and len(set(first)) == 16
    assert {cell.budget for cell in cells if cell.arm == "fifa"} == set(BUDGETS)
    assert len(cells) == len({cell.key for cell in cells})


def test_a_part_of_a_world_has_the_protocols_arms_for_other_shares(tmp_path):
    sample_feedback(DATA, tmp_path, 330, {"nonsense": 0.2}, seed=1)
    write_json(tmp_path / "world.json", {"crowd": {"of": str(DATA)}, "pairs": 330})
    cells = cells_of(moji_study(tmp_path))[1:]
    assert {(cell.part, cell.budget, cell.noise) for cell in cells} == {("shares", 0.5, 0.0)}
    assert len(cells) == 6 * len(SEEDS)
