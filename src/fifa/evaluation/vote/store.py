"""The votes on a run: each is committed to the disk before anybody hears of it."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fifa.errors import FifaError
from fifa.evaluation.generate import FOLDER
from fifa.evaluation.vote.comparisons import COMPARE, REPEAT, Comparison, Trial
from fifa.evaluation.vote.database import Database, Postgres, Session, Sqlite, nobody_voted
from fifa.shards.files import cannot_write

FILE = "votes.sqlite"
SCHEMA_FILE = "votes.schema"  # names the schema of a run's votes in PostgreSQL
ANSWERS = ("left", "right", "tie")
MAX_VOTERS = 10_000
CLAIM = 300.0  # seconds that a pair with a quota waits for a voter who was shown it

TABLES = """
create table if not exists secret (name text primary key, value text not null);
create table if not exists comparison (
    key text primary key, ours text not null, theirs text not null, prompt_id text not null,
    prompt text not null, seed integer not null, category text,
    file_0 text not null, file_1 text not null {number});
create table if not exists image (file text primary key, digest text not null);
create table if not exists voter (
    id {id}, who text not null unique, name text, joined text not null);
create table if not exists trial (
    voter integer not null references voter, position integer not null,
    type text not null, comparison text not null references comparison,
    "left" integer not null, image integer not null, primary key (voter, position)) {compact};
create table if not exists vote (
    id {id}, voter integer not null, position integer not null,
    answer text not null check (answer in ('left', 'right', 'tie')), at text not null,
    undone integer not null default 0,
    foreign key (voter, position) references trial (voter, position));
create unique index if not exists one_vote on vote (voter, position) where undone = 0;
create table if not exists tally (
    comparison text primary key references comparison, votes integer not null);
"""
COMPARISON = "key, ours, theirs, prompt_id, prompt, seed, category, file_0, file_1"
TRIAL = 'type, comparison, "left", image'
QUERIES = {
    "comparisons": f"select {COMPARISON} from comparison order by {{order}}",
    "votes": f"select vote.voter, vote.position, {TRIAL}, answer, at "
    "from vote join trial using (voter, position) where undone = 0 "
    "order by vote.voter, vote.position",
    "voters": "select id, name from voter order by id",
    "digests": "select file, digest from image order by file",
}
# The votes that stand on each comparison, for files that an earlier version made
FILL = """
insert into tally select key, count(voted) from comparison left join (
    select comparison as voted from vote join trial using (voter, position)
    where undone = 0 and type = 'compare') as standing on voted = key
where true group by key on conflict do nothing
"""
PROGRESS = """
select voter.id, name, joined, count(vote.id), max(at),
    (select count(*) from trial where trial.voter = voter.id)
from voter left join vote on vote.voter = voter.id and undone = 0
group by voter.id, name, joined order by voter.id
"""
LEFT = f"""
select trial.position, {TRIAL}, coalesce(votes, 0) from trial
left join tally using (comparison)
where voter = ? and not exists (
    select 1 from vote
    where vote.voter = trial.voter and vote.position = trial.position and undone = 0)
