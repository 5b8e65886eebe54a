import json
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import SMALL, write_lora, write_model, write_part
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from fifa.config import Evaluate, Generate
from fifa.errors import FifaError
from fifa.evaluation import generate as generation
from fifa.evaluation import sampling
from fifa.evaluation.generate import _is_png, generate, plan, png, read_index
from fifa.evaluation.models import find_models, name_checkpoints
from fifa.evaluation.prompts import read_prompts
from fifa.evaluation.sampling import settings_for
from fifa.models.runtime import Runtime
from fifa.shards.pool import LocalPool


def prompts_of(folder, count=3):
    (folder / "prompts.txt").write_text("".join(f"a cat number {i}\n" for i in range(count)))
    return read_prompts(folder / "prompts.txt")


def make(base, tuned, folder, *, count=3, seeds=2, batch=4, executor=None, **settings):
    folder.mkdir(exist_ok=True)
    asked = Evaluate(seeds=seeds, generate=Generate(**{**SMALL, **settings}, batch=batch))
    models = find_models(str(base), {name: str(path) for name, path in tuned.items()})
    how = settings_for(asked.generate, base)
    return generate(asked, models, prompts_of(folder, count), how, folder, executor=executor)


def pixels(folder, table, model):
    files = [r["file"] for r in table.to_pylist() if r["model"] == model]
    return np.stack([np.asarray(Image.open(folder / file)) for file in files])


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.png")}


def test_the_images_are_those_of_the_stock_pipeline(base, lora, unet, tmp_path):
    table = make(base, {"lora": lora, "full": unet}, tmp_path, seeds=1, count=3, batch=3)
    assert table.equals(read_index(tmp_path))
    assert table["model"].to_pylist() == ["base"] * 3 + ["lora"] * 3 + ["full"] * 3
    rows = table.to_pylist()[:3]
    stock = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    stock.set_progress_bar_config(disable=True)

    def images():
        found = stock(
            [row["prompt"] for row in rows],
            generator=[torch.Generator().manual_seed(row["seed"]) for row in rows],
            num_inference_steps=2,
            width=32,
            height=32,
            guidance_scale=7.5,
        ).images
        return np.stack([np.asarray(image) for image in found])

    np.testing.assert_array_equal(pixels(tmp_path, table, "base"), images())
    stock.load_lora_weights(lora)
    np.testing.assert_array_equal(pixels(tmp_path, table, "lora"), images())
    stock.unload_lora_weights()
    stock.unet = UNet2DConditionModel.from_pretrained(unet / "unet")
    np.testing.assert_array_equal(pixels(tmp_path, table, "full"), images())
    assert (pixels(tmp_path, table, "lora") != pixels(tmp_path, table, "base")).any()
    assert (pixels(tmp_path, table, "full") != pixels(tmp_path, table, "base")).any()


class Elsewhere(LocalPool):
    """What an executor's workers get is what travels to them."""

    is_here = False

    def map(self, make, shards, ledger):
        make, shards = pickle.loads(pickle.dumps((make, list(shards))))
        assert len(dict(shards)) == len(shards)
        return self._here(make, shards, ledger)


def test_workers_elsewhere_make_the_same_files(base, lora, unet, tmp_path, monkeypatch):
    tuned = {"lora": lora, "full": unet, "same": base}
    table = make(base, tuned, tmp_path / "here", batch=2)
    elsewhere = Elsewhere(store=str(tmp_path / "store"))
    assert make(base, tuned, tmp_path / "there", batch=2, executor=elsewhere) == table
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert list((tmp_path / "store").iterdir()) == []

    # memory that does not suffice there halves the groups of all models here
    real, most = generation.make_images, 2

    def full(pipe, settings, prompts, seeds):
        if len(seeds) > most:
            raise torch.OutOfMemoryError
        return real(pipe, settings, prompts, seeds)

    monkeypatch.setattr(generation, "make_images", full)
    again = make(base, tuned, tmp_path / "short", batch=4, executor=elsewhere)
    assert again == table
    assert files(tmp_path / "short") == files(tmp_path / "here")


