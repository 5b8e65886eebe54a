"""Model files that lie, and what training and evaluation make of them when they load.

A model's folder is copied and one of its files exchanged: pickles and wrong headers in safetensors,
settings of wrong types and sizes, code of its own. Right is an error in words, or a model that
loads because the lie is none; wrong is a traceback, code that runs, or a long wait.

    python scripts/attack/models.py --cases 240 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fifa.config import Generate
from fifa.errors import FifaError
from fifa.evaluation.models import find_models
from fifa.evaluation.sampling import PipelineLoader, settings_for
from fifa.training.backbones import load_backbone

KINDS = ("sd15", "sdxl", "sd3", "flux-dev")
SLOW = 20.0  # seconds
WRONG: tuple[Any, ...] = (None, -1, 10**400, "x", [], {}, float("nan"), True, 1e308)


class _Code:
    """What a pickle would run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def lies(path: Path, mark: Path) -> Iterator[tuple[str, bytes | Path | str]]:
    """Names, and what to put into a file's place: bytes, a link, or an index of this one file."""
    whole = path.read_bytes()
    yield from (("empty", b""), ("half", whole[: len(whole) // 2]), ("zeros", bytes(len(whole))))
    yield "pickle", pickle.dumps(_Code(mark))
    if path.suffix == ".safetensors":
        yield from _headers(whole)
        for link in ("/etc/passwd", path.name, "gone", "."):
            yield f"a link to {link}", Path(link)
        for shard in ("../../evil.py", "/etc/passwd", "gone", ""):
            yield f"an index of {shard}", shard
    elif path.suffix == ".json":
        yield from _settings(json.loads(whole))


def _headers(whole: bytes) -> Iterator[tuple[str, bytes]]:
    size = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    one, two, *_ = (name for name in header if name != "__metadata__")

    def packed(raw: bytes) -> bytes:
        return struct.pack("<Q", len(raw)) + raw + data

    for exponent in (27, 60, 63):
        yield f"a header of 2^{exponent}", struct.pack("<Q", 1 << exponent) + whole[8:]
    changes: dict[str, dict[str, Any]] = {
        "overlapping": {"data_offsets": header[two]["data_offsets"]},
        "beyond the end": {"data_offsets": [0, 1 << 50]},
        "backwards": {"data_offsets": [10, 0]},
        "negative shape": {"shape": [-1, 4]},
        "huge shape": {"shape": [1 << 40, 1 << 40]},
        "no such type": {"dtype": "Q7"},
        "another type": {"dtype": "F64"},
        "shape of text": {"shape": "x"},
    }
    for name, change in changes.items():
        yield name, packed(json.dumps({**header, one: {**header[one], **change}}).encode())
    left = {name: entry for name, entry in header.items() if name != one}
    yield "a weight less", packed(json.dumps(left).encode())
    yield "a weight renamed", packed(json.dumps({**left, "x": header[one]}).encode())
    twice = json.dumps({one: header[two]})[1:-1]
    yield "a key twice", packed(f"{json.dumps(header)[:-1]}, {twice}}}".encode())
    yield "deep", packed(b'{"a":' * 50_000 + b"1" + b"}" * 50_000)


def _settings(known: Any) -> Iterator[tuple[str, bytes]]:
    texts = {"null": "null", "list": "[]", "deep": "[" * 100_000, "digits": "9" * 5000}
    for name, text in texts.items():
        yield name, text.encode()
    if not isinstance(known, dict):
        return
    own = {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}}
    yield "code", json.dumps({**known, **own, "_class_name": ["evil", "Evil"]}).encode()
    yield "code of a kind", json.dumps({**known, **own, "model_type": "evil"}).encode()
    for key in list(known)[:12]:
        for value in WRONG:
            yield f"{key} = {str(value)[:8]}", json.dumps({**known, key: value}).encode()


def put(file: Path, content: bytes | Path | str) -> None:
    """Exchange a file of weights or settings."""
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, Path):
        file.unlink()
        file.symlink_to(content)
    else:
        with safe_open(file, "np") as weights:
            index = {"weight_map": dict.fromkeys(weights.keys(), content)}
        file.rename(file.with_name(f"{file.stem}-00001-of-00001.safetensors"))
        file.with_name(f"{file.name}.index.json").write_text(json.dumps(index), "utf-8")


def load(folder: Path, *, training: bool) -> None:
    """Load all parts as `fifa train` or `fifa evaluate` does."""
    if training:
        backbone = load_backbone(folder)
        backbone.rehearse(64)
        backbone.encode_prompts(["the cat"])
        _ = backbone.vae.network, backbone.denoiser
        return
    base, *_ = find_models(str(folder), {})
    settings = settings_for(Generate(device="cpu"), base.base)
    with PipelineLoader(base.base, settings, "cpu").use(base):
        pass


def attack(cases: int, seed: int, folder: Path) -> list[tuple[str, str, str]]:
    """What was tried and what came of it: ``told``, ``loads`` or ``wrong: ...``."""
    draw = random.Random(seed)
    # the same small models as the tests'
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "training"))
    write: Any = importlib.import_module("tiny_diffusion").write_model
    files = []
    for kind in KINDS:
        write(folder / kind, kind)
        files += [path for path in sorted((folder / kind).rglob("*")) if path.is_file()]
    every = [(file, *lie) for file in files for lie in lies(file, folder / "ran")]
    found = []
    headers = [one for one in every if one[0].suffix == ".safetensors"]
    others = [one for one in every if one[0].suffix != ".safetensors"]
    chosen = [draw.sample(some, min(cases // 2, len(some))) for some in (headers, others)]
    for file, name, content in chain(*chosen):
        kind, *_ = file.relative_to(folder).parts
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(folder / kind, case)
        put(case / file.relative_to(folder / kind), content)
        (case / "evil.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n", "utf-8")
        for training in (True, False):
            begun, result = time.monotonic(), "loads"
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    load(case, training=training)
            except FifaError:
                result = "told"
            except Exception as error:
                result = f"wrong: {type(error).__name__}"
            if (folder / "ran").exists() or time.monotonic() - begun > SLOW:
                result = "wrong: code ran, or slow"
            place = file.relative_to(folder).as_posix()
            found.append((place, f"{name}, {('evaluate', 'train')[training]}", result))
    return found


def main() -> None:
    """Attack, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=240, help="lies to try [default: 240]")
    parser.add_argument("--seed", type=int, default=0, help="of the lies [default: 0]")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = attack(asked.cases, asked.seed, Path(folder))
    for place, name, result in found:
        if result.startswith("wrong"):
            print(f"{place} | {name} | {result}")
    kinds = Counter((Path(place).suffix or place, result) for place, _, result in found)
    for (suffix, result), count in sorted(kinds.items()):
        print(f"{suffix:14} | {result:30} | {count:,}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{'all':14} | peak memory of the process, MB    | {peak:,}")


if __name__ == "__main__":
    main()
