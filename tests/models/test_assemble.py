"""What people have on disk becomes the model it was made of, and what is none is told."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from original import parts_of, vae, write_file
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fifa.config import Convert, Generate, Train
from fifa.errors import FifaError
from fifa.evaluation.models import find_models
from fifa.models.assemble import assembled, convert
from fifa.training.backbones import load_backbone
from neighbours import helper

write_model = helper("training", "tiny_diffusion").write_model
# Kind, the kind of its file, and what the file lacks
FILES = (
    ("sd15", "sd15", ()),
    ("sd2", "sd2", ()),
    ("sdxl-wide", "sdxl", ()),
    ("sd3", "sd3", ("text_encoder", "text_encoder_2", "text_encoder_3")),
    ("flux-dev", "flux-dev", ("vae", "text_encoder", "text_encoder_2")),
    ("zimage", "zimage", ("vae", "text_encoder")),
    ("flux2", "flux2", ("vae", "text_encoder")),
    ("klein", "comfy", ("vae", "text_encoder")),
    ("qwenimage", "alone", ("vae", "text_encoder")),
    ("sana", "alone", ("vae", "text_encoder")),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models by kind, in diffusers' layout."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(folder / kind, kind) for kind, *_ in FILES}


def without_weights(folder, out, but=()):
    """The model's settings and tokenizers, and the weights of some parts."""

    def weights(place, names):
        part = place.rpartition("/")[2]
        return [n for n in names if n.endswith(".safetensors") and part not in but]

    return shutil.copytree(folder, out, ignore=weights)


def same(one, other):
    assert one.keys() == other.keys()
    for part in one:
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())


@pytest.fixture(scope="module")
def files(made, tmp_path_factory):
    """By kind, the model in one file, and a folder of what the file lacks."""
    place = tmp_path_factory.mktemp("files")
    return {
        kind: (
            str(write_file(made[kind], place / f"{kind}.safetensors", layout)),
            str(without_weights(made[kind], place / kind, but=lacks)),
        )
        for kind, layout, lacks in FILES
    }


def test_a_single_file_is_the_model_it_was_made_of(made, files, tmp_path):
    for kind, (file, parts) in files.items():
        folder = assembled(file, Train(parts=parts))
        same(parts_of(folder), parts_of(made[kind]))
        load_backbone(folder).rehearse(64)
        assert assembled(file, Generate(parts=parts)) == folder
    # it is named by its content, and so are the images of it
    base, *_ = find_models(file, {}, Generate(parts=parts))
    shutil.copy(file, tmp_path / "moved.safetensors")
    again, *_ = find_models(str(tmp_path / "moved.safetensors"), {}, Generate(parts=parts))
    assert base.weights == again.weights
    half = write_file(made["sd15"], tmp_path / "half.safetensors", "sd15", half=True)
    halved = parts_of(assembled(str(half), Train(parts=files["sd15"][1])))
    assert {value.dtype for value in halved["unet"].values()} == {torch.float16}


def test_a_folder_is_written_once_for_all(files, made, tmp_path):
    file, parts = files["sd15"]
    out = convert(Convert(source=file, parts=parts), tmp_path / "whole")
    assert not any(path.is_symlink() for path in out.rglob("*"))
    same(parts_of(out), parts_of(made["sd15"]))
    with pytest.raises(FifaError, match="not empty"):
        convert(Convert(source=file, parts=parts), out)


def test_copies_of_a_variant_are_taken_where_there_are_any(made, tmp_path):
    full = made["sd15"]
    folder = shutil.copytree(full, tmp_path / "model")
    pipe = DiffusionPipeline.from_pretrained(full, dtype=torch.float16)
    # beside the full weights; the UNet's in shards
    pipe.vae.save_pretrained(folder / "vae", variant="fp16")
    pipe.unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="60KB")
    assert len(list((folder / "unet").glob("*fp16-*"))) > 1
    plain = load_backbone(assembled(str(folder), Train()))
    half = load_backbone(assembled(str(folder), Train(variant="fp16")))
    for wanted, found in ((full, plain), (pipe, half)):
        unet = wanted.unet if wanted is pipe else load_backbone(full).denoiser
        for name, value in unet.state_dict().items():
            assert torch.equal(found.denoiser.state_dict()[name], value.float())
    assert half.vae.network.encoder.conv_in.weight.dtype == torch.float32
    assert half.encoders["vae"] != plain.encoders["vae"]  # in the names of what is cached
    assert half.encoders["text_encoder"] == plain.encoders["text_encoder"]


