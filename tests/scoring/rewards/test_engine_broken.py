"""A thousand broken images: every one a row with its reason, the sound ones scored."""

from __future__ import annotations

import io
import random
import re
import struct
import time
import zlib

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from tiny import Tiny, cells, one_by_one, picture

from fifa.config import Compute
from fifa.scoring.rewards.engine import score_pairs, unreadable_path


def encoded(kind: str, image: Image.Image | None = None, **options) -> bytes:
    image = image or Image.open(io.BytesIO(picture(7, (64, 48))))
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def truncated(draw):
    data = encoded(draw.choice(["JPEG", "PNG", "WEBP"]))
    return data[: draw.randrange(1, len(data) - 30)]


def wrong_type(draw):
    kinds = ["BMP", "GIF", "TIFF", "ICO", "PPM", "TGA", "PDF"]
    other = [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a"]
    return draw.choice([encoded(draw.choice(kinds)), *other])


def garbage(draw):
    return draw.choice([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b""]) + draw.randbytes(
        draw.randrange(4, 400)
    )


def zero_bytes(draw):
    return draw.choice([b"", bytes(draw.randrange(1, 5000))])


def animated(draw):
    frames = [Image.new("RGB", (16, 16), (i * 60, draw.randrange(256), 0)) for i in range(3)]
    kind = draw.choice(["PNG", "WEBP"])
    return encoded(kind, frames[0], save_all=True, append_images=frames[1:])


def sixteen_bit(draw):
    return encoded("PNG", Image.new("I;16", (20, 20), draw.randrange(65536)))


def long_and_thin(draw):
    size = draw.choice([(20_000, 1), (1, 20_000)])
    return encoded("PNG", Image.new("RGB", size, (draw.randrange(256), 0, 0)))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(draw):
    """A small PNG that says (and, in part, holds) hundreds of megapixels."""
    width, height = draw.choice([(30_000, 30_000), (2**31 - 1, 1), (65_000, 65_000)])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(draw.randrange(1 << 20, 3 << 20)))
    pieces = [chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def lying_header(draw):
    """A header that promises more rows or columns than there are pixels: one more to thousands."""
    rows = draw.choice([draw.randrange(1, 40), draw.randrange(40, 4000)])
    columns = draw.choice([0, draw.randrange(1, 4000)])
    if draw.random() < 0.5:
        # of 64 x 48 pixels; whole blocks, as what the last ones hold anyway is no lie
        data = bytearray(encoded("JPEG", progressive=draw.random() < 0.5))
        at = re.search(b"\xff[\xc0\xc2]\0\x11", data).end() + 1
        data[at : at + 4] = struct.pack(">HH", 48 + 15 + rows, 64 + columns)
        return bytes(data)
    data = bytearray(encoded("PNG"))
    data[16:24] = struct.pack(">II", 64 + columns, 48 + rows)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def many_scans(draw):
    """A progressive JPEG with more passes than anybody lives to see."""
    data = encoded("JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + draw.randrange(101, 3000) * data[at:-2] + data[-2:]


KINDS = [
    truncated,
    wrong_type,
    garbage,
    zero_bytes,
    animated,
    sixteen_bit,
    long_and_thin,
    bomb,
    lying_header,
    many_scans,
]


def test_a_thousand_broken_images_are_a_thousand_rows_with_reasons(tmp_path):
    draw = random.Random(0)
    sound = [picture(i, (16, 12), "PNG") for i in range(9)] + [
        encoded("PNG", Image.new("L", (1, 1)))
    ]
    broken = [KINDS[i % len(KINDS)](draw) for i in range(1000)]
    rows = [(f"prompt {i % 50}", sound[i % 10], broken[i]) for i in range(1000)]
    pairs = cells(tmp_path / "data", rows, row_group=100)
    model = Tiny()
    begun = time.monotonic()
    table = score_pairs(pairs, model, folder=tmp_path, compute=Compute(batch=8), shard=200)
    assert time.monotonic() - begun < 60
    assert len(pairs) == 1000
    found = {
        row: (a, b)
        for row, a, b in zip(
            pairs.table["row"].to_pylist(),
            table["reward_0"].to_numpy(),
            table["reward_1"].to_numpy(),
            strict=True,
        )
    }
    (path,) = tmp_path.glob("margin-*.parquet")
    listed = pq.read_table(unreadable_path(path)).to_pylist()
    reasons = {row["row"]: row["reason"] for row in listed if row["column"] == "jpg_1"}
    assert len(listed) == len(reasons) == 1000
    for row, (prompt, data, _) in enumerate(rows):
        kind = KINDS[row % len(KINDS)].__name__
        assert np.isnan(found[row][1]), kind
        assert reasons[row], kind
        if row < 50:
            expected = one_by_one(model, prompt, data)
            np.testing.assert_allclose(found[row][0], expected, rtol=1e-5)
    named = {
        "animated": "an animation",
        "bomb": "pixels",
        "long_and_thin": "too long and thin",
        "many_scans": "more than 100 scans",
        "sixteen_bit": "is not supported",
        "wrong_type": "cannot be decoded",
    }
    for number, kind in enumerate(KINDS):
        if kind.__name__ in named:
            assert named[kind.__name__] in reasons[number], reasons[number]
