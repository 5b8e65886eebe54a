"""What this machine does in a second: measured in about a minute, and kept.

`fifa doctor --bench` measures everything in `BENCH` and shows it; `fifa plan` takes from it what it
cannot measure on the data set itself. Rates lie in ``rates.json`` in the folder of
`fifa.shards.files.cache_folder`, and hold for one machine and one set of versions.
"""

from __future__ import annotations

import io
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fifa import __version__
from fifa.config import Train, changed
from fifa.config.train import STATS
from fifa.console import QUIET, output
from fifa.data.decode import open_image
from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.models.runtime import make_runtime
from fifa.moji.family import FEEDBACK, SD
from fifa.scoring.encoders import make_encoder
from fifa.scoring.neighbours import (
    approximate_index,
    approximate_search,
    device_search,
    exact_search,
)
from fifa.scoring.raters.local import DefaultRater
from fifa.shards.files import PREFIX, cache_folder, digest, read_json, read_json_lines, write_json
from fifa.shards.pool import cores

FILE = "rates.json"
WRITTEN = 64 << 20  # bytes, to measure the disk
LIBRARIES = (
    "torch",
    "transformers",
    "diffusers",
    "peft",
    "numpy",
    "pillow",
    "pyarrow",
    "faiss-cpu",
)
LAYERS, WIDTH, TOKENS = 32, 1280, 257  # of ViT-H/14, the image tower of PickScore and HPSv2.1
TIMED_LAYERS = 2
IMAGES = 4  # through these layers at once
SIDE = 512  # pixels of the JPEG that is decoded
VECTORS, WIDE = 8192, 384  # random ones, of all-MiniLM-L6-v2's width
MANY_VECTORS = 131_072  # the same for a GPU
STEPS, PAIRS = 6, 8  # of the training in the small world


@dataclass(frozen=True)
class Rate:
    """How long something takes, and what it writes.

    Parameters
    ----------
    start
        Seconds before the first.
    each
        Seconds for each after that.
    unit
        Of what: ``images``.
    of
        What was measured, for people.
    size
        Bytes that each leaves on the disk.
    """

    start: float
    each: float
    unit: str
    of: str
    size: float = 0.0

    def seconds(self, count: float) -> float:
        """For so many of them."""
        return self.start + self.each * count

    def __str__(self) -> str:
        """For people: as many a second as there are, or seconds each."""
        if self.each <= 0:
            return f"too quick to tell ({self.of})"
        rate = 1 / self.each
        if rate >= 1e9:
            return f"{rate / 1e9:,.1f} billion {self.unit} a second ({self.of})"
        if rate >= 1e6:
            return f"{rate / 1e6:,.0f} million {self.unit} a second ({self.of})"
        if rate < 1:
            return f"{self.each:,.1f} seconds for each of the {self.unit} ({self.of})"
        return f"{rate:,.{0 if rate >= 100 else 1}f} {self.unit} a second ({self.of})"


def kept_rates(
    name: str, measure: Callable[[], dict[str, Rate]], fresh: bool = False
) -> dict[str, Rate]:
    """The rates called ``name``: as they are kept, or ``measure()`` kept from now on.

    ``fresh`` measures in any case. A file of another machine, of other versions or a damaged one is
    begun anew. Raises what ``measure`` raises.
    """
    path, here = cache_folder() / FILE, machine()
    known: dict[str, Any] = {}
    with suppress(FifaError):
        there = read_json(path, "the rates", missing={}, sealed=path.exists())
        known = there["rates"] if there.get("machine") == here else {}
    if fresh or name not in known:
        known[name] = {key: asdict(rate) for key, rate in measure().items()}
        write_json(path, {"machine": here, "rates": known}, sealed=True)
    return {key: Rate(**plain) for key, plain in known[name].items()}


def bench_rate(name: str, fresh: bool = False) -> Rate:
    """One of `BENCH`; raises `FifaError` where its library or model is not installed."""

    def measured() -> dict[str, Rate]:
        with output(QUIET):
            return {name: BENCH[name]()}

    return kept_rates(name, measured, fresh)[name]


@cache
def machine() -> str:
    """Names this machine and the versions that its rates depend on; 16 hex characters."""
    processor = platform.processor()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.startswith("model name"))
    gpus = [os.environ.get("CUDA_VISIBLE_DEVICES", ""), *map(str, _gpus())]
    versions = []
    for library in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{library} {metadata.version(library)}")
    return digest([__version__, processor, platform.machine(), cores(), gpus, versions])


def _gpus() -> list[Path]:
    return sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))


def write_rate(folder: Path) -> float:
    """Bytes a second that reach the disk of ``folder``; raises `OSError` where it is full."""
    if shutil.disk_usage(folder).free < 2 * WRITTEN:
        raise OSError(28, "no space left on the device")
    with tempfile.NamedTemporaryFile(prefix=PREFIX, dir=folder) as file:
        data = os.urandom(WRITTEN)
        began = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN / (time.perf_counter() - began)


def warm(work: Callable[[], object], count: int, least: float = 1.0) -> float:
    """Seconds for each of the ``count`` things that ``work`` does, when it has done them before.

    It is repeated for ``least`` seconds; the quickest time counts, as others use the machine too.
    """
    work()
    times: list[float] = []
    while sum(times) < least:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times) / count


def _decode() -> Rate:
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (SIDE // 8, SIDE // 8, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    data, n = file.getvalue(), 16 * cores()

    def one(_: int) -> object:
        return open_image(data).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)

    with ThreadPoolExecutor(cores()) as pool:
        each = warm(lambda: list(pool.map(one, range(n))), n)
    of = f"JPEG of {SIDE} x {SIDE} and {len(data) / 1000:.0f} KB, resized, {cores()} threads"
    return Rate(0.0, each, "images", of)