order by trial.position
"""


@dataclass(frozen=True)
class Quotas:
    """How many votes one voter gives at most, and one comparison gets; None is no limit."""

    voter: int | None = None
    pair: int | None = None


@dataclass(frozen=True)
class Place:
    """Where a voter is.

    Parameters
    ----------
    voter
        Their number.
    position
        Of the trial that comes next; after the last one, how many there are.
    votes
        Of theirs that stand.
    total
        Votes when they are through, as far as is known now.
    positions, trials
        The next two trials.
    """

    voter: int
    position: int
    votes: int
    total: int
    positions: tuple[int, ...]
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Progress:
    """How far a voter is: votes that stand, of how many at most, and when the last one came."""

    voter: int
    name: str | None
    joined: str
    votes: int
    last: str | None
    total: int


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
    """All votes on a run. Threads, and on PostgreSQL servers, may use them at the same time.

    Parameters
    ----------
    database
        Where they are kept; a path is a file of SQLite.
    create
        Make it if it is not there; else `FifaError`.
    quotas
        What is asked for at most.
    """

    def __init__(
        self, database: Path | Database, *, create: bool = False, quotas: Quotas | None = None
    ) -> None:
        self.database = Sqlite(database) if isinstance(database, Path) else database
        self.quotas = quotas or Quotas()
        self._claims: dict[int, tuple[int, str, float]] = {}  # by voter: position, comparison, when
        self._claiming = threading.Lock()
        self.database.make(self._sql(TABLES), create=create)

    def _sql(self, text: str) -> str:
        return text.format_map(self.database.words)

    def secret(self, name: str, *, renew: bool = False) -> str:
        """A random text of 128 bits that is kept under ``name``."""
        fresh = secrets.token_urlsafe(16)

        def keep(db: Session) -> str:
            if renew:
                db.execute("delete from secret where name = ?", (name,))
            db.execute("insert into secret values (?, ?) on conflict do nothing", (name, fresh))
            (value,) = db.execute("select value from secret where name = ?", (name,)).fetchone()
            return str(value)

        return self.database.change(keep)

    def add_comparisons(self, comparisons: Sequence[Comparison]) -> None:
        """Add what is not there yet."""

        def add(db: Session) -> None:
            db.executemany(
                f"insert into comparison ({COMPARISON}) values (?, ?, ?, ?, ?, ?, ?, ?, ?) "
                "on conflict do nothing",
                [astuple(one) for one in comparisons],
            )
            db.execute(FILL)

        self.database.change(add)

    def remember(self, file: str, digest: str) -> bool:
        """Keep the digest of an image that is shown; False if it was another one before."""

        def keep(db: Session) -> bool:
            db.execute("insert into image values (?, ?) on conflict do nothing", (file, digest))
            known = db.execute("select digest from image where file = ?", (file,)).fetchone()
            return bool(known[0] == digest)

        return self.database.change(keep)

    def register(self, who: str, name: str | None, draw: Callable[[int], list[Trial]]) -> None:
        """Add a voter with the trials of ``draw(number)``; one who is known keeps theirs."""

        def add(db: Session) -> None:
            (count,) = db.execute("select count(*) from voter").fetchone()
            added = db.execute(
                "insert into voter (who, name, joined) values (?, ?, ?) on conflict do nothing",
                (who, name, _now()),
            )
            if not added.rowcount:
                return
            if count >= MAX_VOTERS:
                raise FifaError(
                    f"there are {MAX_VOTERS:,} voters already", where=self.database.where
                )
            (voter,) = db.execute("select id from voter where who = ?", (who,)).fetchone()
            db.executemany(
                "insert into trial values (?, ?, ?, ?, ?, ?)",
                [(voter, i, *astuple(trial)) for i, trial in enumerate(draw(voter))],
            )

        self.database.change(add)

    def place(self, who: str) -> Place | None:
        """Where the voter called ``who`` is; None if there is none."""
        return self.database.read(lambda db: self._place(db, who))

    def vote(self, who: str, position: int, answer: str) -> bool:
        """Commit a vote to disk.

        Returns
        -------
        False where the voter is at another position, as in a second tab, or the pair has got all
        its votes meanwhile; nothing was written then. The same vote again (sent twice by a bad
        line) is True and changes nothing.
        """

        def cast(db: Session) -> bool:
            place = self._place(db, who, lock=True)
            if place is None:
                return False
            if not place.trials or position != place.position:
                last = _last(db, place.voter)
                return last is not None and last[1:3] == (position, answer)
            trial = place.trials[0]
            if trial.type == COMPARE:
                most = self.quotas.pair
                counted = db.execute(
                    "update tally set votes = votes + 1 where comparison = ?"
                    + ("" if most is None else f" and votes < {most}"),
                    (trial.comparison,),
                )
                if not counted.rowcount:
                    return False
            db.execute(
                "insert into vote (voter, position, answer, at) values (?, ?, ?, ?)",
                (place.voter, position, answer, _now()),
            )
            return True

        return self.database.change(cast)

    def undo(self, who: str, position: int) -> bool:
        """Take back the vote before ``position``, where the voter is; False if it is elsewhere."""

        def back(db: Session) -> bool:
            place = self._place(db, who, lock=True)
            last = _last(db, place.voter) if place else None
            if place is None or last is None or position != place.position:
                return False
            vote, before, _, type, comparison = last
            db.execute("update vote set undone = 1 where id = ?", (vote,))
            if type == COMPARE:
                db.execute("update tally set votes = votes - 1 where comparison = ?", (comparison,))
            if self.quotas.pair is not None:
                with self._claiming:
                    self._claims[place.voter] = before, comparison, time.monotonic()
            return True

        return self.database.change(back)

    def trial(self, who: str, position: int) -> Trial | None:
        """What the voter called ``who`` sees at a position; None if there is nothing."""
        found = self.database.read(
            lambda db: db.execute(
                f"select {TRIAL} from trial join voter on voter.id = voter "
                "where who = ? and position = ?",
                (who, position),
            ).fetchone()
        )
        return Trial(*found) if found else None

    def progress(self) -> tuple[list[Progress], dict[str, int]]:
        """Every voter who began, and the votes that stand on each comparison, at one moment."""
        rows, votes = self.database.read(
            lambda db: (
                db.execute(PROGRESS).fetchall(),
                db.execute("select comparison, votes from tally").fetchall(),
            )
        )
        most = self.quotas.voter
        ends = [row[5] if most is None else min(row[5], most) for row in rows]
        voters = [
            Progress(row[0], row[1], row[2], row[3], row[4], end)
            for row, end in zip(rows, ends, strict=True)
        ]
        return voters, dict(votes)

    def read(self) -> Snapshot:
        """All of it as it is at one moment."""
        ask = self.database.read(
            lambda db: {
                name: db.execute(self._sql(query)).fetchall() for name, query in QUERIES.items()
            }
        )
        return Snapshot(
            {row[0]: Comparison(*row) for row in ask["comparisons"]},
            [Vote(row[0], row[1], Trial(*row[2:6]), *row[6:]) for row in ask["votes"]],
            dict(ask["voters"]),
            dict(ask["digests"]),
        )

    def _place(self, db: Session, who: str, *, lock: bool = False) -> Place | None:
        if lock:  # on its own: what a locking statement counts may be of before the lock
            db.execute(self._sql("select id from voter where who = ? {lock}"), (who,))
        found = db.execute(
            "select id, (select count(*) from vote where vote.voter = voter.id and undone = 0), "
            "(select count(*) from trial where trial.voter = voter.id) from voter where who = ?",
            (who,),
        ).fetchone()
        if found is None:
            return None
        voter, votes, total = found
        if self.quotas.pair is None:
            trials = db.execute(
                f"select position, {TRIAL} from trial "
                "where voter = ? and position >= ? order by position limit 2",
                (voter, votes),
            ).fetchall()
            end = total
        else:
            through = self.quotas.voter is not None and votes >= self.quotas.voter
            trials = self._open(db, voter, [] if through else db.execute(LEFT, (voter,)).fetchall())
            end = votes + len(trials)
        if self.quotas.voter is not None:
            end = max(votes, min(end, self.quotas.voter))
        shown = [(row[0], Trial(*row[1:5])) for row in trials[: min(2, end - votes)]]
        return Place(
            voter=voter,
            position=shown[0][0] if shown else total,
            votes=votes,
            total=end,
            positions=tuple(position for position, _ in shown),
            trials=tuple(trial for _, trial in shown),
        )

    def _open(
        self, db: Session, voter: int, rows: list[tuple[int, str, str, int, int, int]]
    ) -> list[tuple[int, str, str, int, int, int]]:
        """Of a voter's rows of `LEFT`, those whose comparisons want votes; what they see now first.

        A comparison that was shown to others a moment ago waits for their votes.
        """
        most = self.quotas.pair
        assert most is not None
        voted = db.execute(
            "select comparison from vote join trial using (voter, position) "
            "where voter = ? and undone = 0 and type = 'compare'",
            (voter,),
        )
        first = {comparison for (comparison,) in voted.fetchall()}
        with self._claiming:
            since = time.monotonic() - CLAIM
            self._claims = {who: one for who, one in self._claims.items() if one[2] > since}
            claimed = Counter(key for who, (_, key, _) in self._claims.items() if who != voter)
            mine = self._claims.pop(voter, (-1, "", 0.0))
            left = [
                row
                for row in rows
                if (row[1] != COMPARE or row[5] + claimed[row[2]] < most)
                and (row[1] != REPEAT or row[2] in first)
            ]
            left.sort(key=lambda row: (row[0] != mine[0], row[0]))
            if left:
                shown, type, comparison = left[0][:3]
                since = mine[2] if shown == mine[0] else time.monotonic()
                self._claims[voter] = shown, comparison if type == COMPARE else "", since
        return left


def open_store(
    run: str | Path,
    url: str | None = None,
    *,
    create: bool = False,
    quotas: Quotas | None = None,
) -> VoteStore:
    """The votes on a run: in its folder, or with ``url`` in a PostgreSQL database.

    There every run has a schema of its own; a file in the run's folder names it. Raises as
    `VoteStore` does.
    """
    folder = Path(run) / FOLDER
    path = folder / SCHEMA_FILE
    if url is None:
        if not create and path.is_file() and not (folder / FILE).exists():
            raise nobody_voted(str(folder / FILE), "the votes are in PostgreSQL: --database URL")
        return VoteStore(folder / FILE, create=create, quotas=quotas)
    if create:
        try:
            with path.open("x") as file:
                file.write(f"fifa_vote_{secrets.token_hex(8)}")
        except FileExistsError:
            pass
        except OSError as error:
            raise cannot_write(path, error) from error
    if not path.is_file():
        raise nobody_voted(str(path), "fifa vote RUN --database URL")
    schema = path.read_bytes()[:100].decode("latin-1")
    if not re.fullmatch("fifa_vote_[0-9a-f]{16}", schema):
        raise FifaError("this names no schema of votes", where=str(path), do="mend or remove it")
    return VoteStore(Postgres(url, schema), create=create, quotas=quotas)


def _last(db: Session, voter: int) -> tuple[int, int, str, str, str] | None:
    """The voter's last vote that stands: id, position, answer, and its trial's type and key."""
    found = db.execute(
        "select vote.id, vote.position, answer, type, comparison "
        "from vote join trial using (voter, position) "
        "where voter = ? and undone = 0 order by vote.id desc limit 1",
        (voter,),
    ).fetchone()
    return tuple(found) if found else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
