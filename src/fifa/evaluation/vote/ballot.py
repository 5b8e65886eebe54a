"""What the page asks and what it knows of its voters; everything but HTTP.

Voters get the pixels of an image, and nothing that says where it is from.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import xxhash

from fifa.config import Vote
from fifa.console import progress
from fifa.data.images import file_images, look
from fifa.errors import FifaError
from fifa.evaluation.generate import FOLDER
from fifa.evaluation.vote.comparisons import (
    CHECK,
    Comparison,
    Trial,
    draw_comparisons,
    draw_trials,
    load_comparisons,
    read_file,
)
from fifa.evaluation.vote.pictures import Picture, Pictures, canonical_png, scrambled_png
from fifa.evaluation.vote.store import FILE, Progress, Quotas, open_store
from fifa.formatting import shorten

LONGEST = 2000  # characters of a prompt
SIDES = ("l", "r")  # in a picture's id
IMAGE_ID = re.compile(r"([0-9]{1,9})([lr])[0-9a-f]{32}")


@dataclass(frozen=True)
class Showing:
    """What a voter sees now. Images go by ids that say nothing of models or files.

    Parameters
    ----------
    position
        What a vote on it is sent with.
    votes, total
        Votes that stand, and how many there will be.
    prompt
        Of the two images; "" at the end.
    images
        Ids of the left and the right one; none at the end. They are this voter's alone.
    upcoming
        Ids of the next pair's, to be loaded ahead.
    """

    position: int
    votes: int
    total: int
    prompt: str
    images: tuple[str, ...]
    upcoming: tuple[str, ...]

    @property
    def done(self) -> bool:
        """True if there is nothing left to vote on."""
        return not self.images


class Ballot:
    """The comparisons of a run, and the file of votes on them.

    Parameters
    ----------
    run
        A run with generated images. Votes go where `open_store` says; those that are there go
        on, each voter with the trials drawn at first.
    options
        What is asked of voters who are new.

    Raises
    ------
    FifaError
        As `load_comparisons` does, and where an image has changed since it was voted on.
    """

    def __init__(self, run: str | Path, options: Vote | None = None) -> None:
        self.options = options or Vote()
        self.run = Path(run)
        self.folder = self.run / FOLDER
        self.until = self.options.until and self.options.until.astimezone()
        every = load_comparisons(run)
        models = self.options.models
        asked = load_comparisons(run, models) if models else every
        if self.options.limit is not None:
            asked = draw_comparisons(asked, self.options.limit, self.options.seed)
        quotas = Quotas(self.options.votes_per_voter, self.options.votes_per_pair)
        self.store = open_store(run, self.options.database, create=True, quotas=quotas)
        self._check_same(every)
        self.store.add_comparisons(asked)
        self.asked = [one.key for one in asked]
        self.comparisons = self.store.read().comparisons
        self._key = self.store.secret("key").encode()
        self._pictures = Pictures(self.folder)

    @property
    def ended(self) -> bool:
        """True once the time to vote is over."""
        return self.until is not None and datetime.now(UTC) >= self.until

    def progress(self) -> tuple[list[Progress], list[int]]:
        """Every voter who began, and the votes that stand on each comparison asked now."""
        voters, votes = self.store.progress()
        return voters, [votes.get(key, 0) for key in self.asked]

    def sign(self, *parts: str) -> str:
        """32 hex characters that only this file of votes can make of ``parts``."""
        message = "\0".join(parts).encode("utf-8", "surrogatepass")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:32]

    def register(self, who: str, name: str | None) -> None:
        """Draw the trials of a new voter; nothing for one who is known.

        Order and sides come from a secret that is kept with the votes: nobody can work out which
        model is where, and a server that starts again deals the same.
        """
        options = self.options

        def draw(voter: int) -> list[Trial]:
            order, sides = (
                np.random.default_rng(int(self.sign("deck", stream, str(voter)), 16))
                for stream in ("order", "sides")
            )
            trials = draw_trials(
                self.asked, order, sides, repeats=options.repeats, checks=options.checks
            )
            if options.votes_per_pair is not None:  # any of them may have its votes by then
                return trials
            return trials[: options.votes_per_voter]

        self.store.register(who, name, draw)

    def showing(self, who: str) -> Showing | None:
        """What the voter called ``who`` sees, no pair after the end; None if there is nobody."""
        place = self.store.place(who)
        if place is None:
            return None
        trials = () if self.ended else place.trials
        prompt = self.comparisons[trials[0].comparison].prompt if trials else ""
        ids = [self._ids(who, at) for at in place.positions[: len(trials)]]
        now, upcoming = [*ids, (), ()][:2]
        text = shorten(prompt, LONGEST)
        return Showing(place.position, place.votes, place.total, text, now, upcoming)

    def image(self, who: str, image: str) -> Picture:
        """The picture that goes by this id for the voter called ``who``; KeyError if none does."""
        found = IMAGE_ID.fullmatch(image)
        if not found or not hmac.compare_digest(image, self._id(who, int(found[1]), found[2])):
            raise KeyError(image)
        trial = self.store.trial(who, int(found[1]))
        if trial is None:
            raise KeyError(image)
        name, broken = self._file(trial, SIDES.index(found[2]))
        return self._pictures.get((name, broken), lambda: self._make(name, broken))

    def _make(self, name: str, broken: bool) -> bytes:
        data = read_file(self.folder, name)
        if not self.store.remember(name, xxhash.xxh3_128_hexdigest(data)):
            raise _changed([name], self.folder)
        return scrambled_png(data) if broken else canonical_png(data)

    def _ids(self, who: str, position: int) -> tuple[str, ...]:
        return tuple(self._id(who, position, side) for side in SIDES)

    def _id(self, who: str, position: int, side: str) -> str:
        """What the picture there is called: something else for everybody, and at every place."""
        return f"{position}{side}{self.sign('image', who, str(position), side)}"

    def _file(self, trial: Trial, side: int) -> tuple[str, bool]:
        """The file of the picture on a side (0 is left), and whether it is destroyed."""
        one = self.comparisons[trial.comparison]
        if trial.type == CHECK:
            return (one.file_0, one.file_1)[trial.image], side != trial.left
        return (one.file_0, one.file_1)[trial.left ^ side], False

    def _check_same(self, every: Sequence[Comparison]) -> None:
        """Votes belong to the pictures that they were cast for."""
        known = {one.key: one for one in every}
        said = self.store.read()
        gone = [one for one in said.comparisons.values() if known.get(one.key) != one]
        if gone:
            raise FifaError(
                f"{len(gone):,} comparisons that people were asked for are not in the index "
                "any more",
                where=self.store.database.where,
                do=f"evaluate into another folder, or move {FILE} away to start again",
            )
        changed_images(said.digests, self.folder)


def changed_images(digests: dict[str, str], folder: Path) -> None:
    """Raise `FifaError` if an image that was shown is another one by now."""
    with progress("checking the images that were voted on", len(digests)) as advance:
        facts = look(file_images(folder, list(digests)), sizes=False, done=advance)
    found = zip(digests, facts["content"].to_pylist(), strict=True)
    changed = [name for name, content in found if content != digests[name]]
    if changed:
        raise _changed(changed, folder)


def _changed(names: Sequence[str], folder: Path) -> FifaError:
    return FifaError(
        f"{len(names):,} images have changed since they were voted on, the first: {names[0]}",
        where=str(folder),
        do=f"evaluate into another folder, or move {FILE} away to start again",
    )
