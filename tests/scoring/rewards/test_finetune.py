import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from feedback import write_feedback
from safetensors.torch import load_file
from tiny_models import write_clip

from fifa.config import Reward
from fifa.errors import FifaError
from fifa.scoring.rewards import finetune, load_reward
from fifa.scoring.rewards.engine import score_pairs
from fifa.scoring.rewards.finetune import preference_loss, schedule
from fifa.scoring.rewards.fit import crossfit_rewards, train_reward

SHORT = Reward(
    lr=3e-3, weight_decay=0.0, warmup=2, steps=8, batch=12, held_out=0.25, evaluate_every=4
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of random weights, and a data set."""
    folder = tmp_path_factory.mktemp("clip")
    model = write_clip(folder / "tiny-clip", image_size=64)
    model.logit_scale.data.fill_(1.5)
    model.save_pretrained(folder / "tiny-clip")
    return str(folder / "tiny-clip"), write_feedback(folder / "feedback")


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_the_loss_is_pickscores_written_out():
    draw = np.random.default_rng(0)
    r0, r1, y, w = (draw.random(9) for _ in range(4))
    total = 0.0
    for a, b, label, weight in zip(r0, r1, y, w, strict=True):
        p = math.exp(a) / (math.exp(a) + math.exp(b))
        total -= weight / w.sum() * (label * math.log(p) + (1 - label) * math.log(1 - p))
    tensors = (torch.from_numpy(values) for values in (r0, r1, y, w))
    assert preference_loss(*tensors).item() == pytest.approx(total)


def test_a_tie_is_cheapest_where_the_rewards_are_equal():
    r0 = torch.tensor([1.0, 3.0], requires_grad=True)
    loss = preference_loss(r0, torch.tensor([1.0, 1.0]), torch.full((2,), 0.5), torch.ones(2))
    loss.backward()
    assert r0.grad[0] == 0
    assert r0.grad[1] > 0


def test_the_learning_rate_rises_and_falls_in_straight_lines():
    shares = [schedule(step, 4, 12) for step in range(13)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4:] == pytest.approx([(12 - step) / 8 for step in range(4, 13)])


def test_a_clip_learns_the_taste_and_is_calibrated(clip, tmp_path):
    base, pairs = clip
    options = replace(SHORT, base=base, steps=40, evaluate_every=10)
    trained = train_reward(pairs, tmp_path / "reward", options)
    assert trained.metrics.accuracy >= 0.8
    assert trained.metrics.nll < 0.5
    base_scale, scale = 1.5, weights(tmp_path / "reward")["logit_scale"].item()
    assert scale == pytest.approx(base_scale - np.log(trained.temperature), abs=0.2)
    model = trained.load()
    table = score_pairs(pairs, model)
    z = table["reward_0"].to_numpy() - table["reward_1"].to_numpy()
    assert np.mean((z > 0) == (pairs.table["label"].to_numpy() > 0.5)) > 0.8
    # as a PickScore, it is the same
    again = load_reward(f"pickscore:{tmp_path / 'reward' / 'model'}", device="cpu")
    assert score_pairs(pairs, again)["reward_0"].to_pylist() == table["reward_0"].to_pylist()
    assert "fine-tuned (both towers)" in (tmp_path / "reward" / "README.md").read_text()


def test_training_the_heads_leaves_the_towers_alone(clip, tmp_path):
    base, pairs = clip
    train_reward(pairs, tmp_path / "heads", replace(SHORT, base=base, parts="heads"))
    before = load_file(f"{base}/model.safetensors")
    after = weights(tmp_path / "heads")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"text_projection.weight", "visual_projection.weight", "logit_scale"}


@pytest.mark.parametrize("bf16", [False, True])
def test_heads_on_kept_features_learn_what_heads_in_the_whole_model_do(clip, bf16, tmp_path):
    base, pairs = clip
    full = replace(SHORT, base=base, parts="heads", bf16=bf16)
    train_reward(pairs, tmp_path / "kept", full)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune._Clip, "freeze", lambda self: None)
        train_reward(pairs, tmp_path / "whole", full)
    kept, whole = weights(tmp_path / "kept"), weights(tmp_path / "whole")
    for name in ("text_projection.weight", "visual_projection.weight"):
        assert torch.allclose(kept[name], whole[name], atol=2e-2 if bf16 else 1e-4)


def test_the_same_seed_gives_the_same_bytes(clip, tmp_path):
    base, pairs = clip
    for name in ("a", "b"):
        train_reward(pairs, tmp_path / name, replace(SHORT, base=base))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    train_reward(pairs, tmp_path / "c", replace(SHORT, base=base, seed=1))
    assert weights(tmp_path / "a")["logit_scale"] != weights(tmp_path / "c")["logit_scale"]


def test_no_step_that_was_worse_on_held_out_prompts_is_kept(clip, tmp_path):
    base, pairs = clip
    wild = replace(SHORT, base=base, lr=1e4, steps=6, warmup=0, evaluate_every=1, patience=2)
    trained = train_reward(pairs, tmp_path / "wild", wild)
    still = train_reward(pairs, tmp_path / "still", replace(wild, lr=0.0))
    assert trained.before.accuracy >= still.before.accuracy


def test_a_pair_whose_image_is_broken_is_left_out(clip, tmp_path):
    base, _ = clip
    pairs = write_feedback(tmp_path / "some", broken={"0-1-0.png"})
    train_reward(pairs, tmp_path / "reward", replace(SHORT, base=base, parts="heads"))
    card = (tmp_path / "reward" / "README.md").read_text()
    assert "| pairs | 23 |" in card
    assert "| pairs without both images | 1 |" in card


def test_a_disk_that_takes_no_file_is_told(clip, tmp_path, monkeypatch):
    base, _ = clip
    pairs = write_feedback(tmp_path / "some")

    def refuse(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fifa.scoring.rewards.finetune.np.lib.format.open_memmap", refuse)
    left = tmp_path / ".fifa-pixels-reward" / "pixels.npy"  # by a kill
    left.parent.mkdir()
    left.touch()
    with pytest.raises(FifaError, match="cannot write: No space left"):
        train_reward(pairs, tmp_path / "reward", replace(SHORT, base=base, parts="heads"))
    assert [path.name for path in tmp_path.iterdir()] == ["some"]


def test_a_clip_can_be_cross_fitted(clip, tmp_path):
    base, pairs = clip
    options = replace(SHORT, base=base, parts="heads", steps=30, evaluate_every=10)
    table = crossfit_rewards(pairs, folds=2, folder=tmp_path, options=options)
    assert table["pair_id"].to_pylist() == pairs.table["pair_id"].to_pylist()
    assert np.isfinite(table["reward_0"].to_numpy()).all()
    assert [p.name for p in tmp_path.glob(".parts-*")] == []


def test_options_that_make_no_sense_are_refused():
    for wrong in ({"parts": "tail"}, {"steps": 0}, {"held_out": 1.0}, {"steps": 10}):
        with pytest.raises(FifaError):
            Reward(**wrong)
