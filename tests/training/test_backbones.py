"""Each family against diffusers' own: the same embeddings, noise, targets and predictions."""

import dataclasses
import json
import shutil
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from diffusers import FlowMatchEulerDiscreteScheduler as FlowMatch
from safetensors.torch import load_file, save_file
from tiny_diffusion import KINDS, PROMPTS, write_model

from fifa.errors import FifaError
from fifa.models.families import FAMILIES
from fifa.training.backbones import Backbone, load_backbone
from fifa.training.backbones import flux as flux_family
from fifa.training.backbones.parts import ModelFolder
from fifa.training.backbones.text import padded

CLOSE = {"atol": 1e-6, "rtol": 1e-6}
DIFFUSIONS = tuple(kind for kind in KINDS if kind.startswith(("sd1", "sd2", "sdxl")))
FLOWS = tuple(kind for kind in KINDS if kind not in DIFFUSIONS)


class Backbones(dict):
    """Each loaded when it is first asked for."""

    def __init__(self, models):
        super().__init__()
        self.models = models

    def __missing__(self, kind):
        self[kind] = load_backbone(self.models[kind])
        return self[kind]


@pytest.fixture(scope="module")
def backbones(models):
    return Backbones(models)


def stock(folder, kind):
    missing = {}
    if kind == "sd3-without-t5":
        missing = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = DiffusionPipeline.from_pretrained(folder, **missing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def times(backbone, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([backbone.schedule.draw_time(generator) for _ in range(n)])


def test_the_family_is_told_by_the_folder(backbones):
    all_of_them = {kind: backbones[kind] for kind in KINDS}
    found = {
        kind: (b.family.name, b.schedule.prediction, b.family.part)
        for kind, b in all_of_them.items()
    }
    assert found == {
        "sd15": ("sd", "epsilon", "unet"),
        "sd2": ("sd", "v_prediction", "unet"),
        "sd15-tiny-vae": ("sd", "epsilon", "unet"),
        "sdxl": ("sdxl", "epsilon", "unet"),
        "sd3": ("sd3", "flow", "transformer"),
        "sd3-without-t5": ("sd3", "flow", "transformer"),
        "flux-dev": ("flux", "flow", "transformer"),
        "flux-schnell": ("flux", "flow", "transformer"),
        **{name: (name, "flow", "transformer") for name in KINDS[-5:]},
    }
    sides = {kind: backbone.pixels_per_latent for kind, backbone in all_of_them.items()}
    assert {sides[kind] for kind in DIFFUSIONS} == {8}
    assert sides.pop("sana") == 8  # the real one has 32
    assert {sides[kind] for kind in FLOWS if kind in sides} == {16}


def _sana(pipeline, prompts):
    """The empty prompt without the instruction, as what guidance is away from."""
    told = signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    options = {"complex_human_instruction": told}
    both, mask, bare, none = pipeline.encode_prompt(prompts, True, **options)
    both[1, :], mask[1] = bare[1], none[1]
    return padded([row[there.bool()] for row, there in zip(both, mask, strict=True)])


def _flux(pipeline, prompts):
    length = 512 if pipeline.transformer.config.guidance_embeds else 256
    found = pipeline.encode_prompt(prompts, max_sequence_length=length)
    return dict(zip(("prompt", "pooled"), found, strict=False))


# What the stock pipelines make of prompts, in our names
EXPECTED = {
    "sd": lambda pipe, prompts: {"prompt": pipe.encode_prompt(prompts, "cpu", 1, False)[0]},
    "sdxl": lambda pipe, prompts: dict(
        zip(
            ("prompt", "pooled"),
            pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[::2],
            strict=True,
        )
    ),
    "sd3": lambda pipe, prompts: dict(
        zip(
            ("joined", "pooled"),
            pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)[::2],
            strict=True,
        )
    ),
    "flux": _flux,
    "zimage": lambda pipe, prompts: padded(pipe.encode_prompt(prompts, "cpu", False)[0]),
    "qwenimage": lambda pipe, prompts: {
        name: found.float()
        for name, found in zip(("prompt", "mask"), pipe.encode_prompt(prompts), strict=True)
    },
    "flux2": lambda pipe, prompts: {"prompt": pipe.encode_prompt(prompts)[0]},
    "klein": lambda pipe, prompts: {"prompt": pipe.encode_prompt(prompts)[0]},
    "sana": _sana,
}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_embedded_as_by_the_pipeline(models, backbones, kind):
    pipeline, backbone = stock(models[kind], kind), backbones[kind]
    prompts = list(PROMPTS)
    mine = backbone.encode_prompts(prompts)
    with torch.no_grad():
        expected = EXPECTED[backbone.family.name](pipeline, prompts)
    if backbone.family.name == "sd3":
        mine = {"joined": backbone._joined(mine), "pooled": mine["pooled"]}
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value, **CLOSE)
    assert all(value.dtype == torch.float32 for value in mine.values())


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_inside_the_pipeline(models, backbones, kind):
    pipeline, backbone = stock(models[kind], kind), backbones[kind]
    seen = []
    denoiser = getattr(pipeline, backbone.family.part)
    denoiser.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs, output[0])),
        with_kwargs=True,
    )
    extra = {}
    if backbone.family.name == "sdxl":
        extra = {
            "original_size": (90, 120),
            "crops_coords_top_left": (0, 21),
            "target_size": (64, 48),
        }
    if backbone.family.name == "sana":
        extra = {"use_resolution_binning": False}
    height, width = 64, 64 if backbone.family.name == "sana" else 48
    guidance = {"flux": 3.5, "flux2": 4.0, "zimage": 0.0}.get(backbone.family.name, 1.0)
    pipeline(
        prompt=list(PROMPTS),
        num_inference_steps=2,
        height=height,
        width=width,
        **{backbone.family.guide: guidance},
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **({"max_sequence_length": 256} if kind == "flux-schnell" else {}),
        **extra,
    )
    frames = torch.tensor([[90, 120, 0, 21, 64, 48]] * 3)
    prompts = backbone.encode_prompts(PROMPTS)
    assert len(seen) >= 2
    for args, kwargs, output in seen:
        if backbone.family.name in ("sd", "sdxl"):
            noisy, time = args[0], args[1].expand(3)
        elif backbone.family.name == "sd3":
            noisy, time = kwargs["hidden_states"], kwargs["timestep"] / 1000
        elif backbone.family.name == "zimage":
            # in float64, of which 1 - time is what the pipeline gave
            noisy, time = torch.cat(args[0], 1).transpose(0, 1), 1 - args[1].double()
            output = -torch.cat(output, 1).transpose(0, 1)
        elif backbone.family.name == "sana":
            noisy, time = args[0], kwargs["timestep"] / 1000
        elif backbone.family.name in ("flux2", "klein"):
            noisy, time, ids = kwargs["hidden_states"], kwargs["timestep"], kwargs["img_ids"]
            noisy, output = (pipeline._unpack_latents_with_ids(x, ids) for x in (noisy, output))
        else:
            noisy, time = kwargs["hidden_states"], kwargs["timestep"]
            noisy, output = (
                pipeline._unpack_latents(x, height, width, pipeline.vae_scale_factor)
                for x in (noisy, output)
            )
            if backbone.family.name == "qwenimage":
                noisy, output = noisy[:, :, 0], output[:, :, 0]
        with torch.no_grad():
            mine = backbone.predict(noisy, time, prompts, frames)
        if kind == "sana":  # the pipeline's empty prompt has the instruction before it
            mine, output = mine[::2], output[::2]
        torch.testing.assert_close(mine, output, **CLOSE)


