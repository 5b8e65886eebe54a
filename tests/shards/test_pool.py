from functools import partial
from itertools import count

import fsspec
import pytest
from steps import EXPECTED, KEYS, SHARDS, Dying, Squares, squares_of

from fifa.errors import FifaError
from fifa.shards.pool import LocalPool, Worker, run_shards
from fifa.shards.store import Store


@pytest.fixture(params=["folder", "object store"])
def store(request, tmp_path):
    if request.param == "folder":
        yield Store(str(tmp_path / "parts"))
    else:
        yield Store("memory://bucket/parts")
        fsspec.filesystem("memory").store.clear()


def test_tables_come_in_the_order_of_their_keys(store):
    tables = run_shards(LocalPool(), Squares, KEYS, SHARDS.__getitem__, store)
    assert squares_of(tables) == EXPECTED
    assert store.keys() == set(KEYS)


def test_a_finished_shard_is_not_done_again(store):
    store.write(KEYS[2], Squares().finish(SHARDS[2]))
    asked, done = [], []

    def shard(i):
        asked.append(i)
        return SHARDS[i]

    tables = run_shards(LocalPool(), Squares, KEYS, shard, store, done.append)
    assert squares_of(tables) == EXPECTED
    assert asked == [i for i in range(12) if i != 2]
    assert sorted(done) == KEYS


def test_the_next_shard_begins_before_this_one_is_finished(tmp_path):
    events = []

    class Told(Squares):
        def begin(self, shard):
            events.append(("begin", shard[0]))
            return shard

        def finish(self, begun):
            events.append(("finish", begun[0]))
            return super().finish(begun)

    list(LocalPool().map(Told, zip(KEYS, SHARDS[:3], strict=False), Store(str(tmp_path))))
    names = [("begin", 0), ("begin", 3), ("finish", 0), ("begin", 6), ("finish", 3), ("finish", 6)]
    assert events == names


def test_forgetting_removes_the_parts(store):
    store.write("a", Squares().finish([1]))
    store.forget()
    assert store.keys() == set()
    store.forget()


def test_a_half_written_file_is_no_finished_shard(tmp_path):
    (tmp_path / ".fifa-tmp-x.parquet").write_bytes(b"half")
    store = Store(str(tmp_path))
    assert store.keys() == set()
    store.sweep()
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_opened_is_told():
    with pytest.raises(FifaError, match="cannot open the store"):
        Store("nosuch://bucket").keys()


def test_a_process_that_is_killed_loses_nothing(tmp_path):
    make = partial(Squares, tmp_path / "died")
    store = Store(str(tmp_path / "parts"))
    done = []
    tables = run_shards(LocalPool(2), make, KEYS, SHARDS.__getitem__, store, done.append)
    assert squares_of(tables) == EXPECTED
    assert (tmp_path / "died").exists()
    assert set(done) == set(KEYS)


def test_processes_stay_for_the_same_step_and_go_for_another(tmp_path):
    pool, make = LocalPool(1), partial(Squares)
    store = Store(str(tmp_path))
    list(pool.map(make, [("a", [1])], store))
    first = pool._pool
    list(pool.map(make, [("b", [2])], store))
    assert pool._pool is first
    list(pool.map(partial(Squares), [("c", [3])], store))
    assert pool._pool is not first
    pool.close()
    assert store.keys() == {"a", "b", "c"}


def test_processes_that_never_finish_a_shard_are_told(tmp_path):
    pool = LocalPool(1).map(Dying, zip(KEYS, SHARDS, strict=True), Store(str(tmp_path)))
    with pytest.raises(FifaError, match="keep dying"):
        list(pool)


def test_shards_are_taken_as_they_are_needed(tmp_path):
    taken = count()
    shards = ((f"{next(taken)}", [1]) for _ in range(1000))
    results = LocalPool().map(Squares, shards, Store(str(tmp_path)))
    next(results)
    assert next(taken) <= 3


def test_a_worker_keeps_what_its_step_makes(tmp_path):
    store = Store(str(tmp_path))
    assert Worker(Squares).run(("key", [5]), store) == "key"
    assert store.read("key")["square"].to_pylist() == [25]
