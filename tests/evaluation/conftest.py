import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A small Stable Diffusion in diffusers' layout."""
    from checkpoints import write_model

    return write_model(tmp_path_factory.mktemp("models") / "base", "sd15")


@pytest.fixture(scope="session")
def lora(base, tmp_path_factory):
    """A LoRA for it."""
    from checkpoints import write_lora

    return write_lora(base, tmp_path_factory.mktemp("models") / "lora")


@pytest.fixture(scope="session")
def unet(base, tmp_path_factory):
    """Another UNet for it."""
    from checkpoints import write_part

    return write_part(base, tmp_path_factory.mktemp("models") / "full")
