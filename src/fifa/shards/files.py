"""Files and folders that are there whole or not at all, and the digests that name them."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
import yaml

from fifa.errors import FifaError
from fifa.shards.mapped import Shelf, give_back
from fifa.shards.sealed import BLANK, SEAL, DamagedError, check_whole, has_seal, is_whole, seal

PREFIX = ".fifa-tmp-"  # what an interrupted write leaves behind; `sweep` removes it
LOCK = ".fifa-lock"  # of `fifa.shards.lock`
ROW_GROUP = 131_072  # fixed, so that the same table gives the same bytes
MAX_DICTIONARY = ROW_GROUP // 2  # values in a dictionary that row groups have whole
SYNCS = 16  # files written through to the disk at a time
MAX_JSON = 1 << 30  # bytes of a file that is read whole into memory
MAX_YAML = 1 << 24  # recipes are a few hundred bytes, and YAML is slow to read
_LOST = "start again in another folder: what was asked for in this one is not known any more"
_OLD = 86400.0  # seconds after which a temporary folder is nobody's, where there are no locks
_NUMBER = re.compile(r"\(os error (\d+)\)")


def digest(*parts: object) -> str:
    """16 hex characters (64 bits of XXH3-128) that name ``parts``: what goes into a file's name.

    ``parts`` are read as sorted JSON; bytes are taken as they are.
    """
    h = xxhash.xxh3_128()
    for part in parts:
        raw = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        h.update(len(raw).to_bytes(8, "little"))
        h.update(raw)
    return h.hexdigest()[:16]


def column_digest(column: pa.ChunkedArray) -> str:
    """16 hex characters that name a string column's values and order, however it is chunked."""
    lengths, values = xxhash.xxh3_128(), xxhash.xxh3_128()
    for chunk in column.chunks:
        packed = pa.concat_arrays([chunk, chunk[:0]])  # a copy without another slice's bytes
        lengths.update(pc.binary_length(packed).to_numpy(zero_copy_only=False))
        values.update(packed.buffers()[-1] or b"")
    return digest(lengths.digest(), values.digest())


def files_digest(files: Mapping[str, Path]) -> str:
    """16 hex characters that name the content of ``files`` under their keys, wherever they lie."""
    return digest({name: content_digest(path) for name, path in files.items()})


