"""The same votes in SQLite and in PostgreSQL, and what only one of them does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fifa.errors import FifaError
from fifa.evaluation.vote.comparisons import CHECK, COMPARE, REPEAT, Comparison, Trial
from fifa.evaluation.vote.database import Database, Postgres, Sqlite
from fifa.evaluation.vote.store import Quotas, VoteStore

KEYS = ["k0", "k1", "k2", "k3"]
SOME = [Comparison(key, "ours", "theirs", "p", "a 'fox'; --", 3, None, "a", "b") for key in KEYS]


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Database]:
    """Makes the same database again, as another server does."""
    if request.param == "sqlite":
        return lambda: Sqlite(tmp_path / "votes.sqlite")
    url = request.getfixturevalue("postgres")
    schema = f"fifa_vote_{abs(hash(tmp_path)):016x}"[:26]
    return lambda: Postgres(url, schema)


def begun(database: Callable[[], Database], *, pair: int | None = None, voter: int | None = None):
    made = VoteStore(database(), create=True, quotas=Quotas(voter, pair))
    made.add_comparisons(SOME)
    return made


def trials(*keys: str, type: str = COMPARE) -> list[Trial]:
    return [Trial(type, key, i % 2) for i, key in enumerate(keys)]


def test_votes_undos_and_strange_names_are_kept(database: Callable[[], Database]) -> None:
    store = begun(database)
    name = "Robert'); drop table vote; -- %s ? {id} Zoë"
    store.register("x", name, lambda number: trials(*KEYS))
    store.register("x", "again", lambda number: trials("k0"))
    other = VoteStore(database(), create=True)  # a second server
    assert store.vote("x", 0, "left")
    assert other.vote("x", 0, "left")  # the same, sent twice
    assert not other.vote("x", 0, "right")
    assert other.vote("x", 1, "tie")
    assert not store.vote("nobody", 0, "left")
    assert not store.undo("x", 1)
    assert store.undo("x", 2)
    with pytest.raises(FifaError, match="cannot be kept"):
        store.vote("x", 1, "both")
    assert store.vote("x", 1, "right")
    said = other.read()
    assert [(vote.position, vote.answer) for vote in said.votes] == [(0, "left"), (1, "right")]
    assert list(said.comparisons.values()) == SOME
    assert said.voters == {1: name}
    ((one,), votes) = other.progress()
    assert (one.votes, one.total, one.name) == (2, 4, name)
    assert votes == {"k0": 1, "k1": 1, "k2": 0, "k3": 0}
    assert store.secret("key") == other.secret("key") != other.secret("other")
    assert store.remember("a", "1")
    assert not other.remember("a", "2")


def test_a_voter_has_a_quota(database: Callable[[], Database]) -> None:
    store = begun(database, voter=2)
    store.register("x", None, lambda number: trials(*KEYS))
    assert [store.vote("x", i, "left") for i in range(4)] == [True, True, False, False]
    place = store.place("x")
    assert place
    assert (place.votes, place.total, place.trials) == (2, 2, ())
    assert store.undo("x", place.position)
    assert store.vote("x", 1, "tie")
    both = VoteStore(database(), create=True, quotas=Quotas(2, 2))
    both.register("y", None, lambda number: trials(*KEYS))
    assert not both.place("x").trials  # type: ignore[union-attr] # and k2 does not wait for them
    both.quotas = Quotas(2, 1)
    assert both.place("y").positions == (2, 3)  # type: ignore[union-attr]


def test_a_pair_has_a_quota(database: Callable[[], Database]) -> None:
    store = begun(database, pair=1)
    deck = [
        *trials("k0", "k1"),
        *trials("k0", type=REPEAT),
        *trials("k2"),
        *trials("k3", type=CHECK),
    ]
    for who in ("x", "y", "z"):
        store.register(who, None, lambda number: deck)
    at = {who: store.place(who) for who in ("x", "y", "z")}
    assert [place.position for place in at.values() if place] == [0, 1, 3]  # nobody waits
    assert not store.vote("y", 0, "left")  # which x was shown
    assert store.vote("x", 0, "left")
    assert store.vote("x", 2, "left")  # k0 again; not k1, which y was shown
    again = store.place("y")
    assert again
    assert again.position == 1
    assert store.vote("y", 1, "left")
    assert store.vote("z", 3, "left")
    for who in ("x", "y", "z"):  # and no repeat of what was skipped
        assert store.vote(who, 4, "left")
        left = store.place(who)
        assert left
        assert not left.trials
    assert store.undo("x", 5)
    assert store.undo("x", 4)
    assert store.undo("x", 2)  # k0 is free again, and x sees it, not the check before it
    assert store.vote("x", 0, "right")
    assert max(store.progress()[1].values()) == 1
    server = VoteStore(database(), create=True, quotas=Quotas(pair=1))  # started again
    server.register("late", None, lambda number: trials(*KEYS))
    place = server.place("late")
    assert place
    assert place.positions == (3,)


def test_many_at_once_on_two_servers_lose_and_double_nothing(
    database: Callable[[], Database],
) -> None:
    servers = [begun(database, pair=5), begun(database, pair=5)]
    if isinstance(servers[0].database, Sqlite):
        servers[1] = servers[0]

    def person(number: int) -> int:
        store, taken = servers[number % 2], 0
        store.register(f"v{number}", None, lambda _: trials(*KEYS))
        while min(store.progress()[1].values()) < 5:
            place = store.place(f"v{number}")
            if place and place.trials:
                taken += store.vote(f"v{number}", place.position, "left")
            elif place and place.votes == len(KEYS):
                break
        return taken

    def clicker(answer: str) -> list[bool]:
        return [servers[answer == "left"].vote("twice", i, answer) for i in range(2)]

    with ThreadPoolExecutor(8) as pool:
        accepted = sum(pool.map(person, range(8)))
    votes = servers[0].read().votes
    assert accepted == len(votes) == len({(vote.voter, vote.position) for vote in votes})
    assert sorted(servers[1].progress()[1].values()) == [5] * 4
    servers = [begun(database), begun(database)]
    servers[0].register("twice", None, lambda _: trials(*KEYS))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(clicker, ["left", "right"])
    assert all(a or b for a, b in zip(first, second, strict=True))
    assert len(servers[0].read().votes) <= len(votes) + 4


def test_what_fails_takes_nothing_else_with_it(database: Callable[[], Database]) -> None:
    store = begun(database)
    store.register("x", None, lambda number: trials(*KEYS))

    def wrong(db: object) -> None:
        db.execute("update vote set answer = 'tie'")  # type: ignore[attr-defined]
        raise ValueError("no")

    def vote(i: int) -> object:
        if i % 2:
            with pytest.raises(ValueError, match="no"):
                store.database.change(wrong)
            return None
        return store.vote("x", i // 2, "left")

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(vote, range(8)))
    assert {vote.answer for vote in store.read().votes} == {"left"}
    assert sum(map(bool, taken)) == len(store.read().votes)
