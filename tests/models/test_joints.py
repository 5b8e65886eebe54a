"""Which parts of a model's folder do not fit, told from settings alone."""

import json

import pytest

from fifa.errors import FifaError
from fifa.evaluation.models import find_models, find_pipeline
from fifa.models.families import FAMILIES, PIPELINES
from fifa.models.joints import check_joints

# The settings that matter of the published models
CLIP_L = {"model_type": "clip_text_model", "hidden_size": 768, "projection_dim": 768}
CLIP_G = {"model_type": "clip_text_model", "hidden_size": 1280, "projection_dim": 1280}
T5 = {"model_type": "t5", "d_model": 4096, "vocab_size": 32_128}
WORDS = {"vocab.json": {"a": 0, "b": 49_407}, "tokenizer_config.json": {"model_max_length": 77}}
PIECES = {"tokenizer.json": {"model": {"vocab": [["a", 0.0]] * 32_100}}}
PUBLISHED = {
    "sd": {
        "unet": {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 768},
        "vae": {"latent_channels": 4, "scaling_factor": 0.18215},
        "text_encoder": CLIP_L,
        "tokenizer": WORDS,
        "scheduler": {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000},
    },
    "sdxl": {
        "unet": {
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {"latent_channels": 4, "scaling_factor": 0.13025},
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "tokenizer": WORDS,
        "tokenizer_2": WORDS,
        "scheduler": {"_class_name": "EulerDiscreteScheduler"},
    },
    "sd3": {
        "transformer": {
            "in_channels": 16,
            "out_channels": 16,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
        },
        "vae": {"latent_channels": 16, "scaling_factor": 1.5305},
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "text_encoder_3": T5,
        "tokenizer_3": PIECES,
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    },
    "flux": {
        "transformer": {
            "in_channels": 64,
            "out_channels": None,
            "patch_size": 1,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
        },
        "vae": {"latent_channels": 16, "scaling_factor": 0.3611},
        "text_encoder": CLIP_L,
        "text_encoder_2": T5,
        "tokenizer_2": PIECES,
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    },
    "zimage": {
        "transformer": {"in_channels": 16, "cap_feat_dim": 2560, "all_patch_size": [2]},
        "vae": {"latent_channels": 16, "scaling_factor": 0.3611},
        "text_encoder": {"model_type": "qwen3", "hidden_size": 2560, "vocab_size": 151_936},
        "tokenizer": {"vocab.json": {"a": 0, "b": 151_642}},
    },
    "qwenimage": {
        "transformer": {"in_channels": 64, "out_channels": 16, "joint_attention_dim": 3584},
        "vae": {"z_dim": 16},
        "text_encoder": {"model_type": "qwen2_5_vl", "text_config": {"hidden_size": 3584}},
    },
    "flux2": {
        "transformer": {"in_channels": 128, "joint_attention_dim": 15_360, "patch_size": 1},
        "vae": {"latent_channels": 32},
        "text_encoder": {"model_type": "mistral3", "text_config": {"hidden_size": 5120}},
    },
    "sana": {
        "transformer": {"in_channels": 32, "out_channels": 32, "caption_channels": 2304},
        "vae": {"latent_channels": 32, "scaling_factor": 0.41407},
        "text_encoder": {"model_type": "gemma2", "hidden_size": 2304},
        "scheduler": {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
    },
}
BY_NAME = {family.name: family for family in FAMILIES}


def written(folder, name, **changes):
    """A folder of settings; ``changes`` are of parts."""
    for part, known in PUBLISHED[name].items():
        files = known if part.startswith("tokenizer") else {"config.json": known}
        if part == "scheduler":
            files = {"scheduler_config.json": known}
        for file, content in files.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / file).write_text(json.dumps({**content, **changes.get(part, {})}))
    for part in BY_NAME[name].parts:  # whose settings are not told
        (folder / part).mkdir(parents=True, exist_ok=True)
    index = {"_class_name": BY_NAME[name].pipeline}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_fit(tmp_path, name):
    check_joints(written(tmp_path, name), BY_NAME[name])


def test_settings_that_are_not_there_are_not_compared(tmp_path):
    for family in FAMILIES:
        check_joints(tmp_path, family)
    check_joints(written(tmp_path, "sd", unet={"encoder_hid_dim": 512}), BY_NAME["sd"])


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("sd", "unet", {"cross_attention_dim": 1024}, "is 1024, but it is given 768"),
        ("sd", "unet", {"in_channels": 9}, r"in_channels is 9, .* 4 \(vae.latent_channels 4\)"),
        ("sd", "unet", {"out_channels": 8}, "out_channels is 8"),
        ("sd", "unet", {"addition_embed_type": "text_time"}, "'text_time', not None"),
        ("sd", "unet", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ("sd", "unet", {"num_class_embeds": 10}, "num_class_embeds is 10"),
        ("sd", "vae", {"latent_channels": 16}, "in_channels is 4, but it is given 16"),
        ("sd", "vae", {"out_channels": 4}, "vae: out_channels is 4, not 3"),
        ("sd", "vae", {"in_channels": 1}, "vae: in_channels is 1, not 3"),
        ("sd", "vae", {"scaling_factor": 0}, "scaling_factor is 0"),
        ("sd", "vae", {"scaling_factor": float("nan")}, "scaling_factor is nan"),
        ("sd", "vae", {"scaling_factor": 10**400}, None),
        ("sd", "text_encoder", {"hidden_size": 1024}, "is 768, but it is given 1024"),
        ("sd", "text_encoder", {"vocab_size": 49_000}, "49,408 words, text_encoder knows 49,000"),
        ("sd", "text_encoder", {"max_position_embeddings": 64}, "at 77 .*text_encoder reads 64"),
        ("sd", "tokenizer", {"model_max_length": 10**30}, "cuts prompts at 1000"),
        ("sd", "tokenizer", {"model_max_length": None}, "cuts prompts nowhere"),
        ("sd", "tokenizer", {"model_max_length": 0}, "cuts prompts at 0"),
        ("sd", "tokenizer", {"model_max_length": "77"}, "cuts prompts at '77'"),
        ("sd", "scheduler", {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "no flow's"),
        ("sd", "scheduler", {"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ("sd", "scheduler", {"num_train_timesteps": 10**400}, "num_train_timesteps is 1000"),
        ("sd", "scheduler", {"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ("sdxl", "unet", {"cross_attention_dim": 768}, "768 .*text_encoder_2.hidden_size 1280"),
        ("sdxl", "unet", {"addition_embed_type": None}, "None, not text_time"),
        ("sdxl", "unet", {"projection_class_embeddings_input_dim": 2560}, "6 x unet.addition_time"),
        ("sdxl", "text_encoder_2", {"projection_dim": 768}, "2816, but it is given 2304"),
        ("sd3", "transformer", {"pooled_projection_dim": 768}, "768, but it is given 2048"),
        ("sd3", "text_encoder_3", {"d_model": 2048}, "4096, but it is given 2048"),
        ("sd3", "scheduler", {"_class_name": "DDPMScheduler"}, "where a flow's is needed"),
        ("flux", "transformer", {"in_channels": 16}, "4 x vae.latent_channels 16"),
        ("flux", "transformer", {"patch_size": 2}, "patch_size is 2, not 1"),
        ("flux", "text_encoder", {"hidden_size": 1024}, "pooled_projection_dim is 768"),
        ("flux", "text_encoder_2", {"vocab_size": 100}, "32,100 words, text_encoder_2 knows 100"),
        ("zimage", "text_encoder", {"vocab_size": 100}, "151,643 words, text_encoder knows 100"),
        ("qwenimage", "vae", {"z_dim": 32}, "out_channels is 16, but it is given 32"),
        ("qwenimage", "transformer", {"zero_cond_t": True}, "zero_cond_t is True"),  # for edits
        ("flux2", "transformer", {"joint_attention_dim": 7680}, "15360 .3 x text_encoder"),
        ("sana", "scheduler", {"use_flow_sigmas": False}, "where a flow's is needed"),
    ],
)
def test_a_part_that_does_not_fit_is_named(tmp_path, name, part, change, message):
    folder = written(tmp_path, name, **{part: change})
    if message is None:
        check_joints(folder, BY_NAME[name])
        return
    with pytest.raises(FifaError, match=f"the parts of the model do not fit: .*{message}"):
        check_joints(folder, BY_NAME[name])
    with pytest.raises(FifaError, match=message):  # as `fifa evaluate` finds its models
        find_pipeline(str(folder))


def test_a_checkpoint_of_another_base_is_told_before_any_image_is_made(tmp_path):
    base = written(tmp_path / "base", "sd")
    other = written(tmp_path / "other", "sd", unet={"cross_attention_dim": 1024})
    part = other / "unet" / "config.json"
    named = {"_class_name": "UNet2DConditionModel", **json.loads(part.read_text())}
    part.write_text(json.dumps(named))
    (other / "model_index.json").unlink()
    with pytest.raises(FifaError, match=r"1024, but it is given 768[\s\S]*other/unet"):
        find_models(str(base), {"tuned": str(other)})
    assert PIPELINES["StableDiffusionPipeline"] == BY_NAME["sd"]
