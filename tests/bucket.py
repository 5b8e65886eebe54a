"""A store for tests: the objects are files of a folder, and conditions are kept as S3 keeps them.

``bucket://NAME`` lies in ``$BUCKET/NAME``. `faults` fail requests, or end the process at one.
"""

import fcntl
import os
import random
import shutil
import signal
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fifa.shards import stores

NAME = "bucket"


class Bucket(LocalFileSystem):
    """Requests of `fifa.shards.mirror`, one file an object."""

    protocol = NAME
    cachable = False
    faults = staticmethod(lambda what, path: None)

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path)
        if path.startswith(f"{NAME}://"):
            path = f"{os.environ['BUCKET']}/{path.removeprefix(f'{NAME}://')}"
        return super()._strip_protocol(path)

    def find(self, path, **more):
        self.faults("find", path)
        return super().find(path, **more)

    def get_file(self, source, target, **more):
        self.faults("get", source)
        shutil.copyfile(source, target)

    def put_file(self, source, target, **more):
        self.faults("put", target)
        _place(target, Path(source).read_bytes())
        self.faults("answer", target)

    listed: ClassVar = {}  # folders, as s3fs remembers them

    def invalidate_cache(self, path=None):
        self.listed.clear()

    def ls(self, path, detail=False, **more):
        found = super().ls(path, detail=detail, **more)
        if not detail:
            self.listed[self._strip_protocol(path)] = {Path(name).name for name in found}
        return found

    def cat_file(self, path, *more, **options):
        path = Path(self._strip_protocol(path))
        if path.name not in self.listed.get(str(path.parent), {path.name}):
            raise FileNotFoundError(path)
        return super().cat_file(str(path), *more, **options)

    def pipe_file(self, path, value, **more):
        _place(self._strip_protocol(path), value)

    def cp_file(self, source, target, **more):
        self.faults("copy", target)
        _place(target, Path(source).read_bytes())

    def rm_file(self, path):
        self.faults("remove", path)
        Path(path).unlink()


def _place(path, data):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    coming = path.with_name(f"{path.name}.{threading.get_ident()}.coming")
    coming.write_bytes(data)
    coming.replace(path)


@contextmanager
def _alone():
    with Path(os.environ["BUCKET"], "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _version(path):
    status = path.stat()
    return f"{status.st_ino}-{status.st_mtime_ns}"


def read(system, path):
    system.faults("read", path)
    if not Path(path).is_file():
        raise FileNotFoundError(path)
    with _alone():
        return Path(path).read_bytes(), _version(Path(path))


def write(system, path, data, version):
    system.faults("write", path)
    with _alone():
        if (_version(Path(path)) if Path(path).exists() else "") != version:
            return None
        _place(path, data)
        new = _version(Path(path))
    system.faults("answer", path)
    return new


def use(folder):
    """Let this process know the store, whose objects lie in ``folder``."""
    Path(folder).mkdir(exist_ok=True)
    os.environ["BUCKET"] = str(folder)
    fsspec.register_implementation(NAME, Bucket, clobber=True)
    stores.CONDITIONAL[NAME] = (read, write)


def objects(name):
    """The content of every object by its name, but for those of the lock and the index."""
    folder = Path(os.environ["BUCKET"], name)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    kept = [path for path in files if not path.name.startswith((".fifa-lock", ".fifa-index"))]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


def die_at(nth):
    """Let SIGKILL end this process just before its ``nth`` request that writes."""
    left = nth

    def faults(what, path):
        nonlocal left
        left -= what not in ("read", "get", "find", "answer")
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Bucket.faults = staticmethod(faults)


def fail(share, seed):
    """Let a share of all requests fail: half of them before they are done, half after."""
    draw = random.Random(seed)

    def faults(what, path):
        if draw.random() < share:
            raise OSError(f"503 at {what} {path}")

    Bucket.faults = staticmethod(faults)
