"""Threads and processes decode to the same bytes; what an image does to one is its own trouble."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fifa.data import decoders as module
from fifa.data.decode import BadImage
from fifa.data.decoders import Decoders, choose_decoders, travels
from fifa.data.prefetch import decode_images
from fifa.scoring.rewards.pixels import convert_crop, pad, prepared, square

SMALL = partial(prepared, partial(convert_crop, size=32))
ODD = 13  # pixels wide: an image that does something to its decoder


def encoded(kind: str, size: tuple[int, int] = (48, 40), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def images(n: int = 24) -> list[tuple[int, bytes | BadImage]]:
    """Good ones of every kind, one that is cut off, a sliver, no picture, and one never read."""
    good = [
        encoded(("JPEG", "PNG", "WEBP")[i % 3], (40 + i % 30, 60 - i % 30), i) for i in range(n)
    ]
    odd = [good[0][:-200], encoded("PNG", (4000, 2)), b"no picture", BadImage("gone")]
    return list(enumerate([*good[: n // 2], *odd, *good[n // 2 :]]))


def results(found, pool: Decoders) -> list[object]:
    try:
        done = list(decode_images(found, pool))
    finally:
        pool.close()
    assert [row for row, _ in done] == [row for row, _ in found]
    return [x.reason if isinstance(x, BadImage) else (x.dtype, x.tobytes()) for _, x in done]


def fatal(image: Image.Image, row: int) -> np.ndarray:
    if image.width == ODD:
        os.kill(os.getpid(), signal.SIGKILL)
    return SMALL(image, row)


def fatal_once(flag: str, image: Image.Image, row: int) -> np.ndarray:
    if image.width == ODD and not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return SMALL(image, row)


def endless(image: Image.Image, row: int) -> np.ndarray:
    while image.width == ODD:
        time.sleep(0.01)
    return SMALL(image, row)


def talking(image: Image.Image, row: int) -> np.ndarray:
    print("a library says something")
    return SMALL(image, row)


@pytest.mark.parametrize("preprocess", [convert_crop, square, pad])
def test_threads_and_processes_give_the_same_bytes(preprocess):
    function = partial(prepared, partial(preprocess, size=32))
    expected = results(images(), Decoders(function, 1))
    assert results(images(), Decoders(function, 3)) == expected
    assert results(images(), Decoders(function, 2, apart=True)) == expected
    assert sum(isinstance(one, str) for one in expected) == 4


def test_processes_that_are_killed_at_any_moment_change_nothing():
    found = images(160)
    expected = results(found, Decoders(SMALL, 1))
    pool = Decoders(SMALL, 2, apart=True)
    kills = []

    def kill() -> None:
        for process in list(pool._processes)[:1]:
            os.kill(process._popen.pid, signal.SIGKILL)
            kills.append(process)

    list(decode_images(found[:4], pool))  # its processes are there
    for number in range(3):  # one death a time: an image survives no second one
        timer = threading.Timer(0.02 * number, kill)
        timer.start()
        done = [x for _, x in decode_images(found, pool)]
        timer.cancel()
        timer.join()
    pool.close()
    kept = [x.reason if isinstance(x, BadImage) else (x.dtype, x.tobytes()) for x in done]
    assert kept == expected
    assert kills


def test_an_image_that_kills_its_process_is_bad_and_costs_no_other(tmp_path):
    found = images(12)
    found.insert(3, (99, encoded("PNG", (ODD, 20))))
    expected = results(found, Decoders(SMALL, 1))
    killed = results(found, Decoders(fatal, 2, apart=True))
    assert killed[3] == "cannot be decoded: it ends every process that tries"
    assert killed[:3] + killed[4:] == expected[:3] + expected[4:]
    once = partial(fatal_once, str(tmp_path / "died"))
    assert results(found, Decoders(once, 2, apart=True)) == expected
    assert (tmp_path / "died").exists()


def test_an_image_without_end_is_bad_and_costs_no_other(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 1.0)
    found = images(6)
    found.insert(2, (99, encoded("PNG", (ODD, 20))))
    expected = results(found, Decoders(SMALL, 1))
    hung = results(found, Decoders(endless, 2, apart=True))
    assert hung[2] == "cannot be decoded: no end after 1 s"
    assert hung[:2] + hung[3:] == expected[:2] + expected[3:]


def of_many_parts(image: Image.Image, row: int) -> dict[str, np.ndarray]:
    pixels = SMALL(image, row)
    return {"a": pixels[:, :, 1:].copy(), "b": pixels[0].T / 3, "c": np.arange(row % 3)}


def test_arrays_of_every_layout_come_through_aligned():
    found = images(9)
    near, far = Decoders(of_many_parts, 1), Decoders(of_many_parts, 2, apart=True)
    assert (near.together(64), far.together(64), far.together(1)) == (1, module.TOGETHER, 1)
    for (row, here), (again, there) in zip(
        decode_images(found, near), decode_images(found, far), strict=True
    ):
        assert row == again
        if isinstance(here, BadImage):
            assert here.reason == there.reason
            continue
        for name, array in here.items():
            assert there[name].dtype == array.dtype
            assert np.array_equal(there[name], array)
            assert there[name].flags.aligned
            assert there[name].flags.writeable
    near.close()
    far.close()


def test_what_a_library_prints_is_no_answer():
    assert results(images(3), Decoders(talking, 1, apart=True)) == results(
        images(3), Decoders(SMALL, 1)
    )


def test_where_no_process_starts_threads_decode(monkeypatch, capsys):
    expected = results(images(6), Decoders(SMALL, 1))
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert results(images(6), Decoders(SMALL, 2, apart=True)) == expected
    assert "decoding in threads" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["close", "forget"])
def test_processes_end_with_their_pool(end):
    pool = Decoders(SMALL, 2, apart=True)
    assert len(list(decode_images(images(8), pool))) == 12
    processes = [process._popen for process in pool._processes]
    assert processes
    assert all(process.poll() is None for process in processes)
    if end == "close":
        pool.close()
    del pool
    gc.collect()
    assert all(process.wait(5) is not None for process in processes)


def test_processes_end_with_whoever_started_them():
    script = """
import os, signal, test_data_decoders as t
pool = t.Decoders(t.SMALL, 2, apart=True)
list(t.decode_images(t.images(8), pool))
print(*[process._popen.pid for process in pool._processes], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids, done.stderr
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/fd/0").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}/fd/0").exists() for pid in pids)


class Model:
    def preprocess(self, image: Image.Image) -> np.ndarray:
        return convert_crop(image, 32)


def test_only_functions_of_modules_travel():
    assert travels(convert_crop)
    assert travels(SMALL)
    assert not travels(Model().preprocess)
    assert not travels(partial(prepared, Model().preprocess))
    assert not travels(lambda image, row: None)
    assert not travels(partial(prepared, lambda image: None))


def test_few_cores_decode_in_threads_and_many_in_processes(monkeypatch):
    for cores, apart in ((2, False), (4, False), (16, True)):
        monkeypatch.setattr(module, "cores", lambda cores=cores: cores)
        assert choose_decoders(SMALL).apart is apart
        assert not choose_decoders(SMALL, apart=False).apart
        assert not choose_decoders(partial(prepared, Model().preprocess)).apart
    assert choose_decoders(SMALL).workers == 16 - module.SPARED
    assert choose_decoders(SMALL, 5).workers == 5
