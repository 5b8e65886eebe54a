"""Where feedback comes from: a file, a folder, a glob or a URL becomes a sorted list of files."""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fifa.data.archive import SCHEME, TABLE, has_member, listed, member_bytes
from fifa.data.folders import SETTINGS, find_sides, sides_stamp
from fifa.data.records import encodable
from fifa.data.remote import Range, RemoteFile, pinned
from fifa.data.subset import SUBSET_FILE, is_subset
from fifa.errors import FifaError
from fifa.shards.stores import open_store, patiently, stamp_of, unreachable

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tar": "tar",
}
PACKED = ".gz"  # behind the ending of a text file
TOO_MANY = "it unpacks to over {:,} bytes: too many for its size"
ARCHIVES = (".gz", ".tgz", ".zip", ".zst", ".bz2", ".xz", ".7z", ".rar")
UNPACK = "unpack it first (gzip -d, unzip)"
ARROW = "an Arrow file, as datasets' save_to_disk writes: make Parquet of it with its to_parquet"
MAGIC = "*?["
UNPACKED = 30, 16 << 20  # times its bytes, or bytes: no table, but something made to fill memory
BLOCK = 5 << 20  # bytes; a remote file below it is read whole, of others only what is needed


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Parameters
    ----------
    path
        Relative to the source's root, with forward slashes.
    kind
        One of the values of `KINDS`, or ``sides``: two folders (``chosen+rejected``) that are read
        together, `fifa.data.folders`.
    size
        Bytes; -1 where the store does not say.
    stamp
        What changes with the content: modification time in ns, etag or blob id.
    """

    path: str
    kind: str
    size: int
    stamp: str


@dataclass(frozen=True)
class Root:
    """The folder, or the URL prefix, that the files and relative image paths are below."""

    url: str

    @property
    def folder(self) -> Path | None:
        """The root as a local folder; None if it is remote."""
        return None if is_url(self.url) else Path(self.url)

    @property
    def archive(self) -> Path | None:
        """The zip file that the root is; None if it is none."""
        is_zip = self.url.startswith(SCHEME)
        return Path(self.url.removeprefix(SCHEME)) if is_zip else None

    def holds(self, path: str) -> bool:
        """True if there is such a file in the folder or the zip file that this is."""
        if self.archive is not None:
            return has_member(self.archive, path)
        return self.folder is not None and has_file(self.folder, path)

    @property
    def is_remote(self) -> bool:
        """True if it is neither a folder nor a zip file of this machine."""
        return is_url(self.url) and self.archive is None

    def name(self, path: str) -> str:
        """The full name of ``path``, for messages and for libraries that open it themselves."""
        return f"{self.url}/{path}" if is_url(self.url) else str(Path(self.url) / path)

    def open(
        self,
        path: str,
        size: int = -1,
        stamp: str = "",
        wanted: Sequence[Range] | None = None,
    ) -> IO[bytes]:
        """``path`` below the root, opened to be read from its beginning to its end.

        It must come from `find_files`, which tells ``size`` and ``stamp`` too; ``wanted`` are the
        only bytes that will be read of it, where that is not all.
        """
        if path.lower().endswith(PACKED):
            return _unpacked(self._open(path, size, stamp, None))
        return self._open(path, size, stamp, wanted)

    def _open(self, path: str, size: int, stamp: str, wanted: Sequence[Range] | None) -> IO[bytes]:
        if self.folder is not None:
            return (self.folder / path).open("rb")
        if self.archive is not None:
            return io.BytesIO(member_bytes(self.archive, path, TABLE))
        far = RemoteFile(self.name(path), size, stamp)
        far.expect_whole(wanted)
        return io.BufferedReader(far, 1 << 20)

    def parquet(
        self, path: str, size: int = -1, stamp: str = "", cache_gb: float | None = None
    ) -> str | RemoteFile | io.BytesIO:
        """``path`` below the root as pyarrow opens it: a name, or a file of byte ranges.

        A remote file of less than `BLOCK` bytes is read whole.
        """
        if self.folder is not None:
            return self.name(path)
        if self.archive is not None:
            return io.BytesIO(member_bytes(self.archive, path, TABLE))
        far = RemoteFile(self.name(path), size, stamp, cache_gb)
        if far.size < BLOCK:
            far.expect_whole()
        return far


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    """A gzip file's content, which is not just any number of bytes; `OSError` if it were."""
    size = file.seek(0, os.SEEK_END)
    most = max(UNPACKED[0] * size, UNPACKED[1])
    file.seek(max(0, size - 4))
    last = file.read(4)  # the size modulo 2^32, of the last part if there are several
    file.seek(0)
    if size > 18 and int.from_bytes(last, "little") > most:
        file.close()
        raise OSError(TOO_MANY.format(most))
    return io.BufferedReader(_Unpacked(file, most), 1 << 16)