def test_frames_are_the_pipelines_time_ids(models, backbones):
    """The crop's order, height before width, is easily turned round: compare with its own."""
    pipeline, backbone = stock(models["sdxl"], "sdxl"), backbones["sdxl"]
    ids = pipeline._get_add_time_ids((90, 120), (0, 21), (64, 48), torch.float32, 32)
    frames = torch.tensor([[90, 120, 0, 21, 64, 48]])
    assert ids.tolist() == frames.tolist()
    noisy, prompts = randn(1, 4, 8, 6), backbone.encode_prompts(["the cat"])
    with torch.no_grad():
        one, other = (
            backbone.predict(noisy, torch.tensor([7]), prompts, f)
            for f in (frames, torch.tensor([[120, 90, 0, 21, 64, 48]]))
        )
    assert not torch.allclose(one, other, atol=1e-4)


def _are_decoded_as_the_pipeline_does(pipeline, backbone, moments):
    """The latents of the mean, given to the pipeline as its last: its VAE decodes the mean."""
    mean, std = moments.chunk(2, dim=1)
    assert bool(std.any()) == (backbone.family.name != "sana")
    latents = backbone.vae.latents(moments, torch.zeros_like(mean))
    noise = randn(*mean.shape)
    moved = backbone.vae.latents(moments, noise) - latents
    _, scale = backbone.vae.norm
    torch.testing.assert_close(moved, std * noise * scale, **CLOSE)
    seen = []
    pipeline.vae.decode = lambda z, **_: (
        seen.append(z) or (torch.zeros(2, 3, 1, 64, 48).squeeze(2),)
    )
    pipeline.scheduler.step = lambda *_, **__: (given,)
    given = latents
    if backbone.family.name != "sana":
        given = latents.flatten(2).mT
    if backbone.family.name == "qwenimage":
        given = flux_family.pack(latents)
    options = {"use_resolution_binning": False} if backbone.family.name == "sana" else {}
    width = 64 if backbone.family.name == "sana" else 48
    options |= {"num_inference_steps": 1, "height": 64, "width": width}
    pipeline(prompt=["a", "b"], output_type="pt", **options)
    mean = torch.nn.functional.pixel_shuffle(mean, 2) if "bn" in dir(pipeline.vae) else mean
    torch.testing.assert_close(seen[0].reshape(mean.shape), mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_the_posteriors_and_latents_a_scaled_sample_of_it(models, backbones, kind):
    pipeline, backbone = stock(models[kind], kind), backbones[kind]
    pixels = randn(2, 3, 64, 48).clamp(-1, 1)
    moments = backbone.vae.moments(pixels)
    mean, std = moments.chunk(2, dim=1)
    factor = 16 if kind in ("flux2", "klein") else 8
    assert mean.shape == (2, backbone.vae.channels, 64 // factor, 48 // factor)
    config = pipeline.vae.config
    if kind in ("flux2", "klein", "qwenimage", "sana"):
        _are_decoded_as_the_pipeline_does(pipeline, backbone, moments)
        return
    with torch.no_grad():
        encoded = pipeline.vae.encode(pixels)
    if kind == "sd15-tiny-vae":
        torch.testing.assert_close(mean, encoded.latents, **CLOSE)
        assert not std.any()
    else:
        assert isinstance(pipeline.vae, AutoencoderKL)
        torch.testing.assert_close(mean, encoded.latent_dist.mean, **CLOSE)
        torch.testing.assert_close(std, encoded.latent_dist.std, **CLOSE)
        generator = torch.Generator().manual_seed(5)
        sample = encoded.latent_dist.sample(torch.Generator().manual_seed(5))
        noise = torch.randn(mean.shape, generator=generator)
        expected = (sample - (config.shift_factor or 0.0)) * config.scaling_factor
        torch.testing.assert_close(backbone.vae.latents(moments, noise), expected, **CLOSE)


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_noise_and_targets_are_ddpms(models, backbones, kind):
    backbone = backbones[kind]
    scheduler = DDPMScheduler.from_pretrained(models[kind], subfolder="scheduler")
    latents, noise, time = randn(50, 4, 4, 4), randn(50, 4, 4, 4, seed=1), times(backbone, 50)
    noisy = backbone.schedule.add_noise(latents, noise, time)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, time), **CLOSE)
    expected = noise
    if scheduler.config.prediction_type == "v_prediction":
        expected = scheduler.get_velocity(latents, noise, time)
    torch.testing.assert_close(backbone.schedule.target(latents, noise, time), expected, **CLOSE)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", None])
