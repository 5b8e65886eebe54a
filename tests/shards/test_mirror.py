"""Folders in a store: killed at any request, with failing ones, by two commands, by any clock."""

import hashlib
import io
import json
import os
import signal
import sqlite3
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from fsspec.asyn import get_loop

import bucket
from fifa.cli import cli, main
from fifa.config import Compute
from fifa.errors import FifaError
from fifa.shards import claim, lock, mirror, stores
from fifa.shards.executors import executor_of
from fifa.shards.ledger import Ledger
from fifa.shards.mirror import INDEX, local, mirrored
from forked import finish, start
from kill import contents

URL = "bucket://runs/one"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The store, and quick beats; a function that goes to another machine's empty cache."""
    monkeypatch.setenv("BUCKET", str(tmp_path / "bucket"))
    bucket.use(tmp_path / "bucket")
    monkeypatch.setattr(bucket.Bucket, "faults", staticmethod(lambda what, path: None))
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(claim, "LOOK", 0.01)
    monkeypatch.setattr(stores, "PAUSE", 0.001)
    monkeypatch.setattr("fifa.console._names", {})

    def elsewhere(name):
        monkeypatch.setenv("FIFA_CACHE", str(tmp_path / name))

    elsewhere("cache")
    yield elsewhere
    stores.CONDITIONAL.pop(bucket.NAME)


def write(folder, **files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name("new").write_text(text)
        path.with_name("new").rename(path)


def texts(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".fifa")
    }


def test_what_is_written_is_in_the_store_under_its_own_names_and_comes_back(here):
    with mirrored(URL) as folder:
        write(folder, a="1", **{"b/c": "2"})
        (folder / ".fifa-tmp-x").write_text("not finished")
    assert bucket.objects("runs/one") == {"a": b"1", "b/c": b"2"}
    here("elsewhere")
    assert texts(local(URL)) == {"a": "1", "b/c": "2"}
    with mirrored(URL) as folder:
        (folder / "a").unlink()
        write(folder, **{"b/c": "3"})
        os.utime(folder / "b" / "c", ns=(1, 7_000_000_001))
    assert bucket.objects("runs/one") == {"b/c": b"3"}
    here("a third one")
    assert texts(local(URL)) == {"b/c": "3"}
    assert (local(URL) / "b" / "c").stat().st_mtime_ns == 7_000_000_001


def test_a_folder_within_one_is_that_ones_and_a_file_is_fetched_alone(here):
    with mirrored(URL) as folder:
        write(folder, a="1", **{"b/c": "2"})
    with mirrored(f"{URL}/b") as inside, mirrored(URL) as folder:
        assert inside == folder / "b"
        write(inside, d="3")
    assert bucket.objects("runs/one") == {"a": b"1", "b/c": b"2", "b/d": b"3"}
    assert local(f"{URL}/b/d").read_text() == "3"
    Path(os.environ["BUCKET"], "recipe.yaml").write_text("x")
    assert local("bucket://recipe.yaml").read_text() == "x"


def test_actors_keep_their_shards_in_the_store_and_nobody_takes_these_for_files(here):
    cluster, table = Compute(executor="ray"), pa.table({"a": [1]})
    with mirrored(URL), executor_of(cluster) as executor:
        ledger = Ledger.beside(Path("table.parquet"), executor.store)
        ledger.write("one", table)
        there = [path for path in bucket.objects("runs/one") if path.endswith(".parquet")]
        assert there == [".fifa-shards/.parts-table/one.parquet"]
        assert ledger.keys() == {"one"}
        of_one = Path(os.environ["BUCKET"], "runs/one", there[0])
        of_one.with_name("two.parquet").write_bytes(of_one.read_bytes())  # by another process
        assert ledger.read("two") == table
        with executor_of(Compute()) as local_pool:
            assert local_pool.store is None
        with executor_of(replace(cluster, store="shared")) as other:
            assert other.store == "shared"
    Path(os.environ["BUCKET"], "runs/one", INDEX).unlink()  # as if somebody had copied it there
    here("elsewhere")
    assert texts(local(URL)) == {}
    assert ledger.read("one") == table
    with executor_of(cluster) as executor:
        assert executor.store is None


def test_a_link_to_a_folder_within_is_left_out(here, tmp_path):
    write(tmp_path / "data", outside="2")
    with mirrored(URL) as folder:
        write(folder, **{"scores/a": "1", "work/b": "3"})
        (folder / "work" / "scores").symlink_to(folder / "scores", target_is_directory=True)
        (folder / "work" / "up").symlink_to(folder, target_is_directory=True)
        (folder / "data").symlink_to(tmp_path / "data", target_is_directory=True)
    assert set(bucket.objects("runs/one")) == {"scores/a", "work/b", "data/outside"}
    here("elsewhere")
    assert texts(local(URL)) == {"scores/a": "1", "work/b": "3", "data/outside": "2"}


