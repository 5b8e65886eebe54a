"""How a training went: its statistics as curves, in a report and on a page of its own."""

import json
import re
from dataclasses import replace
from math import isnan

import pytest
from drawn import write_evaluation

from fifa.evaluation.history import POINTS, history_of
from fifa.evaluation.results import load_results, save_results
from fifa.reporting.page import write_report


def line(step, loss, **more):
    return {
        "step": step,
        "loss": loss,
        "implicit_accuracy": 0.5 + step / 1000,
        "winner_minus_reference": -step / 1e5,
        "loser_minus_reference": step / 1e5,
        **more,
    }


def lines(steps=20, held=(0.7, 0.6, 0.65, 0.8)):
    found = [line(step, 0.7 - step / 100) for step in range(1, steps + 1)]
    for place, loss in enumerate(held, 1):
        own = line(place * steps // len(held), loss)
        found[own["step"] - 1] |= {f"heldout_{k}": v for k, v in own.items() if k != "step"}
    return found


def test_a_history_has_the_means_of_lines_and_the_best_step():
    found = history_of("it", lines())
    assert [moment.step for moment in found.taught] == list(range(1, 21))
    assert [(moment.step, moment.loss) for moment in found.held] == [
        (5, 0.7),
        (10, 0.6),
        (15, 0.65),
        (20, 0.8),
    ]
    assert found.best == 10
    assert found.held[1].winner == -1e-4
    many = history_of("it", lines(2 * POINTS + 1, ()))
    assert len(many.taught) <= POINTS
    assert (many.taught[0].step, many.taught[0].loss) == (3, pytest.approx(0.68))
    assert (many.taught[-1].step, many.best, many.held) == (2 * POINTS + 1, 0, ())
    # another program's lines, and damaged ones
    odd = history_of("it", [{}, {"step": "4", "loss": 1}, {"step": 5, "loss": None}, {"step": 6}])
    assert [moment.step for moment in odd.taught] == [5, 6]
    assert isnan(odd.taught[0].loss)


def labels(text):
    part = text[text.index('id="training"') :]
    return re.findall(r'<svg class="plot"[^>]*aria-label="([^"]*)"', part)


def test_a_training_has_a_page_of_its_own(tmp_path):
    folder = tmp_path / "check <b>point"
    folder.mkdir()
    (folder / "train.yaml").write_text("source: x\n")
    stats = folder / "stats.jsonl"
    stats.write_text("".join(json.dumps(one) + "\n" for one in lines()) + '{"st')
    page = write_report(folder)
    text = page.read_text("utf-8")
    loss, accuracy, errors = labels(text)
    assert "held-out pairs: 0.7 to 0.8 at step 20" in loss
    assert "the pairs trained on: 0.69 to 0.5 at step 20" in loss
    assert "the lowest held-out loss is at step 10" in loss
    assert accuracy.startswith("implicit accuracy: ")
    assert "preferred image of held-out pairs" in errors
    assert "rejected image of held-out pairs" in errors
    assert "<b>0.6</b>, is after step 10" in text
    assert "<b>point" not in text
    assert ">best</text>" in text
    before = page.read_bytes()
    assert write_report(folder).read_bytes() == before
    # nothing held out, nothing measured yet
    stats.write_text("".join(json.dumps(one) + "\n" for one in lines(held=())))
    text = write_report(folder).read_text("utf-8")
    assert len(labels(text)) == 3
    assert ">best</text>" not in text
    assert "held-out" not in text[text.index('id="training"') :]
    stats.write_text("")
    assert "No steps of training" in write_report(folder).read_text("utf-8")


def test_an_evaluation_shows_how_its_models_were_trained(tmp_path):
    run = write_evaluation(tmp_path / "run", ["a"], [0.5], scorers=("t",))
    results = load_results(run / "evaluate")
    assert results.histories[0].taught == ()
    assert 'id="training"' not in write_report(run).read_text("utf-8")
    histories = (history_of("a", lines()),)
    save_results(run / "evaluate", replace(results, histories=histories))
    assert load_results(run / "evaluate").histories == histories
    text = write_report(run).read_text("utf-8")
    assert len(labels(text)) == 3
    assert "where their loss was lowest" in text
