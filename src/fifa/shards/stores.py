"""Stores behind a URL: opened by fsspec, asked with patience, written on a condition.

An object of a store is there whole or not at all, so one upload replaces a file atomically. What
takes more than that (a lock, an index) rests on conditional writes: the store itself refuses an
upload where the object is no longer the one that its writer has seen.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from time import time
from typing import Any
from urllib.parse import quote

from fifa.errors import FifaError, brief

TRIES = 8  # for one request
PAUSE = 0.5  # seconds before it is asked for again, twice as many each time
LONGEST = 600.0  # seconds that a server may ask us to wait
_STAMPS = ("ETag", "etag", "blob_id", "md5", "mtime", "LastModified", "Last-Modified", "created")
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # of this package, by scheme
_INSTALL = "install the library that the message names"
_FINAL = (  # what comes again however often one asks
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    PermissionError,
    TypeError,
    ValueError,
)


def stamp_of(info: Mapping[str, Any]) -> str:
    """What changes with a file's content, of what its store says about it; "" if it says none."""
    return next(stamps_of(info), "")


def stamps_of(info: Mapping[str, Any]) -> Iterator[str]:
    """All that changes with it: stores say the same thing under several names."""
    for value in filter(None, map(info.get, _STAMPS)):
        # a listing may have seconds where the file's own entry has a date
        yield str(value.timestamp() if isinstance(value, datetime) else value).removeprefix("W/")


def open_store(url: str) -> tuple[Any, str]:
    """The file system of fsspec behind a URL, and the URL's path there."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        raise unreachable(url, error) from error
    return system, str(path)


def unreachable(url: str, error: Exception) -> FifaError:
    """The message for a source that cannot be opened."""
    do = "check the address and the network"
    if isinstance(error, ImportError):
        extra = EXTRAS.get(url.partition(":")[0])
        do = f"pip install 'fifa-align[{extra}]'" if extra else _INSTALL
    return FifaError(f"cannot open the source: {error or type(error).__name__}", where=url, do=do)


def patiently(ask: Callable[[], Any], url: str, stop: threading.Event | None = None) -> Any:
    """What ``ask`` returns; it is asked again after what may pass, until ``stop``.

    Raises `FileNotFoundError` where there is no such file, and `FifaError` where the store refuses
    or does not answer.
    """
    stop = stop or threading.Event()
    for attempt in range(TRIES):
        try:
            return ask()
        except FifaError:
            raise
        except Exception as error:  # every store has a client with errors of its own
            answer = getattr(error, "response", None)
            status = getattr(error, "status", None) or getattr(answer, "status_code", None)
            headers = getattr(error, "headers", None) or getattr(answer, "headers", None)
            if isinstance(error, FileNotFoundError) or status in (404, 410, 412, 416):
                raise FileNotFoundError(brief(error)) from error
            final = status is not None and status not in (408, 425, 429) and status < 500
            known = isinstance(error, _FINAL) or type(error).__name__.endswith("CredentialsError")
            if final or (status is None and known):
                raise FifaError(
                    f"the store refuses: {brief(error)}",
                    where=url,
                    do="check your rights there; the hub wants a token (hf auth login, HF_TOKEN)",
                ) from error
            wait = max(PAUSE * 2**attempt, _retry_after(headers or {}))
            if attempt + 1 == TRIES or wait > LONGEST:
                why = f"it asks to wait for {wait:,.0f} s" if wait > LONGEST else f"{TRIES} times"
                raise FifaError(
                    f"the store does not answer ({why}): {brief(error)}",
                    where=url,
                    do="run the same command later: it goes on from here",
                ) from error
        if stop.wait(wait):
            raise FifaError("no more of it is wanted", where=url)
    raise AssertionError


def read_object(url: str) -> tuple[bytes, str] | None:
    """A small object and its version, which every write changes; None where there is none."""
    system, path = open_store(url)
    read, _ = _conditional(system, url)

    def ask() -> tuple[bytes, str] | None:
        try:
            found: tuple[bytes, str] = read(system, path)
        except FileNotFoundError:
            return None
        return found

    answer: tuple[bytes, str] | None = patiently(ask, url)
    return answer


def write_object(url: str, data: bytes, version: str) -> str | None:
    """Write an object if it still has this version ("" if there is none); the new version.

    None where it has another one: somebody else was here. ``data`` has to be unlike all that others
    write, for an answer that was lost on its way is known by it.
    """
    system, path = open_store(url)
    _, write = _conditional(system, url)

    def ask() -> str | None:
        try:
            new: str | None = write(system, path, data, version)
        except FileNotFoundError:
            if version:
                return None  # the object has gone
            raise
        return new

    try:
        written: str | None = patiently(ask, url)
    except FileNotFoundError as error:
        do = "make the bucket first, or check its name"
        raise FifaError(f"cannot write: {brief(error)}", where=url, do=do) from error
    if written is None and (found := read_object(url)) is not None and found[0] == data:
        return found[1]
    return written


def _conditional(system: Any, url: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    protocol = system.protocol
    for name in (protocol,) if isinstance(protocol, str) else protocol:
        if name in CONDITIONAL:
            return CONDITIONAL[name]
    raise FifaError(
        "fifa knows no conditional writes of this store, which keep two commands apart",
        where=url,
        do=f"name a folder, or a URL of one of these: {', '.join(CONDITIONAL)}",
    )


def _read_s3(system: Any, path: str) -> tuple[bytes, str]:
    from fsspec.asyn import sync

    bucket, key, _ = system.split_path(path)

    async def ask() -> tuple[bytes, str]:
        answer = await system._call_s3("get_object", Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            return await body.read(), answer["ETag"]

    found: tuple[bytes, str] = sync(system.loop, ask)
    return found


def _write_s3(system: Any, path: str, data: bytes, version: str) -> str | None:
    bucket, key, _ = system.split_path(path)

    def put(**condition: str) -> str | None:
        try:
            answer = system.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except OSError as error:
            told = getattr(error.__cause__, "response", {}).get("Error", {})
            if told.get("Code") in ("PreconditionFailed", "412"):
                return None
            raise
        system.invalidate_cache(path)
        return str(answer["ETag"])

    if not version:
        return put(IfNoneMatch="*")
    new = put(IfMatch=version)
    if new is None and _read_s3(system, path)[1] == version:
        # Ceph's gateway compares with the ETag without the quotes that belong to it
        new = put(IfMatch=version.strip('"'))
    return new


def _read_gcs(system: Any, path: str) -> tuple[bytes, str]:
    bucket, key, _ = system.split_path(path)
    facts = system.call("GET", "b/{}/o/{}", bucket, key, json_out=True)
    # of that generation, or 404 where it was replaced meanwhile
    address = system.url(path, generation=facts["generation"])
    return system.call("GET", address)[1], str(facts["generation"])


def _write_gcs(system: Any, path: str, data: bytes, version: str) -> str | None:
    bucket, key, _ = system.split_path(path)
    address = f"{system._location}/upload/storage/v1/b/{quote(bucket)}/o"
    condition = {"uploadType": "media", "name": key, "ifGenerationMatch": version or "0"}
    try:
        answer = system.call("POST", address, data=data, json_out=True, **condition)
    except FileExistsError:
        return None
    system.invalidate_cache(path)
    return str(answer["generation"])


CONDITIONAL = {"s3": (_read_s3, _write_s3), "gs": (_read_gcs, _write_gcs)}


def _retry_after(headers: Mapping[str, Any]) -> float:
    """The seconds that a server asks for; it may name a time as well."""
    value = str(headers.get("Retry-After") or "").strip()
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if value.replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time()) if value else 0.0
    return 0.0
