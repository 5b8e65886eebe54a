"""Diffusion models of the real classes in the hub's layout: small, random, from a seed."""

import json

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderTiny,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PNDMScheduler,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fifa.training.backbones.flux2 import SYSTEM
from fifa.training.backbones.qwenimage import TEMPLATE
from fifa.training.backbones.sana import INSTRUCTION

torch.set_num_threads(1)  # models this small only wait for each other

TEXT = 32  # width of a text encoder
LENGTH = 16  # tokens of a prompt
KINDS = (
    "sd15",
    "sd2",
    "sd15-tiny-vae",
    "sdxl",
    "sd3",
    "sd3-without-t5",
    "flux-dev",
    "flux-schnell",
    "zimage",
    "qwenimage",
    "flux2",
    "klein",
    "sana",
)


def write_model(folder, kind="sd15", seed=0):
    """A model of `KINDS`; returns its folder."""
    make = {
        "sd15": _sd,
        "sd2": lambda folder: _sd(folder, "v_prediction"),
        "sd15-tiny-vae": lambda folder: _sd(folder, tiny_vae=True),
        "sdxl": _sdxl,
        "sdxl-wide": lambda folder: _sdxl(folder, second=2 * TEXT),
        "sd3": _sd3,
        "sd3-without-t5": lambda folder: _sd3(folder, t5=False),
        "flux-dev": _flux,
        "flux-schnell": lambda folder: _flux(folder, dev=False),
        "zimage": _zimage,
        "qwenimage": _qwenimage,
        "flux2": _flux2,
        "klein": _klein,
        "sana": _sana,
    }[kind]
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline, parts, extra = make(folder)
    index = {"_class_name": pipeline, "_diffusers_version": "0.35.0", **extra}
    for name, part in parts.items():
        if part is None:
            index[name] = [None, None]
            continue
        library = type(part).__module__.partition(".")[0]
        index[name] = [library, type(part).__name__]
        part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def shake(module):
    """Weights well away from their initial values: zero-initialised layers would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


def _sd(folder, prediction="epsilon", tiny_vae=False):
    words = write_clip_tokenizer(folder / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=64,  # the stock pipeline writes over smaller ones
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction,
        "steps_offset": 1,
    }
    parts = {
        "vae": _tiny_vae() if tiny_vae else _vae(4, scaling_factor=0.18215),
        "text_encoder": shake(CLIPTextModel(_clip(words))),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "unet": shake(unet),
        "scheduler": PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **schedule),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
    }
    return "StableDiffusionPipeline", parts, {"requires_safety_checker": False}


def _sdxl(folder, second=TEXT):
    words = write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=TEXT + second,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=second + 6 * 8,
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    parts = {
        "vae": _vae(4, scaling_factor=0.13025),
        "text_encoder": shake(CLIPTextModel(_clip(words))),
        "text_encoder_2": shake(CLIPTextModelWithProjection(_clip(words, "gelu", second))),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        "unet": shake(unet),
        "scheduler": DDPMScheduler(**schedule, steps_offset=1),
        "feature_extractor": None,
        "image_encoder": None,
    }
    return "StableDiffusionXLPipeline", parts, {"force_zeros_for_empty_prompt": True}


def _sd3(folder, t5=True):
    words = write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=3 * TEXT,
        caption_projection_dim=32,
        pooled_projection_dim=2 * TEXT,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    parts = {
        "transformer": shake(transformer),
        "vae": _vae(8, scaling_factor=1.5305, shift_factor=0.0609),
        "text_encoder": shake(CLIPTextModelWithProjection(_clip(words))),
        "text_encoder_2": shake(CLIPTextModelWithProjection(_clip(words, act="gelu"))),
        "text_encoder_3": _t5(3 * TEXT) if t5 else None,
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        "tokenizer_3": make_t5_tokenizer() if t5 else None,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "image_encoder": None,
        "feature_extractor": None,
    }
    return "StableDiffusion3Pipeline", parts, {}


def _flux(folder, dev=True):
    words = write_clip_tokenizer(folder / "tokenizer")
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=TEXT,
        guidance_embeds=dev,
        axes_dims_rope=(4, 4, 8),
    )
    dynamic = {"shift": 3.0, "use_dynamic_shifting": True} if dev else {"shift": 1.0}
    parts = {
        "transformer": shake(transformer),
        "vae": _vae(8, scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": shake(CLIPTextModel(_clip(words))),
        "text_encoder_2": _t5(48),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "tokenizer_2": make_t5_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(**dynamic),
        "image_encoder": None,
        "feature_extractor": None,
    }
    return "FluxPipeline", parts, {}


def _zimage(folder):
    words = write_qwen_tokenizer(folder / "tokenizer")
    transformer = ZImageTransformer2DModel(
        in_channels=8,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    parts = {
        "transformer": shake(transformer),
        "vae": _vae(8, scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": shake(Qwen3Model(_qwen3(words))),
        "tokenizer": Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
    }
    return "ZImagePipeline", parts, {}


def _qwenimage(folder):
    words = write_qwen_tokenizer(folder / "tokenizer")
    transformer = QwenImageTransformer2DModel(
        in_channels=32,
        out_channels=8,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
    )
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    config = Qwen2_5_VLConfig(
        text_config={**_language(words, 2), "rope_scaling": rope},
        vision_config={**vision, "out_hidden_size": TEXT},
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=8,
        num_res_blocks=1,
        latents_mean=[0.1 * i for i in range(8)],
        latents_std=[1 + 0.2 * i for i in range(8)],
    )
    parts = {
        "transformer": shake(transformer),
        "vae": shake(vae),
        "text_encoder": shake(Qwen2_5_VLForConditionalGeneration(config)),
        "tokenizer": Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }
    return "QwenImagePipeline", parts, {}


def _flux2(folder):
    vocab, merges = learned_words(pre_tokenizers.ByteLevel(), MISTRAL)
    words = Tokenizer(models.BPE(vocab, merges))
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "additional_special_tokens": MISTRAL[2:]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, chat_template=MISTRAL_CHAT, **special
    )
    text = _language(len(tokenizer), 31)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "model_type": "pixtral"}
    config = Mistral3Config(
        text_config={**text, "model_type": "mistral"},
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    parts = {
        "transformer": _flux2_transformer(guidance_embeds=True),
        "vae": _flux2_vae(),
        "text_encoder": shake(Mistral3ForConditionalGeneration(config)),
        "tokenizer": tokenizer,  # the real one is a part of a processor, which wants torchvision
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }
    return "Flux2Pipeline", parts, {}


def _klein(folder):
    words = write_qwen_tokenizer(folder / "tokenizer")
    parts = {
        "transformer": _flux2_transformer(guidance_embeds=False),
        "vae": _flux2_vae(),
        "text_encoder": shake(Qwen3ForCausalLM(_qwen3(words, layers=28))),
        "tokenizer": Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }
    return "Flux2KleinPipeline", parts, {"is_distilled": False}


def _flux2_transformer(**config):
    transformer = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        **config,
    )
    return shake(transformer)


def _flux2_vae():
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    return shake(vae)


def _sana(folder):
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    vocab, merges = learned_words(pre_tokenizers.Metaspace(prepend_scheme="never"), special)
    tokenizer = GemmaTokenizer(vocab, merges, add_bos_token=True)
    transformer = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT,
        sample_size=16,
    )
    language = {**_language(len(tokenizer), 2), "query_pre_attn_scalar": 16}
    levels = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    vae = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=levels,
        decoder_block_types=levels,
        encoder_block_out_channels=(8, 8, 8, 16),
        decoder_block_out_channels=(8, 8, 8, 16),
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)),
        scaling_factor=0.41407,
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    parts = {
        "transformer": shake(transformer),
        "vae": shake(vae),
        "text_encoder": shake(Gemma2Model(Gemma2Config(**language))),
        "tokenizer": tokenizer,
        "scheduler": DPMSolverMultistepScheduler(**flow),
    }
    return "SanaPipeline", parts, {}


def _qwen3(words, layers=3):
    return Qwen3Config(**_language(words, layers))


def _language(words, layers):
    """The settings of a language model."""
    return {
        "hidden_size": TEXT,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": words,
        "max_position_embeddings": 2400,
    }


def _vae(channels, **config):
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        **config,
    )
    return shake(vae)


def _tiny_vae():
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    return shake(vae)


def _clip(words, act="quick_gelu", width=TEXT):
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        vocab_size=words,
        hidden_act=act,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )


def _t5(width):
    config = T5Config(
        d_model=width,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        vocab_size=140,
        feed_forward_proj="gated-gelu",
    )
    return shake(T5EncoderModel(config))


def make_t5_tokenizer():
    letters = [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz,.!"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    vocabulary += [("▁the", -3.0), ("▁cat", -3.5)]
    vocabulary += [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    return T5Tokenizer(vocab=vocabulary, model_max_length=512)


def write_clip_tokenizer(folder, pad="<|endoftext|>"):
    """CLIP's tokenizer over bytes with a few merges; returns how many words it knows."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("o", "n</w>")]
    words = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=LENGTH,
        pad_token=pad,
    ).save_pretrained(folder)
    return len(words)


