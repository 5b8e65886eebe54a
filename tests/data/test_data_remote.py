"""Remote sources by byte ranges: what is fetched, what is kept, and what goes wrong on the way."""

from __future__ import annotations

import http.server
import io
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fifa.config import Compute
from fifa.data import read_pairs, remote
from fifa.data.decode import BadImage
from fifa.data.images import has_pixels, pair_images, read, unique_images
from fifa.data.remote import Kept, RemoteFile, below
from fifa.data.table import Pairs, load_pairs, save_pairs
from fifa.errors import FifaError
from fifa.scoring.rewards.engine import Engine

pytest.importorskip("aiohttp")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

ROWS, GROUP = 120, 20

Fault = Callable[["Server", int], bool]  # the request and its number: True if it was answered


class Server(http.server.BaseHTTPRequestHandler):
    """Sends byte ranges of the files of a folder, with whatever fault it is told."""

    protocol_version = "HTTP/1.1"
    folder: Path
    etag: str
    fault: Fault
    count: int
    sent: list[tuple[str, int, int]]
    lock = threading.Lock()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        file = self.folder / self.path.strip("/").partition("?")[0]
        if not file.is_file():
            return self.answer(404, b"")
        data = file.read_bytes()
        head = {"ETag": self.etag}
        if self.command == "HEAD":
            return self.answer(200, data, head)
        with self.lock:
            type(self).count += 1
            number = self.count
        if type(self).fault(self, number):
            return None
        match = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = map(int, match.groups()) if match else (0, len(data) - 1)
        part = data[first : last + 1]
        with self.lock:
            self.sent.append((file.name, first, first + len(part)))
        if match:
            head["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        return self.answer(206 if match else 200, part, head)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def no_fault(request: Server, number: int) -> bool:
    return False


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    Server.folder, Server.etag, Server.fault = tmp_path / "far", '"1"', no_fault
    Server.count, Server.sent = 0, []
    Server.folder.mkdir()
    monkeypatch.setenv("FIFA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fifa.shards.stores.PAUSE", 0.001)
    monkeypatch.setattr(remote, "PIECE", 100_000)
    monkeypatch.setattr("fifa.data.source.BLOCK", 50_000)
    monkeypatch.setattr("fifa.data.images.BLOCK", 50_000)
    fsspec.filesystem("http").invalidate_cache()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        Server.url = f"http://127.0.0.1:{running.server_address[1]}"
        yield Server
        running.shutdown()


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    return out.getvalue()


JPEGS = [jpeg(seed) for seed in range(ROWS)]


def feedback(folder: Path) -> Path:
    """Pairs in Pick-a-Pic's columns; between the two images of a row a column of other bytes."""
    rng = np.random.default_rng(0)
    table = {
        "caption": [f"p{i}" for i in range(ROWS)],
        "image_0_uid": [f"u{i}" for i in range(ROWS)],
        "image_1_uid": [f"v{i}" for i in range(ROWS)],
        "jpg_0": JPEGS,
        "other": [rng.bytes(10_000) for _ in range(ROWS)],
        "jpg_1": [*JPEGS[1:], JPEGS[0]],
        "label_0": [1.0] * ROWS,
        "label_1": [0.0] * ROWS,
    }
    path = folder / "set.parquet"
    pq.write_table(pa.table(table), path, row_group_size=GROUP, compression="none")
    return path


def images_of(pairs: Pairs, **how: object) -> list[bytes | BadImage]:
    images, _ = unique_images(pairs)
    return [data for _, data in sorted(read(images, **how), key=lambda found: found[0])]


def needed(path: Path) -> int:
    """The bytes of the images' columns."""
    metadata = pq.ParquetFile(path).metadata
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    columns = (group.column(i) for group in groups for i in range(metadata.num_columns))
    return sum(c.total_compressed_size for c in columns if c.path_in_schema.startswith("jpg"))


def test_of_a_remote_file_the_images_columns_are_fetched_once(server: type[Server]) -> None:
    path = feedback(server.folder)
    pairs = read_pairs(f"{server.url}/set.parquet")
    assert sum(end - start for _, start, end in server.sent) < 0.1 * path.stat().st_size
    server.sent.clear()
    assert images_of(pairs) == images_of(read_pairs(path))
    fetched = sum(end - start for _, start, end in server.sent)
    assert 1.0 <= fetched / needed(path) < 1.01
    server.sent.clear()
    few = pair_images(pairs.table, pairs.origin, [0, 1, 200])
    assert len(list(read(few))) == 3
    assert not server.sent  # all of it is on the disk
    assert len(list(read(few, cache_gb=0))) == 3
    assert 0 < sum(end - start for _, start, end in server.sent) < needed(path) / 2


def test_size_and_stamp_of_remote_files_travel_with_the_pairs(
    server: type[Server], tmp_path: Path
) -> None:
    path = feedback(server.folder)
    pairs = read_pairs(f"{server.url}/set.parquet")
    assert pairs.origin.remote == {"set.parquet": (path.stat().st_size, '"1"')}
    save_pairs(pairs, tmp_path / "run")
    assert load_pairs(tmp_path / "run").origin == pairs.origin
    assert pair_images(pairs.table, pairs.origin, [3]).take([0]).remote == pairs.origin.remote
    assert read_pairs(path).origin.remote == {}


def at_first(fault: Fault) -> Fault:
    """The fault, the first two times that a range is asked for."""
    asked: Counter[str] = Counter()

    def twice(request: Server, number: int) -> bool:
        asked[request.headers["Range"]] += 1
        return asked[request.headers["Range"]] <= 2 and fault(request, number)

    return twice


def another_range(request: Server, number: int) -> bool:
    request.answer(206, b"x" * 200_000, {"Content-Range": "bytes 0-199999/*"})
    return True


def cut_off(request: Server, number: int) -> bool:
    request.send_response(206)
    request.send_header("Content-Range", request.headers["Range"].replace("=", " ") + "/*")
    request.send_header("Content-Length", "100000")
    request.end_headers()
    request.wfile.write(b"x" * 1000)
    request.close_connection = True
    return True


def hang_up(request: Server, number: int) -> bool:
    request.close_connection = True
    return True


def busy(status: int, **headers: str) -> Fault:
    def answer(request: Server, number: int) -> bool:
        request.answer(status, b"x", {name.replace("_", "-"): v for name, v in headers.items()})
        return True

    return answer


def too_short(request: Server, number: int) -> bool:
    request.answer(206, b"short", {"ETag": request.etag})
    return True


@pytest.mark.parametrize(
    "fault",
    [
        cut_off,
        hang_up,
        busy(503),
        busy(500),
        busy(429, Retry_After="0.01"),
        too_short,
        another_range,
    ],
    ids=["cut off", "hung up", "503", "500", "429", "too short", "another range"],
)
def test_what_passes_is_asked_for_again(server: type[Server], fault: Fault) -> None:
    path = feedback(server.folder)
    server.fault = at_first(fault)
    pairs = read_pairs(f"{server.url}/set.parquet")
    assert images_of(pairs) == images_of(read_pairs(path))
    assert server.count > 1.5 * len(server.sent)


def test_a_slow_server_is_waited_for_and_a_silent_one_asked_again(
    server: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = feedback(server.folder)
    pairs = read_pairs(f"{server.url}/set.parquet")
    monkeypatch.setattr(remote, "SILENCE", 0.3)

    def slow(request: Server, number: int) -> bool:
        first, last = map(int, re.findall(r"\d+", request.headers["Range"]))
        data = path.read_bytes()[first : last + 1]
        request.send_response(206)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        for at in range(0, len(data), 20_000):
            time.sleep(0.1)  # longer in all than a silence may be
            request.wfile.write(data[at : at + 20_000])
        return True

    def silent(request: Server, number: int) -> bool:
        time.sleep(0.6)
        request.close_connection = True
        return True

    images, _ = unique_images(pairs)
    for fault in (slow, at_first(silent)):
        server.fault = fault
        found = [data for _, data in read(images.take([0, 1]), cache_gb=0)]
        assert found == [JPEGS[0], JPEGS[1]]


def test_a_server_is_given_the_time_that_it_asks_for(server: type[Server]) -> None:
    feedback(server.folder)
    server.fault = lambda request, number: number == 1 and busy(429, Retry_After="1")(request, 1)
    started = time.monotonic()
    read_pairs(f"{server.url}/set.parquet")
    assert time.monotonic() - started >= 1
    server.fault = busy(429, Retry_After="86400")
    with pytest.raises(FifaError, match=r"asks to wait for 86,400 s"):
        read_pairs(f"{server.url}/set.parquet?again")


@pytest.mark.parametrize(
    ("fault", "why"),
    [(hang_up, "does not answer .8 times"), (busy(502), "does not answer"), (busy(403), "refuses")],
)
def test_no_image_is_lost_to_the_network(server: type[Server], fault: Fault, why: str) -> None:
    feedback(server.folder)
    pairs = read_pairs(f"{server.url}/set.parquet")
    server.fault = fault
    with pytest.raises(FifaError, match=why):
        images_of(pairs)
    with pytest.raises(FifaError, match=why):  # and no row to a file that cannot be read
        read_pairs(f"{server.url}/set.parquet?again")


def test_a_source_that_changes_meanwhile_is_told(server: type[Server]) -> None:
    path = feedback(server.folder)
    pairs = read_pairs(f"{server.url}/set.parquet")
    images, _ = unique_images(pairs)
    found = read(images)
    assert isinstance(next(found)[1], bytes)
    server.etag = '"2"'
    with pytest.raises(FifaError, match=r"has changed since its pairs were read"):
        list(found)
    path.unlink()
    with pytest.raises(FifaError, match="has changed"):
        images_of(pairs, cache_gb=0)


def test_other_stores_are_asked_whether_a_file_is_still_the_same(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    try:
        memory.pipe_file("/bucket/set.parquet", feedback(tmp_path).read_bytes())
        pairs = read_pairs("memory://bucket/set.parquet")
        assert images_of(pairs) == images_of(read_pairs(tmp_path / "set.parquet"))
        memory.pipe_file("/bucket/set.parquet", feedback(tmp_path).read_bytes())
        with pytest.raises(FifaError, match="has changed"):
            images_of(pairs, cache_gb=0)
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_server_without_ranges_is_told(server: type[Server]) -> None:
    path = feedback(server.folder)

    def whole(request: Server, number: int) -> bool:
        request.answer(200, path.read_bytes(), {"ETag": request.etag})
        return True

    server.fault = whole
    with pytest.raises(FifaError, match="no ranges of bytes"):
        read_pairs(f"{server.url}/set.parquet")


def test_paths_beside_a_remote_table_are_fetched_side_by_side(server: type[Server]) -> None:
    rows = ["prompt,image_0,image_1,label"]
    for i in range(8):
        (server.folder / f"{i}.jpg").write_bytes(JPEGS[i])
        rows.append(f"p{i},{i}.jpg,gone-{i}.jpg,1")
    (server.folder / "set.csv").write_text("\n".join(rows))
    pairs = read_pairs(f"{server.url}/set.csv")
    together = threading.Barrier(4, timeout=20)
    server.fault = lambda request, number: bool(together.wait()) and False
    found = images_of(pairs)
    assert found[::2] == JPEGS[:8]
    assert {image.reason for image in found[1::2]} == {"no such file"}
    server.fault = busy(500)
    with pytest.raises(FifaError, match="does not answer"):
        images_of(pairs)


class Brightness:
    name, scale = "brightness", "mean of the pixels"
    identity: ClassVar = {"model": "brightness"}

    def preprocess(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy()

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean(dim=(1, 2, 3))[:, None]

    def prompt_features(self, prompts: list[str]) -> torch.Tensor:
        return torch.zeros(len(prompts), 1)

    def rewards(self, prompts: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0]


def test_scoring_goes_on_where_the_source_was_lost(server: type[Server], tmp_path: Path) -> None:
    path = feedback(server.folder)
    pairs = read_pairs(f"{server.url}/set.parquet")
    server.sent.clear()

    def engine(name: str) -> Engine:
        return Engine(Brightness(), tmp_path / name, Compute(batch=16), shard=50)

    server.fault = lambda request, number: len(server.sent) > 14 and busy(503)(request, number)
    with pytest.raises(FifaError, match="goes on from here"):
        engine("scores").score_pairs(pairs)
    assert list((tmp_path / "scores").glob(".parts-*/*.parquet"))
    server.fault = no_fault
    rewards = engine("scores").score_pairs(pairs)
    near = engine("near").score_pairs(read_pairs(path))
    assert rewards["reward_0"] == near["reward_0"]
    assert rewards["reward_1"] == near["reward_1"]
    # whatever was fetched before was not fetched again
    assert sum(end - start for _, start, end in server.sent) < 1.01 * needed(path)


def test_a_remote_source_is_not_read_once_more_to_tell_its_images_apart(
    server: type[Server], tmp_path: Path
) -> None:
    path = feedback(server.folder)
    plain = pq.read_table(path).drop_columns(["image_0_uid", "image_1_uid"])
    pq.write_table(plain, path, row_group_size=GROUP)
    pairs = read_pairs(f"{server.url}/set.parquet")
    server.sent.clear()
    Engine(Brightness(), tmp_path / "s", Compute(cache_gb=0), shard=500).score_pairs(pairs)
    assert sum(end - start for _, start, end in server.sent) < 1.1 * needed(path)
    assert not list((tmp_path / "s").glob("images-*"))


def test_pieces_that_were_not_used_for_longest_make_room(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "pieces", 1100)
    made: list[str] = []

    def piece(name: str) -> bytes:
        def make() -> bytes:
            made.append(name)
            return name.encode() * 300

        data = kept.get(name, make)
        assert sum(p.stat().st_size for p in (tmp_path / "pieces").glob("*") if p.is_file()) <= 1100
        return data

    for name in ("a", "b", "c", "a", "d", "a"):
        assert piece(name) == name.encode() * 300
        time.sleep(0.01)
    assert made == ["a", "b", "c", "d"]
    piece("b")
    assert made[-1] == "b"
    assert kept.get("e", lambda: b"e" * 2000) == b"e" * 2000  # too large to be kept
    assert not (tmp_path / "pieces/e").exists()


def test_many_small_pieces_stay_below_the_bound_without_a_look_at_all_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, ask = [], shutil.disk_usage
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: looked.append(path) or ask(path))
    kept = Kept(tmp_path / "pieces", 20_000)
    for i in range(300):
        kept.get(f"{i:x}", lambda: b"x" * 100)
        if i % 10 == 0:
            sizes = [p.stat().st_size for p in (tmp_path / "pieces").glob("*") if p.is_file()]
            assert sum(sizes) <= 20_000
    assert sum(sizes) > 10_000
    assert len(looked) < 50


def test_a_piece_that_is_damaged_on_the_disk_is_fetched_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path, 1000)
    kept.get("a", lambda: b"right")
    for damage in (lambda data: data[:-1], lambda data: b"w" + data[1:], lambda data: b""):
        (tmp_path / "a").write_bytes(damage((tmp_path / "a").read_bytes()))
        assert kept.get("a", lambda: b"right") == b"right"


def test_a_piece_that_many_want_at_once_is_fetched_once(tmp_path: Path) -> None:
    made = []

    def make() -> bytes:
        made.append(1)
        time.sleep(0.05)
        return b"piece"

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(Kept(tmp_path, 1000).get, "a", make) for _ in range(4)]
        assert {job.result() for job in jobs} == {b"piece"}
    assert made == [1]


def test_where_nothing_can_be_kept_all_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"no folder")
    kept = Kept(tmp_path / "file" / "pieces", 1000)
    assert [kept.get("a", lambda: b"piece") for _ in range(2)] == [b"piece"] * 2
    assert capsys.readouterr().err.count("is not kept in") == 1


