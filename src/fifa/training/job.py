"""A training from its source to its weights: read, plan, encode, reference, loop, card."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fifa.config import Cluster, Train
from fifa.config.train import FACTS_FILE, STATS, TRAIN_FILE
from fifa.console import echo
from fifa.errors import FifaError
from fifa.models.assemble import assembled
from fifa.models.frozen import OFFLOAD, check_quantizer, quantized_parts
from fifa.models.lora import find_lora
from fifa.models.optional import require
from fifa.models.runtime import (
    best_device,
    best_dtype,
    free_bytes,
    out_of_memory,
    release_memory,
)
from fifa.shards.executors import executor_of
from fifa.shards.files import (
    check_free,
    check_same,
    content_digest,
    make_folder,
    sweep,
    write_text,
)
from fifa.shards.lock import only_writer
from fifa.shards.manifest import MANIFEST
from fifa.shards.mirror import is_written, local
from fifa.training.backbones import Backbone, load_backbone
from fifa.training.batches import (
    Batch,
    Reference,
    Source,
    adapters_off,
    frozen_copy,
    precompute,
    table,
)
from fifa.training.cache import cache_bytes, encode, spread
from fifa.training.checkpoint import (
    BEST,
    CHECKPOINTS,
    STATE,
    check_optimizer,
    latest_state,
    latest_step,
    make_state,
)
from fifa.training.encoding import arithmetic
from fifa.training.holdout import DRAWS, Holdout, split_pairs, steps_between
from fifa.training.labels import choose_loss, with_labels
from fifa.training.loop import Loop
from fifa.training.losses import LOSSES
from fifa.training.metrics import write_card
from fifa.training.order import check_order, presented
from fifa.training.plan import Plan, memory_of, size
from fifa.training.ratings import read_training
from fifa.training.resize import Resize
from fifa.training.samples import Samples
from fifa.training.trackers import Track, no_track, tracking

WAIT = timedelta(days=2)  # of processes, for the slowest one to fill the cache
DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}
MOST_LATENTS = 4096  # pixels a side of a latent that a model may say it was made for
# What may differ when a training is taken up again: it changes no weight by more than rounding.
FREE = frozenset(
    {"device", "compile", "offload", "channels_last", "gradient_checkpointing", "micro_batch"}
    | {"tracker", "log_every", "save_every", "sample_every", "cache_prompts"}
    | {f"cluster.{field.name}" for field in fields(Cluster)}
)


GONE = re.compile(r"(closed|reset) by peer|remote process exited|Timed out waiting|NCCL \w*error")


@dataclass(frozen=True)
class Job:
    """What is at hand before anything is trained.

    Parameters
    ----------
    train
        The training.
    accelerator
        accelerate's view of processes, devices and precision.
    pairs, backbone, plan
        What is trained on, what is trained, what it will take.
    taught, held
        Numbers of the pairs to train on, and of those held out.
    used
        Numbers of the pairs that steps take or that are held out: no others are encoded.
    cache
        The folder of latents, embeddings and the reference's scalars.
    """

    train: Train
    accelerator: Any
    pairs: Any
    backbone: Backbone
    plan: Plan
    taught: list[int]
    held: list[int]
    used: list[int]
    cache: Path


@dataclass(frozen=True)
class Trial:
    """A part of a training that is compared with others: see `fifa.run.tune`.

    Parameters
    ----------
    until
        The step after which it pauses: its state is saved, and it can go on from there.
    shared
        Where trainings that are compared have their cache, unless the run has it.
    judge
        Has the loss and the beta by which held-out pairs are measured.
    """

    until: int
    shared: Path
    judge: Train


def run_training(train: Train, out: str | Path, trial: Trial | None = None) -> Path:
    """Train, or go on with the training that is in ``out``; returns ``out``.

    With ``trial`` only a part of the training, whose weights so far are in ``out / "best"``.

    Raises
    ------
    FifaError
        For whatever a person can mend; what was done until then is kept.
    """
    out = Path(out)
    accelerator = make_accelerator(train)
    train, why = choose_loss(train)
    with only_writer(out) if accelerator.is_main_process else nullcontext():
        return _run(train, out, accelerator, why, trial)


def _run(train: Train, out: Path, accelerator: Any, why: str, trial: Trial | None) -> Path:
    if accelerator.is_main_process:
        start_folder(train, out)
    accelerator.wait_for_everyone()
    if is_finished(out):
        if accelerator.is_main_process:
            echo(f"this training is finished: {out}")
        return out
    with on_device(accelerator.device):
        job = make_job(train, trial.shared if trial else out, accelerator, why)
        if accelerator.is_main_process and not trial:
            echo(str(job.plan))
        main = accelerator.is_main_process
        with tracking(train, out, latest_step(out)) if main else nullcontext(no_track) as track:
            loop = make_loop(job, out, track, trial)
            done = loop.run()
        if trial and done.step < job.plan.steps:
            return out
        loop.state.export(train, job.backbone, out)
    if accelerator.is_main_process:  # last, as its train.json says that all is there
        write_card(job.plan, job.backbone.family, job.pairs, done, accelerator.device, out)
        skipped = f", {done.skipped:,} of them skipped" if done.skipped else ""
        on = f"{job.plan.pairs:,} {job.plan.what}"
        echo(f"trained {done.step:,} steps{skipped} on {on}; weights in {out}")
        if done.best is not None:
            echo(
                f"held-out pairs: lowest loss {done.best:.4f} after step {done.best_step:,}, "
                f"weights in {out / BEST}"
            )
    accelerator.wait_for_everyone()
    return out


def make_loop(job: Job, out: Path, track: Track, trial: Trial | None = None) -> Loop:
    """Encode what is not encoded yet, and load what is trained and what it is compared with."""
    train, accelerator, plan = job.train, job.accelerator, job.plan
    source = make_source(job)
    captions = job.pairs.caption
    samples = Samples(train, job.backbone, captions, out, accelerator, plan.resolution)
    samples.base()
    reference = make_reference(job, source)
    holdout = make_holdout(job, source, trial.judge if trial else train)
    state = make_state(train, job.backbone, accelerator)
    until = trial.until if trial else None
    return Loop(train, plan.steps, out, source, reference, state, samples, holdout, until, track)


@contextmanager
def on_device(device: Any) -> Iterator[None]:
    """How a training computes while the block lasts.

    Memory that runs out, and other processes of the training that die, become a `FifaError`.
    """
    try:
        with arithmetic(device):
            yield
    except (RuntimeError, MemoryError) as error:
        if GONE.search(str(error)):  # what gloo and NCCL say
            raise FifaError(
                f"another process of this training is gone: {str(error).splitlines()[0][:200]}",
                do="see what that one says, then give the same command again, on all machines or "
                "on those that are left: it continues from the newest state",
            ) from error
        if not out_of_memory(error):
            raise
        raise FifaError(
            f"out of memory: {str(error).splitlines()[0]}",
            where=str(device),
            do="a smaller --micro-batch, --gradient-checkpointing, --dtype bfloat16 or --method "
            "lora; the same command continues from the newest state",
        ) from error


def plan_training(train: Train, out: str | Path) -> Plan:
    """What `run_training` would do: reads the pairs and the model's headers, writes nothing."""
    train, why = choose_loss(train)
    check_folder(train, Path(out))
    return make_job(train, Path(out), make_accelerator(train), why).plan


