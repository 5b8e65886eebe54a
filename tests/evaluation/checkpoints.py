"""Small diffusion models, and checkpoints of every kind made from them."""

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict

from neighbours import helper

_tiny = helper("training", "tiny_diffusion")
write_model, write_pairs = _tiny.write_model, _tiny.write_pairs
write_clip = helper("scoring/rewards", "tiny_models").write_clip

SMALL = {"steps": 2, "width": 32, "height": 32}  # quick settings


def write_lora(base, folder, seed=1):
    """A LoRA of the base that changes its images, as `load_lora_weights` reads it."""
    pipe = DiffusionPipeline.from_pretrained(base)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    part = getattr(pipe, name)
    part.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    state = get_peft_model_state_dict(part)
    draw = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(value.shape, generator=draw) for name, value in state.items()}
    type(pipe).save_lora_weights(folder, **{f"{name}_lora_layers": state})
    return folder


def write_part(base, folder, seed=1, scale=0.05):
    """The base's UNet or transformer with other weights, in ``folder/unet`` or its like."""
    pipe = DiffusionPipeline.from_pretrained(base)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    part = getattr(pipe, name)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw))
    part.save_pretrained(folder / name)
    return folder
