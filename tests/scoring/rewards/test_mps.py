import os
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import PROMPTS, images, shake, write_clip
from transformers import CLIPModel, CLIPTokenizer

from fifa.errors import FifaError
from fifa.scoring.rewards import load_reward, score
from fifa.scoring.rewards.pixels import convert_crop, standardise

WIDTH, HEADS, DEPTH = 24, 2, 2
CONDITION = "light, color, the cat, an on"


def nested(**parts):
    """A module that only holds parts, in a class that is gone when its pickle is read."""
    module = sys.modules["trainer.models"].Part()
    for name, part in parts.items():
        module.add_module(name.lstrip("_"), part)
    return module


def layer():
    nn = torch.nn

    def norm():  # the original's has no bias to learn, but a buffer of zeros
        part = nested()
        part.weight = nn.Parameter(torch.ones(WIDTH))
        part.register_buffer("bias", torch.zeros(WIDTH))
        return part

    def linear(into, out):
        return nn.Linear(into, out, bias=False)

    inner = HEADS * 64
    cross = nested(
        norm=norm(),
        to_q=linear(WIDTH, inner),
        to_kv=linear(WIDTH, 128),
        to_out=linear(inner, WIDTH),
        ff=nn.Sequential(linear(WIDTH, 8 * WIDTH), nn.SiLU(), linear(4 * WIDTH, WIDTH)),
    )
    rotary = nested()
    rotary.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, 64, 2).float() / 64)))
    block = nested(
        norm=norm(),
        rotary_emb=rotary,
        fused_attn_ff_proj=linear(WIDTH, inner + 128 + 8 * WIDTH),
        attn_out=linear(inner, WIDTH),
        ff_out=nn.Sequential(nn.SiLU(), linear(4 * WIDTH, WIDTH)),
    )
    block.register_buffer("pos_emb", torch.zeros(3, 64), persistent=False)
    return torch.nn.ModuleList([nested(fn=cross), nested(fn=block)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A module pickled whole, as the original's, with classes that cannot be imported again."""
    folder = tmp_path_factory.mktemp("mps")
    towers = {"hidden_size": 128, "hidden_act": "gelu"}  # the activation of laion's ViT-H-14
    clip = write_clip(folder / "clip", projection=WIDTH, **towers)
    with (
        torch.no_grad()
    ):  # a few directions weigh most, and tokens differ in them: masks have holes
        ids = torch.arange(77)[None] % 26 + 65
        mean = clip.text_model(input_ids=ids).last_hidden_state[0].mean(0)
        rows = clip.text_projection.weight
        rows -= torch.outer(rows @ mean, mean) / (mean @ mean)
        rows[:3] *= 8
    clip.save_pretrained(folder / "clip")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((folder / "clip" / name).read_bytes())
    (folder / "condition.txt").write_text(CONDITION + "\n")
    package = types.ModuleType("trainer.models")
    package.Part = type("Part", (torch.nn.Module,), {"__module__": "trainer.models"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "trainer", types.ModuleType("trainer"))
        patch.setitem(sys.modules, "trainer.models", package)
        layers = torch.nn.ModuleList(layer() for _ in range(DEPTH))
        module = nested(model=clip, cross_model=nested(layers=shake(layers, 3)))
        torch.save(module, folder / "MPS_overall_checkpoint.pth")
    return folder, module.state_dict()


def original(folder, state, clip, prompt, picture):
    """infer_one_sample of Kwai-Kolors/MPS: one prompt, one image."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")

    def read(text):
        ids = tokenizer(
            text, max_length=77, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        out = clip.text_model(input_ids=ids)
        return clip.text_projection(out.last_hidden_state), clip.text_projection(out.pooler_output)

    def norm(b, x):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], w(f"{b}.norm.weight"))

    def w(name):
        return state[f"cross_model.layers.{name}"]

    def swiglu(x):
        x, gate = x.chunk(2, -1)
        return gate * torch.sigmoid(gate) * x

    def attend(q, k, v, bias):
        similar = torch.einsum("b h i d, b j d -> b h i j", q * 64**-0.5, k) + bias
        similar = similar - similar.amax(-1, keepdim=True)
        out = torch.einsum("b h i j, b j d -> b h i d", similar.softmax(-1), v)
        return out.transpose(1, 2).flatten(2)

    def heads(q):
        return q.reshape(*q.shape[:2], HEADS, 64).transpose(1, 2)

    def turned(x):
        inverse = 1.0 / (10000 ** (torch.arange(0, 64, 2).float() / 64))
        angles = torch.outer(torch.arange(x.shape[-2]).float(), inverse).repeat(1, 2)
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    with torch.no_grad():
        text, whole = read(prompt)
        condition, _ = read(CONDITION)
        pixels = standardise(torch.from_numpy(convert_crop(picture, 224))[None])
        x = clip.visual_projection(clip.vision_model(pixel_values=pixels).last_hidden_state)
        like = torch.einsum("b i d, b j d -> b j i", text, condition).max(1, keepdim=True)[0]
        bias = torch.where(like / like.max() > 0.3, 0.0, float("-inf"))[:, None]
        seen = int(bias.isfinite().sum())
        for i in range(DEPTH):
            b = f"{i}.0.fn"
            y = norm(b, x)
            k, v = (text @ w(f"{b}.to_kv.weight").T).chunk(2, -1)
            out = attend(heads(y @ w(f"{b}.to_q.weight").T), k, v, bias) @ w(f"{b}.to_out.weight").T
            x = x + out + swiglu(y @ w(f"{b}.ff.0.weight").T) @ w(f"{b}.ff.2.weight").T
            b = f"{i}.1.fn"
            fused = norm(b, x) @ w(f"{b}.fused_attn_ff_proj.weight").T
            q, k, v, feed = fused.split((HEADS * 64, 64, 64, 8 * WIDTH), -1)
            out = attend(turned(heads(q)), turned(k), v, 0) @ w(f"{b}.attn_out.weight").T
            x = x + out + swiglu(feed) @ w(f"{b}.ff_out.1.weight").T
        image = x[:, 0] / x[:, 0].norm(dim=-1, keepdim=True)
        whole = whole / whole.norm(dim=-1, keepdim=True)
        return (clip.logit_scale.exp() * whole @ image.T).item(), seen


def test_it_is_the_originals_arithmetic(checkpoint):
    pictures = [images()[i] for i in (0, 2, 6, 8, 3, 9)]
    clip = CLIPModel.from_pretrained(checkpoint[0] / "clip").eval()
    found = [original(*checkpoint, clip, p, i) for p, i in zip(PROMPTS, pictures, strict=True)]
    theirs = np.array([reward for reward, _ in found])
    assert len({seen for _, seen in found}) > 2  # prompts are seen through masks that differ
    model = load_reward(f"mps:{checkpoint[0]}", device="cpu")
    alone = [score(model, [p], [i])[0] for p, i in zip(PROMPTS, pictures, strict=True)]
    assert np.abs(theirs - alone).max() < 1e-5 * 97
    assert theirs.std() > 1
    assert np.abs(score(model, PROMPTS, pictures) - theirs).max() < 1e-5 * 97
    # a prompt that comes again, beside others
    again = score(model, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], [pictures[0], *pictures[:2]])
    assert again[0] == pytest.approx(theirs[0], abs=1e-3)
    features = model.prompt_features(PROMPTS)
    assert features.shape == (6, 77) and model.prompt_features([]).shape == (0, 77)


def test_safetensors_of_the_port_and_other_precisions(checkpoint, tmp_path):
    folder, state = checkpoint
    for name in ("tokenizer.json", "tokenizer_config.json", "condition.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tensors = {f"mps.{key}": tensor.contiguous() for key, tensor in state.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    pictures, prompts = images()[:3], PROMPTS[:3]
    plain = load_reward(f"mps:{folder}", device="cpu")
    rewards = score(plain, prompts, pictures)
    port = load_reward(f"mps:{tmp_path}", device="cpu", channels_last=True)
    assert np.abs(score(port, prompts, pictures) - rewards).max() < 1e-3
    half = load_reward(f"mps:{tmp_path}", device="cpu", dtype="bfloat16")
    assert 0 < np.abs(score(half, prompts, pictures) - rewards).max() < 0.1 * 97
    (tmp_path / "condition.txt").unlink()  # the published one
    other = load_reward(f"mps:{tmp_path}", device="cpu")
    assert "things." in other.identity["preprocessing"]
    assert np.abs(score(other, prompts, pictures) - rewards).max() > 1e-3


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


class Harder:
    def __reduce__(self):
        return eval, ("__import__('os').mkdir('harmed')",)


def test_no_code_of_a_checkpoint_is_run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint[0] / name).read_bytes())
    round_trip = torch.nn.Linear(1, 1)
    round_trip.add_module("itself", round_trip)
    for number, (harm, told) in enumerate(
        (
            (Harm(), "cannot read the weights"),
            (Harder(), "cannot read the weights"),
            ({"state_dict": Harder()}, "no tensors in the file"),
            ([torch.zeros(1)], "no tensors in the file"),
            ({3: torch.zeros(1)}, "no tensors in the file"),
            (
                round_trip,
                r"2 missing \(cross_model\.layers\., model\.\); 2 unused \(bias, weight\)",
            ),
        )
    ):
        file = tmp_path / f"{number}.pth"
        torch.save(harm, file)
        model = load_reward(f"mps:{file}", device="cpu")
        with pytest.raises(FifaError, match=told):
            model.image_features(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    assert not (tmp_path / "harmed").exists()


def test_weights_that_do_not_fit_are_named(checkpoint, tmp_path):
    folder, state = checkpoint
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    at = "cross_model.layers.1.1.fn"
    for change, without, said in (
        ({"head.weight": torch.zeros(1)}, "none", "1 unused (head.weight)"),
        ({f"{at}.other": torch.zeros(1)}, "none", "1 unused (1.1.other)"),
        ({}, f"{at}.attn_out.weight", "1 missing (1.1.attn_out.weight)"),
        ({}, "model.visual_projection.weight", "1 missing (visual_projection.weight)"),
        ({f"{at}.attn_out.weight": torch.zeros(3, 3)}, "none", "do not fit: size mismatch"),
    ):
        left = {k: v for k, v in (state | change).items() if k != without}
        torch.save(left, tmp_path / "MPS_overall_checkpoint.pth")
        model = load_reward(f"mps:{tmp_path}", device="cpu")
        with pytest.raises(FifaError) as error:
            score(model, ["a"], [Image.new("RGB", (9, 9))])
        assert said in str(error.value)