class _Unpacked(io.RawIOBase):
    """A gzip file up to ``most`` bytes."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._most = file, most
        self._gzip = gzip.GzipFile(fileobj=file, mode="rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._gzip.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._gzip.read(len(buffer))
        except (EOFError, zlib.error) as error:
            raise OSError(f"broken gzip: {error}") from error
        if self._gzip.tell() > self._most:
            raise OSError(TOO_MANY.format(self._most))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._gzip.close()
        self._file.close()
        super().close()


@dataclass(frozen=True)
class Source:
    """A source's files, and what was refused while listing them.

    Parameters
    ----------
    named
        What the user named.
    root
        What the files are below.
    files
        Sorted by path.
    refused
        ``(path, reason)`` of files that are not read: links that leave the folder.
    """

    named: str
    root: Root
    files: tuple[SourceFile, ...]
    refused: tuple[tuple[str, str], ...] = ()


def kind_of(name: str) -> str | None:
    """One of the values of `KINDS` by a file's name; None for a file that is not read."""
    path = Path(name.lower())
    kind = KINDS.get(path.suffix)
    if path.suffix == PACKED:
        kind = KINDS.get(Path(path.stem).suffix)
        return None if kind in ("parquet", "tar") else kind
    return kind


def is_url(name: str) -> bool:
    """True for ``scheme://...``."""
    scheme, separator, _ = name.partition("://")
    return bool(separator) and scheme.replace("+", "").replace("-", "").isalnum()


def find_files(source: str | Path) -> Source:
    """The files of a source: a file, a folder (searched recursively), a glob or a URL.

    Hidden files and folders (``.name``, ``_name``) are passed over, links that lead out of the
    folder are refused. ``file://``, ``memory://``, ``http(s)://``, ``hf://datasets/...`` and
    every other scheme that fsspec knows work alike.

    Raises `FifaError` where there is nothing to read.
    """
    named = str(source)
    if named.startswith("file://"):
        named = named.removeprefix("file://")
    if not named:
        raise FifaError("no source given", do="name a file, folder, glob, hf:// id or URL")
    if named.startswith(SCHEME):
        raise FifaError("a zip file is named by its path", where=named, do="leave zip:// out")
    if "::" in named and is_url(named):
        do = "unpack the archive, or copy the files, first"
        raise FifaError("a source within a source is not read", where=named, do=do)
    if encodable(named) != named:
        raise FifaError("the source's name is no UTF-8", where=encodable(named), do="rename it")
    if is_url(named) and named.lower().endswith(".zip"):
        do = "download it, and name the file or its folder"
        raise FifaError("of a remote zip file nothing is read", where=named, do=do)
    found = _find_remote(named) if is_url(named) else _find_local(named)
    if not found.files and not found.refused:
        unpack = f"{UNPACK}: " if named.lower().endswith(ARCHIVES) else ""
        raise FifaError(
            "nothing to read here",
            where=str(source),
            do=f"{unpack}it needs files that end in {', '.join(KINDS)}, or as text in {PACKED}, or "
            "two folders of images, chosen/ and rejected/, with equal file names; a .zip is named "
            "itself",
        )
    return found


def inside(root: Path, path: Path) -> bool:
    """True if ``path``, its links followed, is below ``root``.

    A snapshot of the Hugging Face cache links to the blobs beside it; those count as inside.
    """
    home, real = root.resolve(), path.resolve()
    if real.is_relative_to(home):
        return True
    return home.parent.name == "snapshots" and real.is_relative_to(home.parents[1] / "blobs")


def has_file(root: Path, path: str) -> bool:
    """True if there is a file at ``path`` and it is inside ``root``."""
    try:
        place = (root / path).resolve(strict=True)
        return inside(root, place) and place.is_file()
    except (OSError, ValueError, RuntimeError):  # no such path, a NUL in it, links in a circle
        return False


