"""Small diffusion models, and checkpoints of every kind made from them."""

import importlib.util
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict

_HELPER = next((Path(__file__).parents[1] / "train").glob("tiny_*.py"))
_spec = importlib.util.spec_from_file_location("tiny_diffusion", _HELPER)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
write_model = _module.write_model

SMALL = {"steps": 2, "width": 32, "height": 32}  # quick settings


def write_lora(base, folder, seed=1):
    """A LoRA of the base's UNet that changes its images, as `load_lora_weights` reads it."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    state = get_peft_model_state_dict(unet)
    draw = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(value.shape, generator=draw) for name, value in state.items()}
    kind = DiffusionPipeline.from_pretrained(base).__class__
    kind.save_lora_weights(folder, unet_lora_layers=state)
    return folder


def write_unet(base, folder, seed=1, scale=0.05):
    """The base's UNet with other weights, in ``folder/unet``."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw))
    unet.save_pretrained(folder / "unet")
    return folder