def test_a_folder_that_somebody_copied_there_is_taken_as_it_is(here):
    write(Path(os.environ["BUCKET"], "runs/one"), a="1", **{"b/c": "2"})
    assert texts(local(URL)) == {"a": "1", "b/c": "2"}
    write(Path(os.environ["BUCKET"], "runs/one"), a="other")
    assert texts(local(URL)) == {"a": "other", "b/c": "2"}
    with mirrored(URL) as folder:
        write(folder, d="3")
    here("elsewhere")
    assert texts(local(URL)) == {"a": "other", "b/c": "2", "d": "3"}


def test_what_is_damaged_in_the_store_is_told_and_a_damaged_index_refused(here, capsys):
    with mirrored(URL) as folder:
        write(folder, a="1", b="2")
    there = Path(os.environ["BUCKET"], "runs/one")
    there.joinpath("a").write_text("x")
    there.joinpath("b").unlink()
    here("elsewhere")
    with mirrored(URL) as folder:
        assert texts(folder) == {"a": "x"}
        write(folder, a="1", b="2")
    told = capsys.readouterr().err
    assert f"{URL}/a is not what fifa wrote there" in told and f"{URL}/b is not" in told
    assert bucket.objects("runs/one") == {"a": b"1", "b": b"2"}
    index = there / INDEX
    index.write_text(index.read_text().replace('"a"', '"z"'))
    with pytest.raises(FifaError, match="index of the folder is damaged"):
        local(URL)


def test_an_index_that_leads_out_of_its_folder_is_refused(here):
    from fifa.shards.files import sealed_line

    index = {"batch": "x", "files": {"../out": [1, "d"]}, "times": {}, "coming": {}}
    write(Path(os.environ["BUCKET"], "runs/one"), **{INDEX: sealed_line(index)})
    with pytest.raises(FifaError, match="outside of its folder"):
        local(URL)


def test_the_store_has_what_was_there_at_one_moment_while_the_command_works(here, monkeypatch):
    monkeypatch.setattr(mirror, "EVERY", 0.01)
    wrong, ended = [], threading.Event()

    def reader():
        while not ended.is_set():
            found = stores.read_object(f"{URL}/{INDEX}")
            names = json.loads(found[0])["files"] if found else {}
            if {"first", "second"} & names.keys() and len(names) % 2:
                wrong.append(sorted(names))

    thread = threading.Thread(target=reader)
    thread.start()
    with mirrored(URL) as folder:
        for number in range(30):  # two files that come and go together, as a folder
            write(folder.parent / "made", first=str(number), second=str(number))
            if (folder / "x").exists():
                (folder / "x").rename(folder.parent / f"gone-{number}")
            folder.mkdir(exist_ok=True)
            (folder.parent / "made").rename(folder / "x")
            time.sleep(0.01)
        done = stores.read_object(f"{URL}/{INDEX}")
    ended.set()
    thread.join()
    assert not wrong and done is not None
    assert bucket.objects("runs/one") == {"x/first": b"29", "x/second": b"29"}


def test_logs_grow_and_databases_are_copied_whole(here):
    with mirrored(URL) as folder:
        folder.mkdir()
        base = sqlite3.connect(folder / "votes.sqlite")
        base.execute("pragma journal_mode=wal")
        base.execute("create table votes (n)")
        base.execute("insert into votes values (1)")
        base.commit()
        (folder / "log.jsonl").write_text("{}\n")
    base.close()
    assert set(bucket.objects("runs/one")) == {"votes.sqlite", "log.jsonl"}
    here("elsewhere")
    found = sqlite3.connect(local(URL) / "votes.sqlite")
    assert found.execute("select n from votes").fetchall() == [(1,)]
    found.close()


def test_a_second_command_is_refused_by_name_and_reading_is_not(here, monkeypatch):
    monkeypatch.setattr(claim, "machine", lambda: "")
    with mirrored(URL) as folder:
        write(folder, a="1")
        here("elsewhere")
        with pytest.raises(FifaError, match=f"process {os.getpid()} on .* is writing here") as told:
            claim.Claim(URL)
        assert told.value.where == URL
        mirror._open.clear()
        assert texts(local(URL)) == {}
        mirror._open[URL] = None
    claim.Claim(URL).release()


