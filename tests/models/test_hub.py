"""Which files of a model are fetched and loaded."""

import fnmatch

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
    with pytest.raises(FifaError, match=r"single file[\s\S]*save_pretrained"):
        model_folder(tmp_path / "model.safetensors")
