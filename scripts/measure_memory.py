"""What training and encoding take beside the weights: the rows `Activations` of `families.py`.

    python scripts/measure_memory.py

Every family's denoiser at its published size, from its configuration, with random weights made on
the device in bfloat16; a LoRA of rank 8; forward and backward of 1 and 2 pairs at the native size
under autocast, with and without gradient checkpointing. Then the VAE's encoder and the text
encoders. The peaks become a part that is always there and a part a pair and latent pixel, a pixel
of an image, a prompt. What does not fit is said to be so. No file and no network is needed.
Prints a table, the rows to copy, and a line of JSON.

Without CUDA it says so and runs tiny networks on the CPU; there it counts what is kept for the
backward pass, which is no figure to copy.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fifa.models.families import FAMILIES, Family
from fifa.models.runtime import best_device, out_of_memory, release_memory, tf32
from fifa.training.checkpoint import layers

GB = 1e9
RANK = 8


KL_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
KL_TINY = {**KL_BLOCKS, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2}
# of SD and SDXL; SD3's, FLUX's and Z-Image's encoders differ in their last layer
KL = (
    "AutoencoderKL",
    {**KL_BLOCKS, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    KL_TINY,
)


@dataclass(frozen=True)
class Published:
    """A family's model as it is published.

    Parameters
    ----------
    denoiser
        Its settings, where they are not the class's defaults.
    tiny
        The same for a network that a CPU runs in a moment.
    side
        Sides of the latents at its native size, and of a tiny network's.
    text
        (class, settings, tokens) of each text encoder, as in the hub's ``config.json``.
    vae
        (class, settings, settings of a tiny one) of its autoencoder.
    """

    denoiser: dict[str, Any]
    tiny: dict[str, Any]
    side: tuple[int, int]
    text: tuple[tuple[str, dict[str, Any], int], ...]
    vae: tuple[str, dict[str, Any], dict[str, Any]] = KL


CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
}
QWEN2_7B = {  # Qwen2.5-VL's language model
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
}
GEMMA2_2B = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256_000,
}
ONE, TWO = "CLIPTextModel", "CLIPTextModelWithProjection"
UNET = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
# Sources: unet/config.json or transformer/config.json, and text_encoder*/config.json, of
# stable-diffusion-v1-5/stable-diffusion-v1-5, stabilityai/stable-diffusion-xl-base-1.0,
# stabilityai/stable-diffusion-3-medium-diffusers and black-forest-labs/FLUX.1-dev; the classes'
# defaults of Z-Image, Qwen-Image and SANA 1.6B, and of FLUX.2 klein what 4B differs in (its sizes
# are to be checked against the hub). FLUX.2 dev fits no card of 80 GB in 16 bits.
PUBLISHED = {
    "sd": Published(
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 768,
            **UNET,
        },
        (64, 8),
        ((ONE, CLIP_L, 77),),
    ),
    "sdxl": Published(
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            **UNET,
        },
        (128, 8),
        ((ONE, CLIP_L, 77), (TWO, CLIP_G, 77)),
    ),
    "sd3": Published(
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        {
            "num_layers": 1,
            "num_attention_heads": 2,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 128,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        (128, 8),
        ((TWO, CLIP_L, 77), (TWO, CLIP_G, 77), ("T5EncoderModel", T5_XXL, 256)),
    ),
    "flux": Published(
        {"guidance_embeds": True},
        {
            "guidance_embeds": True,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
        },
        (128, 8),
        ((ONE, CLIP_L, 77), ("T5EncoderModel", T5_XXL, 512)),
    ),
    "zimage": Published(
        {},
        {"dim": 256, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
        (128, 8),
        (("Qwen3Model", QWEN3_4B, 512),),
    ),
    "qwenimage": Published(
        {},
        {"num_layers": 1, "num_attention_heads": 2},
        (128, 8),
        (("Qwen2Model", QWEN2_7B, 1024),),
        ("AutoencoderKLQwenImage", {}, {"base_dim": 8}),
    ),
    "klein": Published(
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        (64, 8),
        (("Qwen3Model", QWEN3_4B, 512),),
        ("AutoencoderKLFlux2", {}, {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2}),
    ),
    "sana": Published(
        {},
        {
            "num_layers": 1,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 1,
            "cross_attention_head_dim": 64,
            "cross_attention_dim": 64,
        },
        (32, 8),
        (("Gemma2Model", GEMMA2_2B, 300),),
        (
            "AutoencoderDC",
            {
                f"{half}_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
                for half in ("encoder", "decoder")
            },
            {
                **{f"{half}_block_out_channels": (32, 32) for half in ("encoder", "decoder")},
                **{f"{half}_layers_per_block": (1, 1) for half in ("encoder", "decoder")},
                **{f"{half}_qkv_multiscales": ((), ()) for half in ("encoder", "decoder")},
            },
        ),
    ),
}
SHRUNK = {  # of a text encoder, on a CPU
    "intermediate_size": 32,
    "d_ff": 32,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "vocab_size": 100,
    "head_dim": 8,
}


def inputs_of(family: str, images: int, side: int, device: Any) -> dict[str, Any]:
    """What the denoiser of a family is called with."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(images, *shape, device=device, dtype=torch.bfloat16)

    middle = torch.full((images,), 0.5, device=device)
    if family in ("sd", "sdxl"):
        given: dict[str, Any] = {
            "sample": randn(4, side, side),
            "timestep": torch.full((images,), 500, device=device),
            "encoder_hidden_states": randn(77, 768 if family == "sd" else 2048),
        }
        if family == "sdxl":
            given["added_cond_kwargs"] = {"text_embeds": randn(1280), "time_ids": randn(6)}
        return given
    if family == "sd3":
        return {
            "hidden_states": randn(16, side, side),
            "timestep": 1000 * middle,
            "encoder_hidden_states": randn(77 + 256, 4096),
            "pooled_projections": randn(2048),
        }
    if family == "zimage":
        x, cap_feats = list(randn(16, 1, side, side)), list(randn(512, 2560))
        return {"x": x, "t": middle, "cap_feats": cap_feats}
    if family == "sana":
        return {
            "hidden_states": randn(32, side, side),
            "timestep": 1000 * middle,
            "encoder_hidden_states": randn(300, 2304),
        }
    if family == "klein":
        words = torch.zeros(512, 4, device=device)
        return {
            "hidden_states": randn(side**2, 128),
            "timestep": middle,
            "encoder_hidden_states": randn(512, 7680),
            "txt_ids": words,
            "img_ids": torch.zeros(side**2, 4, device=device),
        }
    tokens = (side // 2) ** 2
    if family == "qwenimage":
        return {
            "hidden_states": randn(tokens, 64),
            "timestep": middle,
            "encoder_hidden_states": randn(512, 3584),  # of 1,024 at most
            "img_shapes": [[(1, side // 2, side // 2)]] * images,
        }
    return {
        "hidden_states": randn(tokens, 64),
        "timestep": middle,
        "guidance": 3.5 * torch.ones(images, device=device),
        "encoder_hidden_states": randn(512, 4096),
        "pooled_projections": randn(768),
        "txt_ids": torch.zeros(512, 3, device=device),
        "img_ids": torch.zeros(tokens, 3, device=device),
    }


@contextmanager
def made_on(device: Any) -> Iterator[None]:
    """Networks that are made in the block lie on the device, in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def taken(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak of ``function`` beyond what was held before; None if memory ran out.

    On a CPU the bytes that it keeps for the backward pass.
    """
    if device.type != "cuda":
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function()
        return sum(kept.values())
    release_memory()
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        function()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
    return torch.cuda.max_memory_allocated(device) - held


def line(points: list[tuple[int, int | None]]) -> tuple[int, int] | None:
    """(always, each) of ``bytes = always + each * units`` through the two largest that fit.

    (0, each) where only one does, None where none.
    """
    known = [(units, found) for units, found in points if found is not None][-2:]
    if not known:
        return None
    (less, small), (more, large) = known[0], known[-1]
    each = max(0.0, (large - small) / (more - less)) if more > less else large / more
    return max(0, round(large - each * more)), round(each)


def denoiser_of(family: Family, device: torch.device) -> Any:
    """The denoiser with its adapters in float32, as `fifa train` has it; frozen in bfloat16."""
    import diffusers
    from peft import LoraConfig

    published = PUBLISHED[family.name]
    settings = published.denoiser if device.type == "cuda" else published.tiny
    with made_on(device):
        denoiser = getattr(diffusers, family.denoiser)(**settings)
    denoiser.requires_grad_(False).train()
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers(denoiser, family.targets))
    denoiser.add_adapter(config)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return denoiser


def measure_denoiser(family: Family, device: torch.device) -> dict[str, Any]:
    """Its numbers, and (always, a latent pixel and pair) without and with checkpointing."""
    denoiser = denoiser_of(family, device)
    numbers = sum(p.numel() for p in denoiser.parameters() if not p.requires_grad)
    native = PUBLISHED[family.name].side[device.type != "cuda"]

    def train(pairs: int, side: int) -> None:
        given = inputs_of(family.name, 2 * pairs, side, device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            predicted = denoiser(**given, return_dict=False)[0]
            if isinstance(predicted, list):  # Z-Image's, of images that may differ in size
                predicted = torch.stack(predicted)
            loss = predicted.float().square().mean()
        loss.backward()

    found: dict[str, Any] = {"numbers": numbers}
    # a quarter of a pair first: where a whole one does not fit, it still says something
    sizes = [(1, native // 2), (1, native), (2, native)]
    for name in ("pair", "pair_checkpointed"):
        if name == "pair_checkpointed":
            denoiser.enable_gradient_checkpointing()
        points = [
            (pairs * side**2, taken(lambda p=pairs, s=side: train(p, s), device))
            for pairs, side in sizes
        ]
        found[f"{name}_peaks"] = [peak for _, peak in points]
        # the quarter has as many tokens of text: only for what does not fit as a whole
        found[name] = line(points[1:]) or line(points[:1])
    return found


def vae_of(vae: tuple[str, dict[str, Any], dict[str, Any]], device: torch.device) -> Any:
    """An autoencoder with random weights."""
    import diffusers

    name, settings, tiny = vae
    with made_on(device):
        made = getattr(diffusers, name)(**(settings if device.type == "cuda" else tiny))
    return made.eval().requires_grad_(False)


def measure_vae(
    vae: tuple[str, dict[str, Any], dict[str, Any]], device: torch.device
) -> dict[str, Any]:
    """Bytes a pixel in bfloat16 and float32, and images of 512 pixels a second."""
    found: dict[str, Any] = {}
    native = 512 if device.type == "cuda" else 32
    frame = (1,) if vae[0] == "AutoencoderKLQwenImage" else ()  # it encodes videos
    for dtype in (torch.bfloat16, torch.float32):
        network = torch.nn.Module.to(vae_of(vae, device), dtype)  # diffusers' own would warn

        def encode(images: int, side: int, vae: Any = network, dtype: Any = dtype) -> None:
            pixels = torch.zeros(images, 3, *frame, side, side, device=device, dtype=dtype)
            with torch.no_grad(), tf32(device):
                vae.encode(pixels)

        name = str(dtype).removeprefix("torch.")
        for side in (native, 2 * native):
            points = [
                (n * side**2, taken(lambda n=n, s=side: encode(n, s), device)) for n in (1, 2)
            ]
            found[f"{name}_{side}"] = line(points)
        if device.type != "cuda":
            continue
        speed = speed_of(lambda: encode(16, native), 16)
        found[f"{name}_16_images_per_second"] = speed
    return found


def speed_of(function: Callable[[], object], images: int) -> float:
    """Images a second of the second call; 0 where memory ran out."""
    try:
        function()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        function()
        torch.cuda.synchronize()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return 0.0
    return images / (time.perf_counter() - begun)


def measure_text(family: Family, device: torch.device) -> tuple[int, int] | None:
    """(always, a prompt) of all text encoders, one after the other."""
    import transformers

    encoders = []
    for name, settings, tokens in PUBLISHED[family.name].text:
        cls = getattr(transformers, name)
        if device.type != "cuda":
            settings = settings | {k: v for k, v in SHRUNK.items() if k in settings}
        with made_on(device):
            encoders.append(
                (cls(cls.config_class(**settings)).eval().requires_grad_(False), tokens)
            )

    def encode(prompts: int) -> None:
        with torch.no_grad():
            for model, tokens in encoders:
                ids = torch.ones(prompts, tokens, dtype=torch.long, device=device)
                model(ids, output_hidden_states=True)

    return line([(n, taken(lambda n=n: encode(n), device)) for n in (8, 16)])


def measure(device: torch.device, names: list[str]) -> dict[str, Any]:
    """Everything, each network gone before the next is made."""
    if device.type == "cuda":
        # as in training: see the reason there
        torch.backends.cuda.enable_cudnn_sdp(False)
    found: dict[str, Any] = {"device": str(device)}
    vaes: dict[str, Any] = {}
    for family in FAMILIES:
        if family.name in names:
            row = attempt(measure_denoiser, family, device)
            row["text"] = attempt(measure_text, family, device)
            vae = PUBLISHED[family.name].vae
            row["vae"] = vaes.setdefault(vae[0], None) or attempt(measure_vae, vae, device)
            vaes[vae[0]] = row["vae"]
            found[family.name] = row
            print_row(family, row)
    return found


def attempt(function: Callable[..., Any], *given: Any) -> Any:
    """What the function finds; what does not fit as a whole is said to be so."""
    begun = time.perf_counter()
    try:
        found = function(*given)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        found = {"does_not_fit": True}
    gc.collect()
    release_memory()
    if isinstance(found, dict):
        found["seconds"] = round(time.perf_counter() - begun, 1)
    return found


def print_row(family: Family, row: dict[str, Any]) -> None:
    """A family's line of the table."""
    cells = []
    for name in ("pair", "pair_checkpointed"):
        peaks = row.get(f"{name}_peaks") or [None] * 3
        cells.append(" / ".join("no fit" if p is None else f"{p / GB:.2f} GB" for p in peaks))
    print(f"| {family.title} | {row.get('numbers', 0) / 1e6:,.0f} M | {' | '.join(cells)} |")


def print_fields(found: dict[str, Any]) -> None:
    """What to copy into `families.py`: the family's own figures, VAE's the largest of its sizes."""
    for family in FAMILIES:
        row = found.get(family.name)
        if row is None:
            continue
        lines = [each[1] for name, each in row["vae"].items() if is_line(name, each)]
        pixel = max(lines, default=0)
        pair, again = row.get("pair"), row.get("pair_checkpointed")
        print(
            f"{family.name}: Activations(numbers={row.get('numbers', 0):_}, "
            f"fixed={max(line[0] for line in (pair, again, (0, 0)) if line):_}, "
            f"pair={pair[1] if pair else 0:_}, "
            f"pair_checkpointed={again[1] if again else 0:_}, "
            f"vae={pixel:_}, prompt={row['text'][1] if row.get('text') else 0:_})"
        )


def is_line(name: str, value: Any) -> bool:
    """Whether an entry of the VAE's is its line in bfloat16."""
    return name.startswith("bfloat16") and isinstance(value, tuple)


def main() -> None:
    names = [family.name for family in FAMILIES if family.name in PUBLISHED]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=names, action="append", help="only this one")
    given = parser.parse_args()
    device = torch.device(best_device())
    if device.type != "cuda":
        print("no CUDA device here: tiny networks on the CPU; these are no figures to copy")
        device = torch.device("cpu")
    print("| family | numbers | 1/4, 1, 2 pairs | with gradient checkpointing |")
    print("|---|---|---|---|")
    found = measure(device, given.family or names)
    print_fields(found)
    print(json.dumps({"name": "memory", **found}))


if __name__ == "__main__":
    main()
