"""The command itself: served, killed, started again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from vote_worlds import make_run

from attack.voters import Load, Person, free_port
from commands import fifa
from fifa.cli import main
from fifa.evaluation.vote.store import FILE, VoteStore, open_store
from forked import start

JSON = {"accept": "application/json"}


def serve(*arguments: str) -> None:
    sys.argv = ["fifa", "vote", *arguments]
    main()


@contextmanager
def served(run: Path, *options: object) -> Iterator[tuple[Any, str, str]]:
    """A running `fifa vote`: the process and its two links. What it says is beside ``run``."""
    said = run.with_name("said.txt")
    said.write_text("")
    process = start(serve, str(run), *map(str, options), said=said)
    try:
        while len(links := re.findall(r"^(http\S+)\n", said.read_text(), re.M)) < 2:
            assert process.is_alive(), said.read_text()
            time.sleep(0.01)
        yield process, *links
    finally:
        process.kill()
        process.join()


def begin(client: httpx2.Client, page: str) -> dict[str, str]:
    """Start to vote, or go on; gives the fields of the next vote but the answer."""
    text = client.get(page).text
    if '/start"' in text:
        own = re.search(r'name="token" value="(\w+)"', text)
        assert own
        text = client.post("/start", data={"token": own[1]}).text
    return {
        name: re.search(rf'name="{name}" value="(\w+)"', text)[1]  # type: ignore[index]
        for name in ("token", "position")
    }


def test_a_server_killed_between_votes_loses_none(tmp_path: Path) -> None:
    run = make_run(tmp_path, prompts=400, seeds=1, models=("base", "tuned"), size=8)
    heard: list[int] = []
    jar = httpx2.Cookies()
    for delay in (0.02, 0.11, 0.17):
        with (
            served(run, "--port", 0) as (process, page, _),
            httpx2.Client(base_url=page, cookies=jar, follow_redirects=True, timeout=60) as client,
        ):
            fields = begin(client, page)
            assert int(fields["position"]) in (len(heard), len(heard) + 1)
            heard += [0] * (int(fields["position"]) - len(heard))  # committed, but not heard of
            jar = client.cookies
            timer = threading.Timer(delay, os.kill, (process.pid, signal.SIGKILL))
            timer.start()
            with pytest.raises(httpx2.TransportError):
                while True:
                    answer = client.post("/vote", data={**fields, "answer": "left"}, headers=JSON)
                    assert answer.status_code == 200
                    heard.append(1)
                    fields["position"] = str(answer.json()["position"])
            timer.join()
            stored = len(VoteStore(run / "evaluate" / FILE).read().votes)
            assert stored in (len(heard), len(heard) + 1)
    assert sum(heard) >= 3
    votes = VoteStore(run / "evaluate" / FILE).read().votes
    assert [vote.position for vote in votes] == list(range(len(votes)))


def test_what_many_voters_heard_is_kept_whatever_kills_the_server(tmp_path: Path) -> None:
    run = make_run(tmp_path, prompts=5, seeds=1, size=8)
    into, lock, port = Load(), threading.Lock(), free_port()
    people = [Person(f"voter {i}", port, 0, into, lock) for i in range(8)]
    threads = [threading.Thread(target=one.run, daemon=True) for one in people]
    for kill in range(3):
        with served(run, "--port", port) as (process, *_):
            if not kill:
                for thread in threads:
                    thread.start()
            while kill < 2 and len(into.accepted) < 12 * (kill + 1):
                assert process.is_alive(), run.with_name("said.txt").read_text()
                time.sleep(0.01)
            if kill == 2:
                for thread in threads:
                    thread.join(120)
        assert run.with_name("said.txt").read_text().count("\n") <= 3  # two links, how to stop
    into.read(run)
    assert len(into.accepted) <= 40 == len(into.stored)
    assert into.accepted <= into.stored
    assert len(into.stored - into.accepted) <= into.unheard
    assert (into.taken, into.redealt) == (0, 0)
    assert into.refused == into.posts - into.unheard - len(into.accepted) - into.lost


def test_two_servers_share_one_postgres_and_a_kill_loses_nothing(
    tmp_path: Path, postgres: str
) -> None:
    runs = [make_run(tmp_path / name / "run", prompts=9, seeds=1, size=8) for name in "ab"]
    options = ("--port", 0, "--database", postgres, "--votes-per-pair", 3)
    with served(runs[0], *options) as (process, first, _):
        shutil.copy(runs[0] / "evaluate" / "votes.schema", runs[1] / "evaluate")
        with served(runs[1], *options) as (_, second, admin):
            jar = httpx2.Cookies()
            for i in range(4):
                page = (first, second)[i % 2]
                if i == 3:
                    os.kill(process.pid, signal.SIGKILL)
                with httpx2.Client(
                    base_url=page, cookies=jar, follow_redirects=True, timeout=60
                ) as client:
                    fields = begin(client, page)
                    done = client.post("/vote", data={**fields, "answer": "left"}, headers=JSON)
                    assert done.json()["votes"] == i + 1
                    jar = client.cookies
            with httpx2.Client(base_url=second, follow_redirects=True, timeout=60) as client:
                assert "<b>4</b> votes of <b>1</b> voter" in client.get(admin).text
                assert client.get("/votes.parquet").status_code == 200
    for run in runs:
        said = run.with_name("said.txt").read_text()
        assert "hidden-word" not in said
        assert len(open_store(run, postgres).read().votes) == 4
        assert not (run / "evaluate" / FILE).exists()
    done = fifa("vote", "export", runs[0], "--out", tmp_path / "x.parquet", "--database", postgres)
    assert "4 pairs from 4 votes" in done.stderr
    for command in (("results", runs[0]), ("export", runs[0], "--out", tmp_path / "y.parquet")):
        done = fifa("vote", *command)
        assert "--database URL" in done.stderr


def test_a_database_that_cannot_be_reached_is_told_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="pip install 'fifa-align[postgres]' to test it")
    run = make_run(tmp_path / "run", prompts=1, seeds=1, size=8)
    for url, message in (
        ("postgresql://me:hidden-word@127.0.0.1:9/votes", "127.0.0.1:9/votes"),
        ("mysql://me:hidden-word@127.0.0.1/votes", "no URL of a PostgreSQL database"),
        ("hidden-word", "no URL of a PostgreSQL database"),
        ("postgresql://me:hidden-word@[::1/votes", "no URL of a PostgreSQL database"),
        ("postgresql://me@127.0.0.1/votes?no=hidden-word", "no URL of a PostgreSQL database"),
    ):
        done = fifa("vote", run, "--database", url)
        assert done.returncode == 1
        assert message in done.stderr, done.stderr
        assert "hidden-word" not in done.stderr + done.stdout
        assert "Traceback" not in done.stderr


def test_a_second_server_of_a_folder_is_refused_and_votes_are_exported_meanwhile(
    tmp_path: Path,
) -> None:
    runs = [make_run(tmp_path / name / "run", prompts=2, seeds=1, size=8) for name in "ab"]
    with (
        served(runs[0], runs[1], "--port", 0) as (_, start_page, page, *_),
        httpx2.Client(base_url=page, follow_redirects=True, timeout=60) as client,
    ):
        assert "owner=" in start_page
        said = fifa("vote", runs[1], "--port", 0)
        assert said.returncode == 1
        assert "is writing here" in said.stderr
        fields = begin(client, page)
        assert client.post("/vote", data={**fields, "answer": "tie"}).status_code == 200
        done = fifa("vote", "export", runs[0], "--out", tmp_path / "votes.parquet")
        assert "1 pairs from 1 votes" in done.stderr
        assert "no vote counts yet" in fifa("vote", "export", runs[1], "--out", "x.parquet").stderr


def test_ctrl_c_ends_well_and_tells_how_to_go_on(tmp_path: Path) -> None:
    run = make_run(tmp_path, prompts=1, seeds=1, size=8)
    with served(run, "--port", 0) as (process, page, _):
        with httpx2.Client(base_url=page, follow_redirects=True, timeout=60) as client:
            fields = begin(client, page)
            client.post("/vote", data={**fields, "answer": "tie"})
            assert "50.0 %" in client.get("/results").text
        os.kill(process.pid, signal.SIGINT)
        process.join(120)
        told = run.with_name("said.txt").read_text()
    assert process.exitcode == 0, told
    assert "1 votes of 1 voters; fifa vote results" in told
    assert "Traceback" not in told


def test_beyond_loopback_an_invitation_is_needed_and_stays_valid(tmp_path: Path) -> None:
    run = make_run(tmp_path, prompts=1, seeds=1, size=8)
    links = []
    for more in ((), (), ("--new-invitation",)):
        with served(run, "--host", "0.0.0.0", "--port", 0, *more) as (_, page, admin):
            port = httpx2.URL(page).port
            assert socket.gethostname() in page
            base = f"http://127.0.0.1:{port}"
            with httpx2.Client(base_url=base, follow_redirects=True, timeout=60) as client:
                assert client.get("/").status_code == 403
                query = page.partition("?")[2]
                assert query.startswith("invitation=")
                assert client.get(f"/?{query}").status_code == 200
                assert client.get("/").status_code == 200
                assert client.get("/results").status_code == 403
                assert client.get(f"/results?{admin.partition('?')[2]}").status_code == 200
                assert client.get("/admin").status_code == 200
            links.append(query)
    assert links[0] == links[1] != links[2]


def test_results_and_export_from_the_command_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "export", prompts=2, seeds=1, size=8)
    with (
        served(run, "--port", 0) as (_, page, _),
        httpx2.Client(base_url=page, follow_redirects=True, timeout=60) as client,
    ):
        for _ in range(2):
            fields = begin(client, page)
            client.post("/vote", data={**fields, "answer": "left"})
        plain = json.loads(fifa("vote", "results", run, "--json").stdout)  # while it is served
    assert plain["votes"] == 2
    assert "tuned-secret against base" in fifa("vote", "results", run).stdout
    done = fifa("vote", "export", run, "--out", tmp_path / "votes.parquet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "votes.parquet")
    assert "2 pairs from 2 votes" in done.stderr
    read = fifa("read", tmp_path / "votes.parquet", "--out", tmp_path / "read")
    assert read.returncode == 0, read.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vote",), "Usage"),
        (("vote", "--port", "0", "nowhere"), "no generated images here"),
        (("vote", "nowhere"), "do:    run `fifa evaluate` first"),
        (("vote", "results", "nowhere"), "nobody has voted here yet"),
        (("vote", "export", "nowhere", "--out", "x.parquet"), "nobody has voted here yet"),
        (("vote", "nowhere", "--checks", "2"), "checks"),
    ],
)
def test_mistakes_are_told(arguments: tuple[str, ...], message: str) -> None:
    done = fifa(*arguments)
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert done.returncode in (1, 2)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    run = make_run(tmp_path, prompts=1, seeds=1, size=8)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = fifa("vote", run, "--port", taken.getsockname()[1])
    assert done.returncode == 1
    assert "choose another --port" in done.stderr


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path, prompts=1, seeds=1, size=8)
    code = "import sys; sys.modules['starlette'] = None; from fifa.cli import main; main()"
    command = [sys.executable, "-c", code, "vote", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "fifa-align[vote]" in done.stderr


def test_help_imports_no_server() -> None:
    code = "import sys, fifa.cli; print(sorted({'starlette', 'uvicorn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    told = fifa("vote", "--help").stdout
    assert all(word in told for word in ("serve", "results", "export"))
