"""Prompts to evaluate on, from the files that benchmarks come in."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from fifa.console import echo
from fifa.data.ids import prompt_ids
from fifa.data.parquet import read_columns
from fifa.data.records import encoding_of, tab_rows
from fifa.errors import FifaError

PROMPTS = pa.schema(
    [("prompt_id", pa.string()), ("prompt", pa.string()), ("category", pa.string())]
)
LONGEST = 4_000  # characters; no text encoder of an image model reads more
SUFFIXES = (".txt", ".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".json")
ONE_OF = f"one of {', '.join(SUFFIXES)}, or a folder of them"
# Names of columns and fields, the first that is there counts; case does not matter
PROMPT_NAMES = ("prompt", "caption", "text")
CATEGORY_NAMES = ("category", "tag", "categories", "style")

# A prompt, its category if it has one, or the reason why there is no prompt
Item = tuple[str | None, str | None, str]


@dataclass(frozen=True)
class Prompts:
    """Prompts to generate from.

    Parameters
    ----------
    source
        The file or folder that the user named.
    table
        `PROMPTS`, each prompt once, in the order of the source; ``category`` is null where the
        source has none.
    rows
        Lines, rows or entries read: ``len(table)`` and all of ``dropped``.
    dropped
        How many were left out, by reason.
    """

    source: str
    table: pa.Table
    rows: int
    dropped: dict[str, int]

    def __len__(self) -> int:
        return int(self.table.num_rows)


def read_prompts(source: str | Path, *, limit: int | None = None) -> Prompts:
    """Read prompts, and say what was left out.

    Parameters
    ----------
    source
        A file, a folder of them, or one file's URL: text (a prompt a line), CSV or TSV
        (PartiPrompts: ``Prompt``, ``Category``), Parquet, JSON lines (GenEval: ``prompt``,
        ``tag``), or JSON: a list of prompts or of objects with a ``prompt`` (HPSv2's benchmark,
        HPDv2's test.json), or lists by category. In a folder of files without categories, the
        file's name is the category (HPSv2's ``anime.json``, ``photo.json``, ...).
    limit
        At most this many, drawn in turn from each category in the source's order.

    Raises
    ------
    FifaError
        For a file that is missing, unreadable or of another kind, and where no prompt is left.
    """
    items = list(_items(str(source)))
    dropped = Counter(reason for prompt, _, reason in items if prompt is None)
    found: dict[str, tuple[str, str | None]] = {}
    kept = [(prompt, category) for prompt, category, _ in items if prompt is not None]
    for name, entry in zip(prompt_ids(prompt for prompt, _ in kept), kept, strict=True):
        if found.setdefault(name, entry) is not entry:
            dropped["a repeat of an earlier prompt"] += 1
    names = _spread({name: category for name, (_, category) in found.items()}, limit)
    if len(names) < len(found):
        dropped["beyond the limit"] = len(found) - len(names)
    if not names:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        raise FifaError(f"no prompt here ({reasons or 'it is empty'})", where=str(source))
    rows = [{"prompt_id": n, "prompt": found[n][0], "category": found[n][1]} for n in names]
    table = pa.Table.from_pylist(rows, schema=PROMPTS)
    prompts = Prompts(str(source), table, len(items), dict(dropped))
    categories = len({row["category"] for row in rows} - {None})
    of = f" in {categories:,} categories" if categories else ""
    echo(f"read {prompts.rows:,} rows of {prompts.source}: {len(prompts):,} prompts{of}")
    for reason, count in sorted(dropped.items(), key=lambda item: (-item[1], item[0])):
        echo(f"  dropped  {count:>10,}  {reason}")
    return prompts


def draw_seeds(prompt_id: str, count: int, first: int = 0) -> list[int]:
    """The seeds of a prompt's images, each in [0, 2^32): what `torch.Generator` is given.

    Every prompt has seeds of its own, so that its images say something about the prompt and not
    about one noise that all prompts share: prompts are then independent, as the intervals assume.
    """
    digests = (
        xxhash.xxh3_64_intdigest(f"{number} {prompt_id}".encode())
        for number in range(first, first + count)
    )
    return [digest & 0xFFFFFFFF for digest in digests]


def _spread(categories: dict[str, str | None], limit: int | None) -> list[str]:
    """The first ``limit`` names, taken in turn from each category, in the source's order."""
    if limit is None or len(categories) <= limit:
        return list(categories)
    by_category: dict[str | None, list[str]] = {}
    for name, category in categories.items():
        by_category.setdefault(category, []).append(name)
    turns = chain.from_iterable(zip_longest(*by_category.values()))
    chosen = set([name for name in turns if name is not None][:limit])
    return [name for name in categories if name in chosen]