def is_finished(out: Path) -> bool:
    """Whether the training in ``out`` has come to its end."""
    return (out / FACTS_FILE).is_file()


def check_folder(train: Train, out: Path) -> None:
    """Raise `FifaError` unless ``out`` is free, or holds this very training.

    Knobs in `FREE` may differ; until the first state, any may.
    """
    if not (out / TRAIN_FILE).is_file():
        check_free(out, "training")
    elif latest_state(out) is not None or is_finished(out):
        differences = Train.from_yaml(out / TRAIN_FILE).differences(train, but=FREE)
        do = "choose another --out, or give the same options"
        check_same("another training", differences, out, do)


def start_folder(train: Train, out: Path) -> None:
    """Begin in ``out``, or get it ready to go on; raises as `check_folder`."""
    check_folder(train, out)
    make_folder(out)
    sweep(out)
    for name in (STATE, CHECKPOINTS, BEST):
        sweep(out / name)
    if latest_state(out) is None and not is_finished(out):
        # what was begun here got nowhere, and may have been begun with other options
        for name in (STATS, MANIFEST):
            (out / name).unlink(missing_ok=True)
        for name in ("samples", "logs", CHECKPOINTS, BEST):
            shutil.rmtree(out / name, ignore_errors=True)
    if not is_finished(out):
        write_text(out / TRAIN_FILE, train.to_yaml())