def test_a_remote_file_reads_as_a_file_does(server: type[Server]) -> None:
    data = np.random.default_rng(0).bytes(350_001)
    (server.folder / "data.bin").write_bytes(data)
    rng = np.random.default_rng(1)
    with RemoteFile(f"{server.url}/data.bin") as far, io.BytesIO(data) as near:
        odd = [(-7, 10), (50, 40), (340_000, 1 << 60)]
        far.expect([([(1000, 5000), (5000, 9000), *odd], 1.0), ([(100_000, 350_001)], 0.5)])
        for _ in range(200):
            at, size = int(rng.integers(-10, 360_000)), int(rng.choice([0, 1, 10, 5000, 120_000]))
            assert far.seek(max(at, 0)) == near.seek(max(at, 0))
            assert far.read(size) == near.read(size)
            assert far.tell() == near.tell() or at > len(data)
        assert (far.seek(-5, os.SEEK_END), far.read()) == (len(data) - 5, data[-5:])


@pytest.mark.parametrize(
    ("url", "prefix"),
    [
        ("s3://bucket/other/a.png", "s3://bucket/set"),
        ("s3://bucket/set-2/a.png", "s3://bucket/set"),
        ("s3://bucket/set/../other/a.png", "s3://bucket/set"),
        ("s3://bucket/set/%2e%2e/other/a.png", "s3://bucket/set"),
        ("s3://bucket/set/%252e%252e/other/a.png", "s3://bucket/set"),
        ("s3://bucket/set/..\\other/a.png", "s3://bucket/set"),
        ("s3://bucket/set/x::file:///etc/passwd", "s3://bucket/set"),
        ("https://host.evil.example/a.png", "https://host"),
        ("https://host@evil.example/a.png", "https://host"),
        ("gs://bucket/set/a.png", "s3://bucket/set"),
        ("hf://datasets/someone/other/a.png", "hf://datasets/someone/set@" + "1" * 40),
        ("hf://datasets/someone/set@main/a.png", "hf://datasets/someone/set@" + "1" * 40),
        ("/home/someone/a.png", "/home/someone"),
    ],
)
def test_a_table_names_no_place_that_its_reader_has_not_named(url: str, prefix: str) -> None:
    assert below(url, [prefix]) is None