def test_every_beta_schedule_is_diffusers(models, tmp_path, schedule):
    folder = shutil.copytree(models["sd15"], tmp_path / "model")
    betas = {"beta_schedule": schedule} if schedule else {"trained_betas": [0.1, 0.2, 0.3]}
    scheduler = DDPMScheduler(**betas, num_train_timesteps=40 if schedule else 3)
    scheduler.save_pretrained(folder / "scheduler")
    alphas = load_backbone(folder).schedule.alphas
    torch.testing.assert_close(alphas, scheduler.alphas_cumprod, **CLOSE)


@pytest.mark.parametrize("kind", FLOWS)
def test_flows_are_straight_lines_to_the_noise(models, backbones, kind):
    backbone = backbones[kind]
    latents, noise, time = randn(50, 8, 4, 4), randn(50, 8, 4, 4, seed=1), times(backbone, 50)
    s = time.view(-1, 1, 1, 1)
    expected = (1 - s) * latents + s * noise
    torch.testing.assert_close(backbone.schedule.add_noise(latents, noise, time), expected, **CLOSE)
    torch.testing.assert_close(
        backbone.schedule.target(latents, noise, time), noise - latents, **CLOSE
    )
    if kind == "sana":  # its scheduler is for sampling only
        return
    # diffusers' own, at its own sigmas
    scheduler = FlowMatch.from_pretrained(models[kind], subfolder="scheduler")
    at = torch.arange(0, 1000, 20)
    noisy = scheduler.scale_noise(latents, scheduler.timesteps[at], noise)
    torch.testing.assert_close(
        backbone.schedule.add_noise(latents, noise, scheduler.sigmas[at]), noisy, **CLOSE
    )