def hold_and_die(folder):
    bucket.use(folder)
    claim.Claim(URL)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_commands_lock_is_free_here_and_after_a_time_elsewhere(here, monkeypatch, capsys):
    finish(start(hold_and_die, os.environ["BUCKET"]), -signal.SIGKILL)
    monkeypatch.setattr(lock, "STALE", 1.0)
    monkeypatch.setattr(claim, "machine", lambda: "another")
    began = time.monotonic()
    claim.Claim(URL).release()
    assert time.monotonic() - began >= 1
    assert "is taken for dead" in capsys.readouterr().err


def test_on_its_own_machine_a_dead_commands_lock_is_free_at_once(here):
    finish(start(hold_and_die, os.environ["BUCKET"]), -signal.SIGKILL)
    began = time.monotonic()
    claim.Claim(URL).release()
    assert time.monotonic() - began < lock.STALE / 10


@pytest.mark.parametrize("jump", [-(10**6), 10**6])
def test_no_clock_that_is_set_takes_a_living_lock_or_keeps_a_dead_one(here, monkeypatch, jump):
    monkeypatch.setattr(claim, "machine", lambda: "")
    monkeypatch.setattr(lock, "STALE", 0.5)
    real = time.time
    held = claim.Claim(URL)
    monkeypatch.setattr(time, "time", lambda: real() + jump)  # while it is held
    with pytest.raises(FifaError, match="is writing here"):
        claim.Claim(URL)
    held._ended.set()  # no beat any more: it has died
    held._beats.join()
    claim.Claim(URL).release()


def test_of_many_that_find_a_dead_lock_one_takes_it(here, monkeypatch):
    monkeypatch.setattr(claim, "machine", lambda: "")
    monkeypatch.setattr(lock, "STALE", 0.5)
    dead = claim.Claim(URL)
    dead._ended.set()
    dead._beats.join()
    got, refused = [], []

    def take():
        try:
            got.append(claim.Claim(URL))
        except FifaError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 5
    with pytest.raises(FifaError, match="has taken this folder over"):
        dead.check()
    got[0].release()


def test_who_was_taken_for_dead_and_lives_changes_nothing_any_more(here, monkeypatch):
    monkeypatch.setattr(claim, "machine", lambda: "")
    monkeypatch.setattr(lock, "STALE", 0.2)
    with pytest.raises(FifaError, match="has taken this folder over"), mirrored(URL) as folder:
        write(folder, a="old")
        held = mirror._open[URL]._claim
        held._ended.set()  # it sleeps
        held._beats.join()
        mirror._open.clear()
        here("elsewhere")
        with mirrored(URL) as other:
            write(other, a="new")
        mirror._open[URL] = None
    assert bucket.objects("runs/one") == {"a": b"new"}


def test_a_command_that_lost_its_folder_is_stopped(here, monkeypatch):
    monkeypatch.setattr(mirror, "EVERY", 0.05)
    monkeypatch.setattr(claim, "machine", lambda: "")
    monkeypatch.setattr(lock, "STALE", 0.2)
    with pytest.raises(FifaError, match="has taken this folder over"), mirrored(URL) as folder:
        held = mirror._open[URL]._claim
        held._ended.set()
        held._beats.join()
        other = claim.Claim(URL)
        write(folder, a="1")
        time.sleep(60)
    other.release()


def test_a_store_that_keeps_no_conditions_is_refused(here, monkeypatch):
    def careless(system, path, data, version):
        found = bucket.read(system, path)[1] if Path(path).exists() else ""
        return bucket.write(system, path, data, found)

    monkeypatch.setitem(stores.CONDITIONAL, bucket.NAME, (bucket.read, careless))
    with pytest.raises(FifaError, match="ignores conditions"):
        claim.Claim(URL)
    with pytest.raises(FifaError, match="no conditional writes"):
        local("memory://x")


def test_a_store_that_refuses_what_is_right_is_told_so(here, monkeypatch):
    def fussy(system, path, data, version):
        return None if version else bucket.write(system, path, data, version)

    monkeypatch.setitem(stores.CONDITIONAL, bucket.NAME, (bucket.read, fussy))
    with pytest.raises(FifaError, match="refuses a write whose condition holds"):
        claim.Claim(URL)


