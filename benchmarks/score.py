"""The engine against the loop of PickScore's README, and against the bare image tower.

The same weights for all (a CLIP ViT-B/32 of random weights, on this machine's processors or on
``--device``, where the engine takes its own precision and batch), and pairs whose images recur as
in Pick-a-Pic: about 1.7 pairs an image and 14 pairs a prompt. The loop does what the README does, a
pair at a time: the prompt and both images through processor and model. The limit is the image tower
alone on batches that are ready. The three take turns.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from common import peak_mb, report
from fifa.config import Compute
from fifa.data import read_pairs
from fifa.data.decode import open_image
from fifa.scoring.rewards import load_reward
from fifa.scoring.rewards.engine import score_pairs
from fifa.scoring.rewards.pixels import convert_crop
from made import jpeg, write_clip

PAIRS_AN_IMAGE = 1.7
PAIRS_A_PROMPT = 14
BATCH = 32


def make_pairs(folder: Path, pairs: int) -> Path:
    """Pairs of 512 x 512 JPEGs in Pick-a-Pic's columns; every prompt has its own images.

    14 pairs a prompt and 1.7 pairs an image are 14 / 1.7, some 8 images a prompt.
    """
    draw = np.random.default_rng(0)
    images = round(PAIRS_A_PROMPT / PAIRS_AN_IMAGE)
    rows: dict[str, list[object]] = {name: [] for name in COLUMNS}
    for prompt in range(-(-pairs // PAIRS_A_PROMPT)):
        text = f"{prompt} " + "".join(draw.choice(list("abcdefg hij klm "), 16))
        jpegs = [jpeg(draw) for _ in range(images)]
        both = [(i, j) for i in range(images) for j in range(i)]
        draw.shuffle(both)
        for i, j in both[: min(PAIRS_A_PROMPT, pairs - len(rows["caption"]))]:
            uids = f"{prompt}-{i}", f"{prompt}-{j}"
            for name, value in zip(
                COLUMNS, (text, jpegs[i], jpegs[j], *uids, 1.0, 0.0), strict=True
            ):
                rows[name].append(value)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), folder / "pairs.parquet", row_group_size=100)
    return folder / "pairs.parquet"


COLUMNS = ("caption", "jpg_0", "jpg_1", "image_0_uid", "image_1_uid", "label_0", "label_1")


class Loop:
    """PickScore's README: `calc_probs` a pair, without its softmax; in float32, as there."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.device = device
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.processor = CLIPImageProcessorPil()

    @torch.no_grad()
    def score(self, prompt: str, data: tuple[bytes, bytes]) -> list[float]:
        """The rewards of both images."""
        images = [Image.open(io.BytesIO(one)) for one in data]
        pixels = self.processor(images=images, return_tensors="pt")
        tokens = self.tokenizer(
            prompt, padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        pixels, tokens = pixels.to(self.device), tokens.to(self.device)
        image = self.model.get_image_features(**pixels).pooler_output
        image = image / torch.norm(image, dim=-1, keepdim=True)
        text = self.model.get_text_features(**tokens).pooler_output
        text = text / torch.norm(text, dim=-1, keepdim=True)
        scores: list[float] = (self.model.logit_scale.exp() * (text @ image.T)[0]).tolist()
        return scores

    def run(self, rows: Sequence[dict[str, Any]]) -> list[list[float]]:
        """Pair by pair."""
        return [self.score(row["caption"], (row["jpg_0"], row["jpg_1"])) for row in rows]

    def tower(self, batches: int) -> tuple[float, float]:
        """Seconds, and processor seconds, an image takes in the bare tower, on ready batches."""
        ready = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        ready = ready.to(self.device)
        with torch.inference_mode():
            begun, busy = time.perf_counter(), time.process_time()
            for _ in range(batches):
                self.model.get_image_features(pixel_values=ready)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        images = batches * BATCH
        return (time.perf_counter() - begun) / images, (time.process_time() - busy) / images


def decode_ms(source: Path) -> float:
    """Processor milliseconds that one image takes to be decoded and resized."""
    data = pq.read_table(source, columns=["jpg_0"])["jpg_0"][:50].to_pylist()
    begun = time.process_time()
    for one in data:
        convert_crop(open_image(one), 224)
    return 1000 * (time.process_time() - begun) / len(data)


_reward = None


def ours(
    folder: str, source: str, threads: int, device: str
) -> tuple[list[float], float, list[list[float]], int]:
    """Seconds and processor seconds, peak MB, scores, images: in its own process, model loaded."""
    global _reward
    torch.set_num_threads(threads)
    if _reward is None:
        _reward = load_reward(f"pickscore:{folder}", device=device)
        _reward.image_features(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
        _reward.prompt_features(["warm"])
    pairs = read_pairs(source)
    with tempfile.TemporaryDirectory() as scores:
        begun, busy = time.perf_counter(), time.process_time()
        table = score_pairs(pairs, _reward, folder=Path(scores), compute=Compute())
        seconds = [time.perf_counter() - begun, time.process_time() - busy]
    images = len({*pairs.table["image_0"].to_pylist(), *pairs.table["image_1"].to_pylist()})
    found = np.full((len(pairs), 2), np.nan)
    swapped = pairs.table["swapped"].to_numpy(zero_copy_only=False)
    rewards = np.stack([table["reward_0"].to_numpy(), table["reward_1"].to_numpy()], 1)
    found[pairs.table["row"].to_numpy()] = np.where(swapped[:, None], rewards[:, ::-1], rewards)
    return seconds, peak_mb(), found.tolist(), images


def compare(folder: Path, pairs: int, rounds: int, device: str) -> None:
    write_clip(folder / "model")
    source = make_pairs(folder / "data", pairs)
    loop = Loop(folder / "model", device)
    loop.tower(1)
    share = -(-pairs // rounds)
    theirs, limits, times, scores = 0.0, [], [], []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as engine:
        for number in range(rounds):
            rows = pq.read_table(source).slice(number * share, share).to_pylist()
            begun = time.perf_counter()
            scores += loop.run(rows)
            theirs += time.perf_counter() - begun
            limits.append(loop.tower(4))
            seconds, peak, found, images = engine.submit(
                ours, str(folder / "model"), str(source), torch.get_num_threads(), device
            ).result()
            times.append(seconds)
            limits.append(loop.tower(4))
    difference = float(np.abs(np.array(found) - np.array(scores)).max())
    spread = float(np.std(scores))
    seconds, busy = np.median(times, axis=0).tolist()
    limit, busy_limit = (np.median(limits, axis=0) * images).tolist()
    report(
        "score",
        [
            ("", "pairs/s", "images/s", "s"),
            ("loop of PickScore's README", *rates(pairs, 2 * pairs, theirs)),
            ("fifa, decoding and all", *rates(pairs, images, seconds)),
            ("bare image tower", "", *rates(0, images, limit)[1:]),
            ("tower's processor seconds / fifa's", "", "", f"{busy_limit / busy:.3f}"),
            ("decoding and resizing, ms of a core", "", "", f"{decode_ms(source):.1f}"),
            ("largest difference of scores", "", "", f"{difference:.1e}"),
            ("(their standard deviation)", "", "", f"{spread:.1e}"),
        ],
        speedup=theirs / seconds,
        of_limit=limit / seconds,
        of_limit_processor=busy_limit / busy,
        peak_mb=peak,
    )
    if difference > 1e-5 and device == "cpu":
        raise SystemExit(f"the scores differ by {difference:.1e}")


def rates(pairs: int, images: int, seconds: float) -> tuple[str, str, str]:
    return f"{pairs / seconds:.2f}", f"{images / seconds:.2f}", f"{seconds:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=2, help="turns that each takes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="keep model and data here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as temporary:
        compare(given.folder or Path(temporary), given.pairs, given.rounds, given.device)


if __name__ == "__main__":
    main()