def test_urls_below_the_source_or_a_named_place_are_paths_there(tmp_path: Path) -> None:
    pin = "hf://datasets/someone/set@" + "1" * 40
    assert below("hf://datasets/someone/set/x/a.png", [f"{pin}/x"]) == f"{pin}/x/a.png"
    memory = fsspec.filesystem("memory")
    try:
        places = ["mine/a.jpg", "named/b.jpg", "secret/c.jpg"]
        for i, place in enumerate(places):
            memory.pipe_file(f"/{place}", JPEGS[i])
        rows = [f"p{i},memory://{places[i]},memory://{places[i]}.not,1" for i in range(3)]
        table = "\n".join(["prompt,image_0,image_1,label", *rows])
        memory.pipe_file("/mine/set.csv", table.encode())
        pairs = read_pairs("memory://mine/set.csv", images_from=["memory://named/"])
        assert has_pixels(pairs.table, pairs.origin)
        found = [x if isinstance(x, bytes) else x.reason for x in images_of(pairs)]
        gone, refused = "no such file", "only known by URL, and downloads are not allowed"
        assert found == [JPEGS[0], gone, JPEGS[1], gone, refused, refused]
        (tmp_path / "set.csv").write_text(table)  # the same table, read from elsewhere
        near = read_pairs(tmp_path / "set.csv")
        assert not has_pixels(near.table, near.origin)
        assert {x.reason for x in images_of(near)} == {refused}
        save_pairs(pairs, tmp_path / "run")
        assert load_pairs(tmp_path / "run").origin.images_from == ("memory://named/",)
    finally:
        memory.rm("/", recursive=True)
