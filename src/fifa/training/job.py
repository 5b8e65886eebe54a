"""A training from its source to its weights: read, plan, encode, reference, loop, card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from fifa.config import Train
from fifa.console import echo
from fifa.errors import FifaError
from fifa.models.memory import free_bytes
from fifa.models.optional import require
from fifa.training.adapters import add_lora, train_all
from fifa.training.backbones import Backbone, load_backbone
from fifa.training.batches import Source
from fifa.training.cache import cache_bytes, encode
from fifa.training.card import write_card
from fifa.training.checkpoint import CHECKPOINTS, TrainState, step_name
from fifa.training.folder import check_folder, is_finished, start_folder
from fifa.training.loop import Loop
from fifa.training.losses import LOSSES
from fifa.training.optim import Average, make_optimizer
from fifa.training.pairs import read_training_pairs
from fifa.training.plan import Plan, memory_of_model
from fifa.training.reference import AdaptersOff, FrozenCopy, Reference, Table, precompute
from fifa.training.samples import Samples

WAIT = timedelta(days=2)  # of processes, for the slowest one to fill the cache
PRECISIONS = {None: None, "float32": "no", "bfloat16": "bf16", "float16": "fp16"}
DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Job:
    """What is at hand before anything is trained.

    Parameters
    ----------
    train, out
        The training and its folder.
    accelerator
        accelerate's view of processes, devices and precision.
    pairs, backbone, plan
        What is trained on, what is trained, what it will take.
    cache
        The folder of latents, embeddings and the reference's scalars.
    encoded
        `fifa.training.cache.Encoded`, once there is one.
    """

    train: Train
    out: Path
    accelerator: Any
    pairs: Any
    backbone: Backbone
    plan: Plan
    cache: Path
    encoded: Any = None

    @property
    def source(self) -> Source:
        """Where micro-batches come from."""
        device = self.accelerator.device
        return Source(self.train, self.backbone, self.pairs, self.encoded, device)


def run_training(train: Train, out: str | Path) -> Path:
    """Train, or go on with the training that is in ``out``; returns ``out``.

    Raises
    ------
    FifaError
        For whatever a person can mend; what was done until then is kept.
    """
    out = Path(out)
    accelerator = make_accelerator(train)
    if accelerator.is_main_process:
        start_folder(train, out)
    accelerator.wait_for_everyone()
    if is_finished(out):
        if accelerator.is_main_process:
            echo(f"this training is finished: {out}")
        return out
    job = encode_job(make_job(train, out, accelerator))
    samples = Samples(train, job.backbone, job.pairs.caption, out, accelerator, job.plan.resolution)
    samples.base()
    reference = make_reference(job)
    state = make_state(job)
    loop = Loop(
        train=train,
        steps=job.plan.steps,
        out=out,
        source=job.source,
        reference=reference,
        state=state,
        checkpoint=lambda step: state.export(
            train, job.backbone, out / CHECKPOINTS / step_name(step)
        ),
        sample=lambda step: samples.draw(step, state),
    )
    try:
        done = loop.run()
    except torch.cuda.OutOfMemoryError as error:
        raise FifaError(
            f"out of memory: {str(error).splitlines()[0]}",
            where=str(accelerator.device),
            do="--micro-batch 1, --gradient-checkpointing or --dtype bfloat16; the same command "
            "continues from the newest state",
        ) from error
    state.export(train, job.backbone, out)
    if accelerator.is_main_process:  # last, as its train.json says that all is there
        write_card(train, job.plan, job.backbone.family, job.pairs, done, accelerator.device, out)
        echo(f"trained {done.step:,} steps on {len(job.pairs):,} pairs; weights in {out}")
    accelerator.wait_for_everyone()
    return out


def plan_training(train: Train, out: str | Path) -> Plan:
    """What `run_training` would do: reads the pairs and loads the model, writes nothing."""
    check_folder(train, Path(out))
    return make_job(train, Path(out), make_accelerator(train), device="cpu").plan


def make_accelerator(train: Train) -> Any:
    """accelerate's view of processes and devices, in the precision asked for.

    Raises `FifaError` where this process has computed in another precision before.
    """
    accelerate: Any = require("accelerate", "train")
    handlers = [
        accelerate.InitProcessGroupKwargs(timeout=WAIT),
        # a joint attention's last block has weights whose output nobody reads
        accelerate.DistributedDataParallelKwargs(find_unused_parameters=True),
    ]
    try:
        return accelerate.Accelerator(
            mixed_precision=PRECISIONS[train.dtype],
            cpu=train.device == "cpu",
            kwargs_handlers=handlers,
        )
    except ValueError as error:
        raise FifaError(
            f"accelerate refuses: {str(error).splitlines()[0]}",
            do="a process can train with one dtype only: start a new process",
        ) from error


def make_job(train: Train, out: Path, accelerator: Any, device: Any = None) -> Job:
    """Read the pairs, check folder and memory, load the model (on ``device``, if one is given)."""
    pairs = read_training_pairs(train.source)
    check_pairs(train, pairs, accelerator.num_processes)
    dtype = DTYPES.get(accelerator.mixed_precision, "float32")
    # sharding wants weights of one type; otherwise what is frozen may be halved
    halved = train.method == "lora" and not str(accelerator.distributed_type).endswith("FSDP")
    weights = dtype if halved else "float32"
    memory, free = memory_of_model(train, weights), free_bytes(accelerator.device)
    if device is None:
        memory.check(free, str(accelerator.device))
    backbone = load_backbone(train.model, device=device or accelerator.device, dtype=weights)
    resolution = train.resolution or native_resolution(backbone)
    plan = Plan(
        train,
        pairs=len(pairs),
        dropped=pairs.dropped,
        processes=accelerator.num_processes,
        resolution=resolution,
        dtype=dtype,
        cache=cache_bytes(pairs, backbone, resolution, train.cache_dtype) * (1 + train.flips),
        memory=memory,
        free=free,
    )
    run = Path(train.source).expanduser()
    cache = run / "train" if pairs.folder == run / "subset" else out / "cache"
    return Job(train, out, accelerator, pairs, backbone, plan, cache)


def check_pairs(train: Train, pairs: Any, processes: int) -> None:
    """Raise `FifaError` for pairs that this training cannot use."""
    if train.batch < processes:
        raise FifaError(
            f"a batch of {train.batch:,} cannot be shared by {processes:,} processes",
            do="raise --batch, or start fewer processes",
        )
    if train.label == "margin" and LOSSES[train.loss].reads_label:
        missing = int((pairs.margin != pairs.margin).sum())
        if missing:
            raise FifaError(
                f"{missing:,} of {len(pairs):,} pairs have no margin to make a soft label of",
                where=train.source,
                do="train on a subset that `fifa export` wrote, or with --label people",
            )


def native_resolution(backbone: Backbone) -> int:
    """Pixels a side that the model was made for: 512 for SD1.5, 1,024 for SDXL, SD3, FLUX."""
    config: Any = backbone.denoiser.config
    side = config.get("sample_size")
    return side * backbone.vae.factor if isinstance(side, int) else 1024


def encode_job(job: Job) -> Job:
    """The job with its cache filled; every process encodes its share."""
    train, accelerator = job.train, job.accelerator
    if accelerator.is_main_process:
        echo(str(job.plan))
    encoded = encode(
        job.pairs,
        job.backbone,
        job.cache,
        resolution=job.plan.resolution,
        buckets=train.buckets,
        flips=train.flips,
        dtype=train.cache_dtype,
        share=(accelerator.process_index, accelerator.num_processes),
        wait=accelerator.wait_for_everyone,
    )
    job.backbone.drop_encoders()
    return replace(job, encoded=encoded)


def make_reference(job: Job) -> Reference | None:
    """What knows the reference's errors; to be made while the denoiser is the base.

    None for a loss that needs none, unless a pool of draws was asked for.
    """
    train, accelerator = job.train, job.accelerator
    if train.draws:
        scalars = precompute(job.source, job.cache, job.plan.dtype, accelerator)
        return Table(scalars, accelerator.device)
    if not LOSSES[train.loss].needs_reference:
        return None
    if train.method == "full":
        return FrozenCopy(job.backbone, accelerator.autocast)
    return AdaptersOff(job.backbone, accelerator.unwrap_model)


def make_state(job: Job) -> TrainState:
    """The denoiser as it is trained: adapters in, laid out, compiled, wrapped by accelerate."""
    train, backbone, accelerator = job.train, job.backbone, job.accelerator
    learned = add_lora(backbone, train) if train.method == "lora" else train_all(backbone)
    model: Any = backbone.denoiser
    if train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if train.channels_last:
        model.to(memory_format=torch.channels_last)
    if train.compile:
        model.compile()
    optimizer = make_optimizer(train, learned, accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    backbone.denoiser = model
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = Average(learned, train.ema) if train.ema else None
    return TrainState(accelerator, model, optimizer, average)