def test_timesteps_are_uniform(backbones):
    drawn = times(backbones["sd15"], 20_000)
    assert drawn.dtype == torch.int64 and drawn.min() == 0 and drawn.max() == 999
    counts = torch.bincount(drawn // 100, minlength=10)
    assert (counts - 2000).abs().max() < 200  # 4.7 standard deviations


@pytest.mark.parametrize(
    ("kind", "shift"), [("sd3", 3.0), ("flux-dev", 1.0), ("flux-schnell", 1.0)]
)
def test_sigmas_are_logit_normal_and_shifted(models, backbones, kind, shift):
    drawn = times(backbones[kind], 20_000)
    assert drawn.dtype == torch.float32 and drawn.min() > 0 and drawn.max() < 1
    unshifted = drawn / (shift - (shift - 1) * drawn)
    logits = torch.logit(unshifted.double())
    assert abs(float(logits.mean())) < 0.03 and abs(float(logits.std()) - 1) < 0.03
    # the scheduler's own sigmas are what the same shift makes of even steps
    sigmas = FlowMatch.from_pretrained(models[kind], subfolder="scheduler").sigmas
    even = torch.linspace(1, 0.001, 1000)
    torch.testing.assert_close(sigmas, shift * even / (1 + (shift - 1) * even))


def test_patches_go_there_and_back(models):
    pipeline = stock(models["flux-dev"], "flux-dev")
    latents = randn(2, 8, 6, 4)
    packed = flux_family.pack(latents)
    assert torch.equal(packed, pipeline._pack_latents(latents, 2, 8, 6, 4))
    assert torch.equal(flux_family.unpack(packed, 6, 4), latents)
    ids = pipeline._prepare_latent_image_ids(2, 3, 2, "cpu", torch.float32)
    assert torch.equal(flux_family.positions(3, 2, torch.device("cpu")), ids)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux-dev"])
def test_without_encoders_training_goes_on(models, kind):
    backbone = load_backbone(models[kind])
    prompts = backbone.encode_prompts(["the cat"])
    moments = backbone.vae.moments(randn(1, 3, 32, 32))
    before = backbone.encoders
    backbone.drop_encoders()
    assert backbone.encoders == before
    latents = backbone.vae.latents(moments, randn(*moments.chunk(2, 1)[0].shape))
    frames = torch.tensor([[32, 32, 0, 0, 32, 32]])
    assert backbone.predict(latents, times(backbone, 1), prompts, frames).shape == latents.shape
    with pytest.raises(FifaError, match="encode before"):
        backbone.encode_prompts(["the cat"])
    with pytest.raises(FifaError, match="encode before"):
        backbone.vae.moments(randn(1, 3, 32, 32))


@pytest.fixture
def loaded(monkeypatch):
    """The parts of models that have been loaded."""
    parts = []
    load = ModelFolder.model

    def recorded(self, part, *more):
        parts.append(part)
        return load(self, part, *more)

    monkeypatch.setattr(ModelFolder, "model", recorded)
    return parts


def test_a_network_is_loaded_when_it_is_used(models, loaded):
    backbone = load_backbone(models["sdxl"])
    assert backbone.settings["sample_size"] == 16
    assert (backbone.vae.channels, backbone.vae.factor) == (4, 8)
    assert backbone.prompt_shapes() and backbone.encoders
    assert backbone.with_denoiser(torch.nn.Linear(1, 1)).pixels_per_latent == 8
    backbone.release_text()
    backbone.vae.release()
    assert loaded == []
    backbone.encode_prompts(["the cat"])
    assert loaded == ["text_encoder", "text_encoder_2"]
    backbone.release_text()
    backbone.vae.moments(randn(1, 3, 32, 32))
    backbone.vae.moments(randn(1, 3, 32, 32))
    assert loaded[2:] == ["vae"]
    backbone.drop_encoders()
    assert backbone.denoiser is backbone.denoiser
    assert loaded[3:] == ["unet"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_prompt_becomes_is_known_from_the_configurations(models, kind, loaded):
    backbone = load_backbone(models[kind])
    known = backbone.prompt_shapes()
    assert loaded == []
    found = Backbone.prompt_shapes(backbone)  # of a family that does not say: it encodes
    if backbone.reader:  # without padding
        shapes = backbone.encode_prompts(["the cat"])["mask"].shape
        assert backbone.reader.counts(["the cat"]) == [shapes[1]]
        del found["mask"]
        found = {"prompt": (known["prompt"][0], found["prompt"][1])}
    assert known == found
    assert "text_encoder" in loaded


def test_a_damaged_file_is_refused_before_it_is_needed(models, tmp_path):
    for part in ("unet", "vae", "text_encoder"):
        folder = shutil.copytree(models["sd15"], tmp_path / part)
        [path] = (folder / part).glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(FifaError, match=rf"not a safetensors file[\s\S]*{part}"):
            load_backbone(folder)


@pytest.mark.parametrize(
    ("held", "dtype", "device", "read"),
    [
        ("float16", "bfloat16", "meta", "float16"),
        ("bfloat16", "float32", "meta", "bfloat16"),
        ("float32", "bfloat16", "meta", "bfloat16"),  # the whole in float32 may not fit there
        ("bfloat16", "float16", "meta", "float16"),
        ("float16", "float32", "cpu", "float32"),
    ],
)
def test_half_precision_is_cast_on_the_device(tmp_path, held, dtype, device, read):
    dtypes = {name: getattr(torch, name) for name in (held, dtype, read)}
    (tmp_path / "unet").mkdir()
    weights = torch.nn.Linear(2, 2).to(dtypes[held]).state_dict()
    save_file(weights, tmp_path / "unet" / "model.safetensors")

    class Network:
        @staticmethod
        def from_pretrained(path, **settings):
            assert settings["dtype"] == dtypes[read]
            every = {"missing_keys": [], "unexpected_keys": []}
            return torch.nn.Linear(2, 2).to(settings["dtype"]), every

    folder = ModelFolder(
        tmp_path, FAMILIES[0], ("unet",), torch.device(device), dtypes[dtype], dtypes[dtype]
    )
    network = folder.model("unet", Network)
    assert (network.weight.dtype, network.weight.device.type) == (dtypes[dtype], device)
    assert not network.weight.requires_grad


def test_memory_that_runs_out_while_loading_is_no_broken_model(models, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        _ = load_backbone(models["sd15"]).vae.network


def test_encoders_are_named_by_their_content(models, tmp_path):
    one = load_backbone(models["sd15"]).encoders
    moved = shutil.copytree(models["sd15"], tmp_path / "elsewhere")
    assert load_backbone(moved).encoders == one
    other = load_backbone(write_model(tmp_path / "other", "sd15", seed=1)).encoders
    assert {name for name in one if one[name] != other[name]} == {"vae", "text_encoder"}
    assert load_backbone(models["sd15"], dtype="bfloat16").encoders != one
    parts = {"vae", "text_encoder", "tokenizer"}
    assert {name for name in one if name not in parts} == {"family", "dtype"}


def test_what_the_encoders_compute_in_names_what_they_make(models):
    def named(kind, *dtypes, device="cuda"):
        dtype, compute = dtypes
        known = load_backbone(models[kind], device=device, dtype=dtype, compute=compute).encoders
        return known["dtype"], known.get("vae_dtype")

    assert named("sd15", "bfloat16", "bfloat16") == ("bfloat16", "bfloat16")
    # all weights are trained in float32, and computed with in bfloat16
    assert named("sd15", "float32", "bfloat16") == ("bfloat16", "bfloat16")
    assert named("sdxl", "bfloat16", "bfloat16") == ("bfloat16", "tf32")
    assert named("sd15", "float16", "float16") == ("float16", "tf32")
    assert named("sd15", "float32", "float32") == ("tf32", "tf32")
    assert named("sd15", "float32", "bfloat16", device="cpu") == ("float32", None)
    assert named("sd15", "bfloat16", "bfloat16", device="cpu") == ("bfloat16", None)


def test_a_vae_that_overflows_stays_in_float32(models, tmp_path):
    """SDXL's own does in float16; its configuration, or the class's default, says so."""
    half = load_backbone(models["sdxl"], dtype="bfloat16")
    assert half.vae.network.dtype == torch.float32
    assert half.denoiser.dtype == half.text[0].model.dtype == torch.bfloat16
    folder = shutil.copytree(models["sdxl"], tmp_path / "fixed")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "force_upcast": False}))
    assert load_backbone(folder, dtype="bfloat16").vae.network.dtype == torch.bfloat16


