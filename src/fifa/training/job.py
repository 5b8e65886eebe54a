"""A training from its source to its weights: read, plan, encode, reference, loop, card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from fifa.config import Train
from fifa.console import echo
from fifa.errors import FifaError
from fifa.models.hub import CONFIG_AND_WEIGHTS, model_digest
from fifa.models.optional import require
from fifa.training.adapters import add_lora, train_all
from fifa.training.backbones import Backbone, load_backbone
from fifa.training.batches import Source
from fifa.training.checkpoint import CHECKPOINTS, Trainee, step_name
from fifa.training.folder import check_folder, is_finished, start_folder
from fifa.training.loop import Loop
from fifa.training.optim import Average, make_optimizer
from fifa.training.output import finish, write_weights
from fifa.training.plan import Plan, check_memory, make_plan, memory_of_model
from fifa.training.reference import (
    AdaptersOff,
    FrozenCopy,
    Reference,
    Table,
    precompute,
    scalars_path,
)
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
    trainee = make_trainee(job)
    loop = Loop(
        train=train,
        steps=job.plan.steps,
        out=out,
        source=job.source,
        reference=reference,
        trainee=trainee,
        checkpoint=lambda step: write_weights(job, trainee, out / CHECKPOINTS / step_name(step)),
        sample=lambda step: samples.draw(step, trainee),
    )
    try:
        done = loop.run()
    except require("torch", "train").cuda.OutOfMemoryError as error:
        raise FifaError(
            f"out of memory: {str(error).splitlines()[0]}",
            where=str(accelerator.device),
            do="--micro-batch 1, --gradient-checkpointing or --dtype bfloat16; the same command "
            "goes on from the newest state",
        ) from error
    finish(job, trainee, done)
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
            do="a process trains in one precision: start a new one",
        ) from error


def make_job(train: Train, out: Path, accelerator: Any, device: Any = None) -> Job:
    """Read the pairs, check folder and memory, load the model."""
    from fifa.training.cache import cache_bytes
    from fifa.training.pairs import read_training_pairs

    pairs = read_training_pairs(train.source)
    check_pairs(train, pairs, accelerator.num_processes)
    dtype = DTYPES.get(accelerator.mixed_precision, "float32")
    # sharding wants weights of one kind; otherwise what is frozen may be halved
    halved = train.method == "lora" and not str(accelerator.distributed_type).endswith("FSDP")
    memory, free = memory_of_model(train, dtype if halved else "float32", accelerator)
    if device is None:
        check_memory(memory, free, str(accelerator.device))
    backbone = load_backbone(
        train.model,
        device=device or accelerator.device,
        dtype=dtype if halved else "float32",
    )
    resolution = train.resolution or native_resolution(backbone)
    cached = cache_bytes(pairs, backbone, resolution, train.cache_dtype)
    plan = make_plan(
        train,
        pairs=pairs,
        processes=accelerator.num_processes,
        resolution=resolution,
        cache=cached * (2 if train.flips else 1),
        memory=memory,
        free=free,
        dtype=dtype,
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
    if train.label == "margin" and train.loss in ("soft", "smpo"):
        margin = getattr(pairs, "margin", None)
        missing = len(pairs) if margin is None else int((margin != margin).sum())
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
    from fifa.training.cache import encode

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

    None for MaPO, which needs none, unless a pool of draws was asked for.
    """
    train, accelerator = job.train, job.accelerator
    if train.draws:
        parts = (job.backbone.family.part, "scheduler")
        base = [model_digest(job.backbone.folder / part, CONFIG_AND_WEIGHTS) for part in parts]
        path = scalars_path(job.source, job.cache, base, job.plan.dtype)
        return Table(precompute(job.source, path, accelerator), accelerator.device)
    if train.loss == "mapo":
        return None
    if train.method == "full":
        return FrozenCopy(job.backbone, accelerator.autocast)
    return AdaptersOff(job.backbone, accelerator.unwrap_model)


def make_trainee(job: Job) -> Trainee:
    """The denoiser as it is trained: adapters in, laid out, compiled, wrapped by accelerate."""
    train, backbone, accelerator = job.train, job.backbone, job.accelerator
    torch = require("torch", "train")
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
    return Trainee(accelerator, model, optimizer, average)
