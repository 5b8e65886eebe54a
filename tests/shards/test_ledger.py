from contextlib import contextmanager
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

import bucket
from fifa.errors import FifaError
from fifa.shards.ledger import Ledger
from fifa.shards.pool import Shard, map_shards
from fifa.shards.sealed import DamagedError


def squares(numbers):
    return pa.table({"square": [n * n for n in numbers]})


SHARDS = [Shard("a", 2, [1, 2]), Shard("b", 1, [3]), Shard("c", 2, [4, 5])]


@pytest.fixture(params=["folder", "memory"])
def ledger(request, tmp_path):
    return Ledger.beside(tmp_path / "table.parquet" if request.param == "folder" else None)


@pytest.fixture
def bars(monkeypatch):
    """What every progress bar was made with, and what it was told."""
    made = []

    @contextmanager
    def bar(what, total, done):
        advanced = []
        made.append((what, total, done, advanced))
        yield advanced.append

    monkeypatch.setattr("fifa.shards.pool.progress", bar)
    return made


def test_shards_are_joined_in_their_order(ledger):
    table = map_shards("squares", squares, SHARDS, ledger)
    assert table["square"].to_pylist() == [1, 4, 9, 16, 25]


def test_a_stopped_run_goes_on_and_does_no_shard_twice(ledger):
    asked = []

    def fragile(numbers):
        asked.append(numbers)
        if numbers == [4, 5] and len(asked) == 3:
            raise KeyboardInterrupt
        return squares(numbers)

    with pytest.raises(KeyboardInterrupt):
        map_shards("squares", fragile, SHARDS, ledger)
    again = map_shards("squares", fragile, SHARDS, ledger)
    assert again == map_shards("squares", squares, SHARDS, Ledger())
    assert asked == [[1, 2], [3], [4, 5], [4, 5]]


def test_progress_counts_sizes_and_forgetting_removes_the_parts(tmp_path, bars):
    ledger = Ledger.beside(tmp_path / "table.parquet")
    map_shards("squares", squares, SHARDS[:2], ledger)
    map_shards("squares", squares, SHARDS, ledger)
    assert bars == [("squares", 3, 0, [2, 1]), ("squares", 5, 3, [2])]
    assert [path.name for path in tmp_path.iterdir()] == [".parts-table"]
    ledger.forget()
    assert list(tmp_path.iterdir()) == []


def test_shards_lie_beside_their_file_or_where_all_workers_reach():
    assert Ledger.beside(None) == Ledger()
    path = "/run/scores/margin-x-1.parquet"
    assert Ledger.beside(Path(path)).place == "/run/scores/.parts-margin-x-1"
    assert Ledger.beside(Path(path), "s3://bucket/").place == "s3://bucket/.parts-margin-x-1"


@pytest.mark.parametrize("where", ["folder", "store"])
def test_a_large_file_is_lent_once_and_a_damaged_one_is_not_read(where, tmp_path, monkeypatch):
    place = tmp_path / "parts"
    if where == "store":
        monkeypatch.setenv("BUCKET", str(tmp_path))
        fsspec.register_implementation(bucket.NAME, bucket.Bucket, clobber=True)
    ledger = Ledger(str(place) if where == "folder" else f"{bucket.NAME}://parts")
    written = []

    def write(path):
        written.append(path)
        path.write_bytes(b"vectors")

    for _ in range(2):
        ledger.lend("it", write)
        with ledger.borrowed("it") as path:
            assert path.read_bytes().startswith(b"vectors")
            assert (path == place / "it") == (where == "folder")
    assert len(written) == 1
    assert not written[0].exists()
    (place / "it").write_bytes(b"veto")
    with pytest.raises(DamagedError), ledger.borrowed("it"):
        pass
    if where == "folder":
        ledger.lend("it", write)
        assert len(written) == 2
    ledger.forget()
    assert not place.exists()


def test_a_store_that_is_not_there_is_told(tmp_path, monkeypatch):
    bucket.use(tmp_path / "objects")
    monkeypatch.setattr(bucket.Bucket, "put_file", gone)
    ledger = Ledger(f"{bucket.NAME}://parts")
    with pytest.raises(FifaError, match="cannot write"):
        ledger.lend("it", lambda path: path.write_bytes(b"vectors"))
    with pytest.raises(DamagedError, match="missing"), ledger.borrowed("it"):
        pass


def gone(*_, **more):
    raise FileNotFoundError(2, "No such file or directory")
