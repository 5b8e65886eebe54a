import pytest

from fifa import console
from fifa.console import QUIET, VERBOSE, echo, echo_once, output, progress, step_ended


@pytest.fixture
def clock(monkeypatch):
    """What the time is, as a list of one number."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_ten_seconds_with_rate_and_time_left(clock, capsys):
    with progress("training", 300, 100) as advance:
        for _ in range(5):
            clock[0] += 6
            advance(10)
    assert capsys.readouterr().err.splitlines() == [
        "training: 120 of 300 (40%), 1.7/s, 1 min 48 s left",
        "training: 140 of 300 (47%), 1.7/s, 1 min 36 s left",
    ]
    with progress("reading", None) as advance:
        clock[0] += 20
        advance(4)
    assert capsys.readouterr().err == "reading: 4, 5.0 s each\n"


def test_quiet_and_verbose(clock, capsys):
    with output(QUIET), progress("training", 9) as advance:
        clock[0] += 60
        advance(1)
        echo("a note")
    assert capsys.readouterr().err == ""
    with output(VERBOSE):
        step_ended({"step": "read", "started": "now", "pairs": 7})
    assert capsys.readouterr().err.endswith(" step read, pairs 7\n")
    step_ended({"step": "read"})
    with output(None):
        echo("a note")
    assert capsys.readouterr().err == "a note\n"


def test_what_is_said_once_is_not_repeated(capsys):
    for text in ("pickscore: on a card", "hpsv2: on a card", "pickscore: on a card"):
        echo_once(text)
    assert capsys.readouterr().err.splitlines() == ["pickscore: on a card", "hpsv2: on a card"]
