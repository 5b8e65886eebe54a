"""A PostgreSQL server of the tests' own, where one is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # Debian's, which no PATH has


def run(user: str | None, *command: object) -> None:
    environment = os.environ | {"LC_ALL": "C"}
    subprocess.run(
        list(map(str, command)), user=user, env=environment, cwd="/", check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of an empty database; it ends with ``?host=``, a folder with the server's socket."""
    pytest.importorskip("psycopg", reason="pip install 'fifa-align[postgres]' to test it")
    path = os.pathsep.join([os.environ["PATH"], *map(str, BINARIES[::-1])])
    initdb, pg_ctl = (shutil.which(name, path=path) for name in ("initdb", "pg_ctl"))
    if not (initdb and pg_ctl):
        pytest.skip("no PostgreSQL server here: apt-get install postgresql")
    user = None
    folder = Path(tempfile.mkdtemp(prefix="fifa-pg-"))
    try:
        if os.geteuid() == 0:  # it refuses to run as root
            user = "postgres"
            shutil.chown(folder, user)
        run(user, initdb, "--no-sync", "--auth=trust", "--username=fifa", "-D", folder / "data")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        run(user, pg_ctl, "-D", folder / "data", "-w", "-o", options, "start")
        try:
            yield f"postgresql://fifa:hidden-word@/postgres?host={folder}"
        finally:
            run(user, pg_ctl, "-D", folder / "data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
