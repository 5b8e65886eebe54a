"""Members of zip files, read into memory: nothing is ever unpacked to the disk.

Names in an archive reach no file system. What a member says of its size is not believed.
"""

from __future__ import annotations

import io
import os
import stat
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

SCHEME = "zip://"  # before the path of an archive that is a source
LISTING = 64 << 20  # bytes of an archive's list of members
TABLE = 1 << 30  # bytes of a table
OPEN = 4  # archives, their lists in memory


def split(ref: str) -> tuple[str, str]:
    """The archive and the member in ``archive.zip::NAME``; of any other path itself and ""."""
    archive, sign, member = ref.partition("::")
    return (archive, member) if sign and archive.lower().endswith(".zip") else (ref, "")


def listed(archive: Path) -> list[zipfile.ZipInfo]:
    """The members that are files; `OSError` for what is no zip file, or one made to fill memory."""
    return [member for member in _opened(archive).infolist() if not member.is_dir()]


def has_member(archive: Path, name: str) -> bool:
    """True if a file that can be opened has a member of that name."""
    return name in _opened(archive).NameToInfo


def member_bytes(archive: Path, name: str, most: int) -> bytes:
    """A member of at most ``most`` bytes.

    Raises `FileNotFoundError` where there is none of that name, and `OSError` for everything else
    that is wrong with it.
    """
    opened = _opened(archive)
    try:
        info = opened.getinfo(name)
    except KeyError:
        raise FileNotFoundError(name) from None
    if info.flag_bits & 1:
        raise OSError("it is encrypted")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise OSError("a link in an archive")
    try:
        with opened.open(info) as file:
            data = file.read(most + 1)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, zlib.error) as error:
        raise OSError(f"broken zip: {error}") from error
    except RuntimeError as error:  # a password, or a compression that is not built in
        raise OSError(str(error)) from error
    if len(data) > most:
        raise OSError(f"more than {most:,} bytes")
    return data


class _Listing(io.FileIO):
    """A file whose list of members, which zipfile reads at once, has its bounds."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LISTING:
            raise OSError(f"its list of members has more than {LISTING:,} bytes")
        return super().read(-1 if size is None else size) or b""


def _opened(archive: Path) -> zipfile.ZipFile:
    # neither a link put there meanwhile nor a pipe that never ends
    handle = os.open(archive, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        return _zip(archive, status.st_mtime_ns, status.st_size)
    finally:
        os.close(handle)


class _Zip(zipfile.ZipFile):
    """An archive that is closed once nobody has it."""

    def __init__(self, archive: Path) -> None:
        self._file = _Listing(archive)
        try:
            super().__init__(self._file)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        super().close()
        self._file.close()


@lru_cache(OPEN)
def _zip(archive: Path, changed: int, size: int) -> _Zip:
    try:
        return _Zip(archive)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise OSError(f"no zip file: {error}") from error
