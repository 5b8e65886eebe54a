"""Where votes are kept: a file of SQLite, or a schema in a PostgreSQL database.

Both take the same SQL, with ``?`` for values. What `change` has returned is on the disk.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar
from urllib.parse import urlsplit

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.shards.files import cannot_write

FORMAT = 2  # of the tables
T = TypeVar("T")
Values = Sequence[object]


class Session(Protocol):
    """A connection inside a transaction."""

    def execute(self, sql: str, values: Values = (), /) -> Any:
        """A cursor with ``fetchone``, ``fetchall`` and ``rowcount``."""

    def executemany(self, sql: str, rows: Sequence[Values], /) -> Any:
        """One statement for each row of values."""


class Database(Protocol):
    """What `Sqlite` and `Postgres` share.

    Parameters
    ----------
    where
        Its name in messages, without any secret.
    words
        What stands for ``{id}``, ``{number}``, ``{compact}``, ``{order}`` and ``{lock}`` in SQL.
    """

    @property
    def where(self) -> str:
        """Its name in messages."""

    words: ClassVar[dict[str, str]]

    def make(self, tables: str, *, create: bool) -> None:
        """Make the tables where there are none; `FifaError` for those of another version."""

    def read(self, work: Callable[[Session], T]) -> T:
        """What ``work`` finds; the database is as at one moment to its end."""

    def change(self, work: Callable[[Session], T]) -> T:
        """What ``work`` gives, in one transaction, committed to the disk; all of it or nothing."""


class Sqlite:
    """A file, in a write-ahead log. Threads and processes may use it at the same time.

    What several threads want to write at one moment is written by one of them and synced once.
    """

    words: ClassVar[dict[str, str]] = {
        "id": "integer primary key",
        "number": "",
        "compact": "without rowid",
        "order": "rowid",
        "lock": "",
    }

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: deque[tuple[Callable[[Session], Any], Future[Any]]] = deque()
        self._writing = threading.Lock()
        self._writer: sqlite3.Connection | None = None  # to close the last one costs a checkpoint

    @property
    def where(self) -> str:
        """The file."""
        return str(self.path)

    def make(self, tables: str, *, create: bool) -> None:
        """As `Database.make`; a file that is made can be read by its owner only."""
        if not self.path.exists():
            if not create:
                raise nobody_voted(self.where)
            _touch(self.path)
        with self._told(), closing(self._connect()) as db:
            (version,) = db.execute("pragma user_version").fetchone()
            if not version:
                db.execute("pragma journal_mode = wal")

        def begin(db: Session) -> int:
            (version,) = db.execute("pragma user_version").fetchone()
            if not version and not db.execute("select 1 from sqlite_master").fetchone():
                version = FORMAT
                db.execute(f"pragma user_version = {FORMAT}")
            if version == FORMAT:
                for statement in tables.split(";"):
                    db.execute(statement)
            return int(version)

        if version != FORMAT or create:
            version = self.change(begin)
        if version != FORMAT:
            raise _other_version(self.where)

    def read(self, work: Callable[[Session], T]) -> T:
        """As `Database.read`."""
        with self._told(), closing(self._connect()) as db:
            db.execute("begin")  # a reader of a write-ahead log sees one state to its end
            return work(db)

    def change(self, work: Callable[[Session], T]) -> T:
        """As `Database.change`."""
        future: Future[T] = Future()
        self._waiting.append((work, future))
        with self._writing:
            if not future.done():
                self._write()
        return future.result()

    def _write(self) -> None:
        jobs = []
        with suppress(IndexError):
            while True:
                jobs.append(self._waiting.popleft())
        try:
            with self._told():
                ends = self._commit([work for work, _ in jobs])
        except BaseException as failure:
            if self._writer:
                self._writer.close()  # which rolls back
                self._writer = None
            for _, future in jobs:
                future.set_exception(failure)
            return
        for (_, future), (result, error) in zip(jobs, ends, strict=True):
            if error:
                future.set_exception(error)
            else:
                future.set_result(result)

    def _commit(
        self, works: Sequence[Callable[[Session], Any]]
    ) -> list[tuple[Any, Exception | None]]:
        """What each gave or raised; what raised has changed nothing."""
        if self._writer is None:
            self._writer = self._connect()
            weakref.finalize(self, self._writer.close)
        db, ends = self._writer, list[tuple[Any, Exception | None]]()
        db.execute("begin immediate")
        for work in works:
            db.execute("savepoint one")
            try:
                with self._told():
                    ends.append((work(db), None))
            except Exception as error:
                db.execute("rollback to one")
                ends.append((None, error))
            db.execute("release one")
        db.execute("commit")
        return ends

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
        try:
            db.execute("pragma synchronous = full")  # a commit is on the disk
            db.execute("pragma foreign_keys = on")
        except BaseException:
            db.close()
            raise
        return db

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise FifaError(f"the votes cannot be kept: {error}", where=self.where) from error


class Postgres:
    """A schema of a PostgreSQL database, which several servers may use at the same time.

    Parameters
    ----------
    url
        ``postgresql://user@host:port/database``. A password is better kept in PGPASSWORD or
        ``~/.pgpass``; no message of ours shows it.
    schema
        Its name: letters, digits and underscores.
    """

    words: ClassVar[dict[str, str]] = {
        "id": "bigint generated by default as identity primary key",
        "number": ", number bigint generated always as identity",
        "compact": "",
        "order": "number",
        "lock": "for update",
    }

    def __init__(self, url: str, schema: str) -> None:
        self._psycopg = require("psycopg", "postgres", what="--database")
        try:
            self._named = self._psycopg.conninfo.conninfo_to_dict(url)
            assert urlsplit(url).scheme in ("postgresql", "postgres")
        except (self._psycopg.Error, ValueError, AssertionError):  # which quote the URL
            raise FifaError(
                "--database is no URL of a PostgreSQL database",
                do="write it as postgresql://user@host:5432/database",
            ) from None
        self._url, self.schema = url, schema
        self._idle: deque[_Postgres] = deque()
        weakref.finalize(self, _close_all, self._idle)

    @property
    def where(self) -> str:
        """Server, database and schema."""
        named = self._named
        host, port = named.get("host", "localhost"), named.get("port", 5432)
        return f"postgresql://{host}:{port}/{named.get('dbname', '')}, schema {self.schema}"

    def make(self, tables: str, *, create: bool) -> None:
        """As `Database.make`."""

        def begin(db: Session) -> int:
            known = db.execute("select 1 from pg_namespace where nspname = ?", (self.schema,))
            if not known.fetchone() and not create:
                raise nobody_voted(self.where)
            if create:  # one server after the other
                db.execute("select pg_advisory_xact_lock(hashtext(?))", (self.schema,))
                db.execute(f'create schema if not exists "{self.schema}"')
                db.execute("create table if not exists format (version integer primary key)")
                if not db.execute("select version from format").fetchone():
                    db.execute("insert into format values (?)", (FORMAT,))
                for statement in filter(str.strip, tables.split(";")):
                    db.execute(statement)
            (version,) = db.execute("select version from format").fetchone()
            return int(version)

        if self.change(begin) != FORMAT:
            raise _other_version(self.where)

    def read(self, work: Callable[[Session], T]) -> T:
        """As `Database.read`."""
        return self._within("begin isolation level repeatable read read only", work)

    def change(self, work: Callable[[Session], T]) -> T:
        """As `Database.change`."""
        return self._within("begin", work)

    def _within(self, begin: str, work: Callable[[Session], T]) -> T:
        try:
            db = self._begun(begin)
            try:
                result = work(db)
                db.execute("commit")
            except BaseException:
                db.close()  # which rolls back
                raise
        except self._psycopg.Error as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            if secret := self._named.get("password"):
                said = said.replace(str(secret), "...")
            raise FifaError(f"the votes cannot be kept: {said}", where=self.where) from None
        self._idle.append(db)
        return result

    def _begun(self, begin: str) -> _Postgres:
        """A connection in a transaction; one that the server closed meanwhile is made anew."""
        with suppress(IndexError):
            while True:
                db = self._idle.pop()
                try:
                    db.execute(begin)
                    return db
                except self._psycopg.Error:
                    db.close()
        db = _Postgres(self._connect())
        try:
            db.execute("set synchronous_commit = on")  # a commit is on the disk
            db.execute(f'set search_path = "{self.schema}"')
            db.execute(begin)
        except BaseException:
            db.close()
            raise
        return db

    def _connect(self) -> Any:
        return self._psycopg.connect(
            self._url, autocommit=True, connect_timeout=10, client_encoding="utf8"
        )


class _Postgres:
    """A connection of psycopg that takes SQLite's ``?``."""

    def __init__(self, db: Any) -> None:
        self.db = db

    def execute(self, sql: str, values: Values = ()) -> Any:
        return self.db.execute(sql.replace("?", "%s"), values or None)

    def executemany(self, sql: str, rows: Sequence[Values]) -> Any:
        with self.db.cursor() as cursor:
            cursor.executemany(sql.replace("?", "%s"), rows)

    def close(self) -> None:
        self.db.close()


def nobody_voted(where: str, do: str = "fifa vote RUN") -> FifaError:
    """The error for votes that are not there."""
    return FifaError("nobody has voted here yet", where=where, do=do)


def _other_version(where: str) -> FifaError:
    return FifaError("not a file of votes that this version of fifa can read", where=where)


def _close_all(idle: deque[_Postgres]) -> None:
    for db in idle:
        db.close()


def _touch(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise cannot_write(path, error) from error
