"""How a source was understood, in words: what `fifa read --explain` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fifa.data.images import where_images
from fifa.data.names import NAMES, label_columns
from fifa.data.table import Pairs

ROWS = 3
WIDTH = 70  # characters of a prompt or an image's key
REASONS = 10


def explained(pairs: Pairs) -> str:
    """The format and its columns, `ROWS` pairs, and everything that is no pair, with its count."""
    origin = pairs.origin
    known = ", ".join(origin.used) if not origin.columns else "--columns"
    lines = [f"format    {origin.format}, by {known}"]
    for name, what in origin.used.items():
        lines.append(f"column    {name}: {what}")
    kept = ", ".join(origin.score_columns)
    lines.append(f"kept      {kept or 'no other column'}")
    lines.append(f"ignored   {', '.join(origin.ignored) or 'no column'}")
    lines.append(f"images    {where_images(pairs.table, origin)}")
    for row in pairs.table.slice(0, ROWS).to_pylist():
        lines += _row(row)
    rejected = Counter(pairs.rejected["reason"].to_pylist())
    lines.append(f"pairs     {len(pairs):,} of {origin.rows:,} rows, {origin.merged:,} merged")
    lines += _counted("not made", origin.not_made)
    lines += _counted("rejected", dict(rejected.most_common(REASONS)))
    others = len(pairs.rejected) - sum(count for _, count in rejected.most_common(REASONS))
    return "\n".join([*lines, *(_counted("rejected", {"other reasons": others} if others else {}))])


def explained_facts(pairs: Pairs) -> dict[str, Any]:
    """What `explained` says of the source, for JSON."""
    origin = pairs.origin
    return {
        "format": origin.format,
        "columns": origin.used,
        "scores": origin.score_columns,
        "ignored": origin.ignored,
        "images": where_images(pairs.table, origin),
        "pairs": len(pairs),
        "prompts": pairs.prompts.num_rows,
        "rows": origin.rows,
        "merged": origin.merged,
        "not_made": origin.not_made,
        "rejected": Counter(pairs.rejected["reason"].to_pylist()),
    }


def _row(row: dict[str, Any]) -> list[str]:
    label = row["label"]
    wins = "a tie" if label == 0.5 else f"image_{int(label < 0.5)} wins"
    share = "" if label in (0.0, 0.5, 1.0) else f" with {max(label, 1 - label):.0%}"
    side = ", the source's second image is image_0" if row["swapped"] else ""
    names = [name for name in (*NAMES, *label_columns(row)) if row.get(name) is not None]
    lines = [
        f"row       {row['file']}, row {row['row']}: {_cut(row['prompt'])}",
        f"  image_0 {_cut(row['image_0'])}",
        f"  image_1 {_cut(row['image_1'])}",
        f"  label   {wins}{share}, votes: {row['votes']}{side}",
    ]
    values = [f"{value:.2g}" if isinstance(value := row[n], float) else value for n in names]
    beside = _cut(", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True)))
    return [*lines, f"  beside  {beside}"] if beside else lines


def _counted(word: str, counts: Mapping[str, int]) -> list[str]:
    return [f"{word}  {count:,}: {reason}" for reason, count in counts.items()]


def _cut(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= WIDTH else f"{plain[: WIDTH - 3]}..."