def with_tiny_vae(base, tmp_path):
    """The model, whose VAE says that it is of a class that diffusers reads from folders only."""
    folder = shutil.copytree(base, tmp_path / "tiny")
    settings = json.loads((folder / "vae" / "config.json").read_text())
    settings["_class_name"] = "AutoencoderTiny"
    (folder / "vae" / "config.json").write_text(json.dumps(settings))
    return folder


def test_another_vae_takes_the_place_of_the_models(made, tmp_path):
    base, other = made["sd15"], write_model(tmp_path / "other", "sd15", seed=7)
    file = tmp_path / "vae.safetensors"
    weights = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({k: v.contiguous() for k, v in vae(weights, "").items()}, file)
    wanted = parts_of(base) | {"vae": parts_of(other)["vae"]}
    for source in (other, other / "vae", file):
        folder = assembled(str(base), Train(vae=str(source)))
        same(parts_of(folder), wanted)
        assert load_backbone(folder).encoders != load_backbone(base).encoders
    with pytest.raises(
        FifaError, match=r"reads no AutoencoderTiny from a single file[\s\S]*folder"
    ):
        assembled(str(with_tiny_vae(base, tmp_path)), Train(vae=str(file)))


def write_lora(base, folder, part="unet", alpha=1, targets=("to_q", "to_v")):
    """A LoRA of rank 2 on a part, as diffusers' trainers write it."""
    pipe = DiffusionPipeline.from_pretrained(base, safety_checker=None)
    network = getattr(pipe, part)
    network.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=list(targets)))
    draw = torch.Generator().manual_seed(3)
    state = get_peft_model_state_dict(network, adapter_name="default")
    state = {name: torch.randn(v.shape, generator=draw) for name, v in state.items()}
    known = {"r": 2, "lora_alpha": alpha, "target_modules": list(targets)}
    given = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": known}
    type(pipe).save_lora_weights(folder, **given)
    return folder


def draw(folder, lora=None):
    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    return pipe("the cat", generator=generator, **options).images[0]


def test_a_lora_to_start_from_is_in_the_base(made, tmp_path):
    for kind, part, targets in (
        ("sd15", "unet", ("to_q", "to_v")),
        ("sdxl-wide", "text_encoder", ("q_proj", "v_proj")),
    ):
        lora = write_lora(made[kind], tmp_path / kind, part, 1, targets)
        before = parts_of(made[kind])
        folder = assembled(str(made[kind]), Train(init_lora=str(lora)))
        same(parts_of(made[kind]), before)
        after = parts_of(folder)
        changed = {
            p for p in after if any(not torch.equal(v, before[p][n]) for n, v in after[p].items())
        }
        assert changed == {part}
        assert np.abs(draw(made[kind], lora) - draw(folder)).max() < 1e-5


def test_web_uis_files_load_back_as_the_same_lora(made, tmp_path):
    for kind, part in (("sdxl-wide", "unet"), ("flux-dev", "transformer")):
        lora = write_lora(made[kind], tmp_path / kind, part, alpha=3)
        (tmp_path / "ui").mkdir(exist_ok=True)
        file = tmp_path / "ui" / f"{kind}.safetensors"
        assert convert(Convert(source=str(lora), layout="kohya"), file) == file
        # not a setting that only diffusers reads
        names = load_file(file)
        prefix = "lora_unet_" if part == "unet" else "transformer."
        assert all(name.startswith(prefix) for name in names)
        wanted = draw(made[kind], lora)
        assert np.abs(draw(made[kind]) - wanted).max() > 1e-3
        assert np.abs(draw(made[kind], file) - wanted).max() < 1e-4


