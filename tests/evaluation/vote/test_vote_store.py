"""The file of votes, one voter after another and many at once."""

from __future__ import annotations

import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fifa.errors import FifaError
from fifa.evaluation.vote.comparisons import COMPARE, Comparison, Trial
from fifa.evaluation.vote.store import VoteStore

ONE = Comparison("k", "ours", "theirs", "p", "a fox", 3, None, "a.png", "b.png")


@pytest.fixture
def store(tmp_path: Path) -> VoteStore:
    made = VoteStore(tmp_path / "votes.sqlite", create=True)
    made.add_comparisons([ONE])
    return made


def trials_of(n: int) -> list[Trial]:
    return [Trial(COMPARE, "k", i % 2) for i in range(n)]


def test_a_voter_goes_on_where_they_were(store: VoteStore) -> None:
    assert store.place("x") is None
    store.register("x", "Ada", lambda number: trials_of(3))
    store.register("x", "again", lambda number: trials_of(9))
    assert store.vote("x", 0, "left")
    again = VoteStore(store.database.path).place("x")
    assert again is not None
    assert (again.position, again.total) == (1, 3)
    assert again.trials == tuple(trials_of(3)[1:])
    assert store.read().voters == {1: "Ada"}
    assert store.read().comparisons == {"k": ONE}


def test_a_vote_for_another_card_changes_nothing(store: VoteStore) -> None:
    store.register("x", None, lambda number: trials_of(2))
    assert not store.vote("nobody", 0, "left")
    assert not store.vote("x", 1, "left")
    assert store.vote("x", 0, "left")
    assert store.vote("x", 0, "left")  # the same, sent twice
    assert not store.vote("x", 0, "right")  # a second tab that is behind
    assert store.vote("x", 1, "tie")
    assert not store.vote("x", 2, "left")  # after the last
    assert [vote.answer for vote in store.read().votes] == ["left", "tie"]


def test_undo_takes_the_last_vote_back_once(store: VoteStore) -> None:
    store.register("x", None, lambda number: trials_of(3))
    assert not store.undo("x", 0)
    store.vote("x", 0, "left")
    store.vote("x", 1, "left")
    assert store.undo("x", 2)
    assert not store.undo("x", 2)  # pressed twice
    assert store.vote("x", 1, "right")
    assert [vote.answer for vote in store.read().votes] == ["left", "right"]
    with sqlite3.connect(store.database.path) as db:  # what was taken back is still told
        kept = db.execute("select answer, undone from vote order by id").fetchall()
    db.close()
    assert kept == [("left", 0), ("left", 1), ("right", 0)]


def test_the_chosen_image_does_not_depend_on_the_side(store: VoteStore) -> None:
    store.register("x", None, lambda number: trials_of(4))
    for i, answer in enumerate(["left", "left", "right", "tie"]):
        store.vote("x", i, answer)
    assert [vote.chosen for vote in store.read().votes] == [0, 1, 1, None]


def test_other_answers_are_refused_by_the_file_itself(store: VoteStore) -> None:
    store.register("x", None, lambda number: trials_of(1))
    with pytest.raises(FifaError, match="cannot be kept"):
        store.vote("x", 0, "both")
    assert store.read().votes == []


def test_many_voters_and_double_clicks_at_once(store: VoteStore) -> None:
    def person(number: int) -> int:
        mine = VoteStore(store.database.path)
        mine.register(f"v{number}", None, lambda _: trials_of(10))
        return sum(mine.vote(f"v{number}", i, "left") for i in range(10))

    def clicker(answer: str) -> list[bool]:
        return [store.vote("twice", i, answer) for i in range(5)]

    store.register("twice", None, lambda number: trials_of(5))
    with ThreadPoolExecutor(8) as pool:
        people = [pool.submit(person, i) for i in range(6)]
        clicks = [pool.submit(clicker, answer) for answer in ("left", "right")]
        assert [future.result() for future in people] == [10] * 6
        first, second = [future.result() for future in clicks]
    assert len(store.read().votes) == 65
    assert len({(vote.voter, vote.position) for vote in store.read().votes}) == 65
    assert all(a or b for a, b in zip(first, second, strict=True))


def test_only_the_owner_reads_the_file(store: VoteStore) -> None:
    assert stat.S_IMODE(store.database.path.stat().st_mode) == 0o600


def test_secrets_stay_until_they_are_renewed(store: VoteStore) -> None:
    first = store.secret("invitation")
    assert len(first) >= 20
    assert VoteStore(store.database.path).secret("invitation") == first
    assert store.secret("owner") != first
    assert store.secret("invitation", renew=True) != first


def test_a_changed_image_is_noticed(store: VoteStore) -> None:
    assert store.remember("a.png", "1")
    assert store.remember("a.png", "1")
    assert not store.remember("a.png", "2")
    assert store.read().digests == {"a.png": "1"}


def test_a_file_that_holds_no_votes(tmp_path: Path) -> None:
    with pytest.raises(FifaError, match="nobody has voted here yet"):
        VoteStore(tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("no data base at all, but long enough to be one")
    with pytest.raises(FifaError, match="not a database"):
        VoteStore(tmp_path / "text.sqlite", create=True)
    with sqlite3.connect(tmp_path / "other.sqlite") as db:
        db.execute("create table vote (x)")
    db.close()
    with pytest.raises(FifaError, match="not a file of votes"):
        VoteStore(tmp_path / "other.sqlite", create=True)


def test_a_file_that_was_begun_and_no_more_is_made_whole(tmp_path: Path) -> None:
    (tmp_path / "votes.sqlite").touch()  # killed before the tables were there
    store = VoteStore(tmp_path / "votes.sqlite")
    store.add_comparisons([ONE])
    store.register("x", None, lambda number: trials_of(1))
    assert store.vote("x", 0, "tie")


def test_votes_of_an_earlier_version_go_on(store: VoteStore) -> None:
    store.register("x", None, lambda number: trials_of(3))
    store.vote("x", 0, "left")
    with sqlite3.connect(store.database.path) as db:  # as it was before there were quotas
        db.execute("drop table tally")
    db.close()
    assert len(VoteStore(store.database.path).read().votes) == 1
    again = VoteStore(store.database.path, create=True)
    again.add_comparisons([ONE])
    assert again.progress()[1] == {"k": 1}
    assert again.vote("x", 1, "tie")
    assert again.progress()[1] == {"k": 2}
