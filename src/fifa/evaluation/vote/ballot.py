"""What the page asks and what it knows of its voters; everything but HTTP.

Voters get the pixels of an image, and nothing that says where it is from.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from fifa.config import Vote
from fifa.console import progress
from fifa.data.decode import BadImage, open_image
from fifa.data.images import file_images, look
from fifa.errors import FifaError
from fifa.evaluation.generate import FOLDER, png
from fifa.evaluation.vote.comparisons import (
    CHECK,
    Comparison,
    Trial,
    draw_comparisons,
    draw_trials,
    load_comparisons,
    read_file,
)
from fifa.evaluation.vote.store import FILE, VoteStore
from fifa.formatting import shorten

LONGEST = 2000  # characters of a prompt
KEPT_IMAGES = 64  # ready to be sent, in memory
SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What a viewer needs; texts, EXIF and times stay out
CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"IDAT", b"IEND"}
TILES = 8  # a side


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
        there go on, each voter with the trials drawn at first.
    options
        What is asked of voters who are new.

    Raises
    ------
    FifaError
        As `load_comparisons` does, and where an image has changed since it was voted on.
    """

    def __init__(self, run: str | Path, options: Vote | None = None) -> None:
        self.options = options or Vote()
        self.folder = Path(run) / FOLDER
        every = load_comparisons(run)
        models = self.options.models
        asked = load_comparisons(run, models) if models else every
        if self.options.limit is not None:
            asked = draw_comparisons(asked, self.options.limit, self.options.seed)
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
            return draw_trials(
                self.asked, order, sides, repeats=options.repeats, checks=options.checks
            )

        self.store.register(who, name, draw)

    def showing(self, who: str) -> Showing | None:
        """What the voter called ``who`` sees; None if there is none."""
        place = self.store.place(who)
        if place is None:
            return None
        prompt = self.comparisons[place.trials[0].comparison].prompt if place.trials else ""
        now, upcoming = [*map(self._pair, place.trials), (), ()][:2]
        return Showing(place.position, place.total, shorten(prompt, LONGEST), now, upcoming)

    def _image(self, image: str) -> bytes:
        """The PNG with this id; KeyError if there is none."""
        name, broken = self._images[image]
        data = read_file(self.folder, name)
        if not self.store.remember(name, xxhash.xxh3_128_hexdigest(data)):
            raise _changed([name], self.folder)
        return scrambled_png(data) if broken else anonymous_png(data)

    def _id(self, name: str, broken: bool) -> str:
        return self.sign("image", name, "broken" if broken else "")

    def _pair(self, trial: Trial) -> tuple[str, str]:
        one = self.comparisons[trial.comparison]
        files = (one.file_0, one.file_1)
        if trial.type == CHECK:
            file = files[trial.image]
            intact, broken = self._id(file, False), self._id(file, True)
            return (intact, broken) if trial.left == 0 else (broken, intact)
        return self._id(files[trial.left], False), self._id(files[1 - trial.left], False)

    def _check_same(self, every: Sequence[Comparison]) -> None:
        """Votes belong to the pictures that they were cast for."""
        known = {one.key: one for one in every}
        gone = [one for one in self.store.comparisons().values() if known.get(one.key) != one]
        if gone:
            raise FifaError(
                f"{len(gone):,} comparisons that people were asked for are not in the index "
                "any more",
                where=str(self.store.path),
                do=f"evaluate into another folder, or move {FILE} away to start again",
            )
        changed_images(self.store, self.folder)


def changed_images(store: VoteStore, folder: Path) -> None:
    """Raise `FifaError` if an image that was shown is another one by now."""
    digests = store.digests()
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


def anonymous_png(data: bytes) -> bytes:
    """The image as PNG without metadata: a generator may write its model's name into it.

    A PNG keeps its compressed pixels as they are; others are decoded. Raises `FifaError` where
    the bytes are no image that `fifa.data.decode.open_image` lets in.
    """
    pixels = _pixels(data)
    return _without_metadata(data) if data.startswith(SIGNATURE) else png(pixels, 1)


def scrambled_png(data: bytes) -> bytes:
    """The image with its tiles shuffled under heavy noise: nobody who looks prefers it.

    The same bytes give the same image. PNG, of the same size. Raises as `anonymous_png` does.
    """
    pixels = _pixels(data)
    rng = np.random.default_rng(xxhash.xxh3_64_intdigest(data))
    high, wide = max(1, pixels.shape[0] // TILES), max(1, pixels.shape[1] // TILES)
    down, across = pixels.shape[0] // high, pixels.shape[1] // wide
    covered = pixels[: down * high, : across * wide]
    tiles = covered.reshape(down, high, across, wide, 3).swapaxes(1, 2).reshape(-1, high, wide, 3)
    mixed = rng.permutation(tiles).reshape(down, across, high, wide, 3).swapaxes(1, 2)
    pixels[: down * high, : across * wide] = mixed.reshape(down * high, across * wide, 3)
    noise = rng.integers(0, 256, pixels.shape, np.uint8)
    return png(np.where(rng.random((*pixels.shape[:2], 1)) < 0.5, noise, pixels), 1)


def _pixels(data: bytes) -> np.ndarray:
    try:
        return np.array(open_image(data).convert("RGB"))
    except BadImage as error:
        raise FifaError(f"an image cannot be shown: {error}") from error


def _without_metadata(data: bytes) -> bytes:
    kept, at = [SIGNATURE], len(SIGNATURE)
    while at + 12 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        chunk, end = data[at + 4 : at + 8], at + 12 + size  # length, name, data, checksum
        if chunk in CHUNKS:
            kept.append(data[at:end])
        at = end
        if chunk == b"IEND":
            break
    return b"".join(kept)
