import pytest
from drawn import write_evaluation

from fifa.cli import main
from fifa.errors import FifaError
from fifa.evaluation.compare import compare_runs
from fifa.evaluation.measure import load_measured
from fifa.evaluation.win_rates import compare_models


def test_runs_beside_each_other(tmp_path):
    a = write_evaluation(tmp_path / "fifa", ["tuned"], [0.6], curve=(10, 20, 30, 40))
    b = write_evaluation(tmp_path / "random", ["tuned"], [0.1], curve=(10, 20, 30, 40), seed=1)
    found = compare_runs([a, b])
    assert [scale.column for scale in found.scales] == ["t", "s"]  # s picked the data
    assert [e.label for e in found.entries] == ["fifa: tuned", "random: tuned"]
    assert found.entries[0].cost.scoring == 5.0
    assert (found.entries[0].cost.training, found.entries[0].cost.pairs) == (60.0, 320)
    first, second = (load_measured(run / "evaluate") for run in (a, b))
    own = compare_models(first, "tuned", "base", found.scales[0])
    assert found.entries[0].wins[0].wins == own.wins
    across = compare_models(first, "tuned", "tuned", found.scales[0], second)
    assert found.direct[0].wins == across.wins
    assert (found.direct[0].ours, found.direct[0].theirs) == ("fifa: tuned", "random: tuned")
    assert [(i, j) for i, j, _ in found.matches] == [(0, 1), (1, 0)]
    assert found.matches[0][2].step == 10  # a quarter of 0.6 is more than random ever gains
    assert found.matches[1][2] is None
    assert found.differences == ()


def test_what_differs_between_runs_is_told(tmp_path):
    a = write_evaluation(tmp_path / "a", ["one"], [0.5])
    b = write_evaluation(tmp_path / "b", ["two"], [0.5], guidance=5.0)
    found = compare_runs([a, b])
    assert found.differences == ("guidance: 7.5 (a), 5.0 (b)",)
    assert [entry.label for entry in found.entries] == ["one", "two"]


def test_runs_that_cannot_be_compared(tmp_path):
    a = write_evaluation(tmp_path / "a", ["one"], [0.5], scorers=("s",))
    b = write_evaluation(tmp_path / "b", ["one"], [0.5], scorers=("t",))
    with pytest.raises(FifaError, match="share no scorer"):
        compare_runs([a, b])
    with pytest.raises(FifaError, match="no evaluation here"):
        compare_runs([tmp_path / "c"])
    with pytest.raises(FifaError, match="no run to compare"):
        compare_runs([])


def test_the_command_prints_one_table_and_writes_one_page(tmp_path, monkeypatch, capsys):
    a = write_evaluation(tmp_path / "fifa", ["tuned"], [0.6], curve=(10, 20))
    b = write_evaluation(tmp_path / "random", ["tuned"], [0.1], curve=(10, 20), seed=1)
    page = tmp_path / "compare.html"
    monkeypatch.setattr("sys.argv", ["fifa", "compare", str(a), str(b), "--out", str(page)])
    main()
    told = capsys.readouterr()
    assert told.out.strip() == str(page)
    lines = told.err.splitlines()
    assert lines[0].split()[:4] == ["checkpoint", "t", "s", "*"]
    assert [line.partition("  ")[0] for line in lines[1:3]] == ["fifa: tuned", "random: tuned"]
    text = page.read_text("utf-8")
    assert text.count('<svg class="plot"') == 1 + 3
    assert "Time to match" in text
    main()
    assert page.read_text("utf-8") == text