def test_every_kind_of_checkpoint_is_recognised(base, lora, unet, tmp_path):
    whole = write_model(tmp_path / "whole", "sd15", seed=3)
    file = lora / "pytorch_lora_weights.safetensors"
    tuned = {"a": lora, "b": file, "c": unet, "d": unet / "unet", "e": whole}
    models = find_models(str(base), {name: str(path) for name, path in tuned.items()})
    assert [m.method for m in models] == ["base", "lora", "lora", "part", "part", "pipeline"]
    by_name = {model.name: model.weights for model in models}
    assert by_name["a"] == by_name["b"]
    assert by_name["c"] == by_name["d"]
    assert len(set(by_name.values())) == 4
    table = make(base, {"whole": whole, "again": unet}, tmp_path / "run")
    ours = make(whole, {}, tmp_path / "alone")
    np.testing.assert_array_equal(
        pixels(tmp_path / "run", table, "whole"), pixels(tmp_path / "alone", ours, "base")
    )


def test_a_model_is_named_by_its_content_wherever_it_lies(base, unet, tmp_path):
    shutil.copytree(base, tmp_path / "moved")
    shutil.copytree(unet, tmp_path / "tuned")
    here = find_models(str(base), {"a": str(unet)})
    there = find_models(str(tmp_path / "moved"), {"a": str(tmp_path / "tuned")})
    assert [m.weights for m in here] == [m.weights for m in there]


def test_the_base_is_itself_again_after_a_checkpoint(base, lora, unet, tmp_path):
    alone = make(base, {}, tmp_path / "alone")
    again = write_model(tmp_path / "same", "sd15")  # the same weights, loaded as a checkpoint
    tuned = {"lora": lora, "full": unet, "last": write_part(again, tmp_path / "none", scale=0)}
    table = make(base, tuned, tmp_path / "run")
    base_images = pixels(tmp_path / "alone", alone, "base")
    np.testing.assert_array_equal(pixels(tmp_path / "run", table, "last"), base_images)


@pytest.mark.parametrize(
    "kind",
    ["sd2", "sdxl", "sd3", "flux-dev", "flux-schnell", "qwenimage", "klein", "sana"],
)
def test_every_family(kind, tmp_path):
    model = write_model(tmp_path / "model", kind)
    tuned = {"lora": write_lora(model, tmp_path / "a"), "full": write_part(model, tmp_path / "b")}
    table = make(model, tuned, tmp_path / "run", count=1, seeds=2)
    images = [pixels(tmp_path / "run", table, name) for name in ("base", "lora", "full")]
    flat = np.concatenate(images).reshape(6, -1)
    assert images[0].shape == (2, 32, 32, 3)
    assert len(np.unique(flat, axis=0)) == 6


@pytest.mark.parametrize(
    ("kind", "guidance", "steps", "half"),
    [
        ("sd15", 7.5, 50, "float16"),
        ("sdxl", 5.0, 50, "float16"),
        ("sd3", 7.0, 28, "bfloat16"),
        ("flux-dev", 3.5, 28, "bfloat16"),
        ("flux-schnell", 0.0, 4, "bfloat16"),
        ("zimage", 5.0, 50, "bfloat16"),
        ("sana", 4.5, 20, "bfloat16"),
    ],
)
def test_defaults_by_family(kind, guidance, steps, half, tmp_path, monkeypatch):
    model = write_model(tmp_path, kind)
    for device, dtype in (("cpu", "float32"), ("cuda:1", half)):
        monkeypatch.setattr(sampling, "make_runtime", lambda _, device=device: Runtime(device))
        settings = settings_for(Generate(), model)
        assert (settings.guidance, settings.steps) == (guidance, steps)
        assert (settings.device, settings.dtype) == (device.partition(":")[0], dtype)


