"""Attack the readers of sources: python scripts/attack/sources.py --seed 0.

One row a line: what, tried, result. Damaged tables of every kind, rankings spread over files,
holes, gzip bombs, and tars whose members are links, devices, holes or lies. Right is pairs whose
sums are exact, or a reason in words, in time and in little memory; anything else is marked WRONG,
and the command ends with 1.
"""

from __future__ import annotations

import argparse
import base64
import csv
import gzip
import io
import json
import os
import random
import resource
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fifa.data.images import pair_images, read
from fifa.data.read import read_pairs
from fifa.errors import FifaError

NAMES = ("prompt", "image_0", "image_1", "label")
KINDS = ("parquet", "tar", "csv", "tsv", "jsonl", "json", "jsonl.gz", "csv.gz")
SECONDS, MEGABYTES = 20.0, 400  # for one hostile file; the memory beyond what the libraries take
SECRET = 1000  # the seed of a picture beside a source, which no row may reach
ODD = [
    None,
    "",
    "\ud800",
    10**400,
    float("nan"),
    -1,
    7,
    "63%",
    [],
    {},
    ["a"],
    "tar:0+9:x",
    "\0",
    True,
]


def picture(seed: int) -> bytes:
    """A small PNG."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def rows(rng: random.Random, n: int = 6) -> list[dict[str, Any]]:
    """Rows of a table of pairs, a value of some is odd; images are paths or base64."""
    text = base64.b64encode(picture(1)).decode()
    made = []
    for i in range(n):
        row = dict(zip(NAMES, (f"p{i}", f"{i}a.png", rng.choice(["b", text]), i % 2), strict=True))
        if rng.random() < 0.3:
            row[rng.choice(NAMES)] = rng.choice(ODD)
        made.append(row)
    return made


def table(kind: str, own: list[dict[str, Any]]) -> bytes:
    """The rows as a file."""
    out, bare = io.BytesIO(), kind.removesuffix(".gz")
    if bare == "parquet":
        texts = [{name: str(row[name])[:2000] for name in NAMES} for row in own]
        safe = [{k: v.encode("utf-8", "replace").decode() for k, v in row.items()} for row in texts]
        pq.write_table(pa.Table.from_pylist(safe), out, compression="none")
    elif bare == "tar":
        with tarfile.open(fileobj=out, mode="w") as archive:
            for i, row in enumerate(map(dict, own)):
                del row["image_0"], row["image_1"]
                members = {"json": json.dumps(row).encode()}
                members |= {f"image_{k}.png": picture(i + k) for k in (0, 1)}
                for name, data in members.items():
                    info = tarfile.TarInfo(f"{i}.{name}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    elif bare in ("csv", "tsv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, NAMES, delimiter="\t" if bare == "tsv" else ",")
        writer.writeheader()
        writer.writerows(own)
        out.write(text.getvalue().encode("utf-8", "surrogatepass"))
    else:
        lines = "\n".join(map(json.dumps, own))
        out.write((json.dumps(own) if bare == "json" else lines).encode())
    return gzip.compress(out.getvalue()) if kind.endswith(".gz") else out.getvalue()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Up to three places replaced, and perhaps the end cut off."""
    for _ in range(rng.randrange(4)):
        at, size = rng.randrange(len(data) + 1), rng.randrange(4)
        data = data[:at] + rng.randbytes(rng.randrange(4)) + data[at + size :]
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.2 else data


def outcome(path: Path) -> str:
    """``read``, ``refused``, or what is wrong."""
    try:
        pairs = read_pairs(path)
        if pairs.origin.rows != len(pairs) + pairs.origin.merged + len(pairs.rejected):
            return "WRONG: the sum"
        both = [*pairs.table.to_pylist(), *pairs.rejected.to_pylist()]
        places = Counter((row["file"], row["row"]) for row in both)
        if places and max(places.values()) > 1:
            return "WRONG: a row twice"
        if any(data == picture(SECRET) for _, data in read(pair_images(pairs.table, pairs.origin))):
            return "WRONG: an image from outside"
    except FifaError as error:
        str(error).encode()
        return "refused"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {str(error)[:100]}"
    return "read"


def damage(rng: random.Random, tries: int) -> dict[str, Counter[str]]:
    """What comes of damaged tables, by kind."""
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for i in range(tries):
        kind = KINDS[i % len(KINDS)]
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"a.{kind}"
            path.write_bytes(damaged(table(kind, rows(rng)), rng))
            found[kind][outcome(path)] += 1
    return found