def _find_local(named: str) -> Source:
    try:
        path = Path(named).expanduser()
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise FifaError(f"the source cannot be opened: {why}", where=named[:300]) from error
    if path.is_file() and path.suffix.lower() == ".zip":
        return _find_in_zip(named, path.resolve())
    if path.is_file():
        root, paths = path.parent, [path]
    elif path.is_dir():
        root, paths = path, list(_walk(path))
    elif any(sign in named for sign in MAGIC):
        parts = path.parts
        fixed = next(i for i, part in enumerate(parts) if any(sign in part for sign in MAGIC))
        root = Path(*parts[:fixed]) if fixed else Path()
        pattern = "/".join(parts[fixed:])
        paths = [match for match in root.glob(pattern) if not match.is_dir()]
    elif path.exists():
        raise FifaError(
            "a pipe, socket or device, where a file is read more than once",
            where=named,
            do="write it to a file first",
        )
    else:
        raise FifaError("no such file or folder", where=named)
    files, refused = [], []
    for file in paths:
        name = file.relative_to(root).as_posix()
        kind = None if file.name == SUBSET_FILE and is_subset(file.parent) else kind_of(name)
        if file.is_symlink() and file.is_dir():
            refused.append((encodable(name), "a link to a folder: name that folder as a source"))
            continue
        if kind is None:
            stem = Path(file.stem.lower())
            if file.suffix.lower() in ARCHIVES and (stem.suffix in KINDS or file.suffix == ".tgz"):
                refused.append((encodable(name), f"packed: {UNPACK}"))
            if file.suffix.lower() == ".arrow":
                refused.append((encodable(name), ARROW))
            continue
        try:
            status = file.stat()
            fault = "" if stat.S_ISREG(status.st_mode) else "no file that can be read to its end"
            if file != path and not inside(root, file):
                fault = "a link that leaves the folder"
        except (OSError, RuntimeError) as error:  # links in a circle, gone since it was listed
            fault = f"the file cannot be opened: {getattr(error, 'strerror', None) or error}"
        if encodable(name) != name:
            name, fault = encodable(name), "the file's name is no UTF-8: rename it"
        if fault:
            refused.append((name, fault))
            continue
        files.append(SourceFile(name, kind, status.st_size, str(status.st_mtime_ns)))
    files.sort(key=lambda file: file.path)
    sides = find_sides(path) if path.is_dir() else None
    if sides and all(file.path in SETTINGS for file in files):
        files = [SourceFile("+".join(sides), "sides", -1, sides_stamp(path, sides))]
    return Source(named, Root(str(root.resolve())), tuple(files), tuple(sorted(refused)))


def _find_in_zip(named: str, archive: Path) -> Source:
    try:
        members = listed(archive)
    except OSError as error:
        raise FifaError(f"the archive cannot be read: {error}", where=named) from error
    files: dict[str, SourceFile] = {}
    refused = []
    for member in members:
        name = member.filename
        kind = None if any(part[:1] in "._" for part in name.split("/")) else kind_of(name)
        if kind is None:
            continue
        if encodable(name) != name or name in files:
            refused.append((encodable(name), "no UTF-8, or twice in its archive"))
            continue
        files[name] = SourceFile(name, kind, member.file_size, f"{member.CRC:08x}")
    ordered = sorted(files.values(), key=lambda file: file.path)
    return Source(named, Root(f"{SCHEME}{archive}"), tuple(ordered), tuple(sorted(refused)))


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] not in "._"]
        yield from (Path(parent) / name for name in names if name[0] not in "._")
        yield from (path for name in folders if (path := Path(parent) / name).is_symlink())


def _find_remote(named: str) -> Source:
    named, asked = pinned(named), named
    system, path = open_store(named)
    bare = named.rstrip("/")
    try:
        if any(sign in named.partition("://")[2] for sign in MAGIC[:1] + MAGIC[2:]):
            first = min(bare.index(sign) for sign in MAGIC if sign in bare)
            root = bare[:first].rpartition("/")[0]
            listed = system.glob(path, detail=True)
        elif named.startswith("http") or system.isfile(path):
            root = bare.rpartition("/")[0]
            listed = {path: patiently(lambda: system.info(path), named)}
        else:
            root = bare
            listed = system.find(path, detail=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise unreachable(asked, error) from error
    prefix = open_store(root)[1].rstrip("/") + "/"
    files = []
    for full, info in listed.items():
        name = full.removeprefix(prefix)
        hidden = any(part[0] in "._" for part in name.split("/") if part)
        kind = kind_of(name.partition("?")[0])
        if kind is None or (hidden and len(listed) > 1) or info.get("type") == "directory":
            continue
        size = info.get("size")
        files.append(SourceFile(name, kind, -1 if size is None else int(size), stamp_of(info)))
    if not listed:
        raise FifaError("no such file or folder", where=asked)
    return Source(asked, Root(root), tuple(sorted(files, key=lambda file: file.path)))