def test_images_in_float32_are_made_with_products_in_tf32_on_cuda(base):
    seen = []

    class Pipe:
        device = "cuda"

        def __call__(self, **options):
            seen.append(torch.get_float32_matmul_precision())
            return SimpleNamespace(images=np.zeros((1, 8, 8, 3), np.float32))

    before = torch.get_float32_matmul_precision()
    settings = settings_for(Generate(**SMALL, device="cpu"), base)
    sampling.make_images(Pipe(), settings, ["a cat"], [1])
    assert seen == ["high"] and torch.get_float32_matmul_precision() == before


def test_a_broken_off_run_ends_with_the_same_bytes(base, tmp_path):
    make(base, {}, tmp_path / "whole", count=5)
    make(base, {}, tmp_path / "broken", count=5)
    expected = files(tmp_path / "whole")
    random = np.random.default_rng(0)
    for keep in (0, 1, 3, 7, 10):
        names = sorted(expected)
        for name in random.permutation(len(names))[keep:]:
            (tmp_path / "broken" / names[name]).unlink()
        left = [tmp_path / "broken" / name for name in (".fifa-tmp-a.parquet", ".fifa-tmp-b.png")]
        for path in left:  # what a killed write leaves
            path.touch()
        make(base, {}, tmp_path / "broken", count=5)
        assert not any(path.exists() for path in left)
        assert files(tmp_path / "broken") == expected


def test_a_damaged_image_is_made_again_and_said(base, tmp_path, capsys):
    make(base, {}, tmp_path, count=2)
    expected = files(tmp_path)
    first, *_, last = sorted(expected)
    (tmp_path / first).write_bytes(expected[first][:100])
    (tmp_path / last).write_bytes(b"")
    capsys.readouterr()
    make(base, {}, tmp_path, count=2)
    assert files(tmp_path) == expected
    assert "2 images are damaged and made again, the first: images/" in capsys.readouterr().err


def test_a_png_file_is_whole_or_not():
    rng = np.random.default_rng(0)
    data = png(rng.integers(0, 256, (6, 5, 3), np.uint8))
    assert _is_png(data) and not _is_png(data + b"x")
    for place, mask in enumerate(rng.integers(1, 256, len(data)).tolist()):
        assert not _is_png(data[:place])
        assert not _is_png(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])


def test_what_is_there_is_not_made_again(base, lora, tmp_path):
    make(base, {"one": lora}, tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    table = make(base, {"one": lora, "two": lora}, tmp_path)  # the same weights twice
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")} == stamps
    of = {m: [r["file"] for r in table.to_pylist() if r["model"] == m] for m in ("one", "two")}
    assert of["one"] == of["two"]


def test_further_prompts_leave_earlier_images_alone(base, tmp_path):
    few = make(base, {}, tmp_path, count=4)
    many = make(base, {}, tmp_path, count=7)
    assert many["file"].to_pylist()[: len(few)] == few["file"].to_pylist()


def test_another_sampler_guidance_seed_or_spelling_is_another_image(base, tmp_path):
    model = find_models(str(base), {})[0]
    folder = tmp_path
    prompts = prompts_of(folder)
    settings = [
        settings_for(Generate(**{**SMALL, **more}), base)
        for more in ({}, {"guidance": 3.0}, {"sampler": "ddim"}, {"negative": "blur"})
    ]
    names = [plan(model, prompts, s, Evaluate(seeds=2))[0][0].file for s in settings]
    names.append(plan(model, prompts, settings[0], Evaluate(seeds=2, first_seed=7))[0][0].file)
    (folder / "prompts.txt").write_text("A cat  number 0\na cat number 1\n")
    spelled = read_prompts(folder / "prompts.txt")
    names.append(plan(model, spelled, settings[0], Evaluate(seeds=2))[0][0].file)
    assert len(set(names)) == len(names)


def test_a_sampler_by_name_is_used_on_the_models_own_schedule(base, tmp_path):
    plain = make(base, {}, tmp_path / "a", sampler="ddim")
    other = make(base, {}, tmp_path / "b")
    assert (pixels(tmp_path / "a", plain, "base") != pixels(tmp_path / "b", other, "base")).any()
    with pytest.raises(FifaError, match="does not sample this model"):
        make(base, {}, tmp_path / "c", sampler="flow-euler")
    sana = write_model(tmp_path / "sana", "sana")  # a flow, by a setting of its sampler
    with pytest.raises(FifaError, match="DDIMScheduler does not sample this model"):
        make(sana, {}, tmp_path / "d", sampler="ddim")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["out/fifa"], ["fifa"]),
        (["out/fifa", "out/random/"], ["fifa", "random"]),
        (["a/lora", "b/lora"], ["a/lora", "b/lora"]),
        (["mine=out/lora", "b/lora", "b/lora"], ["mine", "lora"]),
        (["out/full/unet", "lora/pytorch_lora_weights.safetensors"], ["full", "lora"]),
    ],
)
def test_names_of_checkpoints(paths, names):
    assert list(name_checkpoints(paths)) == names


