"""How big the reward models are and what an image costs on this CPU: random weights, real sizes.

`python scripts/measure_rewards.py` prints the figures of docs/rewards.md. Times are processor
seconds of one thread, so that other work on the machine does not count.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModelWithProjection,
    Qwen2VLConfig,
    Qwen2VLModel,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

from fifa.models.runtime import Runtime
from fifa.scoring.rewards.clip import ImageTower
from fifa.scoring.rewards.pixels import convert_crop, crop_convert, fit_area, pad

B32 = {
    "vision_config": {"image_size": 224, "patch_size": 32},
    "text_config": {},
    "projection_dim": 512,
}
L14 = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "projection_dim": 768,
}
H14 = {
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "projection_dim": 1024,
}
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 151658,
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584},
}


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with torch.device("meta"):
        vision = BlipVisionConfig(**L14["vision_config"] | {"patch_size": 16, "image_size": 224})
        # BERT-base with cross attention to 1024 dimensions
        text = BlipTextConfig(
            vocab_size=30524,
            encoder_hidden_size=1024,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            is_decoder=True,
        )
        models = {
            "CLIP ViT-B/32": [CLIPModel(CLIPConfig(**B32))],
            "CLIP ViT-L/14": [CLIPModel(CLIPConfig(**L14))],
            "CLIP ViT-H/14": [CLIPModel(CLIPConfig(**H14))],
            "ImageReward": [BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)],
            "HPSv3": [Qwen2VLModel(Qwen2VLConfig.from_dict(QWEN_7B))],
        }
    figures: dict[str, float] = {}
    for name, parts in models.items():
        count = sum(p.numel() for part in parts for p in part.parameters())
        figures[f"{name}, million parameters"] = round(count / 1e6)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    image = Image.fromarray(noise).resize((1024, 1024))
    ways = {
        "convert-crop": lambda: convert_crop(image, 224),
        "crop-convert": lambda: crop_convert(image, 224),
        "pad": lambda: pad(image, 224),
        "fit-area": lambda: fit_area(image, area=256 * 784, factor=28),
    }
    for name, way in ways.items():
        figures[f"{name}, ms for 1024 x 1024"] = round(1000 * cost(way, 10), 1)
    pixels = torch.from_numpy(np.stack([convert_crop(image, 224)] * 8))
    for name, size in (("B/32", B32), ("L/14", L14)):
        with tempfile.TemporaryDirectory() as folder:
            tower = CLIPVisionModelWithProjection(CLIPConfig(**size).vision_config)
            tower.save_pretrained(folder)
            del tower
            model = ImageTower(Path(folder), "convert-crop", Runtime())
            seconds = cost(lambda model=model: model.embed(pixels), 3) / len(pixels)
        figures[f"ViT-{name} image tower, ms an image"] = round(1000 * seconds, 1)
    print(json.dumps(figures, indent=2))


def cost(function: Callable[[], object], rounds: int) -> float:
    """The least processor seconds of a call."""
    function()
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        function()
        seconds.append(time.process_time() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