def make_accelerator(train: Train) -> Any:
    """accelerate's view of processes and devices, in the precision asked for.

    If none is: in the one that accelerate is configured for, or in the fastest one of the device.

    Raises `FifaError` where this process has computed in another precision before, and for one
    that is not known here, or that the device does not compute in.
    """
    accelerate: Any = require("accelerate", "train")
    handlers = [
        accelerate.InitProcessGroupKwargs(timeout=WAIT),
        # a joint attention's last block has weights whose output nobody reads
        accelerate.DistributedDataParallelKwargs(find_unused_parameters=True),
    ]
    processor = train.device == "cpu" or not torch.cuda.is_available()
    # `accelerate launch` says "no" where nobody has chosen
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if train.dtype is None and configured not in DTYPES:
        raise FifaError(f"accelerate is configured for {configured}", do="give --dtype")
    best = best_dtype("cpu" if processor else "cuda")
    dtype = train.dtype or (best if configured == "no" else DTYPES[configured])
    if dtype == "float16" and (train.device == "cpu" or best_device() == "cpu"):
        # accelerate takes it, and computes in whatever types the weights are in
        raise FifaError(
            "a processor does not train in float16", do="--dtype bfloat16 or float32, or a GPU"
        )
    try:
        return accelerate.Accelerator(
            mixed_precision=PRECISIONS[dtype],
            cpu=train.device == "cpu",
            kwargs_handlers=handlers,
        )
    except ValueError as error:
        raise FifaError(
            f"accelerate refuses: {str(error).splitlines()[0]}",
            do="a process can train with one dtype only: start a new process",
        ) from error


def make_job(train: Train, out: Path, accelerator: Any, why: str = "") -> Job:
    """Read the pairs, check the model's folder, and plan; no network is loaded yet.

    ``why`` is the reason for the loss, where it was chosen here.
    """
    pairs = with_labels(train, read_training(train))
    taught, held = split_pairs(pairs.caption, train)
    if train.stop and not held:
        raise FifaError(
            "--stop looks at held-out pairs, and none are held out",
            where=train.source,
            do="hold out a share of the prompts: --holdout 0.2",
        )
    check_optimizer(train)
    check_share(train, accelerator.num_processes)
    check_order(train, pairs.margin)
    dtype = DTYPES.get(accelerator.mixed_precision, "float32")
    # sharding wants weights of one type; otherwise what is frozen may be halved
    sharded = str(accelerator.distributed_type).endswith("FSDP")
    weights = dtype if train.method == "lora" and not sharded else "float32"
    device = accelerator.device
    with accelerator.main_process_first():  # what is converted is converted by one
        model = assembled(train.model, train)
    kept = train.quantize or (OFFLOAD if train.offload else None)
    backbone = load_backbone(model, device=device, dtype=weights, compute=dtype, kept=kept)
    check_kept(train, backbone, sharded)
    resolution = train.resolution or native_resolution(backbone)
    buckets = backbone.family.buckets if train.buckets is None else train.buckets
    Resize(resolution, backbone.pixels_per_latent, buckets)  # says what does not fit
    backbone.rehearse(resolution)
    shards = accelerator.num_processes if sharded else 1
    used = sorted([*held, *(taught[row] for row in presented(train, len(taught)))])
    some = pairs if len(used) == len(pairs) else pairs.take(used)
    latents, prompts = cache_bytes(some, backbone, resolution, train.cache_dtype)
    release_memory()  # what this process scored or trained with before takes none away
    plan = Plan(
        train,
        pairs=len(taught),
        held=len(held),
        dropped=pairs.dropped,
        processes=accelerator.num_processes,
        resolution=resolution,
        buckets=buckets,
        dtype=dtype,
        latents=latents * (1 + train.flips),
        prompts=prompts * train.cache_prompts,
        memory=memory_of(train, backbone, resolution, dtype, shards),
        device=device,
        free=free_bytes(device),
        why=why,
        distilled=backbone.family.distilled_title(backbone.folder),
        init_lora=content_digest(find_lora(train.init_lora)) if train.init_lora else None,
        what=pairs.what,
    )
    run = local(train.source)
    # trainings on a run share its cache, unless it would not reach the store that they are in
    of_run = pairs.folder == run / "subset" and (is_written(run) or not is_written(out))
    cache = run / "train" if of_run else out / "cache"
    return Job(train, accelerator, pairs, backbone, plan, taught, held, used, cache)


