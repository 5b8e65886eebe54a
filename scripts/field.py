"""Inputs that users met, each with its right value: what differs is printed, a line a value.

    python scripts/field.py ../shared/cases

The values are in FOLDER/expected.yaml, or else in tests/field/expected.yaml: a list of entries,
each with ``file`` (relative to FOLDER), maybe ``command`` (``read``, ``train`` or ``prompts``;
``read`` if not given), ``columns`` and ``format``, and the values that are right: of ``labels``
(in the order of the rows, of the source's first image), ``votes``, ``prompts``, ``merged``,
``rejected`` (how many), ``dropped``, ``images`` (how many can be opened) or ``error`` (words that
the message has) those that are to be looked at.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from fifa.data import read_pairs
from fifa.data.decode import BadImage, open_image
from fifa.data.images import pair_images, read
from fifa.errors import FifaError
from fifa.evaluation.prompts import read_prompts
from fifa.training.pairs import read_training_pairs

EXPECTED = Path(__file__).parents[1] / "tests" / "field" / "expected.yaml"
INPUTS = ("file", "command", "columns", "format")


def found(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """What comes of an entry's input: every value that can be looked at, or its ``error``."""
    path = folder / entry["file"]
    try:
        if entry.get("command") == "prompts":
            prompts = read_prompts(path)
            return {"prompts": prompts.table["prompt"].to_pylist(), "dropped": prompts.dropped}
        if entry.get("command") == "train":
            training = read_training_pairs(path)
            labels = training.label.tolist()
            return {"prompts": training.caption, "labels": labels, "dropped": training.dropped}
        pairs = read_pairs(path, entry.get("format"), columns=entry.get("columns"))
    except FifaError as error:
        return {"error": str(error)}
    rows = pairs.table.to_pylist()
    cells = read(pair_images(pairs.table, pairs.origin))
    return {
        "labels": [1 - row["label"] if row["swapped"] else row["label"] for row in rows],
        "votes": pairs.table["votes"].to_pylist(),
        "prompts": pairs.table["prompt"].to_pylist(),
        "merged": pairs.origin.merged,
        "rejected": len(pairs.rejected),
        "images": sum(_opens(data) for _, data in cells),
    }


def _opens(data: bytes | BadImage) -> bool:
    try:
        return isinstance(data, bytes) and open_image(data) is not None
    except BadImage:
        return False


def same(right: Any, value: Any) -> bool:
    """Equal, numbers to six digits."""
    if isinstance(right, list) and isinstance(value, list) and len(right) == len(value):
        return all(map(same, right, value))
    if isinstance(right, float) and isinstance(value, float):
        return abs(right - value) < 1e-6
    return bool(right == value)


def differences(folder: Path, expected: Path) -> list[str]:
    """A line for every value that is not the right one."""
    lines = []
    for entry in yaml.safe_load(expected.read_text("utf-8")):
        values = found(folder, entry)
        for name in entry.keys() - set(INPUTS):
            right, value = entry[name], values.get(name, values.get("error", "no error"))
            good = right in str(value) if name == "error" else same(right, value)
            if not good or (name == "error") != ("error" in values):
                lines.append(f"{entry['file']}: {name} is {value}, not {right}")
    return lines


def main() -> int:
    """Print what differs; 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    own = folder / "expected.yaml"
    lines = differences(folder, own if own.exists() else EXPECTED)
    print("\n".join(lines) or "all values are right")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
