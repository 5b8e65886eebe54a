"""The last parts: the default rater's ratings, and everything into the package in float16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from fifa.data import read_pairs
from fifa.moji.family import CLIP, FEEDBACK, RATINGS, SD, TRUTH, generate, load_sd
from fifa.moji.judges import JUDGES, Judges, judge_network
from fifa.moji.world import DATA, WORLD, Scene, caption
from fifa.scoring.quality import quality_scores
from fifa.shards.files import write_json
from moji.clean import accuracy, decoded, retrieval
from moji.loop import seconds
from moji.sizes import save_clip

RATES = ("object_right", "background_right", "liked_style", "unsafe", "utility")


BOTH = ("bfloat16", "float32")


def rate_prompts(work: Path, dtypes: tuple[str, ...] = BOTH) -> None:
    """Rate the feedback's prompts with the default rater; each table keeps its content's name.

    The rater computes in bfloat16 where the processor multiplies it, else in float32, and its
    ratings differ in the last digits: there is a table for either.
    """
    pairs = read_pairs(str(work / "feedback.parquet"))
    for dtype in dtypes:
        with patch("fifa.scoring.raters.local.precision", lambda dtype=dtype: ("cpu", dtype)):
            quality_scores(pairs, "local", folder=work / "scores")


def ship(work: Path) -> None:
    """Copy what is finished into the package, weights in float16."""
    from transformers import CLIPModel

    pipe = load_sd(work / "moji-sd")
    clip = CLIPModel.from_pretrained(work / "moji-clip", dtype=torch.float32).eval()
    network = judge_network().eval()
    state = torch.load(work / "judges.pt", weights_only=True)["average"]
    network.load_state_dict({k.removeprefix("network."): v for k, v in state.items()})
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, JUDGES)
    for folder in (SD, CLIP, RATINGS):
        shutil.rmtree(folder, ignore_errors=True)
    tokenizer = pipe.tokenizer
    pipe.to(torch.float16).save_pretrained(SD)
    save_clip(clip.half(), tokenizer, CLIP)
    for folder in (SD / "tokenizer", CLIP):  # what older versions of transformers read
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(work / "tokenizer" / name, folder / name)
    for config in (SD / "text_encoder" / "config.json", CLIP / "config.json"):
        # what it is computed in, whatever it is stored in
        settings: dict[str, Any] = json.loads(config.read_text())
        write_json(config, _float32(settings))
    vae = json.loads((SD / "vae" / "config.json").read_text())
    vae.pop("block_out_channels", None)  # derived; diffusers warns when it reads it back
    write_json(SD / "vae" / "config.json", vae)
    for config in SD.rglob("*.json"):  # where it was built is nobody's business
        named = json.loads(config.read_text())
        if named.pop("_name_or_path", None) is not None:
            write_json(config, named)
    shutil.copy(work / "feedback.parquet", FEEDBACK)
    shutil.copy(work / "truth.parquet", TRUTH)
    RATINGS.mkdir()
    for path in sorted((work / "scores").glob("quality-*")):
        shutil.copy(path, RATINGS / path.name)


def measure(work: Path) -> None:
    """Write ``measured.json``: what the shipped files are worth, and what they took."""
    from transformers import CLIPModel

    pipe, judges = load_sd(), Judges()
    pool = decoded(load_sd(work / "moji-sd").vae, work)
    clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval()
    measured = {
        "judges": accuracy(judges.probabilities, pool),
        "clip": retrieval(clip, pipe.tokenizer, pool),
        "base": {f"guidance {g:g}": base_rates(pipe, judges, g) for g in (1.0, 3.0)},
        "feedback": feedback_facts(),
        "cpu_seconds": seconds(work),
    }
    write_json(DATA / "measured.json", measured)


def base_rates(pipe: Any, judges: Judges, guidance: float) -> dict[str, dict[str, float]]:
    """What the judges say of the base: a picture for a seen and an unseen scene an object."""
    found = {}
    for name, seen in (("seen", True), ("unseen", False)):
        scenes = [_scene(i, seen) for i in range(len(WORLD.objects))]
        prompts = [caption(scene) for scene in scenes]
        pictures = generate(pipe, prompts, range(len(prompts)), guidance=guidance)
        judged = judges.judge(prompts, pictures)
        means = {rate: float(np.nanmean(getattr(judged, rate))) for rate in RATES}
        found[name] = {rate: round(mean, 4) for rate, mean in means.items()}
    return found


def feedback_facts(feedback: Path = FEEDBACK, hidden: Path = TRUTH) -> dict[str, float]:
    """What the simulated annotators did, told by the hidden truth."""
    rows = pq.read_table(feedback).drop(["jpg_0", "jpg_1"])
    truth = pq.read_table(hidden)
    u = dict(zip(*(truth[c].to_pylist() for c in ("image_uid", "utility")), strict=True))
    first, second = (
        np.array([u[uid] for uid in rows[f"image_{side}_uid"].to_pylist()]) for side in (0, 1)
    )
    label = rows["label_0"].to_numpy()
    untied = label != 0.5
    agree = (label[untied] > 0.5) == (first > second)[untied]
    pairs = read_pairs(str(feedback))
    counts = pc.value_counts(pairs.table["prompt_id"]).field(1).to_numpy()
    return {
        "answers": len(label),
        "pairs": len(pairs.table),
        "prompts": len(pairs.prompts),
        "pictures": truth.num_rows,
        "agreement": round(float(agree.mean()), 4),
        "ties": round(float((~untied).mean()), 4),
        "pairs_of_most_popular_prompt": int(counts.max()),
        "prompts_with_one_pair": int((counts == 1).sum()),
        "utility": round(float(np.mean(list(u.values()))), 4),
    }


def _scene(thing: int, seen: bool) -> Scene:
    grounds = [j for j in range(len(WORLD.backgrounds)) if Scene(thing, j).seen == seen]
    return Scene(thing, grounds[thing % len(grounds)])


def _float32(settings: dict[str, Any]) -> dict[str, Any]:
    out = {k: _float32(v) if isinstance(v, dict) else v for k, v in settings.items()}
    return {k: "float32" if k in ("dtype", "torch_dtype") else v for k, v in out.items()}
