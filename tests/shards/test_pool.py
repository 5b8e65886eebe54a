import time
from functools import partial
from itertools import count
from threading import Event

import fsspec
import psutil
import pytest
from steps import EXPECTED, KEYS, SHARDS, Dying, Squares, Waiting, squares_of

from fifa.errors import FifaError
from fifa.shards.ledger import Ledger
from fifa.shards.pool import LocalPool, Shard, Worker, run_shards
from forked import start

ALL = [Shard(key, len(shard), shard) for key, shard in zip(KEYS, SHARDS, strict=True)]


@pytest.fixture(params=["folder", "object store"])
def ledger(request, tmp_path):
    if request.param == "folder":
        yield Ledger(str(tmp_path / "parts"))
    else:
        yield Ledger("memory://bucket/parts")
        fsspec.filesystem("memory").store.clear()


def test_tables_come_in_the_order_of_their_keys(ledger):
    tables = run_shards("squares", Squares, ALL, ledger)
    assert squares_of(tables) == EXPECTED
    assert ledger.keys() == set(KEYS)


def test_a_finished_shard_is_not_done_again(ledger):
    ledger.write(KEYS[2], Squares().finish(SHARDS[2]))
    asked = []

    def prepare(shard):
        asked.append(shard)
        return shard

    tables = run_shards("squares", Squares, ALL, ledger, prepare=prepare)
    assert squares_of(tables) == EXPECTED
    assert asked == [shard for i, shard in enumerate(SHARDS) if i != 2]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data[:40] + b"?" + data[41:]]
)
def test_a_damaged_shard_is_made_again_and_said(ledger, damage, capsys):
    squares_of(run_shards("squares", Squares, ALL, ledger))
    system, path = ledger._system()
    file = f"{path}/{KEYS[1]}.parquet"
    system.pipe_file(file, damage(system.cat_file(file)))
    assert squares_of(run_shards("squares", Squares, ALL, ledger)) == EXPECTED
    assert f"{KEYS[1]}.parquet is damaged: made again" in capsys.readouterr().err


def test_the_next_shard_begins_before_this_one_is_finished(tmp_path):
    events = []

    class Told(Squares):
        def begin(self, shard):
            events.append(("begin", shard[0]))
            return shard

        def finish(self, begun):
            events.append(("finish", begun[0]))
            return super().finish(begun)

    list(LocalPool().map(Told, zip(KEYS, SHARDS[:3], strict=False), Ledger(str(tmp_path))))
    names = [("begin", 0), ("begin", 3), ("finish", 0), ("begin", 6), ("finish", 3), ("finish", 6)]
    assert events == names


def test_a_shard_is_waited_for_while_the_next_is_finished(tmp_path):
    class Waiting(Squares):
        begun = [Event() for _ in SHARDS]  # noqa: RUF012

        def finish(self, begun):
            number = begun[0] // 3
            self.begun[number].set()
            table = super().finish(begun)

            def wait():
                last = number == len(SHARDS) - 1
                assert last or self.begun[number + 1].wait(10)
                return table

            return wait

    ledger = Ledger(str(tmp_path))
    assert squares_of(run_shards("squares", Waiting, ALL, ledger)) == EXPECTED
    assert Worker(Waiting).run(("last", SHARDS[-1]), ledger) == "last"


def test_forgetting_removes_the_parts(ledger):
    ledger.write("a", Squares().finish([1]))
    ledger.forget()
    assert ledger.keys() == set()
    ledger.forget()


def test_a_half_written_file_is_no_finished_shard(tmp_path):
    (tmp_path / ".fifa-tmp-x.parquet").write_bytes(b"half")
    ledger = Ledger(str(tmp_path))
    assert ledger.keys() == set()
    ledger.sweep()
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_opened_is_told():
    with pytest.raises(FifaError, match="cannot open the store"):
        Ledger("nosuch://bucket").keys()


def test_a_process_that_is_killed_loses_nothing(tmp_path):
    make = partial(Squares, tmp_path / "died")
    ledger = Ledger(str(tmp_path / "parts"))
    assert squares_of(run_shards("squares", make, ALL, ledger, LocalPool(2))) == EXPECTED
    assert (tmp_path / "died").exists()
    assert ledger.keys() == set(KEYS)


def test_processes_stay_for_the_same_step_and_go_for_another(tmp_path):
    pool, make = LocalPool(1), partial(Squares)
    ledger = Ledger(str(tmp_path))
    list(pool.map(make, [("a", [1])], ledger))
    first = pool._pool
    list(pool.map(make, [("b", [2])], ledger))
    assert pool._pool is first
    list(pool.map(partial(Squares), [("c", [3])], ledger))
    assert pool._pool is not first
    pool.close()
    assert ledger.keys() == {"a", "b", "c"}


def test_processes_that_never_finish_a_shard_are_told(tmp_path):
    pool = LocalPool(1).map(Dying, zip(KEYS, SHARDS, strict=True), Ledger(str(tmp_path)))
    with pytest.raises(FifaError, match="keep dying"):
        list(pool)


def test_shards_are_taken_as_they_are_needed(tmp_path):
    taken = count()
    shards = ((f"{next(taken)}", [1]) for _ in range(1000))
    results = LocalPool().map(Squares, shards, Ledger(str(tmp_path)))
    next(results)
    assert next(taken) <= 3


def test_a_worker_keeps_what_its_step_makes(tmp_path):
    ledger = Ledger(str(tmp_path))
    assert Worker(Squares).run(("key", [5]), ledger) == "key"
    assert ledger.read("key")["square"].to_pylist() == [25]


def drive(folder):
    """A driver whose worker is at a shard for minutes."""
    list(LocalPool(1).map(partial(Waiting, folder / "pid"), [("a", [1])], Ledger(str(folder))))


def test_workers_end_with_the_process_that_started_them(tmp_path):
    driver, pid = start(drive, tmp_path), tmp_path / "pid"
    while not pid.exists():
        assert driver.is_alive()
        time.sleep(0.1)
    worker = psutil.Process(int(pid.read_text()))
    driver.kill()
    assert worker.wait(30) is None  # no child of this process, and gone
