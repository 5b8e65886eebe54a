import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from feedback import write_feedback
from safetensors.torch import load_file, save_file
from tiny_models import write_clip
from transformers import ViTConfig, ViTModel

from fifa.config import Reward
from fifa.errors import FifaError
from fifa.models.runtime import Runtime
from fifa.scoring.rewards import fit
from fifa.scoring.rewards.engine import score_pairs
from fifa.scoring.rewards.features import frozen_features
from fifa.scoring.rewards.fit import comparisons, fit_head, train_reward
from fifa.scoring.rewards.image_encoders import make_image_encoder
from fifa.scoring.rewards.proxy import load_proxy


@pytest.fixture(scope="module")
def feedback(tmp_path_factory):
    """A data set, and the options for encoders of random weights."""
    folder = tmp_path_factory.mktemp("feedback")
    write_clip(folder / "tiny-clip", image_size=64)
    clip = f"clip:{folder / 'tiny-clip'}"
    return write_feedback(folder / "pairs"), Reward(image=clip, text=clip, folds=4)


def features_of(pairs, options, folder=None):
    return frozen_features(pairs, options, folder)[0]


def test_a_head_learns_the_taste_and_says_how_well(feedback, tmp_path):
    pairs, options = feedback
    trained = train_reward(pairs, tmp_path / "reward", options)
    assert trained.metrics.accuracy > 0.9
    assert trained.metrics.nll < 0.1
    card = (tmp_path / "reward" / "README.md").read_text()
    low, high = trained.metrics.low, trained.metrics.high
    assert f"| accuracy against the majority | {trained.metrics.accuracy:.3f} |" in card
    assert f"{low:.3f} to {high:.3f}" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("reads_prompts", [False, True])
def test_the_engine_scores_with_what_was_saved(feedback, reads_prompts, tmp_path, monkeypatch):
    pairs, options = feedback
    walk = fit._walk  # one kind of head wins, whatever held-out prompts say
    monkeypatch.setattr(fit, "_walk", lambda *a: (float(a[3] != reads_prompts), *walk(*a)[1:]))
    train_reward(pairs, tmp_path / "reward", options)
    features = features_of(pairs, options)
    data, _ = comparisons(pairs, features)
    fitted = fit_head(pairs, features, data, options)
    assert fitted.head.reads_prompts == reads_prompts
    table = score_pairs(pairs, load_proxy(tmp_path / "reward"))
    for side in (0, 1):
        images = features.images[data.image[:, side]]
        expected = fitted.head.rewards(images, features.prompts[data.prompt])
        found = table[f"reward_{side}"].to_numpy()
        # prompt vectors pass through float16 while training
        assert found == pytest.approx(expected, abs=2e-2 if reads_prompts else 1e-3)


def test_a_folder_that_went_elsewhere_scores_the_same(feedback, tmp_path):
    pairs, options = feedback
    shutil.copytree(options.image.removeprefix("clip:"), tmp_path / "home" / "encoder")
    own = f"clip:{tmp_path / 'home' / 'encoder'}"
    trained = train_reward(pairs, tmp_path / "home" / "reward", replace(options, image=own))
    first, here = score_pairs(pairs, trained.load()), trained.load().identity
    shutil.move(tmp_path / "home" / "reward", tmp_path / "away")
    shutil.rmtree(tmp_path / "home")
    moved = load_proxy(tmp_path / "away")
    assert moved.identity == here
    assert score_pairs(pairs, moved).equals(first)


def test_another_encoder_than_the_one_it_was_trained_on_is_refused(feedback, tmp_path):
    pairs, options = feedback
    train_reward(pairs, tmp_path / "reward", options)
    write_clip(tmp_path / "reward" / "encoders" / "tiny-clip", seed=5, image_size=64)
    (tmp_path / "reward" / "digests.json").unlink()
    with pytest.raises(FifaError, match="is not the one that this reward was trained on"):
        load_proxy(tmp_path / "reward")


def test_another_head_has_another_identity(feedback, tmp_path):
    pairs, options = feedback
    one = train_reward(pairs, tmp_path / "one", options).load().identity
    assert train_reward(pairs, tmp_path / "same", options).load().identity == one
    flipped = pairs.table.set_column(
        pairs.table.schema.get_field_index("label"),
        "label",
        [(1 - pairs.table["label"].to_numpy()).astype(np.float32)],
    )
    two = train_reward(replace(pairs, table=flipped), tmp_path / "two", options)
    assert two.load().identity != one


