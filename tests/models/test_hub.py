"""Which files of a model are fetched and loaded."""

import fnmatch
import json
import os

import pytest

from fifa.errors import FifaError
from fifa.models.hub import model_folder, pipeline_folder, weight_files

SHARDS = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None, ["model.safetensors"]),
        (["model.bf16.safetensors"], "bf16", ["model.bf16.safetensors"]),
        (["model.bf16.safetensors", *SHARDS], "fp16", SHARDS),
        (["model.non_ema.safetensors"], "non_ema", ["model.non_ema.safetensors"]),
        (["m-00001-of-00002.fp16.safetensors"], "fp16", ["m-00001-of-00002.fp16.safetensors"]),
        (["m-00001-of-00001.safetensors"], None, ["m-00001-of-00001.safetensors"]),
        (["model.bin"], None, []),
    ],
)
def test_the_copy_in_full_precision_is_loaded_or_else_one_in_half(tmp_path, names, variant, chosen):
    for name in names:
        (tmp_path / name).touch()
    found = weight_files(tmp_path)
    assert (found.variant, [path.name for path in found.paths]) == (variant, chosen)


@pytest.mark.parametrize(
    ("held", "fetched"),
    [
        (
            {"unet": ["fp16", "bf16", ""], "vae": ["fp16", "bf16"], "text_encoder": ["bf16"]},
            {"unet": "", "vae": "fp16", "text_encoder": "bf16"},
        ),
        ({"unet": [""], "vae": [""], "text_encoder": [""]}, {}),
    ],
)
def test_half_precision_is_fetched_where_there_is_nothing_else(
    tmp_path, monkeypatch, held, fetched
):
    stems = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    files = ["model_index.json", *(f"{part}/config.json" for part in held)]
    for part, variants in held.items():
        stem = stems.get(part, "model")
        files += [f"{part}/{stem}{v and '.' + v}.safetensors" for v in variants]
    asked = []

    def hub(name, allow_patterns):
        asked.append(name)
        for file in files:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    assert pipeline_folder("somebody/model") == tmp_path
    found = {part: [p.name for p in (tmp_path / part).glob("*.safetensors")] for part in held}
    for part, variant in fetched.items():
        stem = stems.get(part, "model")
        assert found[part] == [f"{stem}{variant and '.' + variant}.safetensors"]
    assert all(len(names) == 1 for names in found.values())
    assert len(asked) == (3 if fetched else 1)


def test_a_single_file_is_told_from_a_name(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FifaError, match=r"single file[\s\S]*fifa convert"):
        model_folder(tmp_path / "model.safetensors")


@pytest.mark.parametrize("target", ["../../etc/passwd", "gone", "model.safetensors", "."])
def test_links_that_lead_to_no_file_are_told(tmp_path, target):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors").symlink_to(target)
    with pytest.raises(FifaError, match=r"a link to nowhere, or no file[\s\S]*model\.safetensors"):
        model_folder(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_a_pipe_is_no_file_of_a_model(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(FifaError, match="no file"):
        model_folder(tmp_path)


@pytest.mark.parametrize(
    "names", [["../../x.safetensors"], ["/etc/passwd"], ["a/b"], [".."], [""], [5], [None], 1]
)
def test_an_index_names_files_beside_it_only(tmp_path, names):
    shards = dict(enumerate(names)) if isinstance(names, list) else names
    for part, suffix in (("unet", "json"), (".", "fp16.json")):
        file = tmp_path / part / f"model.safetensors.index.{suffix}"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(FifaError, match="names no files beside it"):
            model_folder(tmp_path)
        file.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
        assert model_folder(tmp_path) == tmp_path
        file.unlink()
