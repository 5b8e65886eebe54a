"""Images made to waste time or memory, and images with changed bytes; what each takes.

Right is a second of processor time and 200 MB at most beside the file and a copy of it, and a
picture or a reason. Each hostile image is decoded in a process of its own; the changed ones come
as cells of a Parquet file and as files in a folder.

    python scripts/attack/images.py --fuzzed 467 --files 200 --seed 0
"""

from __future__ import annotations

import argparse
import io
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fifa.data.decode import BadImage, check_image
from fifa.data.images import Images, cell_images, file_images, read
from fifa.data.kinds import readable

MODERN = [kind for kind in readable() if kind in ("AVIF", "HEIF")]  # HEIC with its extra
MANY = 60_000_000  # bytes
CHILD = """
import sys, time
from fifa.data.decode import BadImage, check_image
data = open(sys.argv[1], "rb").read()
def held(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if name in line)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins here
before, start, verdict = held("VmRSS"), time.process_time(), "decoded"
try:
    check_image(data)
except BadImage as error:
    verdict = error.reason
seconds, peak = time.process_time() - start, (held("VmHWM") - before) / 1024
print(f"{seconds:.2f}|{peak:.0f}|{verdict}")
"""


def hostile(seed: int) -> Iterator[tuple[str, bytes]]:
    """What is tried, by name."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    large = Image.new("RGB", (5990, 5990), (128, 128, 128))
    for name, options in (("", {}), ("progressive ", {"progressive": True})):
        data = encoded(grey, "JPEG", **options)
        scan = data.index(b"\xff\xda") + 14
        for what, fill in (("ff", b"\xff"), ("ff 00", b"\xff\0"), ("a", b"a")):
            body = fill * (MANY // len(fill))
            yield f"{name}JPEG, {what} in its scan", data[:scan] + body + data[scan:]
            yield f"{name}JPEG, {what} before its end", data[:-2] + body + data[-2:]
    jpeg, png = encoded(noise, "JPEG"), encoded(noise, "PNG")
    for what, part in (
        ("empty COM segments", segment(0xFE)),
        ("ff", b"\xff"),
        ("Exif segments", segment(0xE1, b"Exif\0\0" + bytes(60_000))),
        ("profile segments", segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60_000))),
    ):
        yield f"JPEG, {what} at its front", jpeg[:2] + part * (MANY // len(part)) + jpeg[2:]
    for what, part in (("IDAT", chunk(b"IDAT")), ("tEXt", chunk(b"tEXt", b"a\0b"))):
        yield f"PNG, {what} chunks", png[:33] + part * (MANY // len(part)) + png[33:]
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20), 9))
    yield "PNG, 190 texts of a megabyte", png[:33] + 190 * bomb + png[33:]
    tags = b"".join(struct.pack("<HHLL", i, 7, 50_000, 8) for i in range(60_000))
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 60_000) + tags
    yield "PNG, Exif of 60,000 tags", png[:33] + chunk(b"eXIf", exif) + png[33:]
    yield "JPEG of 36 megapixels", encoded(large, "JPEG")
    yield "PNG of 36 megapixels", encoded(large, "PNG", compress_level=1)
    small = large.resize((3700, 3700))
    data = encoded(small, "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    yield "progressive JPEG of 14 megapixels", data
    yield "the same in 14 scans", data[:-2] + last * 4 + data[-2:]
    yield "the same in 1,000 scans", data[:-2] + last * 990 + data[-2:]
    tile = np.tile(rng.integers(0, 256, (310, 310, 3), np.uint8), (10, 10, 1))
    yield "WEBP of 10 megapixels of noise", encoded(Image.fromarray(tile), "WEBP", method=0)
    for kind in MODERN:
        fast = {"speed": 10} if kind == "AVIF" else {}
        data = encoded(noise, kind, **fast)
        yield f"{kind} of 10 megapixels of noise", encoded(Image.fromarray(tile), kind, **fast)
        yield f"{kind} of 36 megapixels", encoded(large, kind, **fast)
        for what, part in (
            ("boxes", b"\0\0\0\x08free"),
            ("a box of no size", bytes(4) + b"free"),
            ("boxes in boxes", b"\0\0\xff\xffmeta" + bytes(4)),
        ):
            size = int.from_bytes(data[:4])  # behind the box that says what the file is
            yield f"{kind}, {what}", data[:size] + part * (MANY // len(part)) + data[size:]
        wide = data.replace(struct.pack(">LL", 64, 64), struct.pack(">LL", 60_000, 60_000))
        assert wide != data
        yield f"{kind} whose header says 3,600 megapixels", wide
        yield f"{kind}, half of it", data[: len(data) // 2]
    for kind in ("GIF", "TIFF", "BMP", "ICO", "JPEG2000"):
        yield kind, encoded(noise, kind)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def segment(kind: int, body: bytes = b"") -> bytes:
    return bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body


def chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def fuzzed(count: int, seed: int) -> list[bytes]:
    """Pictures of every format, each with bytes changed, taken out, put in or cut off."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    found = []
    for i in range(count):
        picture = Image.fromarray(rng.integers(0, 256, (48, 40, 3), np.uint8))
        kind = ("JPEG", "PNG", "WEBP", "JPEG", *MODERN)[i % (4 + len(MODERN))]
        data = bytearray(encoded(picture, kind, **({"progressive": True} if i % 8 == 3 else {})))
        for _ in range(draw.choice([1, 1, 3, 20])):
            at = draw.randrange(min(len(data), draw.choice([60, 700, len(data)])))
            how = draw.randrange(4)
            if how == 0:
                data[at] = draw.randrange(256)
            elif how == 1:
                data[at : at + draw.randrange(1, 9)] = b""
            elif how == 2:
                data[at:at] = draw.choice([b"\xff", b"\0", draw.randbytes(4)]) * draw.randrange(99)
            elif len(data) > 99:
                del data[at + 40 :]
        found.append(bytes(data))
    return found


