"""What the page asks and what it knows of its voters; everything but HTTP."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from fifa.config import Vote
from fifa.console import progress
from fifa.errors import FifaError
from fifa.evaluation.vote.comparisons import (
    Comparison,
    draw,
    evaluation_folder,
    load_comparisons,
    read_file,
)
from fifa.evaluation.vote.order import CHECK, Card, deal
from fifa.evaluation.vote.pictures import destroyed, shown
from fifa.evaluation.vote.store import FILE, Place, VoteStore
from fifa.formatting import shorten

LONGEST = 2000  # characters of a prompt
KEPT_IMAGES = 64  # ready to be sent, in memory


@dataclass(frozen=True)
class Showing:
    """What a voter sees now. Images go by ids that say nothing of models or files.

    Parameters
    ----------
    position, total
        Votes that stand, and how many there will be.
    prompt
        Of the two images; "" at the end.
    images
        Ids of the left and the right one; none at the end.
    upcoming
        Ids of the next pair's, to be loaded ahead.
    """

    position: int
    total: int
    prompt: str
    images: tuple[str, ...]
    upcoming: tuple[str, ...]

    @property
    def done(self) -> bool:
        """True if there is nothing left to vote on."""
        return self.position >= self.total


class Ballot:
    """The comparisons of a run, and the file of votes on them.

    Parameters
    ----------
    run
        A run with generated images. Votes go to ``RUN/evaluate/votes.sqlite``; those that are
        there go on, each voter with the deck dealt at first.
    options
        What is asked of voters who are new.

    Raises
    ------
    FifaError
        As `load_comparisons` does, and where an image has changed since it was voted on.
    """

    def __init__(self, run: str | Path, options: Vote | None = None) -> None:
        self.options = options or Vote()
        self.folder = evaluation_folder(run)
        every = load_comparisons(run)
        models = self.options.models
        asked = load_comparisons(run, models) if models else every
        if self.options.limit is not None:
            asked = draw(asked, self.options.limit, self.options.seed)
        self.store = VoteStore(self.folder / FILE, create=True)
        self._check_same(every)
        self.store.add_comparisons(asked)
        self.asked = [one.key for one in asked]
        self.comparisons = self.store.comparisons()
        self._key = self.store.secret("key").encode()
        self._images = {
            self._id(name, broken): (name, broken)
            for one in self.comparisons.values()
            for name in (one.file_0, one.file_1)
            for broken in (False, True)
        }
        self.image = lru_cache(KEPT_IMAGES)(self._image)

    def sign(self, *parts: str) -> str:
        """32 hex characters that only this file of votes can make of ``parts``."""
        message = "\0".join(parts).encode("utf-8", "surrogatepass")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:32]

    def register(self, who: str, name: str | None) -> None:
        """Deal a deck to a new voter; nothing for one who is known."""
        options = self.options

        def dealt(voter: int) -> list[Card]:
            rng = np.random.default_rng([options.seed, voter])
            return deal(self.asked, rng, repeats=options.repeats, checks=options.checks)

        self.store.register(who, name, dealt)

    def showing(self, who: str) -> Showing | None:
        """What the voter called ``who`` sees; None if there is none."""
        place = self.store.place(who)
        if place is None:
            return None
        pairs = [self._pair(card) for card in place.cards]
        return Showing(
            place.position,
            place.total,
            self._prompt(place),
            pairs[0] if pairs else (),
            pairs[1] if len(pairs) > 1 else (),
        )

    def _image(self, image: str) -> bytes:
        """The PNG with this id; KeyError if there is none."""
        name, broken = self._images[image]
        data = read_file(self.folder, name)
        if not self.store.remember(name, xxhash.xxh3_128_hexdigest(data)):
            raise _changed([name], self.folder)
        return destroyed(data) if broken else shown(data)

    def _id(self, name: str, broken: bool) -> str:
        return self.sign("image", name, "broken" if broken else "")

    def _pair(self, card: Card) -> tuple[str, str]:
        one = self.comparisons[card.comparison]
        files = (one.file_0, one.file_1)
        if card.kind == CHECK:
            file = files[card.image]
            intact, broken = self._id(file, False), self._id(file, True)
            return (intact, broken) if card.left == 0 else (broken, intact)
        return self._id(files[card.left], False), self._id(files[1 - card.left], False)

    def _prompt(self, place: Place) -> str:
        if not place.cards:
            return ""
        return shorten(self.comparisons[place.cards[0].comparison].prompt, LONGEST)

    def _check_same(self, every: Sequence[Comparison]) -> None:
        """Votes belong to the pictures that they were cast for."""
        known = {one.key: one for one in every}
        gone = [one for one in self.store.comparisons().values() if known.get(one.key) != one]
        if gone:
            raise FifaError(
                f"{len(gone):,} comparisons that people were asked for are not in the index "
                "any more",
                where=str(self.store.path),
                do=f"evaluate into another folder, or move {FILE} away to begin anew",
            )
        changed_images(self.store, self.folder)


def changed_images(store: VoteStore, folder: Path) -> None:
    """Raise `FifaError` if an image that was shown is another one by now."""
    changed = []
    digests = store.digests()
    with progress("checking the images that were voted on", len(digests)) as advance:
        for name, digest in digests.items():
            if xxhash.xxh3_128_hexdigest(read_file(folder, name)) != digest:
                changed.append(name)
            advance(1)
    if changed:
        raise _changed(changed, folder)


def _changed(names: Sequence[str], folder: Path) -> FifaError:
    return FifaError(
        f"{len(names):,} images have changed since they were voted on, the first: {names[0]}",
        where=str(folder),
        do=f"evaluate into another folder, or move {FILE} away to begin anew",
    )
