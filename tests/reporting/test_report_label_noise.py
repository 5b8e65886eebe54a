import pyarrow.parquet as pq
from report_runs import make_run

from fifa.reporting.data import load_columns
from fifa.reporting.label_noise import load_doubts
from fifa.reporting.page import write_report


def margins(run):
    return {path.stem: path for path in sorted((run / "scores").glob("margin-*.parquet"))}


def test_the_pairs_that_all_scorers_contradict_are_those_a_loop_finds(tmp_path):
    make_run(tmp_path, pairs=200, scorers=3)
    columns, found = load_columns(tmp_path), margins(tmp_path)
    doubts = load_doubts(columns, found)
    rewards = [pq.read_table(path).to_pylist() for path in found.values()]
    expected = {
        row
        for row, label in enumerate(columns.label)
        if label != 0.5
        and all((r[row]["reward_0"] - r[row]["reward_1"]) * (label - 0.5) < 0 for r in rewards)
    }
    assert set(doubts.rows) == expected
    assert [entry["against"] for entry in doubts.dissent] == [0, 1, 2, 3]
    assert doubts.dissent[-1]["pairs"] == len(expected)
    assert len(doubts.members) == 3


def test_a_large_run_is_judged_on_a_sample_and_says_so(tmp_path, monkeypatch):
    make_run(tmp_path, pairs=200, scorers=2)
    monkeypatch.setattr("fifa.reporting.label_noise.MOST", 50)
    doubts = load_doubts(load_columns(tmp_path), margins(tmp_path))
    assert doubts.sampled == 50
    assert all(0 <= row < 200 for row in doubts.rows)
    assert "50 pairs drawn from it" in write_report(tmp_path).read_text()


def test_one_scorer_is_no_committee(tmp_path):
    make_run(tmp_path, pairs=40, scorers=1)
    assert load_doubts(load_columns(tmp_path), margins(tmp_path)) is None
    assert 'id="committee"' not in write_report(tmp_path).read_text()