def check_kept(train: Train, backbone: Backbone, sharded: bool) -> None:
    """Raise `FifaError` where the base's weights cannot be trained, or kept as asked for."""
    where, there = str(backbone.folder / backbone.family.part), backbone.origin.quantized
    if there and train.method == "full":
        raise FifaError("quantised weights cannot be trained", where=where, do="--method lora")
    if there and not train.quantize and (train.offload or train.sample_every):
        raise FifaError(
            "a quantised base is neither offloaded nor sampled from",
            where=where,
            do="leave out --offload and --sample-every",
        )
    if there == "int8" and train.draws:
        raise FifaError(
            "in 8 bits a prediction depends on what else is in its batch, so the reference's "
            "errors cannot be known beforehand",
            where=where,
            do="leave out --draws, or take --quantize nf4",
        )
    if there and "quantization_config" in backbone.settings and train.quantize:
        raise FifaError("the weights are quantised already", where=where, do="leave out --quantize")
    if (there or train.offload) and sharded:
        raise FifaError("a quantised or offloaded base cannot be sharded", do="start without FSDP")
    if train.offload and backbone.family.part == "unet":
        raise FifaError(
            "only a transformer's blocks are offloaded", where=where, do="leave out --offload"
        )


def native_resolution(backbone: Backbone) -> int:
    """What the model was made for: 512 pixels a side for SD1.5, 1,024 for SDXL, SD3, FLUX."""
    side = backbone.settings.get("sample_size")
    if isinstance(side, list) and side and side == side[:1] * len(side):
        side = side[0]
    if "sample_size" not in backbone.settings:  # FLUX
        return 1024
    if not isinstance(side, int) or isinstance(side, bool) or not 0 < side <= MOST_LATENTS:
        raise FifaError(
            f"the model does not say what size it was made for: sample_size is {side!r}"[:200],
            where=str(backbone.folder / backbone.family.part),
            do="give --resolution",
        )
    return side * backbone.vae.factor


def check_share(train: Train, processes: int) -> None:
    """Raise `FifaError` for a batch that is too small for so many processes."""
    if train.batch < processes:
        raise FifaError(
            f"a batch of {train.batch:,} cannot be shared by {processes:,} processes",
            do="raise --batch, or start fewer processes",
        )


