"""The families of diffusion models that can be trained and sampled: one row each.

Adding a family is a row in `FAMILIES` and the file ``fifa/training/backbones/<name>.py`` with the
class that the row names. What is fetched from the hub, what a training counts and writes, the
defaults of an evaluation and the texts about them are all read from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.shards.files import read_json


@dataclass(frozen=True)
class Distilled:
    """The variant of a family that was distilled to few steps and no guidance.

    Parameters
    ----------
    title
        What people call it.
    file, setting, values
        The file of the model's folder that tells it, its setting, and the values of it (None:
        lacking) that this variant has.
    steps
        How many it is sampled in.
    """

    title: str
    file: str
    setting: str
    values: tuple[Any, ...]
    steps: int


@dataclass(frozen=True)
class Activations:
    """What computing takes beside weights: bytes in a 16-bit type; float32 takes twice as much.

    Of the model as published and of a LoRA, found by ``scripts/measure_memory.py`` on an H100.

    Parameters
    ----------
    numbers
        In the weights of the denoiser that was measured.
    fixed
        Whatever the batch.
    pair
        A pair, forward and backward, for each of a latent's pixels (h times w).
    pair_checkpointed
        The same with gradient checkpointing.
    vae
        Each pixel of an image that is encoded.
    prompt
        A prompt that is encoded.
    """

    numbers: int
    fixed: int
    pair: int
    pair_checkpointed: int
    vae: int
    prompt: int


@dataclass(frozen=True)
class Family:
    """One family of latent diffusion models.

    Parameters
    ----------
    name
        Its short name, and its file in ``fifa/training/backbones``.
    title
        What people call it.
    pipeline
        The class of its pipeline in diffusers, as ``model_index.json`` names it.
    backbone
        The class in its file.
    denoiser
        The class, in diffusers, of what is trained.
    part
        The denoiser's folder, and the prefix of its keys in a LoRA file.
    parts
        All folders that a model needs.
    schedule
        How noise is added: ``diffusion`` (the model's own betas; it predicts the noise or v, as
        its scheduler says) or ``flow`` (rectified flow; it predicts ``noise - latents``).
    targets
        The modules that get an adapter unless others are named, by the end of their names.
    steps, guidance
        What its pipeline is sampled with by default.
    half
        The 16-bit floating type that its weights bear.
    since
        The first version of diffusers that has its classes.
    vaes
        The classes, in diffusers, that its VAE may have.
    optional
        Folders that a model may lack.
    distilled
        Its distilled variant, if it has one.
    guide
        What its pipeline calls the guidance scale.
    negative
        The negative prompt without which its pipeline does not guide, if that is so.
    buckets
        Whether it was trained on images of many aspect ratios.
    half_vae
        Whether its VAE is exact enough in bfloat16, whatever its ``force_upcast`` says about
        float16.
    activations
        What computing takes beside the weights, if it was measured.
    joints
        Settings of the denoiser, each with those of other parts, ``PART.SETTING``, whose sum it is.
    requires
        Settings of the denoiser, each with the values that it may have, the usual one first.
    """

    name: str
    title: str
    pipeline: str
    backbone: str
    denoiser: str
    part: Literal["unet", "transformer"]
    parts: tuple[str, ...]
    schedule: Literal["diffusion", "flow"]
    targets: tuple[str, ...]
    steps: int
    guidance: float
    half: Literal["float16", "bfloat16"]
    since: str = "0.30"
    vaes: tuple[str, ...] = ("AutoencoderKL", "AutoencoderTiny")
    optional: tuple[str, ...] = ()
    distilled: Distilled | None = None
    guide: str = "guidance_scale"
    negative: str | None = None
    buckets: bool = False
    half_vae: bool = False
    activations: Activations | None = None
    joints: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def is_distilled(self, folder: Path) -> bool:
        """Whether a model is the family's distilled variant, as its settings say."""
        one = self.distilled
        if one is None:
            return False
        known = read_json(folder / one.file, "the model's settings", missing={})
        return known.get(one.setting) in one.values

    def distilled_title(self, folder: Path) -> str:
        """What a model is called if it is the distilled variant; else nothing."""
        return self.distilled.title if self.distilled and self.is_distilled(folder) else ""

    def sampling(self, folder: Path) -> tuple[int, float]:
        """Steps and guidance of a model."""
        if self.distilled is not None and self.is_distilled(folder):
            return self.distilled.steps, 0.0
        return self.steps, self.guidance

    def check_version(self) -> None:
        """Raise `FifaError` where diffusers is too old, or not there."""
        library = require("diffusers", "train")
        if self.pipeline not in dir(library):  # its names: to look is not to import
            raise FifaError(
                f"{self.title} needs diffusers {self.since}; {library.__version__} is installed",
                do=f"pip install -U 'diffusers>={self.since}'",
            )


