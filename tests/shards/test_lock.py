"""One writer a folder: named while it lives, forgotten when it is killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from fifa.cli import cli
from fifa.config import Recipe, Select
from fifa.data.read import read_pairs
from fifa.errors import FifaError
from fifa.run.folder import start_run
from fifa.scoring.rewards.fit import train_reward
from fifa.scoring.table import Scores
from fifa.selection.choose import select
from fifa.selection.export import export
from fifa.shards.files import LOCK, PREFIX, atomic_folder, sweep
from fifa.shards.lock import only_writer


@contextmanager
def another_process(hold: Callable[[], object]) -> Iterator[int]:
    """The pid of a process that holds what ``hold`` returns, until it is killed."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with hold():  # type: ignore[attr-defined]
            os.write(tell, b"!")
            signal.pause()
    os.close(tell)
    try:
        assert os.read(ready, 1) == b"!"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_writer_is_refused_by_name_and_a_killed_one_locks_nothing(tmp_path) -> None:
    folder = tmp_path / "run"
    with another_process(lambda: only_writer(folder)) as pid:
        for _ in range(2):
            with pytest.raises(FifaError, match=f"process {pid} on .* is writing here"):
                only_writer(folder).__enter__()
    assert (folder / LOCK).exists()  # it was killed, and its file stays
    with only_writer(folder):
        assert (folder / LOCK).exists()
    assert not (folder / LOCK).exists()


def test_a_thread_may_take_its_folder_again_and_another_may_not(tmp_path) -> None:
    found: list[BaseException] = []

    def other() -> None:
        try:
            with only_writer(tmp_path):
                pass
        except FifaError as error:
            found.append(error)

    with only_writer(tmp_path), only_writer(tmp_path / "." / "x" / ".."):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with only_writer(tmp_path / "inside"):
            pass
    assert len(found) == 1 and str(os.getpid()) in str(found[0])


def test_a_folder_in_which_nothing_was_written_goes_again(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path / "a"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ("filter", "none.parquet", "--out", "RUN"),
        ("read", "none.parquet", "--out", "RUN"),
        ("score", "none.parquet", "--out", "RUN"),
        ("score", "RUN"),
        ("select", "RUN"),
        ("export", "RUN"),
        ("report", "RUN"),
        ("demo", "--out", "RUN"),
        ("train", "none.parquet", "--model", "none", "--out", "RUN"),
        ("evaluate", "--base", "b", "--tuned", "t", "--prompts", "p.txt", "--out", "RUN"),
    ],
)
def test_commands_leave_the_folder_of_another_process_alone(tmp_path, command) -> None:
    run = start_run(tmp_path / "run", Recipe()).folder
    before = {path: path.read_bytes() for path in run.iterdir()}
    with another_process(lambda: only_writer(run)) as pid:
        words = [str(run) if word == "RUN" else word for word in command]
        done = CliRunner().invoke(cli, words)
        assert done.exit_code != 0
        assert f"process {pid} on" in str(done.exception or "") + done.output
        after = {path: path.read_bytes() for path in run.iterdir() if path.name != LOCK}
    assert after == before


def test_what_is_replaced_as_a_whole_is_locked_from_beside(tmp_path, shipped) -> None:
    pairs, scores = read_pairs(shipped), Scores()
    chosen = select(pairs, scores, Select(keep=4, strategy="random"))
    export(pairs, chosen, scores, tmp_path / "subset", recipe=Recipe())
    with another_process(lambda: only_writer(tmp_path / "subset", beside=True)) as pid:
        for write in (
            lambda: export(pairs, chosen, scores, tmp_path / "subset", recipe=Recipe()),
            lambda: train_reward(pairs, tmp_path / "subset"),
        ):
            with pytest.raises(FifaError, match=f"process {pid} on"):
                write()
        export(pairs, chosen, scores, tmp_path / "other", recipe=Recipe())
    assert {path.name for path in tmp_path.iterdir()} == {"subset", "other", f"{LOCK}-subset"}
    export(pairs, chosen, scores, tmp_path / "subset", recipe=Recipe())
    assert {path.name for path in tmp_path.iterdir()} == {"subset", "other"}


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def no_locks(request, monkeypatch):
    """A file system without `flock`."""

    def flock(handle: int, how: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("links", [True, False])
def test_without_locks_a_file_is_one_until_its_process_ends(tmp_path, links, monkeypatch) -> None:
    def no_link(source, target) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr("os.link", no_link)
    folder = tmp_path / "run"
    with another_process(lambda: only_writer(folder)) as pid:
        for _ in range(2):
            with pytest.raises(FifaError, match=f"process {pid} on .* is writing here"):
                only_writer(folder).__enter__()
    assert (folder / LOCK).exists()  # it was killed, and its file stays
    with only_writer(folder), only_writer(folder):
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("no_locks")
def test_another_machines_lock_counts_while_it_is_touched(tmp_path, monkeypatch) -> None:
    path = tmp_path / LOCK
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "command": "x", "since": "now"}))
    with pytest.raises(FifaError, match="process 1 on elsewhere"):
        only_writer(tmp_path).__enter__()
    os.utime(path, (0, 0))
    monkeypatch.setattr("fifa.shards.lock.BEAT", 0.01)
    with only_writer(tmp_path):
        os.utime(path, (0, 0))
        while path.stat().st_mtime == 0:  # the holder touches it
            time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []
    path.touch()  # one that was just made and has no name yet holds nothing
    with only_writer(tmp_path):
        pass


@pytest.mark.usefixtures("no_locks")
def test_of_many_that_find_a_dead_lock_one_takes_it(tmp_path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"pid": 2**30, "host": socket.gethostname()}))
    inside, most, refused = [0], [0], [0]
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        try:
            with only_writer(tmp_path):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.3)
                inside[0] -= 1
        except FifaError:
            refused[0] += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], refused[0]) == (1, 7)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_sweep_takes_only_what_is_old(tmp_path) -> None:
    folder = tmp_path / f"{PREFIX}x"
    folder.mkdir()
    sweep(tmp_path)
    assert folder.exists()
    os.utime(folder, (0, 0))
    sweep(tmp_path)
    assert not folder.exists()


def test_a_sweep_leaves_a_folder_that_is_being_written(tmp_path) -> None:
    (tmp_path / f"{PREFIX}dead").mkdir()
    with another_process(lambda: atomic_folder(tmp_path / "subset")):
        (living,) = (path for path in tmp_path.iterdir() if path.name != f"{PREFIX}dead")
        sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [living]
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nobody_evaluates_where_people_vote_and_nobody_opens_a_second_vote(tmp_path) -> None:
    run = start_run(tmp_path / "run", Recipe()).folder
    (run / "evaluate").mkdir()
    evaluate = ("evaluate", "--base", "b", "--tuned", "t", "--prompts", "p.txt", "--out", str(run))
    with another_process(lambda: only_writer(run / "evaluate")) as pid:
        for command in (evaluate, ("vote", str(run))):
            done = CliRunner().invoke(cli, command)
            assert f"process {pid} on" in str(done.exception or "") + done.output
        with only_writer(run):  # the run itself is free to be selected from
            pass