def cache_folder() -> Path:
    """Where what can be made or fetched again is kept for all runs.

    ``$FIFA_CACHE``, else ``fifa`` in the user's cache.
    """
    named = os.environ.get("FIFA_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fifa"


def content_digest(path: Path) -> str:
    """32 hex characters (XXH3-128) that name a file's content."""
    h = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            h.update(block)
    return h.hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well.

    The file is synced, renamed over ``path`` and its folder synced; if the block raises,
    ``path`` is as it was. Raises `FifaError` where the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=PREFIX, suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except Exception as error:
        failed = _failed_write(error)
        if failed is None:
            raise
        raise cannot_write(path, failed) from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there; `FifaError` where that is refused."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, atomically."""
    write_bytes(path, text.encode("utf-8", "surrogatepass"))


def write_json(path: Path, value: Any, *, sealed: bool = False) -> None:
    """Write ``value`` as indented JSON with sorted keys to ``path``, atomically.

    ``sealed`` adds a mapping's own digest (`fifa.shards.sealed`) as its last key.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    if sealed:
        write_sealed_json(path, text)
    else:
        write_text(path, text + "\n")


def write_sealed_json(path: Path, text: str) -> None:
    """Write the text of a JSON object, with its own digest as the last key, atomically."""
    start = text[: text.rindex("}")].rstrip()
    comma = "" if start == "{" else ","
    _write_sealed(path, f'{start}{comma}\n  "{SEAL}": "{BLANK}"\n}}\n')


def write_yaml(path: Path, text: str) -> None:
    """Write ``text``, which is YAML, below a comment with the file's digest, atomically."""
    _write_sealed(path, f"# {SEAL}: {BLANK}\n{text}")


def read_json(
    path: Path, what: str, of: type[Any] = dict, missing: Any = None, *, sealed: bool = False
) -> Any:
    """The value in a JSON file of UTF-8.

    Parameters
    ----------
    path
        The file, of at most `MAX_JSON` bytes.
    what
        What it holds, for messages: ``the recipe``.
    of
        The class that the value must have: a mapping unless another is given.
    missing
        What to return where there is no such file; without it that is an error.
    sealed
        The file has to have its digest; where it has one, that has to be right in any case.

    Raises `FifaError` where the file cannot be read or holds a value of another class, and
    `DamagedError` where its digest is not that of its content.
    """
    value = _read(path, what, of, missing, json.loads, MAX_JSON, sealed, has_seal)
    if isinstance(value, dict):
        value.pop(SEAL, None)
    return value


def read_yaml(path: Path, what: str, missing: Any = None, *, sealed: bool = False) -> Any:
    """The mapping in a YAML file (without tags, at most `MAX_YAML` bytes), as in `read_json`.

    An empty file is an empty mapping. People may edit a copy of what fifa wrote: its digest is
    looked at only where it has to be there.
    """
    return _read(path, what, dict, missing, _mapping, MAX_YAML, sealed, lambda raw: False)


def read_json_lines(path: Path, *, sealed: bool = False) -> tuple[list[dict[str, Any]], int]:
    """The objects in a log of JSON lines, and how many lines are none: a kill cuts lines short.

    A file that is not there has no lines. With ``sealed`` every line has its own digest, as
    `sealed_line` writes it, and one that has not is none.
    """
    try:
        text = Path(path).read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise FifaError(f"cannot read the log: {error.strerror}", where=str(path)) from error
    found, lines = [], text.splitlines()
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and (value.pop(SEAL, None) == digest(value) or not sealed):
            found.append(value)
    return found, len(lines) - len(found)


def sealed_line(value: dict[str, Any]) -> str:
    """A line of JSON for a log, with its own digest."""
    plain = json.loads(json.dumps(value, ensure_ascii=False, default=str))
    return json.dumps({**plain, SEAL: digest(plain)}, ensure_ascii=False) + "\n"


def check_free(out: Path, what: str) -> None:
    """Raise `FifaError` for a file, or a folder with files in it, which are no ``what``."""
    if not out.exists():
        return
    if not out.is_dir() or any(not path.name.startswith((PREFIX, LOCK)) for path in out.iterdir()):
        raise FifaError(
            f"the folder is not empty and holds no {what}",
            where=str(out),
            do="choose another --out",
        )


def check_same(
    what: str, differences: Sequence[str], where: Path, do: str = "choose another --out"
) -> None:
    """Raise `FifaError` if there are differences, ``there / asked`` each: it holds another."""
    if differences:
        told = f"the folder holds {what} (there / asked): {'; '.join(differences)}"
        raise FifaError(told, where=str(where), do=do)


def write_table(path: Path, table: pa.Table, **options: Any) -> None:
    """Write ``table`` as Parquet (zstd, fixed row groups) to ``path``, atomically.

    The same table gives the same bytes, however it is chunked in memory and whether it was read
    from a file or not. Its digest is in its metadata. ``options`` go to
    `pyarrow.parquet.ParquetWriter`, and ``row_group_size`` to its ``write_table``.
    """
    with atomic_path(path) as temporary, temporary.open("w+b") as file:
        _write_table(file, table, **options)


def table_bytes(table: pa.Table) -> bytes:
    """What `write_table` writes."""
    file = io.BytesIO()
    _write_table(file, table)
    return file.getvalue()


def read_table(
    path: Path,
    columns: list[str] | None = None,
    *,
    do: str | None = None,
    shelf: Shelf | None = None,
) -> pa.Table:
    """The table that `write_table` wrote to ``path``, or some columns of it; it lies on ``shelf``.

    Raises `DamagedError`, with ``do``, where the file is anything else, and `FifaError` where it
    cannot be read.
    """
    check_whole(path, do)
    try:
        with pq.ParquetFile(path) as file:
            if shelf is None or file.num_row_groups == 0:
                return _unsealed(file.read(columns))
            groups = ([group] for group in range(file.num_row_groups))
            parts = [shelf.put(file.read_row_groups(group, columns)) for group in groups]
        return _unsealed(pa.concat_tables(parts))
    except (OSError, pa.ArrowException) as error:
        raise DamagedError(str(path), do) from error


def parse_table(data: bytes, where: str) -> pa.Table:
    """The table of `table_bytes`; `DamagedError` for any others."""
    if not is_whole(io.BytesIO(data)):
        raise DamagedError(where)
    return _unsealed(pq.read_table(io.BytesIO(data)))


def _write_table(file: BinaryIO, table: pa.Table, **options: Any) -> None:
    size = options.pop("row_group_size", ROW_GROUP)
    table = _unified(_unsealed(table))
    schema = _as_read(table.schema)
    with pq.ParquetWriter(file, schema, **{"compression": "zstd", **options}) as writer:
        for start in range(0, max(1, len(table)), size):  # one row group is copied at a time
            part = _own_dictionaries(table.slice(start, size)).combine_chunks()
            writer.write_table(part.cast(schema), row_group_size=size)
            give_back()
        writer.add_key_value_metadata({SEAL: BLANK})
    seal(file)


def _unified(table: pa.Table) -> pa.Table:
    """A dictionary a column; chunks that share one already, perhaps of millions, are left alone."""
    for i, column in enumerate(table.columns):
        if pa.types.is_dictionary(column.type):
            buffers = (
                [(b.address, b.size) for b in d.buffers() if b] for d in _dictionaries(column)
            )
            if len(set(map(str, buffers))) > 1:
                table = table.set_column(i, table.field(i), column.unify_dictionaries())
    return table


def _own_dictionaries(part: pa.Table) -> pa.Table:
    """Of large dictionaries what is used: otherwise every row group has that of the whole table."""
    for i, column in enumerate(part.columns):
        if pa.types.is_dictionary(column.type) and any(
            len(dictionary) > MAX_DICTIONARY for dictionary in _dictionaries(column)
        ):
            used = column.cast(column.type.value_type).combine_chunks().dictionary_encode()
            part = part.set_column(i, part.field(i), used.cast(column.type))
    return part


def _dictionaries(column: pa.ChunkedArray) -> list[pa.Array]:
    return [chunk.dictionary for chunk in column.chunks]


def _unsealed(table: pa.Table) -> pa.Table:
    """Without the digest of the file that the table was read from."""
    known = table.schema.metadata or {}
    if SEAL.encode() not in known:
        return table
    left = {key: value for key, value in known.items() if key != SEAL.encode()}
    return table.replace_schema_metadata(left or None)


def take_rows(path: Path, rows: npt.ArrayLike, columns: list[str] | None = None) -> pa.Table:
    """Rows of a Parquet file, in the order asked; only the row groups they are in are read.

    The file's digest is not looked at: `check_whole` does that once.
    """
    wanted, order = np.unique(np.asarray(rows, np.int64), return_inverse=True)
    with pq.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        groups = np.searchsorted(starts, wanted, side="right") - 1
        parts = [
            file.read_row_group(int(group), columns).take(wanted[groups == group] - starts[group])
            for group in np.unique(groups)
        ]
        names = columns or file.schema_arrow.names
        empty = file.schema_arrow.empty_table().select(names)
    return pa.concat_tables(parts or [empty]).unify_dictionaries().take(order)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends well.

    It is locked meanwhile, so that no `sweep` takes it for one that was left behind. Those that
    were, beside ``path``, are removed.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in filter(Path.is_dir, path.parent.glob(f"{PREFIX}*")):
            _remove_left(left)
        temporary = Path(tempfile.mkdtemp(prefix=PREFIX, dir=path.parent))
        temporary.chmod(0o777 & ~_umask())
        handle = os.open(temporary, os.O_RDONLY)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        lock(handle)
        yield temporary
        with ThreadPoolExecutor(SYNCS) as pool:  # of 20,000 files one by one it takes minutes
            list(pool.map(_sync, sorted(temporary.rglob("*"))))
        old = Path(f"{temporary}-old")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        failed = _failed_write(error)
        if failed is None:
            raise
        raise cannot_write(path, failed) from error
    finally:
        os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)