def _tower() -> Rate:
    torch, transformers = require("torch"), require("transformers")
    runtime = make_runtime()
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=TIMED_LAYERS,
        num_attention_heads=16,
        patch_size=14,
    )
    tower = transformers.CLIPVisionModel(config).eval().to(runtime.device)
    pixels = torch.zeros(IMAGES, 3, 224, 224, device=runtime.device)

    def work() -> None:
        with torch.no_grad(), runtime.autocast():
            tower(pixel_values=pixels).pooler_output.float().sum().item()

    each = warm(work, IMAGES) * LAYERS / TIMED_LAYERS
    of = f"ViT-H/14 with random weights, {TIMED_LAYERS} of its {LAYERS} layers, "
    return Rate(0.0, each, "images", f"{of}{runtime.device}, {runtime.precision}")


def tower_flops(layers: int = LAYERS, width: int = WIDTH, tokens: int = TOKENS) -> float:
    """Operations of an image in a vision transformer: two for each multiplication.

    A layer of width w has 12 w^2 weights, and its attention two products of [tokens, w] with
    [w, tokens] and back. By default of the whole ViT-H/14 that stands for `_tower`.
    """
    return layers * (2.0 * tokens * 12 * width**2 + 4.0 * tokens**2 * width)


def _captions(count: int) -> list[str]:
    captions = pq.read_table(FEEDBACK, columns=["caption"])["caption"].unique().to_pylist()
    return [captions[i * len(captions) // count] for i in range(count)]


def _rater() -> Rate:
    prompts, rater = _captions(32), DefaultRater()
    each = warm(lambda: rater.rate(prompts), len(prompts))
    return Rate(0.0, each, "prompts", "the rater local, on Moji's prompts")


def _encoder() -> Rate:
    prompts, encoder = _captions(256), make_encoder("minilm")
    each = warm(lambda: encoder.embed(prompts), len(prompts))
    return Rate(0.0, each, "prompts", "minilm, on Moji's prompts")


def _random(n: int = VECTORS) -> Any:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((n, WIDE), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _neighbours() -> Rate:
    vectors = _random()
    each = warm(lambda: exact_search(vectors)(vectors, 11), VECTORS**2)
    of = f"{VECTORS:,} random vectors of {WIDE} numbers, exactly"
    return Rate(0.0, each, "distances", of)


def _neighbours_on_gpu() -> Rate:
    device = make_runtime().device
    if not device.startswith("cuda"):
        raise FifaError("no CUDA device is here", do="nothing: processors search as well")
    vectors = _random(MANY_VECTORS)
    each = warm(lambda: device_search(vectors, device)(vectors, 11), MANY_VECTORS**2)
    of = f"{MANY_VECTORS:,} random vectors of {WIDE} numbers, exactly, on {device}"
    return Rate(0.0, each, "distances", of)


def _approximate() -> Rate:
    vectors = _random()

    def work() -> object:
        return approximate_search(vectors, approximate_index(vectors))(vectors, 11)

    of = f"{VECTORS:,} random vectors of {WIDE} numbers, by an index"
    return Rate(0.0, warm(work, VECTORS), "neighbours", of)


def _training() -> Rate:
    from fifa.training.job import run_training

    with tempfile.TemporaryDirectory(prefix="fifa-") as name:
        rows = pq.read_table(FEEDBACK)
        pq.write_table(rows.slice(0, 4 * PAIRS), Path(name) / "pairs.parquet")
        train = Train(source=name, model=str(SD), holdout=0.0, tracker="none")
        train = partial_training(train, STEPS, PAIRS)
        run_training(train, out := Path(name) / "out")
        each = step_seconds(out) / PAIRS
    return Rate(0.0, each, "pairs", f"LoRA on Moji's model, 4 million weights, batch {PAIRS}")


def partial_training(train: Train, steps: int, batch: int) -> Train:
    """A few steps of a training: nothing held out, nothing written before its end."""
    none = {"holdout": 0.0, "checkpoint_every": 0, "sample_every": 0, "log_every": 1}
    size = {"steps": steps, "batch": batch, "save_every": steps, "stop": False}
    return changed(train, tracker="none", validate_every=steps, **none, **size)


def step_seconds(out: Path) -> float:
    """Seconds of a step of a finished training of three steps or more: their median.

    A step's numbers are read when the next one is queued, so the last two lines are of one time.
    """
    done = [line["seconds"] for line in read_json_lines(out / STATS)[0]]
    return max(1e-4, float(np.median(np.diff(done[:-1]))))


def _disk() -> Rate:
    cache_folder().mkdir(parents=True, exist_ok=True)
    each = 1 / write_rate(cache_folder())
    return Rate(0.0, each, "bytes", f"{WRITTEN >> 20} MB into the cache's folder")


BENCH: dict[str, Callable[[], Rate]] = {
    "decoding": _decode,
    "image tower": _tower,
    "rating": _rater,
    "embedding": _encoder,
    "neighbours": _neighbours,
    "neighbours on a GPU": _neighbours_on_gpu,
    "approximate neighbours": _approximate,
    "training": _training,
    "writing": _disk,
}


def bench() -> Iterator[tuple[str, Rate | FifaError]]:
    """Measure all of `BENCH` anew; a `FifaError` for what cannot be measured here."""
    for name in BENCH:
        try:
            yield name, bench_rate(name, fresh=True)
        except FifaError as error:
            yield name, error
