"""Run folders made by hand, so that the page is tested against numbers that are known."""

import io
from dataclasses import asdict

import numpy as np
import pyarrow as pa
from PIL import Image

from fifa.config import Read, Recipe, Score, Select
from fifa.data.table import PAIRS, PROMPTS, REJECTED, Origin, Pairs, save_pairs
from fifa.run.folder import FORMAT, STAMP
from fifa.scoring.table import DIVERSITY, MARGIN, QUALITY, array_once, scored_once
from fifa.selection.table import REASONS, selection_table, write_selection
from fifa.shards.files import sealed_line, write_json, write_yaml

HOSTILE = '<script>alert("x")</script> & \u202ereversed'


def make_run(folder, *, pairs=400, scorers=2, images=None, seed=0, keep=80, source="a/b.parquet"):
    """A scored and selected run of ``pairs`` pairs, four a prompt; ties, gates and rejects too.

    ``images`` is a folder to write pictures into. Returns the selection's reason codes.
    """
    write_json(folder / STAMP, {"format": FORMAT})
    rng = np.random.default_rng(seed)
    prompts = (pairs + 3) // 4
    prompt_index = np.minimum(np.arange(pairs) // 4, prompts - 1).astype(np.int32)
    label = rng.choice([0.0, 1.0, 0.5, 0.75], pairs, p=[0.42, 0.42, 0.1, 0.06]).astype(np.float32)
    person = np.sign(label - 0.5)
    d = [(person * rng.normal(0.7, 1, pairs) + 0.0).astype(np.float32) for _ in range(scorers)]
    texts = [f"a drawing of {i} tame foxes" for i in range(prompts)]
    texts[1 % prompts] = HOSTILE
    prompt_ids = [f"{i:016x}" for i in range(prompts)]
    names = [_write_images(images, i) if images else (None, None) for i in range(pairs)]
    table = pa.table(
        [
            pa.array([f"{i:020x}" for i in range(pairs)]),
            pa.DictionaryArray.from_arrays(prompt_index, texts),
            pa.DictionaryArray.from_arrays(prompt_index, prompt_ids),
            pa.array(prompt_index),
            pa.array([f"k{2 * i}" for i in range(pairs)]),
            pa.array([f"k{2 * i + 1}" for i in range(pairs)]),
            pa.array([first for first, _ in names], pa.string()),
            pa.array([second for _, second in names], pa.string()),
            pa.DictionaryArray.from_arrays(np.zeros(pairs, np.int32), ["pairs.jsonl"]),
            pa.array(np.arange(pairs)),
            pa.array(np.zeros(pairs, bool)),
            pa.array(label),
            pa.array(np.ones(pairs, np.int32)),
            pa.array(np.zeros(pairs, bool)),
        ],
        schema=PAIRS,
    )
    rejected = pa.table(
        [["b.json"] * 5, [1, 4, 9, 11, 12], ["no prompt"] * 4 + ["<b>bad</b>"]], schema=REJECTED
    )
    origin = Origin(
        source, str(images or ""), "custom", fingerprint="f" * 16, rows=pairs + 5 + 7, merged=7
    )
    save_pairs(
        Pairs(table, pa.table([prompt_ids, texts], schema=PROMPTS), rejected, origin), folder
    )

    rating = rng.uniform(1, 5, prompts).astype(np.float32)
    flags = ["sexual,violence" if i % 10 == 3 else "" for i in range(prompts)]
    entropy = rng.normal(-0.5, 0.3, prompts).astype(np.float32)
    index = {"margins": {}, "quality": "quality-q-0.parquet", "diversity": "diversity-d-0.parquet"}
    scores = folder / "scores"
    tables = {
        index["quality"]: pa.table([prompt_ids, rating, flags], schema=QUALITY),
        index["diversity"]: pa.table([prompt_ids, np.exp(entropy), entropy], schema=DIVERSITY),
    }
    for i, own in enumerate(d):
        name = f"margin-s{i}-0.parquet"
        index["margins"][f"column:s{i}_0,s{i}_1"] = name
        tables[name] = pa.table([table["pair_id"], own, np.zeros(pairs, np.float32)], schema=MARGIN)
    for name, scored in tables.items():
        scored_once(scores / name, lambda _, scored=scored: scored)
    vectors = rng.normal(size=(prompts, 8)) + np.eye(8)[np.arange(prompts) % 3] * 4
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    array_once(scores / "embeddings-minilm-0.npy", lambda _: [vectors.astype(np.float16)], prompts)

    mean = sum(d) / max(scorers, 1)
    importance = np.abs(mean) + 0.2 * rating[prompt_index] + entropy[prompt_index]
    codes = np.full(pairs, REASONS.index("below_cutoff"), np.uint8)
    codes[np.array([bool(flag) for flag in flags])[prompt_index]] = REASONS.index("unsafe_prompt")
    codes[label == 0.5] = REASONS.index("tie")
    free = np.flatnonzero(codes == REASONS.index("below_cutoff"))
    order = free[np.argsort(-importance[free], kind="stable")]
    codes[order[:keep]] = REASONS.index("selected")
    rank = np.zeros(pairs, np.int32)
    rank[order] = np.arange(1, len(order) + 1)
    signed = np.where(label == 0.5, np.nan, mean * person)
    columns = {
        "margin": np.abs(mean),
        "signed_margin": signed,
        "agreement": np.where(
            label == 0.5, np.nan, np.mean([own * person > 0 for own in d], axis=0)
        ),
        "quality": rating[prompt_index],
        "diversity": entropy[prompt_index],
        "importance": np.where(rank > 0, importance, np.nan),
        "rank": rank,
        "weight": (codes == 0).astype(np.float32),
    }
    columns = {k: v if k == "rank" else np.asarray(v, np.float32) for k, v in columns.items()}
    recipe = Recipe(
        read=Read(source=source),
        score=Score(margin=tuple(index["margins"])),
        select=Select(keep=keep),
    )
    used = {
        "select": asdict(recipe.select),
        "margin": index["margins"],
        "quality": index["quality"],
        "diversity": index["diversity"],
    }
    write_selection(folder, selection_table(table["pair_id"], codes, columns), used)
    write_yaml(folder / "recipe.yaml", recipe.to_yaml())
    steps = [
        {"step": "read", "started": "2025-01-02T03:04:05+00:00", "seconds": 0.4, "pairs": pairs},
        {
            "step": "score",
            "started": "2025-01-02T03:04:06+00:00",
            "seconds": 75.2,
            "tokens_in": 1200,
            "recall": 0.987,
        },
        {"step": "score", "started": "2025-01-02T03:08:06+00:00", "seconds": 1, "tokens_in": 34},
    ]
    (folder / "log.jsonl").write_text("".join(map(sealed_line, steps)) + '{"step": "sel', "utf-8")
    return codes


def _write_images(folder, i):
    names = []
    for side in (0, 1):
        picture = Image.new("RGB", (48, 32), ((37 * i) % 256, (91 * i + 120 * side) % 256, 90))
        cell = io.BytesIO()
        picture.save(cell, "PNG")
        (folder / f"{i}_{side}.png").write_bytes(cell.getvalue())
        names.append(f"{i}_{side}.png")
    return names