def test_on_cuda_a_vae_computes_in_bfloat16_where_its_family_bears_it(models):
    for kind, expected in [
        ("sd15", torch.bfloat16),
        ("sdxl", torch.float32),
        ("sd3", torch.bfloat16),
        ("flux-dev", torch.bfloat16),
    ]:
        there = load_backbone(models[kind], device="cuda", dtype="bfloat16")
        assert there.vae.dtype == expected
        assert load_backbone(models[kind], dtype="bfloat16").vae.dtype == torch.float32
        half = load_backbone(models[kind], device="cuda", dtype="float16")
        assert half.vae.dtype == torch.float32


def test_infinite_moments_are_an_error(models):
    backbone = load_backbone(models["sdxl"])
    with torch.no_grad():
        backbone.vae.network.quant_conv.bias[0] = float("inf")
    with pytest.raises(FifaError, match=r"infinite or NaN latents in float32[\s\S]*fp16-fix"):
        backbone.vae.check(backbone.vae.moments(randn(1, 3, 32, 32)))


def test_a_model_that_diffusers_is_too_old_for_is_told_with_the_version(models, monkeypatch):
    monkeypatch.setattr("fifa.models.families.require", lambda *_: SimpleNamespace(__version__="0"))
    with pytest.raises(FifaError, match=r"Z-Image needs diffusers 0.36; 0 is installed[\s\S]*pip"):
        load_backbone(models["zimage"])


