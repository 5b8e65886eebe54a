"""HPSv3++ and MPS against their authors' own classes, with small random weights.

Nothing of the originals is in this project: they are cloned, and run in an environment of their
own. Three steps, the middle one there:

    python scripts/check_rewards.py prepare WORK
    git clone https://github.com/Kwai-Kolors/MPS
    git clone https://github.com/PlantPotatoOnMoon/HPSv3-PlusPlus
    pip install --target OLD --no-deps transformers==4.45.2 huggingface_hub==0.25.2 \\
        tokenizers==0.20.3 einops
    pip install --target NEW --no-deps transformers==4.57.0 huggingface_hub==0.35.3 \\
        tokenizers==0.22.1
    PYTHONPATH=OLD python scripts/check_rewards.py mps WORK --code MPS
    PYTHONPATH=NEW python scripts/check_rewards.py hpsv3++ WORK --code HPSv3-PlusPlus
    python scripts/check_rewards.py compare WORK
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

TINY = Path(__file__).parents[1] / "tests" / "scoring" / "rewards"
RUBRIC = "\nHow good is this?\nTextual prompt - {text_prompt}\n\n\n\nMark: <|Reward|>\n\nEND\n"
TEXT = {
    "model_type": "qwen3_vl_text",
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rope_theta": 5000000,
    "rope_scaling": {
        "rope_type": "default",
        "mrope_interleaved": True,
        "mrope_section": [24, 20, 20],
    },
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
}
VISION = {
    "model_type": "qwen3_vl",
    "depth": 6,
    "hidden_size": 144,
    "intermediate_size": 256,
    "num_heads": 2,
    "out_hidden_size": 512,
    "patch_size": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [1, 2, 4],
}
CLIP = {"num_hidden_layers": 3, "num_attention_heads": 16, "projection_dim": 1024}
PICTURES = (0, 2, 6, 8, 3, 9)  # RGB of several shapes, transparency, a palette


def prepare(work: Path) -> None:
    """Settings, tokenizers, and what the models are given: pixels, patches, tokens."""
    from tiny_models import PROMPTS, images, write_clip_tokenizer, write_qwen_tokenizer

    from fifa.scoring.rewards import load_reward
    from fifa.scoring.rewards.pixels import convert_crop, standardise

    mps, hps = work / "mps", work / "hpsv3++"
    write_clip_tokenizer(mps)
    pictures = [images()[number] for number in PICTURES]
    crops = [torch.from_numpy(convert_crop(picture, 224))[None] for picture in pictures]
    torch.save([standardise(crop) for crop in crops], mps / "pixels.pt")
    (mps / "prompts.json").write_text(json.dumps(PROMPTS))
    words = write_qwen_tokenizer(hps)
    settings = {"model_type": "qwen3_vl", "tie_word_embeddings": False}
    settings |= {"text_config": TEXT | {"vocab_size": words + 1}, "vision_config": VISION}
    (hps / "config.json").write_text(json.dumps(settings))
    (hps / "rubric.txt").write_text(RUBRIC)
    (hps / "hpsv3++.pth").touch()
    model: Any = load_reward(f"hpsv3++:{hps}", device="cpu", dtype="float32")
    number = model._tokenizer.convert_tokens_to_ids
    given = []
    for prompt, picture in zip(PROMPTS, pictures, strict=True):
        pixels = torch.from_numpy(model.preprocess(picture))[None]
        patches, grid = model._patches(standardise(pixels, model.mean, model.std))
        text = model.chat + RUBRIC.format(text_prompt=prompt) + "<|im_end|>\n"
        text = text.replace("<|image_pad|>", "<|image_pad|>" * (int(grid.prod()) // 4))
        ids = torch.tensor(model._tokenizer(text[: text.index("<|Reward|>") + 10])["input_ids"])
        given.append({"ids": ids, "patches": patches, "grid": grid})
    marks = ("<|image_pad|>", "<|vision_start|>", "<|endoftext|>", "<|Reward|>")
    torch.save([given, [number(mark) for mark in marks]], hps / "given.pt")


@torch.no_grad()
def shake(module: Any) -> None:
    """Weights far from their initial values."""
    torch.manual_seed(0)
    for name, weight in module.named_parameters():
        fan = weight.shape[-1] if weight.ndim > 1 else 25
        plus = 1.0 if re.search(r"(norm\w*|layrnorm)\.weight$", name) else 0.0
        weight.copy_(torch.randn(weight.shape) / fan**0.5 + plus)


@torch.no_grad()
def run_mps(work: Path, code: Path) -> dict[str, list[list[float]]]:
    """What ``infer_one_sample`` of the clone says, of a module pickled whole."""
    sys.path.insert(0, str(code))
    from PIL import Image
    from trainer.models.clip_model import CLIPModel, XCLIPModel
    from transformers import AutoTokenizer, CLIPConfig

    folder, found = work / "mps", {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    both = CLIP | {"hidden_act": "gelu"}
    text = {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": len(tokenizer)}
    vision = {"hidden_size": 1280, "intermediate_size": 2560, "patch_size": 14}
    text |= {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    config = CLIPConfig(projection_dim=1024, text_config=both | text, vision_config=both | vision)
    clip = XCLIPModel(config)
    XCLIPModel.from_pretrained = classmethod(lambda *_: clip)
    model = CLIPModel("").eval()
    shake(model)
    clip.logit_scale.fill_(4.6)
    # tokens differ most in a few directions, so that masks have holes
    states = clip.text_model(input_ids=torch.arange(77)[None] % 26 + 65)[0][0]
    rows, mean = clip.text_projection.weight, states.mean(0)
    rows -= torch.outer(rows @ mean, mean) / (mean @ mean)
    rows[:4] *= 10
    script = (code / "eval_overall_mps_on_imagereward.py").read_text()
    function = script[script.index("def infer_one_sample") : script.index("def infer_example")]
    pixels, prompts = (
        torch.load(folder / "pixels.pt"),
        json.loads((folder / "prompts.json").read_text()),
    )
    for dtype in ("float32", "float16"):
        space: dict[str, Any] = {"torch": torch, "einsum": torch.einsum, "Image": Image}
        exec(function.replace(".half()", f".to(torch.{dtype})"), space)
        model = model.to(getattr(torch, dtype))
        torch.save(model, folder / f"{dtype}.pth")
        found[dtype] = []
        for prompt, given in zip(prompts, pixels, strict=True):

            def processor(image: Any, return_tensors: str, given: Any = given) -> Any:
                return {"pixel_values": given}

            nothing = Image.new("RGB", (1, 1))
            space["BytesIO"] = bytes
            said = space["infer_one_sample"](nothing, prompt, model, processor, tokenizer, "cpu")
            found[dtype].append([float(said)])
    return found


@torch.no_grad()
def run_hpsv3_plus(work: Path, code: Path) -> dict[str, list[list[float]]]:
    """Mean and standard deviation by ``Qwen3VLRewardModelFiLMHybrid`` of the clone."""
    from transformers import Qwen3VLConfig

    folder, found = work / "hpsv3++", {}
    spec = importlib.util.spec_from_file_location("theirs", code / "hpsv3/model/qwen3vl_rm.py")
    assert spec is not None and spec.loader is not None
    theirs: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    given, (image, start, pad, reward) = torch.load(folder / "given.pt")
    config = Qwen3VLConfig.from_dict(json.loads((folder / "config.json").read_text()))
    config.image_token_id, config.vision_start_token_id, config.video_token_id = image, start, -1
    how = {"output_dim": 2, "reward_token": "special", "special_token_ids": [reward]}
    model = theirs.Qwen3VLRewardModelFiLMHybrid(config, **how, rm_head_type="ranknet").eval()
    model.config.pad_token_id = pad
    shake(model)
    for dtype in ("bfloat16", "float32"):
        model.to(torch.bfloat16)  # buffers too, as the original
        for head in (model.rm_head, model.film_gen, model.cond_encoder):
            head.float()
        torch.save(dict(model.state_dict()), folder / "hpsv3++.pth")
        if dtype == "float32":
            model.float()
            rotary = model.model.visual.rotary_pos_emb
            rotary.inv_freq = rotary.inv_freq.bfloat16()
        found[dtype] = []
        for one in given:
            ids = one["ids"][None]
            seen = {"pixel_values": one["patches"], "image_grid_thw": one["grid"]}
            said = model(input_ids=ids, attention_mask=torch.ones_like(ids), **seen)
            mu, log_sigma = said["logits"][0].float()
            found[dtype].append([float(mu), float(log_sigma.exp())])
    return found


def compare(work: Path) -> None:
    """Ours beside theirs: the largest difference, and how much theirs vary."""
    from tiny_models import PROMPTS, images

    from fifa.scoring.rewards import load_reward

    pictures = [images()[number] for number in PICTURES]
    for name in ("mps", "hpsv3++"):
        for dtype, rewards in json.loads((work / f"{name}.json").read_text()).items():
            file = f"{dtype}.pth" if name == "mps" else "hpsv3++.pth"
            model = load_reward(f"{name}:{work / name / file}", device="cpu", dtype=dtype)
            ours = []
            for prompt, picture in zip(PROMPTS, pictures, strict=True):
                seen = model.image_features(torch.from_numpy(model.preprocess(picture))[None])
                said = model.rewards(model.prompt_features([prompt]), seen)[0]
                ours.append(said.reshape(-1).tolist())
            theirs = torch.tensor(rewards)
            apart = (torch.tensor(ours) - theirs).abs().max()
            print(
                f"{name} {dtype}: largest difference {apart:.1e}, spread {theirs.std(0).tolist()}"
            )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("step", choices=("prepare", "mps", "hpsv3++", "compare"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--code", type=Path, help="the clone of the original")
    asked = parser.parse_args()
    sys.path.insert(0, str(TINY))
    if asked.step in ("prepare", "compare"):
        {"prepare": prepare, "compare": compare}[asked.step](asked.work)
        return
    run = run_mps if asked.step == "mps" else run_hpsv3_plus
    (asked.work / f"{asked.step}.json").write_text(json.dumps(run(asked.work, asked.code)))


if __name__ == "__main__":
    main()