def test_the_same_data_gives_the_same_bytes_with_and_without_kept_features(feedback, tmp_path):
    pairs, options = feedback
    train_reward(pairs, tmp_path / "a", options)
    for _ in range(2):  # embedded, then read
        train_reward(pairs, tmp_path / "b", options, cache=tmp_path / "cache")
        for name in ("head.safetensors", "reward.json", "README.md"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_features_of_broken_images_are_missing_and_their_pairs_left_out(feedback, tmp_path):
    _, options = feedback
    pairs = write_feedback(tmp_path / "some", broken={"2-0-1.png", "3-1-0.png"})
    features = features_of(pairs, options)
    data, readable = comparisons(pairs, features)
    assert np.isnan(features.images).all(1).sum() == 1  # their bytes are the same
    assert (~readable).sum() == 2
    trained = train_reward(pairs, tmp_path / "reward", options)
    assert trained.metrics.pairs == 22
    assert np.isfinite(data.label).all()


def test_each_different_image_is_embedded_once(feedback, tmp_path):
    _, options = feedback
    pairs = write_feedback(tmp_path / "some", prompts=2)
    names = sorted(path for path in (tmp_path / "some").glob("*.png"))
    names[1].write_bytes(names[0].read_bytes())  # two names of one picture
    features = features_of(pairs, options)
    assert len(names) == 12
    assert len(features.images) == 11


def test_a_source_of_broken_images_is_refused(feedback, tmp_path):
    _, options = feedback
    names = {f"{p}-{i}-{s}.png" for p in range(8) for i in range(3) for s in (0, 1)}
    pairs = write_feedback(tmp_path / "some", broken=names)
    with pytest.raises(FifaError, match="no image could be read"):
        train_reward(pairs, tmp_path / "reward", options)
    assert not (tmp_path / "reward").exists()


def test_other_peoples_folders_are_left_alone(feedback, tmp_path):
    pairs, options = feedback
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(FifaError, match="not empty"):
        train_reward(pairs, tmp_path / "mine", options)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


def test_any_vision_model_can_be_the_image_encoder(feedback, tmp_path):
    pairs, options = feedback
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    settings = {
        "size": {"height": 32, "width": 32},
        "image_mean": [0.4] * 3,
        "image_std": [0.3] * 3,
    }
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    own = replace(options, image=f"image:{tmp_path / 'vit'}", text="none")
    trained = train_reward(pairs, tmp_path / "reward", own)
    assert trained.metrics.accuracy > 0.9
    assert np.isfinite(score_pairs(pairs, trained.load())["reward_0"].to_numpy()).all()


def test_what_is_no_reward_is_refused(tmp_path):
    with pytest.raises(FifaError):
        load_proxy(tmp_path)
    (tmp_path / "reward.json").write_text('{"format": 99}')
    with pytest.raises(FifaError, match="not a reward model of this version"):
        load_proxy(tmp_path)
    with pytest.raises(FifaError, match="no such image encoder"):
        make_image_encoder("efficientnet-b7", Runtime())


def test_a_damaged_reward_is_told(feedback, tmp_path):
    pairs, options = feedback
    train_reward(pairs, tmp_path, options)
    settings, head = tmp_path / "reward.json", tmp_path / "head.safetensors"
    whole, known = settings.read_text(), json.loads(settings.read_text())
    for file in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        if file.name == "README.md":  # for people
            continue
        kept, at = file.read_bytes(), file.stat().st_size * 2 // 3
        for damaged in (kept[:at] + bytes([kept[at] ^ 4]) + kept[at + 1 :], kept[: at * 3 // 4]):
            file.write_bytes(damaged)
            with pytest.raises(FifaError, match=file.name):
                load_proxy(tmp_path)
        file.write_bytes(kept)
    (tmp_path / "digests.json").unlink()  # a folder of another program's, or an older one
    texts = ["", "[]", "null", "[" * 9999, whole[:-9], '{"format": ' + "9" * 5000 + "}"]
    for side in ("image", "text"):
        wrong = (1, [], {}, {"spec": 1, "identity": {}}, {"spec": "", "identity": []})
        texts += [json.dumps({**known, side: value}) for value in wrong]
        texts.append(json.dumps({key: value for key, value in known.items() if key != side}))
    texts += [json.dumps({**known, key: []}) for key in ("format", "kind", "image")]
    for text in texts:
        settings.write_text(text)
        with pytest.raises(FifaError, match=re.escape(str(tmp_path))):
            load_proxy(tmp_path)
    settings.write_text(whole)
    tensors = load_file(head)
    for damaged, said in (
        ({**tensors, "extra": tensors["image"] + 0}, r"1 unused \(extra\)"),
        ({name: t for name, t in tensors.items() if name != "prompt"}, r"1 missing \(prompt\)"),
        ({**tensors, "image_bias": tensors["image_bias"][:0]}, "shapes do not fit"),
        ({**tensors, "prompt": tensors["prompt"].flatten()}, "shapes do not fit"),
    ):
        save_file(damaged, head)
        with pytest.raises(FifaError, match=said):
            _ = load_proxy(tmp_path)._head
