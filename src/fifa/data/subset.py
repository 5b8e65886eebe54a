"""Whether a folder that a source lies in is a subset of fifa's, and still whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fifa.shards.files import content_digest, read_json
from fifa.shards.sealed import DamagedError

SUBSET_FILE = "subset.json"
_AGAIN = "take it from where the subset was made, or export the subset again"


def is_subset(folder: Path) -> bool:
    """True if the folder's ``subset.json`` is one of ours, and no table of somebody's."""
    return bool(_known(folder))


def _known(folder: Path) -> dict[str, Any]:
    path = folder / SUBSET_FILE
    known = read_json(path, "the subset", object) if path.is_file() else None
    return known if isinstance(known, dict) and "fifa_subset" in known else {}


def check_subset(folder: Path) -> None:
    """Raise `FifaError` where a file of a subset is not as ``subset.json`` says.

    Any other folder passes.
    """
    for listed in _known(folder).get("files", ()):
        file = folder / listed["name"]
        if not file.is_file():
            raise DamagedError(str(file), _AGAIN, missing=True)
        if content_digest(file) != listed["xxh3_128"]:
            raise DamagedError(str(file), _AGAIN)
