"""Votes in SQLite: in a write-ahead log, synced, and committed before anybody hears of it."""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fifa.errors import FifaError
from fifa.evaluation.vote.comparisons import Comparison, Trial
from fifa.shards.files import cannot_write

FILE = "votes.sqlite"
FORMAT = 2  # SQLite's user_version
ANSWERS = ("left", "right", "tie")
MAX_VOTERS = 10_000

SCHEMA = """
create table secret (name text primary key, value text not null);
create table comparison (
    key text primary key, ours text not null, theirs text not null, prompt_id text not null,
    prompt text not null, seed integer not null, category text,
    file_0 text not null, file_1 text not null);
create table image (file text primary key, digest text not null);
create table voter (
    id integer primary key, who text not null unique, name text, joined text not null);
create table trial (
    voter integer not null references voter, position integer not null,
    type text not null, comparison text not null references comparison,
    left integer not null, image integer not null, primary key (voter, position)) without rowid;
create table vote (
    id integer primary key, voter integer not null, position integer not null,
    answer text not null check (answer in ('left', 'right', 'tie')), at text not null,
    undone integer not null default 0,
    foreign key (voter, position) references trial (voter, position));
create unique index one_vote on vote (voter, position) where undone = 0;
"""
QUERIES = {
    "comparisons": "select * from comparison order by rowid",
    "votes": "select vote.voter, vote.position, type, comparison, left, image, answer, at "
    "from vote join trial using (voter, position) where undone = 0 "
    "order by vote.voter, vote.position",
    "voters": "select id, name from voter order by id",
    "digests": "select file, digest from image order by file",
}


@dataclass(frozen=True)
class Place:
    """Where a voter is: how many votes stand, of how many trials, and the next two trials."""

    voter: int
    position: int
    total: int
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Vote:
    """A vote that stands.

    Parameters
    ----------
    voter, position
        Whose, and on which trial of theirs.
    trial
        What was shown.
    answer
        One of `ANSWERS`.
    at
        When, ISO 8601 in UTC.
    """

    voter: int
    position: int
    trial: Trial
    answer: str
    at: str

    @property
    def chosen(self) -> int | None:
        """The image that was preferred, 0 or 1 as in `Trial.left`; None for a tie."""
        if self.answer == "tie":
            return None
        return self.trial.left if self.answer == "left" else 1 - self.trial.left


@dataclass(frozen=True)
class Snapshot:
    """All that a file of votes said at one moment, whoever votes meanwhile.

    Parameters
    ----------
    comparisons
        All that anybody was asked for, by key.
    votes
        Those that stand, by voter and position.
    voters
        The name of every voter, by number.
    digests
        The images that were shown, and the digest of their bytes then.
    """

    comparisons: dict[str, Comparison]
    votes: list[Vote]
    voters: dict[int, str | None]
    digests: dict[str, str]