def _items(source: str) -> Iterator[Item]:
    path = Path(source).expanduser()
    try:
        folder = "://" not in source and path.is_dir()
    except (OSError, ValueError) as error:  # a name that no file can have
        brief = getattr(error, "strerror", None) or error
        raise FifaError(f"cannot read the prompts: {brief}", where=source[:200]) from error
    if folder:
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise FifaError("no file of prompts in the folder", where=source, do=ONE_OF)
        for file in files:
            for prompt, category, reason in _file(str(file)):
                yield prompt, category or (file.stem if len(files) > 1 else None), reason
    else:
        yield from _file(source)


def _file(source: str) -> Iterator[Item]:
    suffix = Path(source.partition("?")[0]).suffix.lower()
    if suffix not in SUFFIXES:
        raise FifaError("files of this type are not read", where=source, do=ONE_OF)
    data = _bytes(source)
    try:
        if suffix == ".txt":
            yield from (_item(line) for line in _lines(data))
        elif suffix == ".parquet":
            file = pq.ParquetFile(io.BytesIO(data))
            names = file.schema_arrow.names
            known = (*PROMPT_NAMES, *CATEGORY_NAMES)
            wanted = [name for name in names if name.lower() in known]
            table = read_columns(io.BytesIO(data), wanted, source)
            yield from _rows(names, table.to_pylist(), source)
        elif suffix in (".csv", ".tsv"):
            names, *cells = [row for row in _cells(_text(data), suffix) if row] or [[]]
            rows = [dict(zip(names, row, strict=False)) for row in cells]
            yield from _rows(names, rows, source)
        elif suffix == ".json":
            yield from _json(json.loads(_text(data)), None)
        else:
            yield from chain.from_iterable(_json_line(line) for line in _lines(data))
    except (ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise FifaError(f"cannot read the prompts: {error}", where=source) from error


def _bytes(source: str) -> bytes:
    try:
        if "://" not in source:
            return Path(source).expanduser().read_bytes()
        import fsspec

        with fsspec.open(source, "rb") as file:
            return bytes(file.read())
    except (OSError, ValueError, ImportError) as error:
        raise FifaError(f"cannot open the prompts: {error}", where=source) from error


def _text(data: bytes) -> str:
    """UTF-8 or UTF-16; bytes that are no UTF-8 become lone surrogates."""
    name = encoding_of(data)
    return data.decode(name, "surrogateescape" if name == "utf-8-sig" else "replace")


def _cells(text: str, suffix: str) -> Iterator[list[str]]:
    """The rows of a table. In CSV a quote that nobody closes is an error, in TSV it is a letter."""
    if suffix == ".tsv":
        return tab_rows(io.StringIO(text))
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    return csv.reader(io.StringIO(text, newline=""), strict=True)


def _lines(data: bytes) -> list[str]:
    """Lines as a text file has them."""
    text = _text(data)
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def _rows(names: Sequence[str], rows: list[dict[str, Any]], source: str) -> Iterator[Item]:
    if rows and not any(name.lower() in PROMPT_NAMES for name in names):
        raise FifaError(
            f"no column of prompts; there are {', '.join(names)}",
            where=source,
            do=f"name it {' or '.join(PROMPT_NAMES)}",
        )
    return (_item(_field(row, PROMPT_NAMES), _field(row, CATEGORY_NAMES)) for row in rows)


def _json_line(line: str) -> Iterator[Item]:
    try:
        value = json.loads(line) if line.strip() else ""
    except ValueError:
        yield None, None, "no JSON"
        return
    yield from _json([value], None)


def _json(value: Any, category: str | None) -> Iterator[Item]:
    """Prompts of a list of strings or objects, or of such lists by category."""
    if isinstance(value, dict) and _field(value, PROMPT_NAMES) is _MISSING:
        if not all(isinstance(part, list) for part in value.values()):
            raise ValueError("neither a list of prompts nor lists of prompts by category")
        for name, part in value.items():
            yield from _json(part, name)
        return
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, dict):
            own = _field(entry, CATEGORY_NAMES)
            yield _item(_field(entry, PROMPT_NAMES), category if own is _MISSING else own)
        else:
            yield _item(entry, category)


_MISSING = object()


def _field(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of ``names`` that the row has; `_MISSING` if it has none."""
    lower = {str(key).lower(): value for key, value in row.items()}
    return next((lower[name] for name in names if name in lower), _MISSING)


def _item(prompt: object, category: object = None) -> Item:
    if prompt is _MISSING or prompt is None:
        return None, None, "no prompt"
    if not isinstance(prompt, str):
        return None, None, "the prompt is no text"
    if any("\ud800" <= char <= "\udfff" for char in prompt):
        return None, None, "no UTF-8"
    if not any(map(str.isprintable, prompt.strip())):
        return None, None, "an empty prompt"
    if len(prompt) > LONGEST:
        return None, None, f"longer than {LONGEST:,} characters"
    named = category if isinstance(category, str) and category.strip() else None
    return prompt.strip(), named.strip()[:80] if named else None, ""
