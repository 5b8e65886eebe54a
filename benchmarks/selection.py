"""`fifa select` on a scored run of 10M pairs over 2M prompts, against a bare join and top-K.

    python benchmarks/select.py [--pairs N] [--prompts N] [--keep K] [--rounds N] [--folder DIR]

The peers join the same Parquet files on their ids, compute the importance and keep the K largest;
they apply no gate, normalise nothing, give no reasons and write K rows. Ours does all of that and
writes every pair. A last peer is told what only fifa knows of its files, that prompts have row
numbers and score tables lie row by row: `speedup_integer_keys`, beside `speedup` over the best join
on ids. Each runs in a process of its own; the time is the process's own, from reading
to the last byte written, without the import of libraries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common import report
from fifa.data.table import FILES, PAIRS, PROMPTS, REJECTED, Origin
from fifa.scoring.table import DIVERSITY, MARGIN, QUALITY
from fifa.shards.files import ROW_GROUP, write_json, write_table

CHUNK = 1_000_000
SCORES = {name: f"scores/{name}.parquet" for name in ("margin", "quality", "diversity")}


def hex_ids(rng: np.random.Generator, n: int, width: int = 20) -> pa.Array:
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    data = digits[rng.integers(0, 16, n * width, dtype=np.uint8)]
    offsets = np.arange(0, (n + 1) * width, width, dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), n, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def make_prompts(folder: Path, prompts: int) -> pa.Array:
    rng = np.random.default_rng(1)
    ids = hex_ids(rng, prompts)
    write_table(folder / FILES["prompts"], pa.table([ids, ids], schema=PROMPTS))
    rating = rng.uniform(1, 5, prompts).astype(np.float32)
    flags = pa.DictionaryArray.from_arrays(
        (rng.uniform(size=prompts) < 0.03).astype(np.int32), ["", "sexual"]
    ).cast(pa.string())
    write_table(folder / SCORES["quality"], pa.table([ids, rating, flags], schema=QUALITY))
    distance = rng.gamma(4, 0.1, prompts).astype(np.float32)
    columns = [ids, distance, np.log(distance)]
    write_table(folder / SCORES["diversity"], pa.table(columns, schema=DIVERSITY))
    return ids


def make_pairs(folder: Path, pairs: int, prompt_ids: pa.Array) -> None:
    # in chunks, as a run on a large source writes them; pixels by URL only, as without images
    rng = np.random.default_rng(2)
    origin = {"fifa.origin": json.dumps(Origin("made", "", "memory").__dict__)}
    urls = pa.array(["https://example.org/a.png"])
    one_file = pa.array(["part-0.parquet"])
    settings = {"compression": "zstd"}
    schema = PAIRS.with_metadata(origin)
    with (
        pq.ParquetWriter(folder / FILES["table"], schema, **settings) as table,
        pq.ParquetWriter(folder / SCORES["margin"], MARGIN, **settings) as margin,
    ):
        for start in range(0, pairs, CHUNK):
            n = min(CHUNK, pairs - start)
            zeros = pa.array(np.zeros(n, np.int32))
            prompt = rng.integers(0, len(prompt_ids), n, dtype=np.int32)
            named = prompt_ids.take(pa.array(prompt)).dictionary_encode()
            ids = hex_ids(rng, n)
            url = pa.DictionaryArray.from_arrays(zeros, urls).cast(pa.string())
            columns = {
                "pair_id": ids,
                "prompt": named,
                "prompt_id": named,
                "prompt_index": prompt,
                "image_0": hex_ids(rng, n),
                "image_1": hex_ids(rng, n),
                "image_0_ref": url,
                "image_1_ref": url,
                "file": pa.DictionaryArray.from_arrays(zeros, one_file),
                "row": np.arange(start, start + n),
                "swapped": np.zeros(n, bool),
                "label": rng.choice(np.float32([0, 0.5, 1]), n, p=[0.44, 0.12, 0.44]),
                "votes": np.ones(n, np.int32),
                "repeat": rng.uniform(size=n) < 0.01,
            }
            table.write_table(
                pa.table([columns[name] for name in PAIRS.names], schema=PAIRS), ROW_GROUP
            )
            rewards = rng.normal(size=(2, n)).astype(np.float32)
            margin.write_table(pa.table([ids, *rewards], schema=MARGIN), ROW_GROUP)
    index = {"margins": {"made": "margin.parquet"}}
    write_json(
        folder / "scores.json",
        index | {name: f"{name}.parquet" for name in ("quality", "diversity")},
    )
    write_table(folder / FILES["rejected"], REJECTED.empty_table())


PREAMBLE = """
import resource, sys, time
from pathlib import Path
folder, keep = Path(sys.argv[1]), int(sys.argv[2])
"""
EPILOGUE = """
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
PROGRAMS = {
    "polars": """
import polars as pl
start = time.perf_counter()
pairs = pl.scan_parquet(folder / "pairs.parquet").select("pair_id", "prompt_id")
margin = pl.scan_parquet(folder / "scores/margin.parquet")
quality = pl.scan_parquet(folder / "scores/quality.parquet").select("prompt_id", "rating")
diversity = pl.scan_parquet(folder / "scores/diversity.parquet").select("prompt_id", "entropy")
joined = (
    pairs.with_columns(pl.col("prompt_id").cast(pl.String))
    .join(margin, on="pair_id").join(quality, on="prompt_id").join(diversity, on="prompt_id")
)
value = (
    (pl.col("reward_0") - pl.col("reward_1")).abs()
    + 0.5 * pl.col("rating") + 0.5 * pl.col("entropy")
)
top = joined.select("pair_id", importance=value).top_k(keep, by="importance")
top.collect(engine="streaming").write_parquet(folder / "polars.parquet")
""",
    # The prompt's row in place of its id, and the margins where the pairs are: no id is joined.
    "polars, integer keys": """
import polars as pl
start = time.perf_counter()
pairs = pl.scan_parquet(folder / "pairs.parquet").select("pair_id", "prompt_index")
margin = pl.scan_parquet(folder / "scores/margin.parquet").select("reward_0", "reward_1")
quality = pl.scan_parquet(folder / "scores/quality.parquet").select("rating")
diversity = pl.scan_parquet(folder / "scores/diversity.parquet").select("entropy")
prompts = pl.concat([quality, diversity], how="horizontal").with_row_index("prompt_index")
joined = pl.concat([pairs, margin], how="horizontal").join(
    prompts.with_columns(pl.col("prompt_index").cast(pl.Int32)), on="prompt_index"
)
value = (
    (pl.col("reward_0") - pl.col("reward_1")).abs()
    + 0.5 * pl.col("rating") + 0.5 * pl.col("entropy")
)
top = joined.select("pair_id", importance=value).top_k(keep, by="importance")
top.collect(engine="streaming").write_parquet(folder / "polars.parquet")
""",
    "duckdb": """
import duckdb
start = time.perf_counter()
names = ("pairs", "scores/margin", "scores/quality", "scores/diversity")
files = {name.split("/")[-1]: f"'{folder / name}.parquet'" for name in names}
duckdb.sql(f'''
    COPY (
        SELECT pair_id, abs(reward_0 - reward_1) + 0.5 * rating + 0.5 * entropy AS importance
        FROM {files["pairs"]} JOIN {files["margin"]} USING (pair_id)
        JOIN {files["quality"]} USING (prompt_id) JOIN {files["diversity"]} USING (prompt_id)
        ORDER BY importance DESC LIMIT {keep}
    ) TO '{folder / "duckdb.parquet"}'
''')
""",
    "fifa select": """
from fifa.config import Recipe, Select
from fifa.run.folder import Run
from fifa.run.steps import select_step
start = time.perf_counter()
select_step(Run(folder, Recipe(select=Select(keep=keep))))
""",
}