class VoteStore:
    """The file of all votes. Threads and processes may use it at the same time.

    Parameters
    ----------
    path
        Of the file.
    create
        Make it if it is not there, readable by its owner only; else `FifaError`.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        if not path.exists():
            if not create:
                raise FifaError("nobody has voted here yet", where=str(path), do="fifa vote RUN")
            _touch(path)
        with self._open() as db:
            (version,) = db.execute("pragma user_version").fetchone()
            if not version:
                db.execute("pragma journal_mode = wal")
        if not version:
            version = self._begin()
        if version != FORMAT:
            raise FifaError(
                "not a file of votes that this version of fifa can read", where=str(path)
            )

    def _begin(self) -> int:
        """Make the tables where there are none; gives the format's version."""
        with self._change() as db:
            (version,) = db.execute("pragma user_version").fetchone()
            if version or db.execute("select 1 from sqlite_master").fetchone():
                return int(version)
            for statement in SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"pragma user_version = {FORMAT}")
        return FORMAT

    def secret(self, name: str, *, renew: bool = False) -> str:
        """A random text of 128 bits that is kept under ``name``."""
        with self._change() as db:
            if renew:
                db.execute("delete from secret where name = ?", (name,))
            fresh = secrets.token_urlsafe(16)
            db.execute("insert or ignore into secret values (?, ?)", (name, fresh))
            (value,) = db.execute("select value from secret where name = ?", (name,)).fetchone()
        return str(value)

    def add_comparisons(self, comparisons: Sequence[Comparison]) -> None:
        """Add what is not there yet."""
        with self._change() as db:
            db.executemany(
                "insert or ignore into comparison values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                map(astuple, comparisons),
            )

    def remember(self, file: str, digest: str) -> bool:
        """Keep the digest of an image that is shown; False if it was another one before."""
        with self._change() as db:
            db.execute("insert or ignore into image values (?, ?)", (file, digest))
            known = db.execute("select digest from image where file = ?", (file,)).fetchone()
        return bool(known[0] == digest)

    def register(self, who: str, name: str | None, draw: Callable[[int], list[Trial]]) -> None:
        """Add a voter with the trials of ``draw(number)``; one who is known keeps theirs."""
        with self._change() as db:
            if db.execute("select 1 from voter where who = ?", (who,)).fetchone():
                return
            (count,) = db.execute("select count(*) from voter").fetchone()
            if count >= MAX_VOTERS:
                raise FifaError(f"there are {MAX_VOTERS:,} voters already", where=str(self.path))
            added = db.execute(
                "insert into voter (who, name, joined) values (?, ?, ?)", (who, name, _now())
            ).lastrowid
            assert added is not None  # an insert has one
            db.executemany(
                "insert into trial values (?, ?, ?, ?, ?, ?)",
                ((added, i, *astuple(trial)) for i, trial in enumerate(draw(added))),
            )

    def place(self, who: str) -> Place | None:
        """Where the voter called ``who`` is; None if there is none."""
        with self._open() as db:
            return _place(db, who)

    def vote(self, who: str, position: int, answer: str) -> bool:
        """Commit a vote to disk.

        Returns
        -------
        False where the voter is at another position, as in a second tab, and nothing was written.
        The same vote again (sent twice by a bad line) is True and changes nothing.
        """
        with self._change() as db:
            place = _place(db, who)
            if place is None:
                return False
            if position == place.position < place.total:
                db.execute(
                    "insert into vote (voter, position, answer, at) values (?, ?, ?, ?)",
                    (place.voter, position, answer, _now()),
                )
                return True
            if position != place.position - 1:
                return False
            last = db.execute(
                "select answer from vote where voter = ? and position = ? and undone = 0",
                (place.voter, position),
            ).fetchone()
            return bool(last[0] == answer)

    def undo(self, who: str, position: int) -> bool:
        """Take back the vote before ``position``, where the voter is; False if it is elsewhere."""
        with self._change() as db:
            place = _place(db, who)
            if place is None or position != place.position or not position:
                return False
            db.execute(
                "update vote set undone = 1 where voter = ? and position = ? and undone = 0",
                (place.voter, position - 1),
            )
            return True

    def trial(self, who: str, position: int) -> Trial | None:
        """What the voter called ``who`` sees at a position; None if there is nothing."""
        with self._open() as db:
            found = db.execute(
                "select type, comparison, left, image from trial join voter on voter.id = voter "
                "where who = ? and position = ?",
                (who, position),
            ).fetchone()
        return Trial(*found) if found else None

    def read(self) -> Snapshot:
        """The whole file as it is at one moment."""
        with self._open() as db:
            db.execute("begin")  # a reader of a write-ahead log sees one state to its end
            ask = {name: db.execute(query).fetchall() for name, query in QUERIES.items()}
        return Snapshot(
            {row[0]: Comparison(*row) for row in ask["comparisons"]},
            [Vote(row[0], row[1], Trial(*row[2:6]), *row[6:]) for row in ask["votes"]],
            dict(ask["voters"]),
            dict(ask["digests"]),
        )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for one operation: cheap, and safe in any thread."""
        try:
            with closing(sqlite3.connect(self.path, timeout=10, isolation_level=None)) as db:
                db.execute("pragma synchronous = full")  # a commit is on the disk
                db.execute("pragma foreign_keys = on")
                yield db
        except sqlite3.Error as error:
            raise FifaError(f"the votes cannot be kept: {error}", where=str(self.path)) from error

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A connection inside one transaction: committed if the block ends well."""
        with self._open() as db:
            db.execute("begin immediate")
            yield db  # if the block raises, closing rolls back
            db.execute("commit")


def _touch(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise cannot_write(path, error) from error


def _place(db: sqlite3.Connection, who: str) -> Place | None:
    voter = db.execute("select id from voter where who = ?", (who,)).fetchone()
    if voter is None:
        return None
    (position,) = db.execute(
        "select count(*) from vote where voter = ? and undone = 0", voter
    ).fetchone()
    (total,) = db.execute("select count(*) from trial where voter = ?", voter).fetchone()
    trials = db.execute(
        "select type, comparison, left, image from trial "
        "where voter = ? and position >= ? order by position limit 2",
        (voter[0], position),
    ).fetchall()
    return Place(voter[0], position, total, tuple(Trial(*row) for row in trials))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