def test_what_is_no_model_or_does_not_fit_is_told(made, files, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    sd, sd_parts = files["sd15"]
    lora = str(write_lora(made["sd15"], tmp_path / "lora") / "pytorch_lora_weights.safetensors")
    foreign = str(write_lora(made["sdxl-wide"], tmp_path / "foreign"))
    flux = str(without_weights(made["flux-dev"], tmp_path / "flux"))
    few = write_file(made["sd15"], tmp_path / "few.safetensors", "sd15", but=("text_encoder",))
    cut = load_file(sd)
    cut.pop("model.diffusion_model.out.2.weight")
    save_file(cut, tmp_path / "cut.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08" * 64)
    (tmp_path / "empty.safetensors").touch()
    scaled = load_file(files["zimage"][0])  # in 8 bits with scales, as ComfyUI has them
    save_file(scaled | {"x_embedder.scale_weight": torch.ones(1)}, tmp_path / "scaled.safetensors")
    quantised = shutil.copytree(made["klein"], tmp_path / "quantised")
    settings = quantised / "transformer" / "config.json"
    method = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | method))
    (tmp_path / "model.ckpt").touch()
    unet = str(made["sd15"] / "unet" / "diffusion_pytorch_model.safetensors")
    base = str(made["sd15"])
    for model, asked, words in (
        (
            sd,
            {"parts": files["sdxl-wide"][1]},
            "cannot load a SDXL model in one file|lacks weights",
        ),
        (sd, {"parts": flux}, "FLUX model in one file"),
        (sd, {"parts": str(tmp_path / "gone")}, "no such model"),
        (sd, {"parts": str(tmp_path / "lora")}, "index of the parts"),
        (sd, {"parts": sd_parts, "variant": "fp16"}, "single file has no variants"),
        (sd, {}, r"stable-diffusion-v1-5 cannot be had[\s\S]*--parts"),
        (unet, {}, "no layout that diffusers knows"),
        (lora, {}, r"a LoRA is no model[\s\S]*--init-lora"),
        (str(few), {"parts": sd_parts}, r"has no text_encoder, and [\s\S]*--parts"),
        (files["flux-dev"][0], {"parts": flux}, "has no vae, text_encoder, text_encoder_2"),
        (str(tmp_path / "cut.safetensors"), {"parts": sd_parts}, r"lacks weights of a SD model"),
        (str(tmp_path / "bad.safetensors"), {"parts": sd_parts}, "not a safetensors file"),
        (str(tmp_path / "empty.safetensors"), {"parts": sd_parts}, "not a safetensors file"),
        (str(tmp_path / "gone.safetensors"), {"parts": sd_parts}, "no such file"),
        (str(tmp_path / "scaled.safetensors"), {"parts": files["zimage"][1]}, "scaled or quanti"),
        (files["zimage"][0], {}, r"do not tell which[\s\S]*--parts"),
        (files["klein"][0], {}, r"do not tell which[\s\S]*--parts"),
        (str(quantised), {"init_lora": lora}, r"quantised weights \(transformer\)"),
        (str(tmp_path / "model.ckpt"), {"parts": sd_parts}, "from .safetensors only"),
        (base, {"parts": base}, r"only a single file[\s\S]*--parts"),
        (base, {"variant": "fp16"}, r"no part of the model has weights of the variant fp16"),
        (base, {"vae": base + "/unet"}, "no VAE here"),
        (base, {"vae": lora}, "the VAE"),
        (base, {"init_lora": foreign}, "LoRA"),
        (base, {"init_lora": unet}, "no LoRA"),
        (base, {"init_lora": base}, "no LoRA here"),
    ):
        with pytest.raises(FifaError, match=words):
            assembled(model, Train(**asked))
    with pytest.raises(FifaError, match="no LoRA"):
        convert(Convert(source=unet, layout="kohya"), tmp_path / "ui.safetensors")
    with pytest.raises(FifaError, match=r"new \.safetensors file"):
        convert(Convert(source=lora, layout="kohya"), tmp_path / "ui")
