"""What `gpu.py` measures: a function a side, in a process of its own; numbers by name.

    echo '["NAME", "FOLDER", {"option": value}]' | python benchmarks/gpu_sides.py

prints a line of JSON. Libraries are imported before that line is read. The device is waited for
before a clock is read, and nothing is timed cold.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import made

HERE = Path(__file__).parent
SIDE_SECONDS = 150  # a side that hangs costs no more
COMPILE_SECONDS = 400  # nor one that compiles
# What sides import: diffusers and transformers read a module when a class of it is asked for.
LIBRARIES = (
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "fifa.evaluation.generate",
    "fifa.scoring.rewards.engine",
    "fifa.training.job",
    "peft",
)
GB = 1e9


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    device: str
    sd: dict[str, Any]
    sdxl: dict[str, Any]
    clip: dict[str, Any]
    lm: dict[str, Any]
    resolution: int
    xl_resolution: int
    pairs: int
    batch: int
    steps: int
    script_steps: int
    few: int  # pairs of a training whose memory is measured
    images: int
    few_images: int
    loop_pairs: int
    towers: tuple[int, ...]
    pictures: int
    side: int | None  # pixels of a picture; None: the model's own
    pipelines: tuple[int, ...]
    sampler_steps: int
    prompts: int
    vectors: int
    few_vectors: int  # as many as a processor searches in seconds


CUDA = Sizes(
    device="cuda",
    sd=made.SD,
    sdxl=made.SDXL,
    clip=made.CLIP_H,
    lm=made.SMOLLM,
    resolution=512,
    xl_resolution=1024,
    pairs=128,
    batch=32,
    steps=10,
    script_steps=6,
    few=8,
    images=10_000,
    few_images=512,
    loop_pairs=40,
    towers=(32, 64, 128, 256),
    pictures=128,
    side=None,
    pipelines=(8, 32, 64),
    sampler_steps=20,
    prompts=4096,
    vectors=2_000_000,
    few_vectors=30_000,
)
TINY = Sizes(
    device="cpu",
    sd=made.TINY_SD,
    sdxl=made.TINY_SDXL,
    clip=made.TINY_CLIP,
    lm=made.TINY_LM,
    resolution=64,
    xl_resolution=64,
    pairs=8,
    batch=4,
    steps=4,
    script_steps=4,
    few=4,
    images=24,
    few_images=8,
    loop_pairs=2,
    towers=(2, 4),
    pictures=6,
    side=64,
    pipelines=(1, 2),
    sampler_steps=2,
    prompts=24,
    vectors=400,
    few_vectors=200,
)


def sizes() -> Sizes:
    """`CUDA` where there is a device, else `TINY`."""
    import torch

    return CUDA if torch.cuda.is_available() else TINY


def make_world(folder: Path, part: str) -> dict[str, float]:
    """Models and data of a part, where they are not there yet."""
    size, begun = sizes(), time.perf_counter()
    device = size.device
    if part in ("train", "generate", "memory"):
        made.write_diffusion(folder / "sd", size.sd, device)
    if part == "memory":
        made.write_diffusion(folder / "sdxl", size.sdxl, device)
        _pairs(folder / "few", 2 * size.few, size.xl_resolution)
    if part == "train":
        _pairs(folder / "pairs", 2 * size.pairs, size.resolution)
    if part == "score":
        made.write_clip(folder / "clip", device, "float16", **size.clip)
        _pairs(folder / "images", size.images, made.SIDE, a_prompt=8)
        _pairs(folder / "few-images", size.few_images, made.SIDE, a_prompt=8)
    if part == "rate":
        from fifa.scoring.rubric import load_rubric
        from rate import made_prompts

        texts = [*load_rubric().completion.values(), *made_prompts(min(1000, size.prompts))]
        made.write_language_model(folder / "lm", texts, size.lm, device)
    return {"seconds": time.perf_counter() - begun}


def _pairs(folder: Path, images: int, side: int, a_prompt: int = 1) -> None:
    if not (folder / "train.parquet").exists():
        made.write_pairs(folder / "train.parquet", made.jpegs(images, side), a_prompt)


def train_fifa(folder: Path, draws: int, compile: bool = False) -> dict[str, float]:
    """`fifa train` without a performance option but ``--compile``, from its ``stats.jsonl``."""
    from fifa.training.metrics import read_stats
    from phases import train_in_phases

    size = sizes()
    with tempfile.TemporaryDirectory() as out:
        told = [*("--rank", "8"), *("--steps", size.steps), *("--batch", size.batch)]
        told += [*("--draws", draws), *("--resolution", size.resolution), *("--tracker", "none")]
        if compile:
            told.append("--compile")
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
        arguments = ["train", folder / "pairs", "--model", folder / "sd", "--out", out, *told]
        found = train_in_phases([str(one) for one in arguments])
        if found["error"]:
            raise SystemExit(found["error"])
        lines = read_stats(Path(out))
        device = Path(out) / "device.json"
        fit = json.loads(device.read_text()) if device.exists() else {}
    return {
        **speeds([line["seconds"] for line in lines], size.batch),
        **memory_of(found["phases"]),
        "first_step": found["first_step"],
        "micro_batch": fit.get("micro_batch", 0),
        **{name: phase["seconds"] for name, phase in found["phases"].items()},
    }


def speeds(times: Sequence[float], batch: int) -> dict[str, float]:
    """Pairs a second from the times at which steps ended, the first quarter of them left out."""
    first = max(1, len(times) // 4)
    taken = [times[i] - times[i - 1] for i in range(first, len(times))]
    return {
        "pairs_s": batch / statistics.median(taken),
        "mean_pairs_s": batch * len(taken) / (times[-1] - times[first - 1]),
    }


def memory_of(phases: dict[str, dict[str, float]]) -> dict[str, float]:
    """The peaks of all phases, in GB."""
    return {
        what: max(phase[what] for phase in phases.values()) / GB
        for what in ("allocated", "reserved")
    }


def train_script(folder: Path, script: str) -> dict[str, float]:
    """Diffusers' real script, at its README's settings (without the 8-bit AdamW)."""
    size = sizes()
    with tempfile.TemporaryDirectory() as out:
        record = Path(out) / "record.json"
        options = {
            "pretrained_model_name_or_path": folder / "sd",
            "dataset_name": folder / "pairs",
            "dataset_split_name": "train",
            "cache_dir": folder / "datasets",
            "output_dir": Path(out) / "lora",
            "resolution": size.resolution,
            "mixed_precision": "fp16" if size.device == "cuda" else "no",
            "train_batch_size": size.batch // 2,
            "gradient_accumulation_steps": 2,
            "rank": 8,
            "max_train_steps": size.script_steps,
            "dataloader_num_workers": 8 if size.device == "cuda" else 0,
            "learning_rate": 1e-5,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "seed": 0,
        }
        told = [f"--{name}={value}" for name, value in options.items()]
        told.append("--gradient_checkpointing")
        command = [sys.executable, HERE / "peer_script.py", record, script, *told]
        begun = time.perf_counter()
        run_apart(command)
        taken = time.perf_counter() - begun
        found = json.loads(record.read_text())
    times = found["times"]
    return {
        **speeds(times, size.batch),
        "allocated": found["allocated"] / GB,
        "reserved": found["reserved"] / GB,
        "first_step": times[0],
        "seconds": taken,
    }


def train_step(folder: Path) -> dict[str, float]:
    """A step that does what the script does, where the script is not at hand."""
    import pyarrow.parquet as pq
    import torch

    from train_step import PeerStep

    size = sizes()
    half = torch.bfloat16 if size.device == "cuda" else torch.float32
    step = PeerStep(folder / "sd", size.resolution, 8, size.device, half)
    table = pq.read_table(folder / "pairs" / "train.parquet")
    rows = table.slice(0, size.batch // 2).to_pylist()
    times = []
    step.unet.train()
    for _ in range(size.script_steps):
        step.step(rows)
        times.append(time.perf_counter())
    return {**speeds(times, len(rows)), **peaks()}


def train_policy(folder: Path, pairs: int) -> dict[str, float]:
    """The policy's forward and backward alone, on micro-batches of the size that ours found."""
    import torch

    from train_step import PeerStep

    size = sizes()
    half = torch.bfloat16 if size.device == "cuda" else torch.float32
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in training
    step = PeerStep(folder / "sd", size.resolution, 8, size.device, half)
    step.unet.train()
    pairs = pairs or size.batch // 2
    times = []
    for _ in range(3 + max(3, 2 * size.steps * size.batch // pairs // 8)):
        step.policy(pairs)
        synchronize()
        times.append(time.perf_counter())
    return {**speeds(times, pairs), **peaks()}


def score_engine(folder: Path) -> dict[str, float]:
    """The engine as `fifa score` runs it by default.

    All images less a few, over the time that they take more than the few: what starts anew with
    each call (workers that decode, a first batch) is in neither, nor is loading.
    """
    from fifa.config import Compute
    from fifa.data import read_pairs
    from fifa.scoring.rewards import load_reward
    from fifa.scoring.rewards.engine import score_pairs

    begun = time.perf_counter()
    reward = load_reward(f"pickscore:{folder / 'clip'}")
    few, all_of_them = (read_pairs(str(folder / one)) for one in ("few-images", "images"))
    with tempfile.TemporaryDirectory() as name:

        def timed(pairs: Any, out: str) -> float:
            begun = time.perf_counter()
            score_pairs(pairs, reward, folder=Path(name) / out, compute=Compute())
            synchronize()
            return time.perf_counter() - begun

        timed(few, "first")
        loading = time.perf_counter() - begun
        timed(all_of_them, "warm")  # the text tower has seen no batch of this size either
        short, long = timed(few, "few"), timed(all_of_them, "images")
    images = 2 * (len(all_of_them) - len(few))
    return {
        "images_s": images / (long - short),
        "with_start_images_s": 2 * len(all_of_them) / long,
        "loading": loading,
        **peaks(),
    }


def score_tower(folder: Path) -> dict[str, float]:
    """The bare image tower in bfloat16 on batches that are ready."""
    import torch
    from transformers import CLIPVisionModelWithProjection

    size = sizes()
    half = torch.bfloat16 if size.device == "cuda" else torch.float32
    loaded = CLIPVisionModelWithProjection.from_pretrained(folder / "clip", dtype=half)
    model, found = loaded.eval().to(size.device), {}
    side = model.config.image_size
    with torch.inference_mode():
        for batch in size.towers:
            ready = torch.randn(batch, 3, side, side, device=size.device, dtype=half)
            rounds = max(2, size.images // 4 // batch)
            for _ in range(2):
                model(pixel_values=ready)
            synchronize()
            begun = time.perf_counter()
            for _ in range(rounds):
                model(pixel_values=ready)
            synchronize()
            found[f"images_s_{batch}"] = rounds * batch / (time.perf_counter() - begun)
    return {**found, "images_s": max(found.values()), **peaks()}


def score_decoder(folder: Path) -> dict[str, float]:
    """Decoding and resizing alone, as the engine does it, its processes running already."""
    import pyarrow.parquet as pq

    from fifa.data.decoders import choose_decoders
    from fifa.data.prefetch import decode_images
    from fifa.scoring.rewards.pixels import convert_crop, prepared

    size = sizes()
    table = pq.read_table(folder / "images" / "train.parquet", columns=["jpg_0"])
    data = table["jpg_0"].to_pylist()
    side = size.clip["vision_config"].get("image_size", 224)
    decoders = choose_decoders(partial(prepared, partial(convert_crop, size=side)))

    def decode(some: Sequence[bytes]) -> float:
        begun = time.perf_counter()
        for _ in decode_images(enumerate(some), decoders, most=256):
            pass
        return len(some) / (time.perf_counter() - begun)

    decode(data[:128])
    speed = decode(data)
    decoders.close()
    return {"images_s": speed}


def score_loop(folder: Path) -> dict[str, float]:
    """The loop of PickScore's README, float32, a pair at a time."""
    import pyarrow.parquet as pq

    from score import Loop

    size = sizes()
    loop = Loop(folder / "clip", size.device)
    rows = pq.read_table(folder / "images" / "train.parquet").slice(0, size.loop_pairs).to_pylist()
    loop.run(rows[:2])
    synchronize()
    begun = time.perf_counter()
    loop.run(rows)
    synchronize()
    return {"images_s": 2 * len(rows) / (time.perf_counter() - begun), **peaks()}


def generate_fifa(folder: Path) -> dict[str, float]:
    """The images that `fifa evaluate` makes of the base, with its defaults."""
    from fifa.config import Evaluate, changed
    from fifa.evaluation.generate import generate
    from fifa.evaluation.models import find_models
    from fifa.evaluation.prompts import read_prompts
    from fifa.evaluation.sampling import settings_for

    size = sizes()
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        (out / "prompts.txt").write_text("\n".join(made.captions(size.pictures)))
        asked = changed(
            Evaluate(),
            base=str(folder / "sd"),
            prompts=str(out / "prompts.txt"),
            seeds=1,
            steps=size.sampler_steps,
            width=size.side,
            height=size.side,
        )
        models = find_models(asked.base, {})
        settings = settings_for(asked.generate, models[0].base)
        begun = time.perf_counter()
        generate(asked, models, read_prompts(asked.prompts), settings, out)
        taken = time.perf_counter() - begun
        ended: dict[str, list[float]] = {}  # by group, the end of an image's name
        for image in out.glob("images/*/*.png"):
            ended.setdefault(image.stem.rpartition("-")[2], []).append(image.stat().st_mtime)
    groups = sorted((max(times), len(times)) for times in ended.values())
    late = sum(count for _, count in groups[1:])
    span = groups[-1][0] - groups[0][0]
    return {
        "images_s": late / span if span else math.nan,
        "batch": max(count for _, count in groups),
        "seconds": taken,
        **peaks(),
    }


def generate_stock(folder: Path) -> dict[str, float]:
    """The stock pipeline in float16, as its documentation calls it."""
    import torch
    from diffusers import StableDiffusionPipeline

    size = sizes()
    half = torch.float16 if size.device == "cuda" else torch.float32
    pipe = StableDiffusionPipeline.from_pretrained(
        folder / "sd", dtype=half, safety_checker=None, requires_safety_checker=False
    ).to(size.device)
    pipe.set_progress_bar_config(disable=True)
    texts, found = made.captions(size.pictures), {}
    frame = {"width": size.side, "height": size.side}
    for batch in size.pipelines:
        pipe(texts[:batch], num_inference_steps=2, **frame)
        rounds = max(1, size.pictures // 4 // batch)
        synchronize()
        begun = time.perf_counter()
        for number in range(rounds):
            prompts = texts[number * batch : (number + 1) * batch]
            pipe(prompts, num_inference_steps=size.sampler_steps, **frame)
        synchronize()
        found[f"images_s_{batch}"] = rounds * batch / (time.perf_counter() - begun)
    return {**found, "images_s": max(found.values()), **peaks()}


def rate_prompts(folder: Path) -> dict[str, float]:
    """Ours, the batched loop with `generate`, and the bare forward pass, in turn."""
    import torch

    from fifa.scoring.raters.local import LogitRater
    from fifa.scoring.raters.logits import load_reader, precision
    from rate import limit_batches, made_prompts

    size = sizes()
    prompts = made_prompts(size.prompts)
    rater = LogitRater(str(folder / "lm"))
    reader = load_reader(folder / "lm", *precision())
    batches = limit_batches(reader, prompts)

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                reader.model.base_model(batch, use_cache=False)

    few = prompts[: max(8, size.prompts // 16)]
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "ours": (lambda: rater.rate(prompts), len(prompts)),
        "loop": (lambda: rate_loop(reader.model, folder / "lm", few), len(few)),
        "forward": (forward, len(prompts)),
    }
    found = {}
    for name, (run, count) in runs.items():
        run()
        synchronize()
        begun = time.perf_counter()
        run()
        synchronize()
        found[f"{name}_prompts_s"] = count / (time.perf_counter() - begun)
    return {**found, **peaks()}


def rate_loop(model: Any, folder: Path, prompts: Sequence[str], batch: int = 64) -> None:
    """The usual loop: rubric, prompt and question in a chat, padded, a digit is generated."""
    from transformers import AutoTokenizer

    from fifa.scoring.rubric import QUALITIES, load_rubric
    from rate import CHAT

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    rubric = load_rubric().completion["start"].removesuffix('"')
    for start in range(0, len(prompts), batch):
        for quality in QUALITIES:
            chats = [
                CHAT.format(rubric, f"Prompt: {text}\n\nRate its {quality}. One digit.")
                for text in prompts[start : start + batch]
            ]
            ids = tokenizer(chats, padding=True, return_tensors="pt").to(model.device)
            model.generate(
                input_ids=ids.input_ids,
                attention_mask=ids.attention_mask,
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )


def knn_search(folder: Path) -> dict[str, float]:
    """Ten neighbours of every vector: on the device of all, and of some beside faiss."""
    import numpy as np
    import torch

    from fifa.scoring.diversity import QUERIES
    from fifa.scoring.neighbours import device_search, exact_search

    size = sizes()
    generator = torch.Generator(size.device).manual_seed(0)
    drawn = torch.randn(size.vectors, 384, device=size.device, generator=generator)
    vectors = torch.nn.functional.normalize(drawn).cpu().numpy()
    del drawn
    few = vectors[: size.few_vectors]

    def on_device(of: Any) -> Any:
        search = device_search(of, size.device)
        starts = range(0, len(of), QUERIES)
        return np.concatenate([search(of[start : start + QUERIES], 11) for start in starts])

    found, rows = {}, {}
    runs: dict[str, tuple[Callable[[Any], Any], Any]] = {
        "warm": (on_device, few),
        "few_device": (on_device, few),
        "few_faiss": (lambda of: exact_search(of)(of, 11), few),
        "all_device": (on_device, vectors),
    }
    for name, (run, of_these) in runs.items():
        begun = time.perf_counter()
        rows[name] = run(of_these)
        found[name] = time.perf_counter() - begun
    same = np.mean(rows["few_device"] == rows["few_faiss"])
    return {**found, "same": float(same), **peaks()}


# The name in the line of JSON; what people call it, the card in GB, model, resolution, options
MEMORY: dict[str, tuple[str, int, str, str, list[str]]] = {
    "sdxl_lora": ("SDXL LoRA, 1,024", 24, "sdxl", "xl_resolution", []),
    "sd_full": ("SD1.5 full, --draws 2", 24, "sd", "resolution", ["--method=full", "--draws=2"]),
    "sd_lora": ("SD1.5 LoRA, 512", 12, "sd", "resolution", []),
}


def memory(folder: Path, what: str) -> dict[str, Any]:
    """The phases of a short training on a card that is imitated."""
    from phases import train_in_phases

    size = sizes()
    _, card, model, resolution, more = MEMORY[what]
    with tempfile.TemporaryDirectory() as out:
        told = ["train", folder / "few", "--model", folder / model, "--out", out, "--steps", "2"]
        told += ["--tracker", "none", "--batch", size.few, *more]
        told += ["--resolution", getattr(size, resolution)]
        found = train_in_phases([str(one) for one in told], limit=int(card * GB))
        device = Path(out) / "device.json"
        fit = json.loads(device.read_text()) if device.exists() else {}
    return {**found, "micro_batch": fit.get("micro_batch", 0), "fit": fit}


def run_apart(command: Sequence[object]) -> None:
    """Run a command; what it prints goes to standard error, as our own output is JSON."""
    told, most = [str(one) for one in command], SIDE_SECONDS - 10
    subprocess.run(told, check=True, env=offline(), stdout=sys.stderr, timeout=most)


def synchronize() -> None:
    """Wait for the device, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peaks() -> dict[str, float]:
    """This process's peaks of device memory, in GB."""
    import torch

    if not torch.cuda.is_available():
        return {"allocated": 0.0, "reserved": 0.0}
    cuda = torch.cuda
    return {
        "allocated": cuda.max_memory_allocated() / GB,
        "reserved": cuda.max_memory_reserved() / GB,
    }


def offline() -> dict[str, str]:
    """The environment of sides: nothing is asked of the hub, and no bars."""
    switched = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE")
    silent = {f"{name}_VERBOSITY": "error" for name in ("TRANSFORMERS", "DIFFUSERS")}
    return {**os.environ, **dict.fromkeys(switched, "1"), **silent}


SIDES: dict[str, Callable[..., dict[str, Any]]] = {
    side.__name__: side
    for side in (
        *(make_world, train_fifa, train_script, train_step, train_policy),
        *(score_engine, score_tower, score_decoder, score_loop),
        *(generate_fifa, generate_stock, rate_prompts, knn_search, memory),
    )
}


def main() -> None:
    """Import `LIBRARIES` and say so, then run the side that a line of standard input names."""
    for library in LIBRARIES:
        import_module(library)
    print("ready", flush=True)
    if line := sys.stdin.readline():  # none: no side was left
        name, folder, options = json.loads(line)
        print(json.dumps(SIDES[name](Path(folder), **options)))


if __name__ == "__main__":
    main()