def test_a_tokenizer_without_a_chat_template_is_told(models, tmp_path):
    folder = shutil.copytree(models["zimage"], tmp_path / "model")
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(FifaError, match=r"no chat template[\s\S]*tokenizer"):
        _ = load_backbone(folder).reader


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux-dev", "qwenimage"])
def test_a_part_that_is_missing_is_named(models, tmp_path, kind):
    parts = [path.name for path in models[kind].iterdir() if path.is_dir()]
    for part in sorted(parts):
        folder = shutil.copytree(models[kind], tmp_path / part)
        shutil.rmtree(folder / part)
        with pytest.raises(FifaError, match=rf"lacks its {part}: there is no folder"):
            load_backbone(folder)


def test_pickled_weights_stay_closed(models, tmp_path):
    folder = shutil.copytree(models["sd15"], tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(FifaError, match="lacks its unet: unet has no safetensors"):
        load_backbone(folder)


@pytest.mark.parametrize(
    "variants",
    [("fp16", "fp16", "fp16"), ("bf16", "bf16", "bf16"), (None, "fp16", None), ("bf16", "fp16")],
)
def test_weights_that_exist_in_half_precision_only_are_found(models, tmp_path, variants):
    folder = shutil.copytree(models["sd15"], tmp_path / "model")
    for part, variant in zip(("unet", "vae", "text_encoder"), variants, strict=False):
        for path in (folder / part).glob("*.safetensors"):
            if variant:
                path.rename(path.with_suffix(f".{variant}.safetensors"))
    backbone, original = load_backbone(folder), load_backbone(models["sd15"])
    for mine, theirs in zip(
        backbone.denoiser.parameters(), original.denoiser.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert torch.equal(
        backbone.encode_prompts(["a"])["prompt"], original.encode_prompts(["a"])["prompt"]
    )
    assert backbone.vae.network.dtype == torch.float32


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("fault", ["missing", "unused", "both"])
def test_weights_that_lack_a_layer_or_have_one_too_many_are_refused(models, tmp_path, part, fault):
    folder = shutil.copytree(models["sd15"], tmp_path / "model")
    [path] = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    name = next(key for key in sorted(weights) if "norm" in key and key.endswith("weight"))
    weight = weights[name]
    foreign = name.replace("norm", "foreign")
    if fault != "unused":
        del weights[name]
    if fault != "missing":
        weights[foreign] = weight.clone()
    save_file(weights, path, {"format": "pt"})
    backbone = load_backbone(folder)
    said = {"missing": rf"1 missing \({name}\)", "unused": rf"1 unused \({foreign}\)"}
    said["both"] = f"{said['missing']}; {said['unused']}"
    with pytest.raises(FifaError, match=rf"not those of the network: {said[fault]}"):
        _ = {"unet": lambda: backbone.denoiser, "vae": lambda: backbone.vae.network}.get(
            part, lambda: backbone.text
        )()


def test_a_single_file_is_no_folder(models, tmp_path):
    with pytest.raises(FifaError, match=r"single file[\s\S]*fifa convert"):
        load_backbone(next((models["sd15"] / "unet").glob("*.safetensors")))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "KandinskyPipeline"},
            "KandinskyPipeline is not known",
        ),
        ("model_index.json", {"unet": [None, None]}, "lacks its unet: model_index.json"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts 'sample'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "none"}, "no such beta schedule"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ("vae/config.json", {"_class_name": "VQModel"}, "autoencoder of class VQModel"),
        ("vae/config.json", {"latent_channels": None}, "cannot load the model's vae"),
        ("vae/config.json", {"scaling_factor": [1]}, r"vae: scaling_factor is \[1\]"),
        ("model_index.json", {"unet": -1}, "lacks its unet: model_index.json"),
        ("scheduler/scheduler_config.json", {"trained_betas": 1}, "the model's schedule"),
        ("scheduler/scheduler_config.json", {"beta_end": 1e99}, "the model's schedule"),
        ("scheduler/scheduler_config.json", {"beta_end": 5.0}, "no shares of noise"),
        ("scheduler/scheduler_config.json", {"beta_start": float("nan")}, "no shares of noise"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "channels one by one"),
    ],
)
def test_what_a_folder_says_wrong_is_told(models, tmp_path, file, change, message):
    folder = shutil.copytree(models["sd15"], tmp_path / "model")
    known = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**known, **change}))
    with pytest.raises(FifaError, match=message):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("kind", "file", "change", "message"),
    [
        ("sd15", "unet", {"time_embedding_dim": 24}, "of another shape"),
        ("sd15", "unet", {"layers_per_block": 2}, r"missing \(down_blocks"),
        ("sd15", "unet", {"encoder_hid_dim": 9, "encoder_hid_dim_type": "text_proj"}, "do not fit"),
        ("sd15", "unet", {"norm_num_groups": 7}, "do not fit: num_channels"),
        ("sd15", "unet", {"attention_head_dim": 0}, "do not fit"),
        ("sdxl", "unet", {"addition_time_embed_dim": 9}, "do not fit"),
        ("sd3", "transformer", {"pos_embed_max_size": 2}, "do not fit: Height"),
        ("flux-dev", "transformer", {"axes_dims_rope": [4, 4, 4]}, "do not fit"),
        ("flux-dev", "transformer", {"num_single_layers": 2}, r"missing \(single_transformer"),
        ("flux-schnell", "transformer", {"guidance_embeds": True}, "missing"),
    ],
)
def test_a_prediction_is_rehearsed_before_anything_is_loaded(
    models, tmp_path, kind, file, change, message, loaded
):
    folder = shutil.copytree(models[kind], tmp_path / "model")
    path = folder / file / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FifaError, match=message):
        load_backbone(folder).rehearse(64)
    assert not loaded


@pytest.mark.parametrize("kind", KINDS)
def test_what_fits_is_rehearsed_without_a_word(models, kind, loaded):
    load_backbone(models[kind]).rehearse(64)
    assert not loaded


def test_words_that_an_encoder_does_not_know_are_told(models, backbones):
    (text,) = backbones["sd15"].text
    few = text.model.config.__class__(**{**text.model.config.to_dict(), "vocab_size": 20})
    small = dataclasses.replace(text, model=SimpleNamespace(config=few))
    with pytest.raises(FifaError, match="the text encoder knows 20"):
        small(["the cat"])


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(FifaError, match=r"no model_index\.json"):
        load_backbone(tmp_path)
    with pytest.raises(FifaError, match="neither a folder nor on the hub"):
        load_backbone(tmp_path / "none")
