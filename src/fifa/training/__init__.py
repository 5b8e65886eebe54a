"""TRAIN: Diffusion-DPO on cached latents."""

from fifa.models.optional import require

require("torch", "train")  # every module here imports it
