"""What the files of a folder should hold: ``digests.json``, written with weights.

A folder that has none is somebody else's, and read as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from fifa.errors import FifaError
from fifa.shards.files import content_digest, digest, read_json, write_json

MANIFEST = "digests.json"


def write_manifest(
    folder: Path, files: Iterable[Path], coming: Mapping[str, bytes] | None = None
) -> None:
    """Write what ``files`` in ``folder`` hold.

    Parameters
    ----------
    folder
        Where they are.
    files
        Files, or folders of files.
    coming
        Files that are yet to be written, by name.
    """
    found = {
        file.relative_to(folder).as_posix(): content_digest(file)
        for place in files
        for file in ([place] if place.is_file() else sorted(place.rglob("*")))
        if file.is_file()
    }
    known = found | {name: bytes_digest(data) for name, data in (coming or {}).items()}
    write_json(folder / MANIFEST, {"files": known, "digest": digest(known)})


def check_manifest(folder: Path, below: str = "") -> None:
    """Raise `FifaError` for a file of ``folder`` that is not as it was written.

    Parameters
    ----------
    folder
        Where the manifest is, if there is one.
    below
        What begins the names of the files that are looked at; those that are gone are not missed.
    """
    if not (folder / MANIFEST).exists():
        return
    known = read_json(folder / MANIFEST, "the digests of the files")
    files = known.get("files")
    again = f"copy the folder again; if you changed the file on purpose, remove {MANIFEST}"
    if not isinstance(files, dict) or known.get("digest") != digest(files):
        raise FifaError(
            "the digests of the files are damaged", where=str(folder / MANIFEST), do=again
        )
    for name, wanted in files.items():
        if name.startswith(below) and _differs(folder / name, wanted):
            raise FifaError(
                "the file is not as it was written: it is damaged, or another",
                where=str(folder / name),
                do=again,
            )


def bytes_digest(data: bytes) -> str:
    """`fifa.shards.files.content_digest` of a file with these bytes."""
    return xxhash.xxh3_128(data).hexdigest()


def _differs(path: Path, wanted: Any) -> bool:
    try:
        return path.is_file() and content_digest(path) != wanted
    except OSError as error:
        raise FifaError(f"cannot read the file: {error.strerror}", where=str(path)) from error