def outcomes(images: Images) -> str:
    """How many images are decoded, and why the others are not."""
    start, counts = time.process_time(), Counter[str]()
    for _, data in read(images):
        try:
            if isinstance(data, BadImage):
                raise data
            check_image(data)
            counts["decoded"] += 1
        except BadImage as error:
            counts[error.reason[:40]] += 1
    assert counts.total() == len(images), "an image was left out"
    took = time.process_time() - start
    return f"{counts['decoded']} decoded, {len(images) - counts['decoded']} refused, {took:.1f} s"


def main() -> None:
    """Print a row a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fuzzed", type=int, default=467, help="changed images as cells")
    parser.add_argument("--files", type=int, default=200, help="changed images as files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{'what':36} {'bytes':>11} {'s':>5} {'MB':>5}  result")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what, data in hostile(args.seed):
            (folder / "image").write_bytes(data)
            command = [sys.executable, "-c", CHILD, str(folder / "image")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, peak, verdict = (done.stdout.strip() or f"||{done.stderr[-200:]}").split(
                "|", 2
            )
            print(f"{what:36} {len(data):>11,} {seconds:>5} {peak:>5}  {verdict}", flush=True)
        cells = fuzzed(args.fuzzed, args.seed)
        pq.write_table(pa.table({"jpg_0": pa.array(cells, pa.binary())}), folder / "a.parquet")
        n = len(cells)
        images = cell_images(
            [folder / "a.parquet"], np.zeros(n, np.int64), np.arange(n), ["jpg_0"] * n
        )
        print(f"{n} changed images as cells: {outcomes(images)}")
        names = [f"{i}.jpg" for i in range(args.files)]
        for path, data in zip(names, fuzzed(args.files, args.seed + 1), strict=True):
            (folder / path).write_bytes(data)
        print(f"{args.files} changed images as files: {outcomes(file_images(folder, names))}")


if __name__ == "__main__":
    main()
