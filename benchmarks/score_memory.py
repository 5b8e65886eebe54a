"""Memory while 200,000 pairs are scored: under 3 GB, and flat after the first minute.

Images of 64 x 64 that recur as in Pick-a-Pic (about 1.7 pairs an image, 14 a prompt), told apart
by their bytes, a tiny CLIP of random weights. The engine runs in a process of its own, whose
resident memory is read every second.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from common import report

SIDE = 64
PAIRS_A_PROMPT = 14
IMAGES_A_PROMPT = 8
MINUTE = 60
LIMIT_MB = 3000
GROWTH_MB = 100  # what counts as flat

SCORE = """
import sys
from pathlib import Path
from fifa.data import read_pairs
from fifa.config import Compute
from fifa.scoring.rewards.engine import score_pairs
from fifa.scoring.rewards import load_reward
model = load_reward("pickscore:" + sys.argv[1], device="cpu")
folder, compute = Path(sys.argv[3]), Compute(batch=256)
score_pairs(read_pairs(sys.argv[2]), model, folder=folder, compute=compute, shard=2048)
"""


def make_model(folder: Path) -> None:
    """A CLIP of two narrow layers a tower."""
    from made import write_clip

    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    tower |= {"intermediate_size": 64}
    write_clip(folder, text_config=tower, vision_config={**tower, "image_size": SIDE})


def make_pairs(folder: Path, pairs: int) -> Path:
    """One Parquet file with JPEGs in its cells."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pairs.parquet"
    both = [(i, j) for i in range(IMAGES_A_PROMPT) for j in range(i)]
    kinds = [pa.string(), pa.binary(), pa.binary(), pa.float64(), pa.float64()]
    names = ["caption", "jpg_0", "jpg_1", "label_0", "label_1"]
    schema = pa.schema(list(zip(names, kinds, strict=True)))
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, pairs, 100 * PAIRS_A_PROMPT):
            rows: list[tuple[object, ...]] = []
            for prompt in range(start, min(pairs, start + 100 * PAIRS_A_PROMPT), PAIRS_A_PROMPT):
                images = [jpeg(draw) for _ in range(IMAGES_A_PROMPT)]
                for i, j in draw.permutation(both)[: min(PAIRS_A_PROMPT, pairs - prompt)]:
                    rows.append((f"prompt {prompt}", images[i], images[j], 1.0, 0.0))
            columns = [
                pa.array(column, field.type)
                for column, field in zip(zip(*rows, strict=True), schema, strict=True)
            ]
            writer.write_table(pa.table(columns, schema=schema))
    return path


def jpeg(draw: np.random.Generator) -> bytes:
    coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8))
    stream = io.BytesIO()
    coarse.resize((SIDE, SIDE)).save(stream, "JPEG")
    return stream.getvalue()


def watch(command: list[str]) -> list[tuple[float, float]]:
    """``(seconds, resident MB)`` of a process, every second."""
    begun, samples = time.monotonic(), []
    process = subprocess.Popen(command)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            samples.append((time.monotonic() - begun, watched.memory_info().rss / 1e6))
        except psutil.NoSuchProcess:
            break
        time.sleep(1)
    if process.returncode:
        raise SystemExit(f"scoring failed with {process.returncode}")
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, help="keep model, data and scores here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        make_model(folder / "model")
        source = make_pairs(folder / "data", given.pairs)
        places = [str(folder / "model"), str(source), str(folder / "scores")]
        samples = watch([sys.executable, "-c", SCORE, *places])
    peak = max(memory for _, memory in samples)
    early = max(memory for second, memory in samples if second <= MINUTE)
    growth = max(0.0, peak - early)
    seconds = samples[-1][0]
    report(
        "score_memory",
        [
            ("pairs", f"{given.pairs:,}"),
            ("seconds", f"{seconds:.0f}"),
            ("peak MB", f"{peak:.0f}"),
            ("most MB in the first minute", f"{early:.0f}"),
            ("growth after it, MB", f"{growth:.0f}"),
        ],
        peak_mb=peak,
        growth_mb=growth,
        pairs_a_second=given.pairs / seconds,
    )
    if peak > LIMIT_MB or growth > GROWTH_MB:
        raise SystemExit("memory is not flat")


if __name__ == "__main__":
    main()
