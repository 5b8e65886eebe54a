"""Two folders of images with equal file names, as trainers keep pairs: the better and the worse."""

from __future__ import annotations

import os
from pathlib import Path

from fifa.data.records import Records
from fifa.shards.files import digest

SIDES = (("chosen", "rejected"), ("win", "lose"), ("winner", "loser"), ("preferred", "rejected"))
# What trainers keep beside such folders, which is no table: OneTrainer's and SimpleTuner's
SETTINGS = ("concepts.json", "multidatabackend.json")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_TEXT = 1 << 20  # bytes of a caption's file


def find_sides(root: Path) -> tuple[str, str] | None:
    """The names of the two folders below ``root``; None where it has no such pair."""
    folders = (path.name for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    names = {name.lower(): name for name in folders}
    return next(((names[a], names[b]) for a, b in SIDES if names.keys() >= {a, b}), None)


def sides_stamp(root: Path, sides: tuple[str, str]) -> str:
    """Changes with the files' names, sizes and times."""
    stats = [(name, [*_images(root / name).items()]) for name in sides]
    texts = [(name, sorted(_stems(root / name, (".txt",)).items())) for name in sides]
    return digest([stats, texts])


def read_sides(root: Path, sides: tuple[str, str]) -> Records:
    """A row a file name, in order: ``chosen`` and ``rejected`` are its two files, ``prompt`` the
    text of NAME.txt beside either of them.

    A name that one folder lacks, or has twice (``1.png`` and ``1.jpg``), is a rejected row.
    """
    records = Records(columns={"prompt": [], "chosen": [], "rejected": []})
    found = [_images(root / name) for name in sides]
    for row, stem in enumerate(sorted({*found[0], *found[1]})):
        files = [images.get(stem, []) for images in found]
        lacks = [name for name, own in zip(sides, files, strict=True) if not own]
        if lacks or max(map(len, files)) > 1:
            why = f"{lacks[0]}/ has no image {stem!r}" if lacks else f"several images {stem!r}"
            records.rejected.append((row, why))
            continue
        texts = [root / name / f"{stem}.txt" for name in sides]
        text = next((path for path in texts if path.is_file() and not path.is_symlink()), None)
        values = [f"{name}/{own[0][0]}" for name, own in zip(sides, files, strict=True)]
        prompt = text.read_bytes()[:MAX_TEXT].decode("utf-8", "surrogateescape") if text else None
        records.rows.append(row)
        columns = (prompt and prompt.strip(), *values)
        for name, value in zip(records.columns, columns, strict=True):
            records.columns[name].append(value)
    return records


def _images(folder: Path) -> dict[str, list[tuple[str, int, int]]]:
    return dict(sorted(_stems(folder, SUFFIXES).items()))


def _stems(folder: Path, suffixes: tuple[str, ...]) -> dict[str, list[tuple[str, int, int]]]:
    """By stem the files of a folder, with their sizes and times; links and hidden ones are none."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        stem, dot, suffix = entry.name.rpartition(".")
        wanted = dot + suffix.lower() in suffixes and entry.name[0] not in "._"
        if wanted and entry.is_file(follow_symlinks=False):
            status = entry.stat()
            own = (entry.name, status.st_size, status.st_mtime_ns)
            found.setdefault(stem, []).append(own)
    return found