# The parts of Qwen's own template that text-to-image models use
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


MISTRAL = ["<s>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"]
MISTRAL_CHAT = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content[0].text }}[/INST]"
    "{% else %}{{ m.content[0].text }}{% endif %}{% endfor %}"
)


def write_qwen_tokenizer(folder):
    """Qwen's tokenizer, learned from a few words; returns how many it knows."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = learned_words(pre_tokenizers.ByteLevel(add_prefix_space=False))
    special = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    tokenizer = Qwen2Tokenizer(vocab, merges, chat_template=CHAT, **special)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def learned_words(split, special=()):
    """Words and merges of byte-pair encoding, learned from prompts and instructions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator([*PROMPTS, INSTRUCTION, TEMPLATE, SYSTEM], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


PROMPTS = ("the cat, on a moon!", "", "a very long prompt " * 30)


def write_pairs(path, sizes=(((64, 64), (64, 64)),) * 4, seed=0, **columns):
    """Pairs in Pick-a-Pic's schema with drawn images; ``sizes`` are (width, height) of both.

    ``columns`` replace or add columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = np.random.default_rng(seed)
    n = len(sizes)
    rows = {
        "jpg_0": [picture(draw, *first) for first, _ in sizes],
        "jpg_1": [picture(draw, *second) for _, second in sizes],
        "label_0": [float(i % 2) for i in range(n)],
        "caption": [f"the cat number {i}" for i in range(n)],
        **columns,
    }
    complement = [None if label is None else 1.0 - label for label in rows["label_0"] or []]
    rows.setdefault("label_1", complement or None)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: value for name, value in rows.items() if value is not None})
    pq.write_table(table, path, row_group_size=3)
    return path


def picture(draw, width, height, kind="PNG"):
    """The bytes of an image of soft waves and an edge, so that a shifted pixel shows."""
    import io

    from PIL import Image

    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / draw.uniform(3, 20) + y / draw.uniform(3, 20)) for _ in range(3)]
    pixels = 127 + 100 * np.stack(waves, -1)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = draw.integers(0, 256, 3)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, kind)
    return stream.getvalue()


def images_of(pairs, i):
    """The bytes of pair i's winner and loser."""
    from fifa.data.images import read

    return tuple(data for _, data in read(pairs.image_table, [2 * i, 2 * i + 1]))
