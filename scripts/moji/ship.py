"""The last parts: the default rater's ratings, and everything into the package in float16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fifa.moji.family import CLIP, FEEDBACK, RATINGS, SD, TRUTH, load_sd, save_clip
from fifa.moji.judges import JUDGES, judge_network
from fifa.moji.world import DATA
from fifa.pairs import read_pairs
from fifa.score.quality import quality_scores
from fifa.shards.files import write_json
from moji.clean import accuracy, retrieval


def rate_prompts(work: Path) -> None:
    """Rate the feedback's prompts with the default rater; the table keeps its content's name."""
    pairs = read_pairs(str(work / "feedback.parquet"))
    quality_scores(pairs, "local", folder=work / "scores")


def ship(work: Path) -> None:
    """Copy what is finished into the package, weights in float16, and say what it is worth."""
    from transformers import CLIPModel

    pipe = load_sd(work / "moji-sd")
    vae = pipe.vae
    clip = CLIPModel.from_pretrained(work / "moji-clip", dtype=torch.float32).eval()
    network = judge_network().eval()
    state = torch.load(work / "judges.pt", weights_only=True)["average"]
    network.load_state_dict({k.removeprefix("network."): v for k, v in state.items()})
    measured = {
        "judges": accuracy(network, vae),
        "clip": retrieval(clip, pipe.tokenizer, vae),
        "seconds": json.loads((work / "timings.json").read_text()),
    }
    for folder in (SD, CLIP, RATINGS):
        shutil.rmtree(folder, ignore_errors=True)
    tokenizer = pipe.tokenizer
    pipe.to(torch.float16).save_pretrained(SD)
    save_clip(clip.half(), tokenizer, CLIP)
    for config in (SD / "text_encoder" / "config.json", CLIP / "config.json"):
        # what it is computed in, whatever it is stored in
        settings: dict[str, Any] = json.loads(config.read_text())
        write_json(config, _float32(settings))
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, JUDGES)
    shutil.copy(work / "feedback.parquet", FEEDBACK)
    shutil.copy(work / "truth.parquet", TRUTH)
    RATINGS.mkdir()
    for path in sorted((work / "scores").glob("quality-*")):
        shutil.copy(path, RATINGS / path.name)
    write_json(DATA / "measured.json", measured)


def _float32(settings: dict[str, Any]) -> dict[str, Any]:
    out = {k: _float32(v) if isinstance(v, dict) else v for k, v in settings.items()}
    return {k: "float32" if k in ("dtype", "torch_dtype") else v for k, v in out.items()}
