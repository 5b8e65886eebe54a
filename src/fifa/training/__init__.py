"""TRAIN: Diffusion-DPO on cached latents."""