class Server:
    """What s3fs asks of a server; one with ``bare`` compares with ETags without their quotes.

    As the gateway of Ceph 16 does, of which this is what was seen.
    """

    def __init__(self, bare):
        self.bare, self.held, self.loop = bare, {}, get_loop()

    split_path = staticmethod(lambda path: (*path.split("/", 1), None))

    def invalidate_cache(self, path):
        pass

    def call_s3(self, what, **asked):
        there, key = self.tag(asked["Key"]), asked["Key"]
        right = asked.get("IfMatch") in (None, there.strip('"') if self.bare else there)
        if (there and "IfNoneMatch" in asked) or not right:
            refused = Exception()
            refused.response = {"Error": {"Code": "PreconditionFailed"}}
            raise OSError(22, "refused") from refused
        self.held[key] = asked["Body"]
        return {"ETag": self.tag(key)}

    async def _call_s3(self, what, **asked):
        if asked["Key"] not in self.held:
            raise FileNotFoundError(asked["Key"])
        return {"Body": Body(self.held[asked["Key"]]), "ETag": self.tag(asked["Key"])}

    def tag(self, key):
        return f'"{hashlib.md5(self.held[key]).hexdigest()}"' if key in self.held else ""


class Body(io.BytesIO):
    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def read(self):
        return self.getvalue()


@pytest.mark.parametrize("bare", [False, True])
def test_a_server_compares_etags_with_or_without_their_quotes(bare):
    server, name = Server(bare), "bucket/name"
    read, write = stores.CONDITIONAL["s3"]
    first = write(server, name, b"1", "")
    assert write(server, name, b"2", "") is None
    second = write(server, name, b"2", first)
    assert second not in (None, first)
    assert write(server, name, b"3", first) is None
    assert read(server, name) == (b"2", second)


def test_several_processes_cannot_write_together(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FifaError, match="several processes"):
        mirrored(URL).__enter__()


OPTIONS = ["--margin", "column:clipscore_0,clipscore_1", "--keep", "0.2"]
OPTIONS += ["--quality", "column:proxy_0", "--diversity", "none"]


def run(folder, source, out, every, death=0, failing=0):
    bucket.use(folder)
    stores.PAUSE = 0.001
    mirror.EVERY = every
    if death:
        bucket.die_at(death)
    if failing:
        bucket.fail(0.1, failing)
    sys.argv = ["fifa", "filter", str(source), *OPTIONS, "--out", str(out)]
    main()


def test_killed_at_any_request_a_run_goes_on_elsewhere_to_the_same_bytes(here, shipped, memory):
    there = str(memory / "bucket")
    Path(there).mkdir()
    os.environ["BUCKET"] = there
    finish(start(run, there, shipped, memory / "run", 10))
    expected = contents(memory / "run")
    killed = 0
    for nth in (1, 8, 14, 21, 30, 44):
        url = f"bucket://runs/{nth}"
        first = start(run, there, shipped, url, 0.05, nth, FIFA_CACHE=str(memory / "one"))
        first.join(120)
        killed += first.exitcode == -signal.SIGKILL
        again = f"other-{nth}" if nth % 2 else "one"  # in an empty cache, and in its own
        finish(start(run, there, shipped, url, 10, FIFA_CACHE=str(memory / again)))
        here(str(memory / "last"))
        assert contents(local(url)) == expected
        names = {name for name in bucket.objects(f"runs/{nth}") if not name.startswith(".fifa")}
        assert names >= expected.keys()
    assert killed >= 4


def test_where_a_tenth_of_all_requests_fails_the_bytes_are_the_same(here, shipped, memory):
    there = str(memory / "bucket")
    Path(there).mkdir()
    os.environ["BUCKET"] = there
    finish(start(run, there, shipped, memory / "run", 10))
    for seed in (1, 2):
        url = f"bucket://runs/{seed}"
        finish(start(run, there, shipped, url, 0.05, 0, seed, FIFA_CACHE=str(memory / "cache")))
        here(str(memory / f"last-{seed}"))
        assert contents(local(url)) == contents(memory / "run")


def test_commands_take_urls_and_print_them(here, shipped):
    def fifa(*words):
        done = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    assert fifa("filter", str(shipped), *OPTIONS, "--out", URL) == f"{URL}/report.html\n"
    here("elsewhere")
    assert json.loads(fifa("select", URL, "--keep", "0.1", "--json"))["selection"].startswith(URL)
    assert fifa("export", URL).endswith(f"{URL}/subset\n")
    assert "of 345 pairs kept" in fifa("info", URL)
    assert f"{URL}/report.html" in fifa("report", URL)
    assert fifa("score", URL).endswith(f"{URL}/scores\n")
    fifa("rebuild", f"{URL}/subset/subset.json", "--source", str(shipped), "--out", f"{URL}/made")
    names = bucket.objects("runs/one")
    assert names["subset/subset.json"] and names["made/subset.json"] and names["report.html"]


def test_a_url_is_no_folder_for_functions_that_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("s3://bucket/run", Path("s3://bucket/run")):
        with pytest.raises(FifaError, match="the URL of a store"):
            lock.only_writer(place).__enter__()
    assert list(tmp_path.iterdir()) == []
