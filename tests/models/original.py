"""Small models of diffusers' layout in one file, in the names that their authors use."""

import re

import torch
from safetensors.torch import load_file, save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "final_layer_norm": "ln_final",
}


BLOCK = r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)(?:\.conv(?=\.))?"


def renamed(name, names):
    for new, old in names.items():
        name = name.replace(new, old)
    return name


def unet(weights):
    """The UNet's, whose blocks have one resnet each on the way down and two on the way up."""
    attended = {
        n.partition(".attentions")[0] for n in weights if "up_blocks" in n and "attent" in n
    }

    def block(found):
        way, i, kind, j = found[1], int(found[2]), found[3], int(found[4])
        each = 2  # a resnet and a downsampler; two resnets
        if kind == "downsamplers":
            return f"input_blocks.{each * (i + 1)}.0.op"
        if kind == "upsamplers":
            at = 2 if f"up_blocks.{i}" in attended else 1
            return f"output_blocks.{each * i + 1}.{at}.conv"
        inner = 0 if kind == "resnets" else 1
        if way == "down":
            return f"input_blocks.{each * i + j + 1}.{inner}"
        return f"output_blocks.{each * i + j}.{inner}"

    made = {}
    for name, value in weights.items():
        new = re.sub(
            r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)(?:\.conv(?=\.))?", block, renamed(name, UNET)
        )
        if "resnets" in name:
            new = renamed(new, RESNET)
        made[f"model.diffusion_model.{new}"] = value
    return made


def vae(weights, prefix="first_stage_model."):
    made = {}
    for name, value in weights.items():
        new = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{3 - int(m[1])}.block.", new)
        new = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", new
        )
        new = renamed(new, VAE)
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", new):
            value = value[..., None, None]  # convolutions of one pixel
        made[prefix + new] = value
    return made


def clip(weights, prefix):
    inner = any(name.startswith("text_model.") for name in weights)
    return {prefix + ("" if inner else "text_model.") + name: v for name, v in weights.items()}


def open_clip(weights, prefix):
    made, fused = {}, {}
    for name, value in weights.items():
        new = renamed(name.removeprefix("text_model."), OPEN_CLIP)
        if found := re.match(r"(.*\.attn)\.([qkv])_proj\.(\w+)", new):
            fused.setdefault(f"{found[1]}.in_proj_{found[3]}", {})[found[2]] = value
        elif new == "text_projection.weight":
            made["text_projection"] = value.T
        else:
            made[new] = value
    made |= {name: torch.cat([parts[k] for k in "qkv"]) for name, parts in fused.items()}
    return {prefix + name: value for name, value in made.items()}


SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.add_q_proj": "context_block.attn.qkv.q",
    "attn.add_k_proj": "context_block.attn.qkv.k",
    "attn.add_v_proj": "context_block.attn.qkv.v",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "transformer_blocks": "joint_blocks",
}
SD3_OWN = {"norm_q": "ln_q", "norm_k": "ln_k", "to_out.0": "proj"}
SD3_OWN |= {f"to_{letter}": f"qkv.{letter}" for letter in "qkv"}


def sd3(weights):
    """The transformer's; scale and shift change places in the last norms."""
    last = max(int(n.split(".")[1]) for n in weights if n.startswith("transformer_blocks"))
    made = {}
    for name, value in weights.items():
        new = renamed(name, SD3)
        if found := re.match(r"(joint_blocks\.\d+)\.(attn2?)\.(.*)", new):
            new = f"{found[1]}.x_block.{found[2]}.{renamed(found[3], SD3_OWN)}"
        if name.startswith(("norm_out", f"transformer_blocks.{last}.norm1_context")):
            value = torch.cat(value.chunk(2)[::-1])
        made[new] = value
    return prefixed(joined(made))


ZIMAGE = {
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    "attention.to_out.0": "attention.out",
    "attention.norm_k": "attention.k_norm",
    "attention.norm_q": "attention.q_norm",
    "attention.to_": "attention.qkv.",
}
FLUX2 = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_out": "linear2",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_": "img_attn.qkv.",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
    "single_transformer_blocks": "single_blocks",
    "transformer_blocks": "double_blocks",
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "modulation_img.linear": "modulation_img.lin",
    "modulation_txt.linear": "modulation_txt.lin",
    "modulation.linear": "modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}


def zimage(weights):
    """The transformer's, whose queries, keys and values are one matrix."""
    return joined({renamed(name, ZIMAGE): value for name, value in weights.items()})


def flux2(weights):
    """The transformer's, klein's too; scale and shift change places in the last norm."""
    made = {}
    for name, value in weights.items():
        new = re.sub(r"attn\.add_([qkv])_proj", r"txt_attn.qkv.\1", name)
        if name.startswith("norm_out"):
            value = torch.cat(value.chunk(2)[::-1])
        attention = "norm" if name.startswith("single") else "img_attn.norm"
        new = new.replace("attn.norm_q", f"{attention}.query_norm")
        new = renamed(new.replace("attn.norm_k", f"{attention}.key_norm"), FLUX2)
        made[re.sub(r"(query|key)_norm\.weight", r"\1_norm.scale", new)] = value
    return joined(made)


def joined(weights):
    """Weights of ``qkv.q``, ``qkv.k`` and ``qkv.v`` as one."""
    made, fused = {}, {}
    for name, value in weights.items():
        if found := re.match(r"(.*\.qkv)\.([qkv])\.(\w+)", name):
            fused.setdefault(f"{found[1]}.{found[3]}", {})[found[2]] = value
        else:
            made[name] = value
    return made | {name: torch.cat([parts[k] for k in "qkv"]) for name, parts in fused.items()}


def prefixed(weights):
    """As ComfyUI saves a denoiser."""
    return {f"model.diffusion_model.{name}": value for name, value in weights.items()}


def parts_of(folder):
    """The weights of a model's networks."""
    return {file.parent.name: load_file(file) for file in folder.glob("*/*.safetensors")}


def write_file(folder, file, kind, half=False, but=()):
    """One file of the model in ``folder``: ``sd15``, ``zimage``, or another one below."""
    parts = parts_of(folder)
    make = {
        "sd15": {
            "unet": unet,
            "vae": vae,
            "text_encoder": lambda w: clip(w, "cond_stage_model.transformer."),
        },
        "sd2": {
            "unet": unet,
            "vae": vae,
            "text_encoder": lambda w: open_clip(w, "cond_stage_model.model."),
        },
        "sdxl": {
            "unet": unet,
            "vae": vae,
            "text_encoder": lambda w: clip(w, "conditioner.embedders.0.transformer."),
            "text_encoder_2": lambda w: open_clip(w, "conditioner.embedders.1.model."),
        },
        "sd3": {"transformer": sd3, "vae": vae},
        # its conversion knows widths of 3,072 only; the file has what FLUX's usually has
        "flux-dev": {"transformer": dict},
        "zimage": {"transformer": zimage},
        "flux2": {"transformer": flux2},
        "comfy": {"transformer": lambda w: prefixed(flux2(w))},
        "alone": {"transformer": prefixed},
    }[kind]
    made = {}
    for part, convert in make.items():
        if part not in but:
            made |= convert(parts[part])
    kept = torch.float16 if half else torch.float32
    save_file({name: value.to(kept).contiguous() for name, value in made.items()}, file)
    return file