def rankings(rng: random.Random, images: int) -> str:
    """Images of rankings of two to six, shuffled over eight files: every pair is there, once."""
    sizes: list[int] = []
    while sum(sizes) < images:
        sizes.append(rng.randint(2, 6))
    own = [
        {"prompt_id": g, "prompt": f"p{g}", "rank": i, "image_path": f"{g}/{i}.png"}
        for g, size in enumerate(sizes)
        for i in range(size)
    ]
    rng.shuffle(own)
    with TemporaryDirectory() as folder:
        for k in range(8):
            pq.write_table(pa.Table.from_pylist(own[k::8]), Path(folder) / f"{k}.parquet")
        pairs = read_pairs(folder)
    total = sum(size * (size - 1) // 2 for size in sizes)
    for row in pairs.table.to_pylist():
        first, second = (int(row[f"image_{side}"].split("/")[1][0]) for side in (0, 1))
        if row["label"] != float(first < second):
            return "WRONG: a label"
    good = (len(pairs), pairs.origin.merged, len(pairs.rejected)) == (total, 0, 0)
    return f"{total:,} pairs" if good else f"WRONG: {len(pairs):,} of {total:,} pairs"


def hole(kind: str, start: bytes) -> Callable[[Path], Path]:
    """A file of 10 GB that is all hole behind its beginning."""

    def make(folder: Path) -> Path:
        path = folder / f"a.{kind}"
        path.write_bytes(start)
        os.truncate(path, 10 << 30)
        return path

    return make


def bomb(honest: bool) -> Callable[[Path], Path]:
    """A gzip file of 1 MB that unpacks to 512 MB of rows, and says so or not."""

    def make(folder: Path) -> Path:
        block = b"prompt,image_0,image_1,label\n" + b"p" * 1000 + b",a,b,1\n"
        data = gzip.compress(block * 1000, 6) * 512
        (folder / "a.csv.gz").write_bytes(data if not honest else data[:-4] + b"\0\0\0\x20")
        return folder / "a.csv.gz"

    return make


HOSTILE = {
    "10 GB hole": hole("csv", b""),
    "10 GB hole behind a header": hole("csv", b"prompt,image_0,image_1,label\np,a,b,1\n"),
    "10 GB hole in UTF-16": hole("csv", b"\xff\xfep\0"),
    "10 GB hole behind [": hole("json", b"["),
    "10 GB hole behind {": hole("json", b'{"a":'),
    "10 GB hole as JSON lines": hole("jsonl", b'{"a": 1}\n'),
    "10 GB hole as a tar": hole("tar", b""),
    "10 GB hole as Parquet": hole("parquet", b"PAR1"),
    "gzip bomb of 512 MB": bomb(honest=True),
    "gzip bomb that hides its size": bomb(honest=False),
}


def sample(archive: tarfile.TarFile, key: str, prompt: str, *, but: str = "") -> None:
    """A pair's members, all but one."""
    members = {"json": json.dumps({"prompt": prompt, "label": 1}).encode()}
    members |= {f"image_{side}.png": picture(side) for side in (0, 1)}
    for name, data in members.items():
        if name != but:
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def tar(kind: bytes, link: str = "", **headers: str) -> Callable[[Path], Path]:
    """A tar of a good pair and of one whose first image is another kind of member."""

    def make(folder: Path) -> Path:
        (folder / "secret.png").write_bytes(picture(SECRET))
        (folder / "set").mkdir()
        path = folder / "set" / "a.tar"
        info = tarfile.TarInfo("1.image_0.png")
        info.type, info.linkname, info.pax_headers = kind, link, headers
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            sample(archive, "0", "good")
            archive.addfile(info)
            sample(archive, "1", "hostile", but="image_0.png")
        return path

    return make


HOSTILE |= {
    "tar: a link out of the folder": tar(tarfile.SYMTYPE, "../secret.png"),
    "tar: a hard link out of the folder": tar(tarfile.LNKTYPE, "../secret.png"),
    "tar: a device": tar(tarfile.CHRTYPE),
    "tar: a pipe": tar(tarfile.FIFOTYPE),
    "tar: a header of 50 MB": tar(tarfile.REGTYPE, comment="x" * (50 << 20)),
    "tar: a size of 30 digits": tar(tarfile.REGTYPE, size="9" * 30),
    "tar: a size below zero": tar(tarfile.REGTYPE, size="-512"),
    "tar: a hole of 2^50 bytes": tar(
        tarfile.REGTYPE,
        **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 50)},
    ),
}


def measured(make: Callable[[Path], Path], out: Any) -> None:
    """Send what comes of a file, the seconds and the MB that it takes."""
    with TemporaryDirectory() as folder:
        path = make(Path(folder))
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        result = outcome(path)
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        out.send((result, time.process_time() - began, more))


def main() -> int:
    """Print the table; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int, default=1600, help="damaged tables")
    parser.add_argument("--images", type=int, default=20_000, help="of rankings over files")
    options = parser.parse_args()
    rng, lines = random.Random(options.seed), []
    for kind, found in damage(rng, options.tries).items():
        results = ", ".join(f"{n:,} {what}" for what, n in sorted(found.items()))
        lines.append(f"damaged {kind} | {found.total():,} files | {results}")
        print(lines[-1], flush=True)
    lines.append(
        f"rankings over 8 files | {options.images:,} images | {rankings(rng, options.images)}"
    )
    print(lines[-1], flush=True)
    for name, make in HOSTILE.items():
        here, there = get_context("fork").Pipe()
        process = get_context("fork").Process(target=measured, args=(make, there))
        process.start()
        result, seconds, megabytes = here.recv()
        process.join()
        wrong = " WRONG" if seconds > SECONDS or megabytes > MEGABYTES else ""
        lines.append(f"{name} | 1 file | {result}, {seconds:.1f} s, {megabytes:.0f} MB more{wrong}")
        print(lines[-1], flush=True)
    return any("WRONG" in line for line in lines)


if __name__ == "__main__":
    sys.exit(main())
