"""The load test of the voting page, with few voters: its voters vote as the page's script does."""

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
sys.path.append(str(Path(__file__).parents[1] / "evaluation" / "vote"))

from test_vote_server import served

from fifa.evaluation.vote.store import open_store
from vote import Load, make_run, table


def test_accepted_votes_are_those_in_the_database(tmp_path):
    run = make_run(tmp_path / "run", prompts=3, size=8)
    with served(run, "--port", 0, "--votes-per-pair", 3) as (_, link, _):
        load = Load(link, look=0.05)
        asyncio.run(load.run(4))
    said = open_store(run).read()
    rows, facts = table(load, said, used=0.1)
    assert facts["accepted"] == facts["stored"] == len(said.votes) == 9
    assert facts["lost"] == 0
    assert facts["p50_ms"] > 0
    assert ["votes in the database", "9"] in [row[:2] for row in rows]
    load.accepted["voter 1"] += 1  # one that nobody has kept
    assert table(load, said, used=0.1)[1]["lost"] == 1


def test_a_server_that_is_gone_ends_in_words():
    with pytest.raises(SystemExit, match="the server is gone"):
        asyncio.run(Load("http://127.0.0.1:9/", look=0).run(1))
