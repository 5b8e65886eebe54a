import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import settings

from fifa.moji.family import FEEDBACK

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
settings.register_profile("untimed", deadline=None)  # a busy machine fails no test
settings.load_profile("untimed")

SLOW = ("train_kill", "docs", "cli", "processes", "evaluate", "demo", "extending", "kill", "around")
SLOW += ("loop", "parity")


def pytest_collection_modifyitems(items):
    """The slowest files first: one that begins last keeps a single process busy at the end."""
    items.sort(key=lambda item: not item.path.stem.endswith(SLOW))


def pytest_collection_finish():
    """What is loaded stays: whoever collects garbage need not look through all of it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What tests fetch is not kept in the cache of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIFA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """The first 360 rows of the feedback that the package ships."""
    file = tmp_path_factory.mktemp("shipped") / "feedback.parquet"
    pq.write_table(pq.read_table(FEEDBACK).slice(0, 360), file)
    return file


@pytest.fixture
def mount_disk(tmp_path):
    """Mounts a small disk in memory, ``8m`` or ``1m`` large, which takes the right to do so."""
    folder = tmp_path / "disk"
    mounted = []

    def mount(size):
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if done.returncode != 0:
            pytest.skip(f"a small disk cannot be mounted: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for disk in mounted:  # lazily: what is mapped from there is let go when it is collected
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def memory(tmp_path):
    """A folder in memory if there is one: many runs would wait for the disk most of the time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def real_data():
    """Real feedback that nobody on this project made; tests that need it skip without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real data is not beside this checkout")
    return folder


_QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--allow-file-access-from-files",
    "--dump-dom",
]
# The frame is a window's width whatever the browser's least; scripts are this probe's own
_PROBE = (
    '<body style="margin:0"><iframe id="f" src="{page}" width="{width}" height="900"></iframe>'
    "<script>f.onload = () => {{ const d = f.contentDocument.documentElement;"
    "const t = document.createElement('p');"
    "t.textContent = 'w=' + d.scrollWidth + '/' + d.clientWidth + '!';"
    "document.body.append(t) }}</script>"
)


@pytest.fixture
def page_widths(tmp_path):
    """A function from a page and a window's width to the widths of its content and its window."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on PATH")

    def measure(page, width):
        probe, copy = tmp_path / "probe.html", tmp_path / "probed.html"
        copy.write_bytes(Path(page).read_bytes())
        probe.write_text(_PROBE.format(page=copy.name, width=width), "utf-8")
        options = [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"]
        command = [chromium, *_QUIET, *options, probe.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        found = re.search(r"w=(\d+)/(\d+)!", done.stdout)
        assert found, done.stderr[-500:]
        return int(found.group(1)), int(found.group(2))

    return measure