def make_source(job: Job) -> Source:
    """Where micro-batches come from: fills the cache, of which every process encodes its share."""
    train, accelerator = job.train, job.accelerator
    job.plan.check()
    if train.quantize or quantized_parts(job.backbone.folder):
        check_quantizer(accelerator.device)
    check_disk(job.cache, job.plan.latents, job.plan.prompts)
    n = len(job.pairs)
    some = job.pairs if len(job.used) == n else job.pairs.take(job.used)
    with executor_of(train.cluster) as executor:
        encoded = encode(
            some,
            job.backbone,
            job.cache,
            resolution=job.plan.resolution,
            buckets=job.plan.buckets,
            flips=train.flips,
            dtype=train.cache_dtype,
            prompts=train.cache_prompts,
            share=(accelerator.process_index, accelerator.num_processes),
            wait=accelerator.wait_for_everyone,
            executor=executor,
        )
    if some is not job.pairs:
        encoded = spread(encoded, job.used, n)
    job.backbone.drop_encoders(text=train.cache_prompts)
    device = accelerator.device
    source = Source(train, job.backbone, job.pairs, encoded, device, job.taught, job.held)
    return replace(source, ease=_ease(job, source))


def _ease(job: Job, source: Source) -> Sequence[float]:
    """How easy the pairs to train on are, where it counts; to be asked of the base."""
    if job.train.order == "random":
        return ()
    if job.train.order_by == "margin":
        ease = np.abs(job.pairs.margin[job.taught])
    else:
        scalars = precompute(
            source, job.taught, DRAWS, job.cache, job.plan.dtype, job.accelerator
        ).astype(float)
        # mean over draws of e(loser) - e(winner)
        ease = (scalars[..., 1] - scalars[..., 0]).mean(1)
    return list(map(float, ease))


def check_disk(cache: Path, latents: int, prompts: int) -> None:
    """Raise `FifaError` where the disk has no room for what the cache lacks of so many bytes."""
    there = sum(path.stat().st_size for path in cache.glob("*.safetensors"))
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free, need = shutil.disk_usage(place).free, latents + prompts - there
    if need > free:
        raise FifaError(
            f"too little disk: the cache needs about {size(need)}, {size(free)} are free",
            where=str(cache),
            do="another disk, a smaller --resolution, or --no-cache-prompts, which encodes them "
            f"again and again (they are {size(prompts)} of it)",
        )


def make_reference(job: Job, source: Source) -> Reference | None:
    """What knows the reference's errors; to be made while the denoiser is the base.

    None for a loss that needs none, unless a pool of draws was asked for.
    """
    train, accelerator = job.train, job.accelerator
    if train.draws:
        held = set(job.held)
        rows = [row for row in job.used if row not in held]
        return _table(job, source, rows, range(train.draws))
    if not LOSSES[train.loss].needs_reference:
        return None
    if train.method == "full":
        return frozen_copy(job.backbone, accelerator.autocast)
    return adapters_off(job.backbone, accelerator.unwrap_model)


def make_holdout(job: Job, source: Source, judge: Train | None = None) -> Holdout:
    """What measures held-out pairs, by ``judge`` or by the training's own loss and beta.

    To be made while the denoiser is the base.
    """
    train, reference = judge or job.train, None
    if source.held and LOSSES[train.loss].needs_reference:
        if job.backbone.origin.quantized == "int8":  # as `check_kept` says
            reference = _base_of(job)
        else:
            reference = _table(job, source, source.held, DRAWS)
    every = steps_between(train, job.plan.steps, len(source.held))
    return Holdout(train, source, source.held, reference, every)


def _base_of(job: Job) -> Reference:
    """The base by its adapters off, on one process whatever the others do."""
    unwrap = job.accelerator.unwrap_model

    def reference(batch: Batch) -> tuple[Tensor, Tensor | None]:
        own = job.backbone.with_denoiser(unwrap(job.backbone.denoiser))
        return adapters_off(own, unwrap)(batch)

    return reference


def _table(job: Job, source: Source, rows: Sequence[int], draws: Sequence[int]) -> Reference:
    scalars = precompute(source, rows, draws, job.cache, job.plan.dtype, job.accelerator)
    return table(scalars, rows, draws, job.accelerator.device)
