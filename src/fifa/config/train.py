"""Training, and the settings that were published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from fifa.config.cluster import Cluster
from fifa.config.knobs import (
    Count,
    CountOrZero,
    Dtype,
    NotNegative,
    Option,
    Positive,
    Share,
    Shared,
    knobs,
)
from fifa.errors import FifaError

# In the folder of a training: these knobs, the metrics, and what is written last
TRAIN_FILE, STATS, FACTS_FILE = "train.yaml", "stats.jsonl", "train.json"


@knobs
class Train(Shared):
    """A training of a diffusion model.

    Parameters
    ----------
    source
        The pairs: a run folder, a subset, or Parquet files in diffusers' schema; for the loss
        ``kto`` also Parquet files with one rated image a row.
    model
        The model to train: a folder in diffusers' layout, a hub id, or a single ``.safetensors``
        file in its authors' layout.
    resolution
        Side of the training images in pixels (with buckets: of a square of the same area); if not
        given, the model's own resolution.
    buckets
        Sort images into buckets by their aspect ratio, or crop them to a square; if not given, what
        the model family was trained on.
    flips
        Mirror both images of a pair, in half of the steps.
    cache_dtype
        Precision of the cached latents and embeddings.
    cache_prompts
        Keep the embeddings of prompts on disk. Without, each prompt is encoded whenever it is
        used, and the text encoders stay in memory.
    prompt_dropout
        Share of the presentations in which a pair has an empty prompt.
    method
        ``lora`` trains adapters, ``full`` trains all weights of the UNet or transformer.
    rank
        Rank of the LoRA.
    alpha
        Alpha of the LoRA; if not given, its rank.
    targets
        A module that gets an adapter; if not given, the model's attention layers.
    lora_dropout
        Dropout of the adapters' inputs, the only thing drawn that depends on the micro-batch.
    quantize
        Keep the frozen base in 4 (``nf4``) or 8 bits (``int8``) by bitsandbytes; the reference is
        the same quantised base.
    offload
        Keep the blocks of a frozen transformer in CPU memory, each on the device while it computes;
        activations are then computed twice.
    loss
        The loss: ``sigmoid`` is Diffusion-DPO; docs/training.md has the formulas of all. ``auto``
        takes ``poly`` or ``sigmoid``, by how many labels are wrong as far as the run can tell.
    beta
        How strongly the model is kept close to the base model. Other trainers define beta in other
        ways: docs/training.md converts them.
    poly
        The factor a of Poly-DPO (loss ``poly``); of the loss ``auto`` the largest one.
    mapo
        Weight of MaPO's ratio term (loss ``mapo``).
    beta_target
        Lower beta, step by step, until the logits are of this size in the mean (1.4: pairs have a
        fifth of the gradient that they begin with); if not given, beta stays as it is.
    sdpo
        Scale the gradient of the rejected image down where it would make the preferred one worse
        (Diffusion-SDPO): the share of the preferred image's own gain that has to stay, such as 0.9;
        if not given, it is not scaled.
    dpop
        Weight of the penalty for a preferred image that the model denoises worse than the base
        model does (DPO-Positive).
    sft
        Weight of the supervised term (SFT), the denoising error on the preferred image, which is
        added to the loss.
    weights
        Multiply the loss of each pair by its weight in the subset.
    good_from
        Of images that were rated one by one (loss ``kto``): the rating from which on an image is
        good; the others are bad. If not given, the source's labels say it.
    good_share
        Of such images: the share of the loss that the good ones have, however many there are.
    label
        The soft labels of the losses ``soft`` and ``smpo``: ``people`` takes the share of votes,
        ``margin`` takes sigmoid(label_scale * signed margin), ``blend`` joins the votes with the
        calibrated probability of the margin.
    label_scale
        Factor of the margin in a soft label.
    label_votes
        How many votes the margin is worth in ``blend``.
    weigh_labels
        Multiply the loss of each pair by the probability that its label is right, by its margin and
        the share of wrong labels.
    holdout
        Share of the pairs that are held out, by prompt: measured, and not trained on. If not given,
        0.05 from 200 pairs on.
    validate_every
        Steps between two measurements on held-out pairs; if not given, a tenth of the training, or
        more where measuring would take over a twentieth of its time (not with ``stop``).
    stop
        End the training when held-out pairs get worse.
    patience
        Measurements in a row without a lower loss on held-out pairs, after which ``stop`` ends it.
    displacement
        By how much of the reference's error the policy's may be above it on the preferred images of
        held-out pairs, before ``stop`` ends it.
    order
        The order of the pairs: ``random``; ``easy-first`` or ``hard-first`` in every epoch; or
        ``stages:N``, which begins with the easiest Nth and adds another in every Nth of the
        training.
    order_by
        What makes a pair easy: a large ``margin`` in the subset, whichever image it is for, or the
        ``implicit`` reward, by how much less error the base model makes on the preferred image.
    time
        How noise levels are distributed: ``uniform``, ``logit-normal`` (mostly middle ones, as in
        Stable Diffusion 3), or ``snr`` (as min-SNR weighs them); if not given, as the model's
        family was trained.
    time_range
        The lowest and the highest noise level, from 0 (the image) to 1 (noise alone).
    draws
        Size of the noise pool: 0 draws new noise and a new timestep at every step. With D > 0 each
        pair has a fixed pool of D of them, and the reference model's errors on the pool are
        computed once, before the training.
    batch
        Pairs per step, over all processes and micro-batches.
    micro_batch
        Pairs per forward and backward pass; if not given, as many as the device has memory for.
    steps
        Training steps; by default from --epochs.
    epochs
        Passes over all pairs, if no steps are given.
    optimizer
        The optimiser; ``adamw8bit`` needs bitsandbytes.
    schedule
        The learning rate after the warm-up: ``linear`` and ``cosine`` fall to 0.
    warmup
        Steps of linear warm-up.
    weight_decay
        Weight decay of the optimiser.
    beta1
        First beta of AdamW.
    beta2
        Second beta of AdamW.
    epsilon
        Epsilon of AdamW.
    clip
        Largest norm of the gradient; 0 turns clipping off. Adafactor clips by itself.
    ema
        Decay of the moving average of the weights (EMA). If it is not 0, the average is what is
        written.
    seed
        Seed for everything that is random.
    device
        Only ``cpu`` can be chosen here; if not given, accelerate chooses the device.
    dtype
        Precision of the training: ``float32``, or ``bfloat16`` or ``float16`` under autocast; if
        not given, what accelerate is configured for, else ``bfloat16`` on a CUDA device that has
        it and ``float32`` elsewhere.
    compile
        Compile the blocks that the denoiser repeats (``torch.compile``).
    gradient_checkpointing
        Save memory: compute activations a second time in the backward pass; if not given, only
        where not even one pair fits otherwise.
    tracker
        Where metrics are sent, besides ``stats.jsonl``.
    log_every
        Steps between two lines of metrics.
    save_every
        Steps between two saved states. A stopped training continues from the last one.
    checkpoint_every
        Steps between two checkpoints; 0 keeps only the final weights.
    sample_every
        Steps between two sheets of sample images; 0: no samples.
    sample_prompts
        A prompt for the sample images; if not given, the first four prompts of the pairs.
    sample_steps
        Denoising steps of a sample image.
    cluster
        Who encodes images and prompts before the first step.
    """

    source: Annotated[str, Option(argument=True, required=True)] = ""
    model: Annotated[str, Option(required=True)] = ""
    parts: str | None = None
    variant: str | None = None
    vae: str | None = None
    init_lora: str | None = None
    resolution: Count | None = None
    buckets: Annotated[bool | None, Option("--buckets/--crop", family="buckets")] = None
    flips: bool = False
    cache_dtype: Dtype = "float16"
    cache_prompts: bool = True
    prompt_dropout: Share = 0.0
    method: Literal["lora", "full"] = "lora"
    rank: Count = 8
    alpha: Positive | None = None
    targets: Annotated[tuple[str, ...], Option("--target")] = ()
    lora_dropout: Share = 0.0
    quantize: Literal["nf4", "int8"] | None = None
    offload: bool = False
    loss: Literal["sigmoid", "ipo", "hinge", "mapo", "poly", "soft", "smpo", "kto", "auto"] = (
        "sigmoid"
    )
    beta: Positive = 5000.0
    beta_target: Positive | None = None
    sdpo: Share | None = None
    dpop: NotNegative = 0.0
    poly: NotNegative = 8.0
    mapo: NotNegative = 0.1
    sft: NotNegative = 0.0
    weights: bool = True
    good_from: float | None = None
    good_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    label: Literal["people", "margin", "blend"] = "people"
    label_scale: Positive = 1.0
    label_votes: Positive = 1.0
    weigh_labels: bool = False
    holdout: Annotated[float, Field(ge=0, lt=1)] | None = None
    validate_every: Count | None = None
    stop: bool = False
    patience: Count = 3
    displacement: NotNegative = 0.02
    order: Annotated[str, Field(pattern=r"^(random|easy-first|hard-first|stages:[1-9]\d*)$")] = (
        "random"
    )
    order_by: Literal["margin", "implicit"] = "margin"
    time: Literal["uniform", "logit-normal", "snr"] | None = None
    time_range: tuple[Share, Share] = (0.0, 1.0)
    draws: CountOrZero = 0
    batch: Count = 32
    micro_batch: Count | None = None
    steps: Count | None = None
    epochs: Positive = 10.0
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    lr: Positive = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: CountOrZero = 0
    weight_decay: NotNegative = 0.01
    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: Positive = 1e-8
    clip: NotNegative = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: int = 0
    device: Literal["cpu"] | None = None
    dtype: Dtype | None = None
    compile: bool = False
    channels_last: Annotated[bool, Option("--channels-last/--channels-first")] = False
    gradient_checkpointing: bool | None = None
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    log_every: Count = 1
    save_every: Count = 100
    checkpoint_every: CountOrZero = 0
    sample_every: CountOrZero = 0
    sample_prompts: Annotated[tuple[str, ...], Option("--sample-prompt")] = ()
    sample_steps: Count = 25
    cluster: Cluster = Cluster()

    def __post_init__(self) -> None:
        if (self.quantize or self.offload) and (self.method == "full" or self.sample_every):
            raise FifaError(
                "quantize and offload are for a base that is frozen, and makes no samples",
                do="--method lora, and --sample-every 0",
            )
        if self.offload and (self.quantize or self.gradient_checkpointing is False):
            raise FifaError(
                "offload goes neither with quantize nor without gradient checkpointing",
                do="leave one of them out",
            )
        for given, name, losses in (
            (self.beta_target, "beta_target", ("ipo", "mapo")),
            (self.dpop, "dpop", ("mapo",)),
        ):
            if given and self.loss in losses:
                raise FifaError(
                    f"{name} does nothing for the loss {self.loss}", do="leave one of them out"
                )
        if self.label != "people" and self.loss not in ("soft", "smpo"):
            raise FifaError(
                f"the loss {self.loss} reads no soft label",
                do=f"take --loss soft or smpo with --label {self.label}, or leave it out",
            )
        low, high = self.time_range
        if not low < high:
            raise FifaError(
                f"no noise level is in a time range of {low:g}:{high:g}",
                do="0 to 1, the lower one first, such as 0.2:0.9",
            )

    def steps_of(self, pairs: int) -> int:
        """How many steps the training takes on so many pairs."""
        return self.steps or max(1, round(self.epochs * pairs / self.batch))


def paper_sd15() -> Train:
    """Diffusion-DPO on SD1.5, as its authors trained it.

    From Salesforce's ``launchers/sd15.sh`` and ``train.py`` (github.com/SalesforceAIResearch/
    DiffusionDPO): beta 5,000; lr 1e-8 scaled by the batch of 2,048 pairs; 2,000 steps, 500 of
    them warm-up, then constant; AdamW (0.9, 0.999), weight decay 0.01, gradients clipped at 1;
    every fifth prompt empty; half of the images mirrored (both of a pair alike here); all
    weights; half precision, bf16 for their fp16.
    """
    return Train(
        buckets=False,
        method="full",
        loss="sigmoid",
        beta=5000.0,
        lr=1e-8 * 2048,
        batch=2048,
        steps=2000,
        schedule="constant",
        warmup=500,
        optimizer="adamw",
        weight_decay=0.01,
        clip=1.0,
        prompt_dropout=0.2,
        flips=True,
        resolution=512,
        dtype="bfloat16",
        save_every=100,
        checkpoint_every=500,
    )


def paper_sdxl() -> Train:
    """Diffusion-DPO on SDXL, as its authors trained it.

    From ``launchers/sdxl.sh`` and ``train.py`` (see `paper_sd15`): 200 steps of warm-up of 2,000
    (a comment there gives 30 hours for 200 steps), Adafactor without relative steps, gradient
    checkpointing, 1,024 pixels, the rest as for SD1.5. Sizes and crops are each image's own, where
    theirs are the constant resolution.
    """
    return replace(
        paper_sd15(),
        warmup=200,
        optimizer="adafactor",
        gradient_checkpointing=True,
        resolution=1024,
        checkpoint_every=200,
    )


def lora_small() -> Train:
    """A LoRA on a few hundred to a few thousand pairs, on one GPU.

    From the command in diffusers' ``examples/research_projects/diffusion_dpo/README.md``: rank 8
    with alpha 8, lr 1e-5, constant, batch 32 (16 x 2 accumulated), beta 2,500 of its convention,
    which is our 5,000. Its 10,000 steps and 8-bit AdamW are not taken over: a small subset
    takes ten epochs, and adapters' states are small.
    """
    return Train(
        method="lora",
        rank=8,
        alpha=8.0,
        loss="sigmoid",
        beta=5000.0,
        lr=1e-5,
        batch=32,
        epochs=10.0,
        schedule="constant",
        optimizer="adamw",
    )


PRESETS: dict[str, Callable[[], Train]] = {
    "paper-sd15": paper_sd15,
    "paper-sdxl": paper_sdxl,
    "lora-small": lora_small,
}


def preset(name: str) -> Train:
    """The preset called ``name``; `FifaError` if there is none."""
    if name not in PRESETS:
        raise FifaError(f"no such preset: {name}", do=", ".join(PRESETS))
    return PRESETS[name]()
