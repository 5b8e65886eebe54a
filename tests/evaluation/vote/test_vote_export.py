"""Votes become feedback that the first step reads: the loop is closed."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image
from test_vote_results import person, vote
from vote_worlds import draw, make_run

from fifa.config import Read, Recipe, Score, Select, Vote
from fifa.data.decode import BadImage
from fifa.data.images import pair_images, read
from fifa.data.read import read_pairs
from fifa.errors import FifaError
from fifa.evaluation.vote import store
from fifa.evaluation.vote.ballot import Ballot
from fifa.evaluation.vote.export import export_votes
from fifa.run.steps import filter_pairs


@pytest.fixture
def ballot(tmp_path: Path) -> Ballot:
    run = make_run(tmp_path / "run", prompts=8, seeds=2, size=24)
    return Ballot(run, Vote(repeats=0.3, checks=0.3))


def cast(ballot: Ballot) -> dict[str, list[float]]:
    """Three people vote; gives the outcomes for ours by comparison."""
    outcomes = defaultdict(list)
    for name, votes in (("Ada", 10**6), ("Ben", 20), ("Cyd", 9)):
        for trial, chosen in vote(ballot, name, person(0.7, 0.3), votes):
            if trial.type == "compare":
                outcomes[trial.comparison].append(0.5 if chosen is None else 1.0 - chosen)
    return outcomes


def test_the_pairs_are_read_with_the_share_of_votes_as_label(
    ballot: Ballot, tmp_path: Path
) -> None:
    outcomes = cast(ballot)
    done = export_votes(ballot.folder.parent, tmp_path / "votes.parquet")
    assert (done.pairs, done.votes, done.left_out) == (16, sum(map(len, outcomes.values())), 0)

    pairs = read_pairs(tmp_path / "votes.parquet")
    assert pairs.origin.format == "pickapic"
    assert pairs.origin.score_columns == ()
    assert len(pairs.rejected) == 0
    assert len(pairs) == 16
    found = {}
    for row in pairs.table.to_pylist():
        found[row["prompt"], frozenset((row["image_0"], row["image_1"]))] = row
    for key, one in ballot.comparisons.items():
        ours, theirs = (
            xxhash.xxh3_128_hexdigest((ballot.folder / name).read_bytes())
            for name in (one.file_0, one.file_1)
        )
        row = found[one.prompt, frozenset((ours, theirs))]
        share = np.mean(outcomes[key])
        assert row["label"] == pytest.approx(share if row["image_0"] == ours else 1 - share)
        assert row["votes"] == len(outcomes[key])


def test_the_images_are_the_original_bytes(ballot: Ballot, tmp_path: Path) -> None:
    cast(ballot)
    export_votes(ballot.folder.parent, tmp_path / "votes.parquet")
    pairs = read_pairs(tmp_path / "votes.parquet")
    files = {path.read_bytes() for path in ballot.folder.rglob("*.png")}
    found = list(read(pair_images(pairs.table, pairs.origin)))
    assert len(found) == 32
    for i, data in found:
        row, side = i // 2, i % 2
        assert not isinstance(data, BadImage)
        assert data in files
        assert Image.open(io.BytesIO(data)).size == (24, 24)
        assert xxhash.xxh3_128_hexdigest(data) == pairs.table[f"image_{side}"][row].as_py()


def test_filter_keeps_the_clearest_of_them(ballot: Ballot, tmp_path: Path) -> None:
    cast(ballot)
    export_votes(ballot.folder.parent, tmp_path / "votes.parquet")
    recipe = Recipe(
        read=Read(source=str(tmp_path / "votes.parquet")),
        score=Score(margin=(), quality="none", diversity="none"),
        select=Select(keep=4, strategy="random"),
    )
    run = filter_pairs(recipe, tmp_path / "filtered")
    (subset,) = (run.folder / "subset").rglob("*.parquet")
    kept = pq.read_table(subset)
    assert kept.num_rows == 4
    assert 0.5 not in kept["label"].to_pylist()
    assert set(kept["votes"].to_pylist()) <= {1, 2, 3}
    assert max(kept["votes"].to_pylist()) > 1


def test_the_side_says_nothing_of_the_model(tmp_path: Path) -> None:
    ballot = Ballot(make_run(tmp_path / "run", prompts=40, seeds=1, size=16))
    vote(ballot, "Ada", person(1.0, 0.0))  # ours is always preferred
    export_votes(tmp_path / "run", tmp_path / "votes.parquet")
    table = pq.read_table(tmp_path / "votes.parquet")
    assert 8 < sum(table["label_0"].to_pylist()) < 32
    won = np.where(np.array(table["label_0"]) == 1, table["model_0"], table["model_1"])
    assert set(won.tolist()) == {"tuned-secret"}


def test_the_same_votes_give_the_same_bytes(ballot: Ballot, tmp_path: Path) -> None:
    cast(ballot)
    for name in ("a.parquet", "b.parquet"):
        export_votes(ballot.folder.parent, tmp_path / name)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_voters_who_failed_their_checks_are_left_out(ballot: Ballot, tmp_path: Path) -> None:
    vote(ballot, "Ada", person(1.0, 0.0), votes=12)
    vote(ballot, "Bot", person(0.0, 0.0, careful=0.0))
    done = export_votes(ballot.folder.parent, tmp_path / "votes.parquet")
    assert done.left_out == 16
    assert done.votes == done.pairs < 12
    labels = pq.read_table(tmp_path / "votes.parquet")["label_0"].to_pylist()
    assert set(labels) <= {0.0, 1.0}
    whole = export_votes(ballot.folder.parent, tmp_path / "all.parquet", everybody=True)
    assert (whole.pairs, whole.left_out) == (16, 0)


def test_without_votes_that_count_nothing_is_written(ballot: Ballot, tmp_path: Path) -> None:
    with pytest.raises(FifaError, match="no vote counts yet"):
        export_votes(ballot.folder.parent, tmp_path / "votes.parquet")
    with pytest.raises(FifaError, match="nobody has voted here yet"):
        export_votes(tmp_path, tmp_path / "votes.parquet")
    assert not (tmp_path / "votes.parquet").exists()


def test_an_image_that_has_changed_is_not_exported(ballot: Ballot, tmp_path: Path) -> None:
    vote(ballot, "Ada", person(), votes=1)
    image = ballot.showing("Ada").images[0]
    ballot.image("Ada", image)
    (file,) = ballot.store.read().digests
    (ballot.folder / file).write_bytes(draw("coral", "square", shaky=True, seed=999))
    with pytest.raises(FifaError, match="1 images have changed"):
        export_votes(ballot.folder.parent, tmp_path / "votes.parquet")


class Between(dict[str, str]):
    """Queries between which people go on voting."""

    def __init__(self, queries: dict[str, str], meanwhile: Callable[[], object]) -> None:
        super().__init__(queries)
        self.meanwhile = meanwhile

    def items(self) -> Iterator[tuple[str, str]]:  # type: ignore[override]
        for query in super().items():
            yield query
            self.meanwhile()


def test_an_export_is_of_one_moment_while_people_vote(
    ballot: Ballot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = cast(ballot)
    votes = sum(map(len, outcomes.values()))
    new = iter(f"late {i}" for i in range(99))
    late = Between(store.QUERIES, lambda: vote(ballot, next(new), person(), votes=2))
    monkeypatch.setattr(store, "QUERIES", late)
    done = export_votes(ballot.folder.parent, tmp_path / "votes.parquet")
    assert done.votes == votes
    assert sum(pq.read_table(tmp_path / "votes.parquet")["label_votes"].to_pylist()) == votes
    late.meanwhile = lambda: None
    assert len(ballot.store.read().voters) == 3 + 4  # they were heard all the same
