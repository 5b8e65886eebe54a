"""Small diffusion models, and checkpoints of every kind made from them."""

import importlib.util
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict


def _helper(folder, name):
    """Another folder's helper, under a name that no other helper has."""
    path = next((Path(__file__).parents[1] / folder).glob(f"{name}.py"))
    spec = importlib.util.spec_from_file_location(f"{folder}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


write_model = _helper("train", "tiny_*").write_model
write_clip = _helper("rewards", "tiny_models").write_clip

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
