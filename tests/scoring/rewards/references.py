"""Forward passes written from the originals' sources in plain torch, over their own names."""

import torch
import torch.nn.functional as F


def norm(w, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attend(q, k, v, heads, mask=None):
    """Scaled dot products by hand; q, k, v [b, t, d]."""
    split = [t.reshape(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v)]
    scores = split[0] @ split[1].transpose(-1, -2) / split[0].shape[-1] ** 0.5
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return (weights @ split[2]).transpose(1, 2).flatten(2)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def open_clip_blocks(w, name, x, heads, mask, act):
    """open_clip's ResidualAttentionBlock, as often as it is there."""
    i = 0
    while f"{name}.{i}.ln_1.weight" in w:
        b = f"{name}.{i}"
        y = norm(w, f"{b}.ln_1", x)
        qkv = y @ w[f"{b}.attn.in_proj_weight"].T + w[f"{b}.attn.in_proj_bias"]
        x = x + linear(w, f"{b}.attn.out_proj", attend(*qkv.chunk(3, -1), heads, mask))
        y = act(linear(w, f"{b}.mlp.c_fc", norm(w, f"{b}.ln_2", x)))
        x = x + linear(w, f"{b}.mlp.c_proj", y)
        i += 1
    return x


def open_clip_text(w, ids, heads, act=gelu):
    """CLIP.encode_text of hpsv2 1.2.0: causal, pooled at the highest id."""
    t = ids.shape[1]
    mask = torch.full((t, t), float("-inf")).triu(1)
    x = w["token_embedding.weight"][ids] + w["positional_embedding"][:t]
    x = norm(w, "ln_final", open_clip_blocks(w, "transformer.resblocks", x, heads, mask, act))
    return x[torch.arange(len(x)), ids.argmax(-1)] @ w["text_projection"]


def open_clip_image(w, pixels, heads, act=gelu):
    """VisionTransformer.forward of hpsv2 1.2.0."""
    kernel = w["visual.conv1.weight"]
    x = F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(w, "visual.ln_pre", x + w["visual.positional_embedding"])
    x = open_clip_blocks(w, "visual.transformer.resblocks", x, heads, None, act)
    return norm(w, "visual.ln_post", x[:, 0]) @ w["visual.proj"]


def linear_stack(w, prefix, x):
    for i in (0, 2, 4, 6, 7):
        x = linear(w, f"{prefix}.{i}", x)
    return x


def blip_image(w, pixels, heads):
    """VisionTransformer.forward of ImageReward 1.5 (timm's, LayerNorm with eps 1e-6)."""
    n = "blip.visual_encoder"
    x = F.conv2d(
        pixels, w[f"{n}.patch_embed.proj.weight"], w[f"{n}.patch_embed.proj.bias"], stride=16
    )
    x = torch.cat([w[f"{n}.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + w[f"{n}.pos_embed"]
    i = 0
    while f"{n}.blocks.{i}.norm1.weight" in w:
        b = f"{n}.blocks.{i}"
        qkv = linear(w, f"{b}.attn.qkv", norm(w, f"{b}.norm1", x, 1e-6))
        x = x + linear(w, f"{b}.attn.proj", attend(*qkv.chunk(3, -1), heads))
        y = gelu(linear(w, f"{b}.mlp.fc1", norm(w, f"{b}.norm2", x, 1e-6)))
        x = x + linear(w, f"{b}.mlp.fc2", y)
        i += 1
    return norm(w, f"{n}.norm", x, 1e-6)


def blip_text(w, ids, mask, states, heads):
    """BertModel.forward of ImageReward 1.5, mode 'multimodal'; returns token states."""
    n = "blip.text_encoder"

    def attention(b, x, source, bias):
        parts = [linear(w, f"{b}.self.{p}", s) for p, s in (("query", x), ("key", source))]
        out = attend(*parts, linear(w, f"{b}.self.value", source), heads, bias)
        return norm(w, f"{b}.output.LayerNorm", linear(w, f"{b}.output.dense", out) + x, 1e-12)

    e = f"{n}.embeddings"
    x = w[f"{e}.word_embeddings.weight"][ids]
    x = x + w[f"{e}.position_embeddings.weight"][: ids.shape[1]]
    x = norm(w, f"{e}.LayerNorm", x, 1e-12)
    bias = (1 - mask[:, None, None].float()) * -10000.0
    i = 0
    while f"{n}.encoder.layer.{i}.intermediate.dense.weight" in w:
        b = f"{n}.encoder.layer.{i}"
        x = attention(f"{b}.attention", x, x, bias)
        x = attention(f"{b}.crossattention", x, states, None)
        y = gelu(linear(w, f"{b}.intermediate.dense", x))
        x = norm(w, f"{b}.output.LayerNorm", linear(w, f"{b}.output.dense", y) + x, 1e-12)
        i += 1
    return x


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def qwen_vision(w, patches, h, w_, heads):
    """Qwen2VisionTransformer of transformers 4.45 for one image, after model.to(bfloat16)'s
    rounding of its rotary angles; patches are in blocks of 2 x 2."""
    x = patches @ w["visual.patch_embed.proj.weight"].flatten(1).T
    rows = torch.arange(h)[:, None].expand(h, w_)
    columns = torch.arange(w_)[None].expand(h, w_)
    place = torch.stack([rows, columns], -1).reshape(h // 2, 2, w_ // 2, 2, 2)
    place = place.permute(0, 2, 1, 3, 4).reshape(-1, 2)
    d = x.shape[-1] // heads
    inverse = 1.0 / (10000.0 ** (torch.arange(0, d // 2, 2).float() / (d // 2)))
    table = torch.outer(torch.arange(max(h, w_)).bfloat16(), inverse.bfloat16())
    angles = table[place].flatten(1)
    cos, sin = (t.repeat(1, 2).float()[:, None] for t in (angles.cos(), angles.sin()))
    i = 0
    while f"visual.blocks.{i}.norm1.weight" in w:
        b = f"visual.blocks.{i}"
        qkv = linear(w, f"{b}.attn.qkv", norm(w, f"{b}.norm1", x, 1e-6))
        q, k, v = qkv.reshape(len(x), 3, heads, d).unbind(1)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        out = attend(*(t.reshape(1, len(x), -1) for t in (q, k, v)), heads)[0]
        x = x + linear(w, f"{b}.attn.proj", out)
        y = quick_gelu(linear(w, f"{b}.mlp.fc1", norm(w, f"{b}.norm2", x, 1e-6)))
        x = x + linear(w, f"{b}.mlp.fc2", y)
        i += 1
    x = norm(w, "visual.merger.ln_q", x, 1e-6).reshape(-1, 4 * x.shape[-1])
    return linear(w, "visual.merger.mlp.2", gelu(linear(w, "visual.merger.mlp.0", x)))


def rms(w, name, x, eps=1e-6):
    return w[f"{name}.weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def qwen_text(w, x, heads, kv_heads, theta):
    """Qwen2VLModel of transformers 4.45 for one sequence [t, d] whose positions just count, with
    rotary frequencies in bfloat16."""
    t, d = len(x), x.shape[-1] // heads
    inverse = 1.0 / (theta ** (torch.arange(0, d, 2).float() / d))
    angles = torch.outer(torch.arange(t).float(), inverse.bfloat16().float())
    angles = torch.cat([angles, angles], -1)[:, None]
    cos, sin = angles.cos(), angles.sin()
    mask = torch.full((t, t), float("-inf")).triu(1)
    i = 0
    while f"model.layers.{i}.input_layernorm.weight" in w:
        b = f"model.layers.{i}"
        y = rms(w, f"{b}.input_layernorm", x)
        q = linear(w, f"{b}.self_attn.q_proj", y).reshape(t, heads, d)
        k = linear(w, f"{b}.self_attn.k_proj", y).reshape(t, kv_heads, d)
        v = linear(w, f"{b}.self_attn.v_proj", y).reshape(t, kv_heads, d)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = (s.repeat_interleave(heads // kv_heads, 1) for s in (k, v))
        out = attend(*(s.reshape(1, t, -1) for s in (q, k, v)), heads, mask)[0]
        x = x + out @ w[f"{b}.self_attn.o_proj.weight"].T
        y = rms(w, f"{b}.post_attention_layernorm", x)
        gate = F.silu(y @ w[f"{b}.mlp.gate_proj.weight"].T)
        x = x + (gate * (y @ w[f"{b}.mlp.up_proj.weight"].T)) @ w[f"{b}.mlp.down_proj.weight"].T
        i += 1
    return rms(w, "model.norm", x)


def qwen3_vision(w, patches, h, w_, heads, inner):
    """Qwen3VLVisionModel of transformers 4.57 for one image: the last layer's tokens and those of
    the ``inner`` layers. Rotary angles in bfloat16, as model.to(bfloat16) rounds them."""
    v = "model.visual"
    x = patches @ w[f"{v}.patch_embed.proj.weight"].flatten(1).T + w[f"{v}.patch_embed.proj.bias"]
    rows = torch.arange(h)[:, None].expand(h, w_)
    columns = torch.arange(w_)[None].expand(h, w_)
    place = torch.stack([rows, columns], -1).reshape(h // 2, 2, w_ // 2, 2, 2)
    place = place.permute(0, 2, 1, 3, 4).reshape(-1, 2)
    # a square table of positions, stretched over the image corner to corner
    table = w[f"{v}.pos_embed.weight"]
    side = round(len(table) ** 0.5)
    grid = table.T.reshape(1, -1, side, side)
    grid = F.interpolate(grid, (h, w_), mode="bilinear", align_corners=True)[0]
    x = x + grid[:, place[:, 0], place[:, 1]].T
    d = x.shape[-1] // heads
    inverse = 1.0 / (10000.0 ** (torch.arange(0, d // 2, 2).float() / (d // 2)))
    table = torch.outer(torch.arange(max(h, w_)).bfloat16(), inverse.bfloat16())
    angles = table[place].flatten(1)
    cos, sin = (t.repeat(1, 2).float()[:, None] for t in (angles.cos(), angles.sin()))

    def merged(name, x, first):
        groups = x.reshape(-1, 4 * x.shape[-1])
        x = norm(w, f"{name}.norm", x, 1e-6).reshape(groups.shape) if first else groups
        x = x if first else norm(w, f"{name}.norm", x, 1e-6)
        return linear(w, f"{name}.linear_fc2", gelu(linear(w, f"{name}.linear_fc1", x)))

    i, deep = 0, []
    while f"{v}.blocks.{i}.norm1.weight" in w:
        b = f"{v}.blocks.{i}"
        qkv = linear(w, f"{b}.attn.qkv", norm(w, f"{b}.norm1", x, 1e-6))
        q, k, u = qkv.reshape(len(x), 3, heads, d).unbind(1)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        out = attend(*(t.reshape(1, len(x), -1) for t in (q, k, u)), heads)[0]
        x = x + linear(w, f"{b}.attn.proj", out)
        y = linear(w, f"{b}.mlp.linear_fc1", norm(w, f"{b}.norm2", x, 1e-6))
        tanh = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
        x = x + linear(w, f"{b}.mlp.linear_fc2", tanh)
        if i in inner:
            deep.append(merged(f"{v}.deepstack_merger_list.{inner.index(i)}", x, False))
        i += 1
    return merged(f"{v}.merger", x, True), deep


def qwen3_text(w, x, positions, image, deep, heads, kv_heads, theta, sections):
    """Qwen3VLTextModel of transformers 4.57 for one sequence [t, d] at ``positions`` [3, t]."""
    t, m = len(x), "model.language_model"
    d = w[f"{m}.layers.0.self_attn.q_norm.weight"].shape[0]
    inverse = 1.0 / (theta ** (torch.arange(0, d, 2).float() / d))
    each = positions[..., None].float() * inverse.bfloat16().float()
    angles = each[0].clone()
    for number in range(d // 2):  # time, height, width, time, ... as long as a section lasts
        axis = number % 3
        if axis and number < 3 * sections[axis]:
            angles[:, number] = each[axis, :, number]
    angles = torch.cat([angles, angles], -1)[:, None]
    cos, sin = angles.cos(), angles.sin()
    mask = torch.full((t, t), float("-inf")).triu(1)
    i = 0
    while f"{m}.layers.{i}.input_layernorm.weight" in w:
        b = f"{m}.layers.{i}"
        y = rms(w, f"{b}.input_layernorm", x)
        q, k, v = (
            (y @ w[f"{b}.self_attn.{p}_proj.weight"].T).reshape(t, n, d)
            for p, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rms(w, f"{b}.self_attn.q_norm", q), rms(w, f"{b}.self_attn.k_norm", k)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = (s.repeat_interleave(heads // kv_heads, 1) for s in (k, v))
        out = attend(*(s.reshape(1, t, -1) for s in (q, k, v)), heads, mask)[0]
        x = x + out @ w[f"{b}.self_attn.o_proj.weight"].T
        y = rms(w, f"{b}.post_attention_layernorm", x)
        gate = F.silu(y @ w[f"{b}.mlp.gate_proj.weight"].T)
        x = x + (gate * (y @ w[f"{b}.mlp.up_proj.weight"].T)) @ w[f"{b}.mlp.down_proj.weight"].T
        if i < len(deep):
            x = x.clone()
            x[image] += deep[i]
        i += 1
    return rms(w, f"{m}.norm", x)