def test_models_that_are_none(base, lora, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    broken = tmp_path / "broken"
    shutil.copytree(lora, broken)
    (broken / "pytorch_lora_weights.safetensors").write_bytes(b"\x10")
    code = write_model(tmp_path / "code", "sd15")
    index = json.loads((code / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "Mine"]
    (code / "model_index.json").write_text(json.dumps(index))
    wrong = write_part(write_model(tmp_path / "xl", "sdxl"), tmp_path / "wrong")
    with pytest.raises(FifaError, match="no pipeline in diffusers' layout"):
        find_models(str(tmp_path / "empty"), {})
    with pytest.raises(FifaError, match="code of its own"):
        find_models(str(code), {})
    lacking = write_model(tmp_path / "lacking", "sd15")
    shutil.rmtree(lacking / "tokenizer")
    with pytest.raises(FifaError, match="the model lacks its tokenizer"):
        find_models(str(lacking), {})
    with pytest.raises(FifaError, match="no checkpoint here"):
        find_models(str(base), {"a": str(tmp_path / "empty")})
    with pytest.raises(FifaError, match="safetensors only"):
        find_models(str(base), {"a": str(tmp_path / "weights.bin")})
    with pytest.raises(FifaError, match="cannot be named base"):
        find_models(str(base), {"base": str(lora)})
    with pytest.raises(FifaError, match="cannot load the LoRA"):
        make(base, {"a": broken}, tmp_path / "run")
    with pytest.raises(FifaError, match="the parts of the model do not fit: unet"):
        make(base, {"a": wrong}, tmp_path / "run")


def test_a_lora_of_another_model_is_refused(base, tmp_path):
    other = write_lora(write_model(tmp_path / "xl", "sdxl"), tmp_path / "lora")
    with pytest.raises(FifaError, match=r"cannot load the LoRA|no weights for this model"):
        make(base, {"a": other}, tmp_path / "run")


@pytest.mark.parametrize(
    ("part", "way"), [("unet", "base"), ("vae", "base"), ("text_encoder", "base"), ("unet", "part")]
)
def test_incomplete_weights_make_no_image(base, unet, tmp_path, part, way):
    whole = base if way == "base" else unet
    folder = shutil.copytree(whole, tmp_path / "model")
    [path] = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    lost = [name for name in weights if "norm1" in name]
    save_file({name: w for name, w in weights.items() if name not in lost}, path, {"format": "pt"})
    with pytest.raises(FifaError, match=rf"not those of the network: {len(lost)} missing \("):
        make(*((folder, {}) if way == "base" else (base, {"a": folder})), tmp_path / "run")


@pytest.mark.parametrize("fault", ["foreign", "half", "other"])
def test_a_lora_is_used_whole_or_not_at_all(base, lora, tmp_path, fault):
    [path] = lora.glob("*.safetensors")
    weights = load_file(path)
    names = sorted(weights)
    some = names[: len(names) // 2]
    if fault == "half":  # a factor of two
        del weights[names[0]]
    for name in some:
        if fault == "foreign":
            weights[name.replace("blocks", "foreign")] = weights.pop(name)
        if fault == "other":  # for a text encoder that this model has not
            weights[name.replace("unet.", "text_encoder_2.")] = weights.pop(name)
    (tmp_path / "lora").mkdir()
    save_file(weights, tmp_path / "lora" / path.name)
    said = r"missing \(" if fault == "half" else r"unused \("
    with pytest.raises(FifaError, match=rf"only some of the LoRA's weights[^\n]*{said}"):
        make(base, {"a": tmp_path / "lora"}, tmp_path / "run")


@pytest.mark.parametrize("name", ["lora.down", "processor"])
def test_a_lora_in_older_names_is_the_same(base, lora, tmp_path, name):
    [path] = lora.glob("*.safetensors")
    old = {}
    for key, weight in load_file(path).items():
        for new, own in (("lora_A", "down"), ("lora_B", "up")):
            module, found, _ = key.partition(f".{new}.weight")
            if not found and (module := key.removesuffix(f".lora.{own}.weight")) == key:
                continue
            stem, _, last = module.rpartition(".")
            old[
                f"{module}.lora.{own}.weight"
                if name == "lora.down"
                else f"{stem}.processor.{last}_lora.{own}.weight"
            ] = weight
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / path.name)
    table = make(base, {"new": lora, "old": tmp_path / "old"}, tmp_path / "run", count=1, seeds=1)
    new, again = (pixels(tmp_path / "run", table, which) for which in ("new", "old"))
    np.testing.assert_array_equal(new, again)


def test_precision_differs_by_part(base, tmp_path):
    expected = pixels(tmp_path / "a", make(base, {}, tmp_path / "a", count=1, seeds=1), "base")
    folder = shutil.copytree(base, tmp_path / "model")
    for part, variant in (("vae", "fp16"), ("text_encoder", "bf16")):
        [path] = (folder / part).glob("*.safetensors")
        path.rename(path.with_suffix(f".{variant}.safetensors"))
    found = pixels(tmp_path / "b", make(folder, {}, tmp_path / "b", count=1, seeds=1), "base")
    np.testing.assert_array_equal(found, expected)


def test_a_whole_checkpoint_in_one_file_is_no_lora(base, unet, tmp_path):
    file = unet / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(FifaError, match=r"no LoRA[\s\S]*fifa convert"):
        find_models(str(base), {"a": str(file)})
    with pytest.raises(FifaError, match="single file"):
        find_models(str(file), {})


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": []}, "do not fit: scheduler"),
        ("vae/config.json", {"scaling_factor": None}, "cannot make an image"),
        ("unet/config.json", {"downsample_padding": None}, "cannot make an image"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}, "do not fit: tokenizer"),
        ("model_index.json", {"unet": -1}, "cannot load"),
        ("model_index.json", {"text_encoder": ["os", "system"]}, "cannot load"),
    ],
)
def test_what_a_folder_says_wrong_is_told(base, tmp_path, file, change, words):
    folder = shutil.copytree(base, tmp_path / "model")
    known = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**known, **change}))
    with pytest.raises(FifaError, match=words):
        make(folder, {}, tmp_path / "run", count=1, seeds=1)


def test_images_that_are_not_finite_are_told(base, tmp_path):
    broken = write_part(base, tmp_path / "broken", scale=float("nan"))
    with pytest.raises(FifaError, match="not finite"):
        make(base, {"a": broken}, tmp_path / "run")
