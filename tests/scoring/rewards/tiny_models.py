"""Models of the real classes and checkpoints of the real names, small and random, and images."""

import io
import json

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

torch.set_num_threads(1)  # models this small only wait for each other

PROMPTS = [
    "A cat, sitting on the moon!",
    "",
    "über Straße 猫 🐈 naïve",
    "word " * 200,
    "  two   spaces\tand a tab ",
    "an astronaut riding a horse",
]


def images():
    """Every mode that comes in, and sizes above, at and below 224, wide and tall."""
    sizes = [(300, 250), (224, 224), (97, 331), (640, 225), (60, 40), (229, 224)]
    rgb = [drawing(i, *size) for i, size in enumerate(sizes)]
    alpha = Image.fromarray(np.asarray(rgb[0].convert("L")).T.copy()).resize(rgb[0].size)
    rgba = rgb[0].copy()
    rgba.putalpha(alpha)
    palette = rgb[2].quantize(16)
    seen_through = rgb[4].quantize(8)
    seen_through.info["transparency"] = 3
    rotated = rgb[3].copy()
    rotated.getexif()[0x0112] = 6
    grey = rgb[5].convert("L")
    more = [rgba, palette, seen_through, rotated, grey, grey.convert("LA"), grey.convert("1")]
    return [*rgb, *more, rgb[1].convert("CMYK"), palette.convert("PA")]


def drawing(seed, width, height):
    """Smooth colours and hard edges, so that a shifted pixel or another filter shows."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / random.uniform(3, 40) + y / random.uniform(3, 40)) for _ in range(3)]
    pixels = 127 + 110 * np.stack(waves, -1)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = random.integers(0, 256, 3)
    pixels += random.normal(0, 12, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def png(image):
    """The image's bytes in a file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def shake(module, seed=0):
    """Weights far from their initial values, so that nothing is a near no-op."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            fan = parameter.shape[-1] if parameter.ndim > 1 else 25
            parameter.copy_(noise / fan**0.5 + (1.0 if "norm" in name and "weight" in name else 0))
    return module


def write_clip_tokenizer(folder):
    """CLIP's tokenizer over bytes with a few merges."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "n"), ("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("o", "n</w>")]
    words = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    ).save_pretrained(folder)
    return len(words)


def write_clip(folder, *, projection=24, seed=0, image_size=224, **both):
    """A transformers CLIP with tokenizer, as on the hub; ``both`` are settings of both towers."""
    words = write_clip_tokenizer(folder)
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": projection}
    config = CLIPConfig(
        projection_dim=projection,
        text_config={
            **tower,
            "hidden_size": 32,
            "intermediate_size": 48,
            "vocab_size": words,
            "eos_token_id": 2,
            "bos_token_id": words - 2,
            "pad_token_id": words - 1,
            **both,
        },
        vision_config={
            **tower,
            "hidden_size": 40,
            "intermediate_size": 56,
            "image_size": image_size,
            "patch_size": 32,
            **both,
        },
    )
    model = shake(CLIPModel(config), seed)
    with torch.no_grad():
        model.logit_scale.fill_(float(np.log(97.0)))
    model.save_pretrained(folder)
    return model.eval()


