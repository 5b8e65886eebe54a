import pyarrow.parquet as pq
from report_runs import make_run

from fifa.data.table import load_pairs
from fifa.formatting import interval, percent
from fifa.reporting.numbers import columns_of, label_noise
from fifa.reporting.page import write_report
from fifa.selection.table import load_selection


def loaded(run):
    """The columns of a run, and its rewards by the scorer's name."""
    rewards = {}
    for path in sorted((run / "scores").glob("margin-*.parquet")):
        table = pq.read_table(path)
        rewards[path.stem] = (table["reward_0"].to_numpy(), table["reward_1"].to_numpy())
    return columns_of(load_pairs(run).table, load_selection(run)), rewards


def test_the_pairs_that_all_scorers_contradict_are_those_a_loop_finds(tmp_path):
    make_run(tmp_path, pairs=200, scorers=3)
    columns, rewards = loaded(tmp_path)
    noise = label_noise(columns, rewards)
    expected = {
        row
        for row, label in enumerate(columns.label)
        if label != 0.5 and all((a[row] - b[row]) * (label - 0.5) < 0 for a, b in rewards.values())
    }
    assert set(noise.rows) == expected
    assert [entry["against"] for entry in noise.dissent] == [0, 1, 2, 3]
    assert noise.dissent[-1]["pairs"] == len(expected)
    assert len(noise.dissent) == 4
    # these scorers err on their own, and their people never do
    assert noise.wrong.low == 0 and noise.wrong.share < 0.1
    told = f"{percent(noise.wrong.share)} of the labels would be wrong ({interval(noise.wrong)})"
    assert told in write_report(tmp_path).read_text()


def test_a_large_run_is_judged_on_a_sample_and_says_so(tmp_path, monkeypatch):
    make_run(tmp_path, pairs=200, scorers=2)
    monkeypatch.setattr("fifa.reporting.numbers.MOST", 50)
    noise = label_noise(*loaded(tmp_path))
    assert noise.sampled == 50
    assert all(0 <= row < 200 for row in noise.rows)
    assert "50 pairs drawn from the data set" in write_report(tmp_path).read_text()


def test_one_scorer_is_no_committee(tmp_path):
    make_run(tmp_path, pairs=40, scorers=1)
    assert label_noise(*loaded(tmp_path)) is None
    assert 'id="committee"' not in write_report(tmp_path).read_text()