def lock(handle: int) -> bool | None:
    """Lock an open file or folder until it is closed, or its process ends; False if another has.

    None where the system or the file system has no locks.
    """
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def reserve(path: Path) -> None:
    """Take the room of a file with holes before it is written through a memory map.

    There a full disk ends in a signal, not in an error. Raises `FifaError` where there is no
    room; does nothing on systems that cannot take it.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise cannot_write(path, error) from error


def sweep(folder: Path) -> None:
    """Remove what interrupted writes left in ``folder`` and one level below it."""
    for pattern in (f"{PREFIX}*", f"*/{PREFIX}*"):
        for path in Path(folder).glob(pattern):
            if path.is_dir():
                _remove_left(path)
            else:
                path.unlink(missing_ok=True)


def _remove_left(folder: Path) -> None:
    """Remove a temporary folder that nobody writes into any more."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        locked = lock(handle)
        old = time.time() - os.fstat(handle).st_mtime > _OLD
        if locked or (locked is None and old):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> FifaError:
    """The message for a folder that refuses a file."""
    return FifaError(
        f"cannot write: {error.strerror or error}",
        where=str(path),
        do="choose another --out, free space, or change the folder's permissions",
    )


def _failed_write(error: Exception) -> OSError | None:
    """What went wrong with a file that was written, if that it is.

    The errors of safetensors are no `OSError`, but end in the number of one.
    """
    if isinstance(error, OSError):
        return error
    if number := _NUMBER.search(str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return None


def _write_sealed(path: Path, text: str) -> None:
    file = io.BytesIO(text.encode("utf-8", "surrogatepass"))
    seal(file)
    write_bytes(path, file.getvalue())


def _mapping(text: str) -> Any:
    try:
        return yaml.safe_load(text) or {}
    except (TypeError, AttributeError, OverflowError, KeyError, IndexError) as error:
        raise ValueError(str(error)) from error  # PyYAML's own, of dates and keys


def _read(
    path: Path,
    what: str,
    of: type[Any],
    missing: Any,
    parse: Callable[[str], Any],
    most: int,
    sealed: bool,
    may_be_sealed: Callable[[bytes], bool],
) -> Any:
    do = "check the path and its permissions"
    try:
        with Path(path).open("rb") as file:
            raw = file.read(most + 1)
        do = "mend the file, or name another"
        if len(raw) > most:
            raise ValueError(f"it has more than {most >> 20} MB")
        if (sealed or may_be_sealed(raw)) and not is_whole(io.BytesIO(raw)):
            raise DamagedError(str(path), None if parse is json.loads else _LOST)
        value = parse(raw.decode("utf-8-sig"))
        if not isinstance(value, of):
            wanted = "mapping" if of is dict else of.__name__
            raise ValueError(f"it holds no {wanted} but a {type(value).__name__}")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if missing is not None and isinstance(error, FileNotFoundError | NotADirectoryError):
            return missing
        raise FifaError(f"cannot read {what}: {error}", where=str(path), do=do) from error
    return value


def _as_read(schema: pa.Schema) -> pa.Schema:
    """``schema`` as a file gives it back: there a list's values have another name, for one."""
    empty = pa.BufferOutputStream()
    pq.ParquetWriter(empty, schema).close()
    return pq.read_schema(pa.BufferReader(empty.getvalue()))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