def measure(name: str, folder: Path, keep: int) -> tuple[float, float]:
    program = PREAMBLE + PROGRAMS[name] + EPILOGUE
    command = [sys.executable, "-c", program, str(folder), str(keep)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, megabytes = done.stdout.split()[-2:]
    return float(seconds), float(megabytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--prompts", type=int, default=2_000_000)
    parser.add_argument("--keep", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the made run here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / FILES["rejected"]).exists():
            make_pairs(folder, given.pairs, make_prompts(folder, given.prompts))
        runs = [
            {name: measure(name, folder, given.keep) for name in PROGRAMS}
            for _ in range(given.rounds)
        ]
    seconds = {name: float(np.median([run[name][0] for run in runs])) for name in PROGRAMS}
    peak = {name: max(run[name][1] for run in runs) for name in PROGRAMS}
    ours = seconds["fifa select"]
    best = min(seconds["polars"], seconds["duckdb"])
    report(
        "select",
        [[name, f"{seconds[name]:.2f} s", f"{peak[name]:,.0f} MB"] for name in PROGRAMS],
        speedup=best / ours,
        of_limit=2 * best / ours,
        speedup_integer_keys=seconds["polars, integer keys"] / ours,
        peak_mb=peak["fifa select"],
    )


if __name__ == "__main__":
    main()