# Of the VAE's activations a pixel: one encoder's architecture is in all of these.
VAE = 1_542
ONE_ENCODER = ("text_encoder", "tokenizer")
TWO_ENCODERS = (*ONE_ENCODER, "text_encoder_2", "tokenizer_2")
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
# of image and text tokens together
JOINT_ATTENTION = tuple(
    f"attn.{name}" for name in (*ATTENTION, "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
)

LATENT = ("vae.latent_channels",)
CHANNELS = {"in_channels": LATENT, "out_channels": LATENT}
NO_CLASSES = {"class_embed_type": (None,), "num_class_embeds": (None,)}
TEXTS = ("text_encoder", "text_encoder_2")
WIDTHS = tuple(f"{part}.hidden_size" for part in TEXTS)
PROJECTIONS = tuple(f"{part}.projection_dim" for part in TEXTS)

# Of both models with FLUX.2's transformer
FLUX2: Any = {
    "denoiser": "Flux2Transformer2DModel",
    "part": "transformer",
    "parts": ("transformer", "vae", *ONE_ENCODER, "scheduler"),
    "schedule": "flow",
    "targets": (*ATTENTION, "to_qkv_mlp_proj", "attn.to_out"),
    "half": "bfloat16",
    "half_vae": True,
    "buckets": True,
    "vaes": ("AutoencoderKLFlux2",),
    "joints": {
        "joint_attention_dim": WIDTHS[:1] * 3,
        "in_channels": LATENT * 4,  # of 2 x 2 patches
    },
    "requires": {"patch_size": (1, None)},
}

# buckets: SD was trained on squares; docs/families.md has the sources for the others.
# half_vae: SimpleTuner's VAEs compute in bfloat16 by default, but for SDXL's own (#394 there: take
# the fixed one). diffusers' scripts for SD, SD3 and FLUX give the VAE the training's 16-bit type,
# those for SDXL only if another VAE is named.
FAMILIES = (
    Family(
        name="sd",
        title="SD",
        pipeline="StableDiffusionPipeline",
        backbone="StableDiffusion",
        denoiser="UNet2DConditionModel",
        part="unet",
        parts=("unet", "vae", *ONE_ENCODER, "scheduler"),
        schedule="diffusion",
        targets=ATTENTION,
        steps=50,
        guidance=7.5,
        half="float16",
        half_vae=True,
        activations=Activations(
            numbers=859_520_964,
            fixed=20_116_480,
            pair=567_616,
            pair_checkpointed=132_684,
            vae=VAE,
            prompt=3_095_168,
        ),
        joints={"cross_attention_dim": WIDTHS[:1], **CHANNELS},
        requires={"addition_embed_type": (None, "text"), **NO_CLASSES},
    ),
    Family(
        name="sdxl",
        title="SDXL",
        pipeline="StableDiffusionXLPipeline",
        backbone="StableDiffusionXL",
        denoiser="UNet2DConditionModel",
        part="unet",
        parts=("unet", "vae", *TWO_ENCODERS, "scheduler"),
        schedule="diffusion",
        targets=ATTENTION,
        steps=50,
        guidance=5.0,
        half="float16",
        buckets=True,
        activations=Activations(
            numbers=2_567_463_684,
            fixed=7_648_768,
            pair=949_272,
            pair_checkpointed=88_010,
            vae=VAE,
            prompt=8_005_248,
        ),
        joints={
            "cross_attention_dim": WIDTHS,
            # the pooled prompt, and six numbers of sizes and crop
            "projection_class_embeddings_input_dim": (
                PROJECTIONS[1],
                *("unet.addition_time_embed_dim",) * 6,
            ),
            **CHANNELS,
        },
        requires={"addition_embed_type": ("text_time",), **NO_CLASSES},
    ),
    Family(
        name="sd3",
        title="SD3",
        pipeline="StableDiffusion3Pipeline",
        backbone="StableDiffusion3",
        denoiser="SD3Transformer2DModel",
        part="transformer",
        parts=("transformer", "vae", *TWO_ENCODERS, "scheduler"),
        optional=("text_encoder_3", "tokenizer_3"),
        schedule="flow",
        targets=JOINT_ATTENTION,
        steps=28,
        guidance=7.0,
        half="bfloat16",
        buckets=True,
        half_vae=True,
        activations=Activations(
            numbers=2_028_328_000,
            fixed=31_488_512,
            pair=653_595,
            pair_checkpointed=83_356,
            vae=VAE,
            prompt=113_264_640,
        ),
        joints={
            "joint_attention_dim": ("text_encoder_3.d_model",),
            "pooled_projection_dim": PROJECTIONS,
            **CHANNELS,
        },
    ),
    Family(
        name="flux",
        title="FLUX",
        pipeline="FluxPipeline",
        backbone="Flux",
        denoiser="FluxTransformer2DModel",
        part="transformer",
        parts=("transformer", "vae", *TWO_ENCODERS, "scheduler"),
        schedule="flow",
        targets=(
            *JOINT_ATTENTION,
            "ff.net.0.proj",
            "ff.net.2",
            "ff_context.net.0.proj",
            "ff_context.net.2",
        ),
        steps=28,
        guidance=3.5,
        half="bfloat16",
        buckets=True,
        half_vae=True,
        activations=Activations(
            numbers=11_901_408_320,
            fixed=6_120_448,
            pair=3_540_728,
            pair_checkpointed=298_021,
            vae=VAE,
            prompt=302_026_752,
        ),
        joints={
            "joint_attention_dim": ("text_encoder_2.d_model",),
            "pooled_projection_dim": WIDTHS[:1],
            "in_channels": LATENT * 4,  # of 2 x 2 patches
        },
        requires={"patch_size": (1, None)},
        distilled=Distilled(
            "FLUX schnell",
            "transformer/config.json",
            "guidance_embeds",
            (None, False),
            steps=4,
        ),
    ),
    Family(
        name="zimage",
        title="Z-Image",
        pipeline="ZImagePipeline",
        backbone="ZImage",
        denoiser="ZImageTransformer2DModel",
        part="transformer",
        parts=("transformer", "vae", *ONE_ENCODER, "scheduler"),
        schedule="flow",
        targets=ATTENTION,
        steps=50,
        guidance=5.0,
        half="bfloat16",
        buckets=True,
        half_vae=True,
        since="0.36",
        joints={"cap_feat_dim": WIDTHS[:1], "in_channels": LATENT},
        requires={"all_patch_size": ([2], None), "siglip_feat_dim": (None,)},
        # Both have one architecture; Z-Image itself has a shift of 6.
        distilled=Distilled(
            "Z-Image Turbo", "scheduler/scheduler_config.json", "shift", (3, 3.0), steps=8
        ),
    ),
    Family(
        name="qwenimage",
        title="Qwen-Image",
        pipeline="QwenImagePipeline",
        backbone="QwenImage",
        denoiser="QwenImageTransformer2DModel",
        part="transformer",
        parts=("transformer", "vae", *ONE_ENCODER, "scheduler"),
        schedule="flow",
        targets=ATTENTION,
        steps=50,
        guidance=4.0,
        guide="true_cfg_scale",
        negative=" ",
        half="bfloat16",
        half_vae=True,
        buckets=True,
        since="0.35",
        vaes=("AutoencoderKLQwenImage",),
        joints={
            "joint_attention_dim": WIDTHS[:1],
            "in_channels": ("vae.z_dim",) * 4,  # of 2 x 2 patches
            "out_channels": ("vae.z_dim",),
        },
        requires={
            "patch_size": (2, None),
            "guidance_embeds": (False, None),
            "zero_cond_t": (False, None),
            "use_additional_t_cond": (False, None),
            "use_layer3d_rope": (False, None),
        },
    ),
    Family(
        name="flux2",
        title="FLUX.2",
        pipeline="Flux2Pipeline",
        backbone="Flux2",
        steps=50,
        guidance=4.0,
        since="0.36",
        **FLUX2,
    ),
    Family(
        name="klein",
        title="FLUX.2 klein",
        pipeline="Flux2KleinPipeline",
        backbone="Klein",
        steps=50,
        guidance=4.0,
        since="0.37",
        distilled=Distilled(
            "FLUX.2 klein distilled", "model_index.json", "is_distilled", (True,), steps=4
        ),
        **FLUX2,
    ),
    Family(
        name="sana",
        title="SANA",
        pipeline="SanaPipeline",
        backbone="Sana",
        denoiser="SanaTransformer2DModel",
        part="transformer",
        parts=("transformer", "vae", *ONE_ENCODER, "scheduler"),
        schedule="flow",
        targets=ATTENTION,
        steps=20,
        guidance=4.5,
        half="bfloat16",
        half_vae=True,
        buckets=True,
        since="0.32",
        vaes=("AutoencoderDC",),
        joints={"caption_channels": WIDTHS[:1], **CHANNELS},
        requires={"guidance_embeds": (False, None)},
    ),
)
PIPELINES = {family.pipeline: family for family in FAMILIES}


def listed(field: Literal["steps", "guidance", "half", "buckets"]) -> str:
    """What every family has in a field, for help texts: ``50 for SD and SDXL, 28 for ...``."""
    titles: dict[Any, list[str]] = {}
    for family in FAMILIES:
        titles.setdefault(getattr(family, field), []).append(family.title)
    if field == "steps":
        for one in (family.distilled for family in FAMILIES if family.distilled):
            titles.setdefault(one.steps, []).append(one.title)
    values = []
    for value, names in titles.items():
        text = f"{value:g}" if isinstance(value, (int, float)) else value
        if isinstance(value, bool):
            text = field if value else f"no {field}"
        *most, last = names
        several = f"{', '.join(most)} and " if most else ""
        values.append(f"{text} for {several}{last}")
    return ", ".join(values)