def open_clip_state(words, *, width=40, text_width=32, dimension=24, layers=2, patch=32):
    """A state dict with the names and shapes of open_clip's CLIP."""
    g = torch.Generator().manual_seed(3)

    def new(*shape, plus=0.0):
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5 + plus

    def norm(name, d):
        return {f"{name}.weight": 1 + new(d), f"{name}.bias": new(d)}

    def block(name, d):
        return {
            **norm(f"{name}.ln_1", d),
            **norm(f"{name}.ln_2", d),
            f"{name}.attn.in_proj_weight": new(3 * d, d),
            f"{name}.attn.in_proj_bias": new(3 * d),
            f"{name}.attn.out_proj.weight": new(d, d),
            f"{name}.attn.out_proj.bias": new(d),
            f"{name}.mlp.c_fc.weight": new(4 * d, d),
            f"{name}.mlp.c_fc.bias": new(4 * d),
            f"{name}.mlp.c_proj.weight": new(d, 4 * d),
            f"{name}.mlp.c_proj.bias": new(d),
        }

    state = {
        "logit_scale": torch.tensor(4.6),
        "positional_embedding": new(77, text_width),
        "text_projection": new(text_width, dimension),
        "token_embedding.weight": new(words, text_width),
        "visual.class_embedding": new(width),
        "visual.positional_embedding": new((224 // patch) ** 2 + 1, width),
        "visual.proj": new(width, dimension),
        "visual.conv1.weight": new(width, 3, patch, patch) / patch,
        **norm("ln_final", text_width),
        **norm("visual.ln_pre", width),
        **norm("visual.ln_post", width),
    }
    for i in range(layers):
        state |= block(f"transformer.resblocks.{i}", text_width)
        state |= block(f"visual.transformer.resblocks.{i}", width)
    return state


def blip_state(words, *, width=128, text_width=64, layers=2):
    """A state dict with the names and shapes of ImageReward's checkpoint."""
    g = torch.Generator().manual_seed(5)

    def linear(name, out, into):
        weight = torch.randn(out, into, generator=g) / into**0.5
        return {f"{name}.weight": weight, f"{name}.bias": torch.randn(out, generator=g) / 5}

    def norm(name, d):
        weight = 1 + torch.randn(d, generator=g) / 5
        return {f"{name}.weight": weight, f"{name}.bias": torch.randn(d, generator=g) / 5}

    see, read = "blip.visual_encoder", "blip.text_encoder"
    state = {
        f"{see}.cls_token": torch.randn(1, 1, width, generator=g),
        f"{see}.pos_embed": torch.randn(1, 197, width, generator=g),
        f"{see}.patch_embed.proj.weight": torch.randn(width, 3, 16, 16, generator=g) / 28,
        f"{see}.patch_embed.proj.bias": torch.randn(width, generator=g),
        **norm(f"{see}.norm", width),
        f"{read}.embeddings.position_ids": torch.arange(64)[None],
        f"{read}.embeddings.word_embeddings.weight": torch.randn(words, text_width, generator=g),
        f"{read}.embeddings.position_embeddings.weight": torch.randn(64, text_width, generator=g),
        **norm(f"{read}.embeddings.LayerNorm", text_width),
        **linear("blip.vision_proj", 16, width),  # in the checkpoint, but not in the reward
        **linear("blip.text_proj", 16, text_width),
    }
    for i in range(layers):
        b = f"{see}.blocks.{i}"
        state |= norm(f"{b}.norm1", width) | norm(f"{b}.norm2", width)
        state |= linear(f"{b}.attn.qkv", 3 * width, width)
        state |= linear(f"{b}.attn.proj", width, width)
        state |= linear(f"{b}.mlp.fc1", 2 * width, width) | linear(f"{b}.mlp.fc2", width, 2 * width)
        b = f"{read}.encoder.layer.{i}"
        for kind, source in (("attention", text_width), ("crossattention", width)):
            state |= linear(f"{b}.{kind}.self.query", text_width, text_width)
            state |= linear(f"{b}.{kind}.self.key", text_width, source)
            state |= linear(f"{b}.{kind}.self.value", text_width, source)
            state |= linear(f"{b}.{kind}.output.dense", text_width, text_width)
            state |= norm(f"{b}.{kind}.output.LayerNorm", text_width)
        state |= linear(f"{b}.intermediate.dense", 2 * text_width, text_width)
        state |= linear(f"{b}.output.dense", text_width, 2 * text_width)
        state |= norm(f"{b}.output.LayerNorm", text_width)
    return state | head_state("mlp.layers", text_width, g)


def head_state(prefix, width, generator=None):
    """The linear stack of ImageReward and of the aesthetic predictor, numbered as in both."""
    g = generator or torch.Generator().manual_seed(7)
    widths = (width, 1024, 128, 64, 16, 1)
    state = {}
    for number, into, out in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        state[f"{prefix}.{number}.weight"] = torch.randn(out, into, generator=g) / into**0.5
        state[f"{prefix}.{number}.bias"] = torch.randn(out, generator=g) / 5
    return state


def write_bert_vocabulary(folder):
    """A WordPiece vocabulary in BERT's form, 30 words and the letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.!"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "cat", "moon", "word", "two"]
    words += [c for c in letters if c not in words] + [f"##{c}" for c in letters]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return len(words)


QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def write_qwen_tokenizer(folder):
    """A byte-level tokenizer with Qwen2-VL's marks."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "a")]
    vocabulary = {w: i for i, w in enumerate([*words, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*QWEN_MARKS, "<|image_pad|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()
