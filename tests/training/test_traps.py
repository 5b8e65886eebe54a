"""Thirteen ways in which Diffusion-DPO has gone wrong elsewhere, each held shut by a test."""

import io
import math
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_diffusion import images_of, write_model, write_pairs
from trainings import assemble, quick

from fifa.config import Train
from fifa.training.backbones import load_backbone
from fifa.training.batches import draw_pair
from fifa.training.job import run_training
from fifa.training.loop import Feed
from fifa.training.losses import LOSSES, beta_from_simpletuner, errors
from fifa.training.metrics import read_stats, stats_line, sums
from fifa.training.order import Stream
from fifa.training.pairs import read_training_pairs


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sigmoid_loss(policy, reference, beta=5000.0):
    one = torch.ones(len(policy))
    return LOSSES["sigmoid"](Train(beta=beta), policy, reference, one, one)


def test_trap_1_the_reduction_sets_betas_meaning():
    prediction, base, target = (randn(2, 4, 8, 8, seed=i) for i in range(3))
    mean, base_mean = (errors(x, target)[None] for x in (prediction, base))
    assert torch.allclose(mean[0], (prediction - target).square().flatten(1).mean(1))
    total, base_total = mean * 4 * 8 * 8, base_mean * 4 * 8 * 8
    theirs = sigmoid_loss(total, base_total, beta=0.1)
    assert not torch.allclose(sigmoid_loss(mean, base_mean, beta=0.1), theirs)
    ours = sigmoid_loss(mean, base_mean, beta=beta_from_simpletuner(0.1, (4, 8, 8)))
    assert torch.allclose(ours, theirs, rtol=1e-4)


def test_trap_2_errors_are_reduced_in_float32():
    prediction, target = (randn(64, 4, 64, 64, seed=i).half() for i in (0, 1))
    exact = (prediction.double() - target.double()).square().mean((1, 2, 3))
    found = errors(prediction, target)
    assert found.dtype == torch.float32
    in_half = (prediction - target).square().mean((1, 2, 3))

    def logit_error(e):
        return float((0.5 * 5000 * (e.double() - exact)).abs().max())

    assert logit_error(in_half) > 0.1
    assert logit_error(found) < 0.01


def test_trap_3_the_batch_mean_is_outside_the_logarithm(world, tmp_path):
    loop = assemble(quick(world, micro_batch=4), tmp_path)
    with torch.no_grad():
        for weight in loop.state.weights().values():
            weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    [(part, _)] = loop.parts(0, loop.train.micro_batch)
    loss, _ = loop.forward(loop.source.batch(part))
    assert loss.shape == (4,)
    alone = [loop.forward(loop.source.batch([item]))[0].item() for item in part]
    assert loss.tolist() == pytest.approx(alone, rel=1e-3)
    inside = -torch.log(torch.expm1(loss.detach().double()))  # z of each pair, as l = log(1 + e^-z)
    wrong = float(-F.logsigmoid(inside.mean()))
    totals = loop.step(0, 1e-3, Feed(loop, 4))()
    assert totals[0] / 4 == pytest.approx(sum(alone) / 4, rel=1e-3)
    assert abs(totals[0] / 4 - wrong) > 1e-3


def test_trap_4_a_tie_is_no_win_of_image_0(tmp_path):
    labels = [1.0, 0.5, 0.0, 0.5]
    path = write_pairs(tmp_path / "pairs.parquet", label_0=labels)
    pairs = read_training_pairs(path)
    assert pairs.dropped == {"tie": 2}
    table = pq.read_table(path)
    first, second = table["jpg_0"].to_pylist(), table["jpg_1"].to_pylist()
    assert images_of(pairs, 0) == (first[0], second[0])
    assert images_of(pairs, 1) == (second[2], first[2])


def test_trap_5_both_images_are_changed_alike_and_keep_their_shape(world, tmp_path):
    sizes = (((96, 64), (96, 64)), ((64, 64), (80, 40)), ((64, 96), (64, 64)), ((64, 64),) * 2)
    write_pairs(tmp_path / "pairs.parquet", sizes)
    train = replace(quick(world, flips=True, buckets=True), source=str(tmp_path / "pairs.parquet"))
    loop = assemble(train, tmp_path / "out")
    encoded, asked = loop.source.encoded, []
    for i, ((w, h), (w2, h2)) in enumerate(sizes):
        winner, loser = encoded.frames(i).tolist()
        assert sorted([(h, w), (h2, w2)]) == sorted([tuple(winner[:2]), tuple(loser[:2])])
        assert winner[4:] == loser[4:]
    assert encoded.frames(0)[0, 4] < encoded.frames(0)[0, 5]  # a wide pair stays wide
    moments = type(encoded).moments

    def watched(self, i, flip=False):
        asked.append(flip)
        return moments(self, i, flip)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(encoded), "moments", watched)
        for step in range(8):
            for part, _ in loop.parts(step, loop.train.micro_batch):
                loop.source.batch(part)
    # asked for once a pair, both images with it; about half of the time mirrored
    assert len(asked) == 8 * 4
    assert 6 <= sum(asked) <= 26


def test_trap_6_sdxl_is_told_each_images_own_size_and_crop(tmp_path):
    write_model(tmp_path / "sdxl", "sdxl")
    sizes = (((128, 64), (64, 64)), ((64, 64), (64, 160)))
    write_pairs(tmp_path / "pairs.parquet", sizes)
    loop = assemble(quick(tmp_path, "sdxl", batch=2, buckets=False), tmp_path / "out")
    told = []
    loop.source.backbone.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]),
        with_kwargs=True,
    )
    loop.step(0, 1e-4, Feed(loop, 2))
    rows = {tuple(row) for ids in told for row in ids.tolist()}
    # height and width as they were, then what the centre crop to 64 x 64 cut off above and left
    assert rows == {
        (64, 128, 0, 32, 64, 64),
        (64, 64, 0, 0, 64, 64),
        (160, 64, 48, 0, 64, 64),
    }


def test_trap_7_sdxls_vae_stays_in_float32(tmp_path):
    write_model(tmp_path / "sdxl", "sdxl")
    full, half = (load_backbone(tmp_path / "sdxl", dtype=d) for d in ("float32", "float16"))
    assert next(half.denoiser.parameters()).dtype == torch.float16
    pixels = randn(2, 3, 64, 64).clamp(-1, 1)
    assert torch.equal(half.vae.moments(pixels), full.vae.moments(pixels))


def test_trap_8_ipo_trains(world, tmp_path):
    train = quick(world, loss="ipo", beta=50.0, steps=6, lr=3e-3)
    lines = read_stats(run_training(train, tmp_path / "out"))
    assert lines[0]["loss"] == pytest.approx((1 / 50.0) ** 2, rel=1e-4)
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["gradient_norm"] > 0


@pytest.mark.parametrize("world_size", [2, 4])
def test_trap_9_every_process_has_noise_and_times_of_its_own(world_size):
    stream = Stream(pairs=8, batch=8, seed=0)

    def drawn(rank):
        items = stream.step(0, rank, world_size)
        time = lambda generator: torch.randint(0, 1000, (), generator=generator)  # noqa: E731
        return [draw_pair(0, str(pair), d, time, (1, 4, 4), 0.0) for pair, d in items]

    shares = [drawn(rank) for rank in range(world_size)]
    noises = [one.noise for share in shares for one in share]
    assert len(noises) == 8
    for i, one in enumerate(noises):
        assert not any(torch.equal(one, other) for other in noises[:i])
    times = [[int(one.time) for one in share] for share in shares]
    assert len({tuple(row) for row in times}) == world_size


def test_trap_10_a_resumed_run_neither_replays_nor_skips(world, tmp_path):
    train = quick(world, steps=6, batch=3, save_every=1)

    def presented(loop):
        seen = []
        batch = type(loop.source).batch

        def watched(self, items):
            made = batch(self, items)
            seen.extend(
                zip(items, made.noisy[: len(items)].flatten(1).sum(1).tolist(), strict=True)
            )
            return made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(loop.source), "batch", watched)
            loop.run()
        return seen

    unbroken = presented(assemble(train, tmp_path / "unbroken"))
    first = assemble(train, tmp_path / "broken")
    object.__setattr__(first, "steps", 2)
    seen = presented(first) + presented(assemble(train, tmp_path / "broken"))
    assert seen == unbroken
    assert len(set(unbroken)) == 6 * 3


def test_trap_11_both_errors_may_rise_while_the_loss_falls():
    reference = torch.tensor([[0.10, 0.10]])
    before, after = reference.clone(), torch.tensor([[0.11, 0.13]])
    lines = []
    for policy in (before, after):
        loss = sigmoid_loss(policy, reference)
        lines.append(stats_line(sums(loss, policy, reference, torch.tensor([0.004])).tolist(), 1))
    assert lines[1]["loss"] < lines[0]["loss"]
    assert lines[1]["winner_minus_reference"] == pytest.approx(0.01, abs=1e-6)
    assert lines[1]["loser_minus_reference"] == pytest.approx(0.03, abs=1e-6)
    assert (lines[0]["implicit_accuracy"], lines[1]["implicit_accuracy"]) == (0.5, 1.0)
    assert lines[1]["kl"] == pytest.approx(0.004)
    assert lines[0]["kl_bound"] == 0.0


def test_trap_12_winner_and_loser_share_a_micro_batch_a_time_and_a_noise(world, tmp_path):
    loop = assemble(quick(world, micro_batch=1, batch=3), tmp_path)
    backbone = loop.source.backbone
    for part, _ in loop.parts(0, loop.train.micro_batch):
        assert len(part) == 1
        batch = loop.source.batch(part)
        assert len(batch.noisy) == 2
        assert int(batch.time[0]) == int(batch.time[1])
        # epsilon prediction: the target is the noise
        assert backbone.schedule.prediction == "epsilon"
        assert torch.equal(batch.target[0], batch.target[1])
        assert not torch.equal(batch.noisy[0], batch.noisy[1])


def test_trap_13_every_presentation_samples_the_posterior_anew(world, tmp_path):
    loop = assemble(quick(world), tmp_path)
    source = loop.source
    assert source.encoded.moments(0).shape[1] == 2 * source.backbone.vae.channels
    given = []
    latents = type(source.backbone.vae).latents

    def watched(self, moments, noise):
        given.append((moments, latents(self, moments, noise)))
        return given[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(source.backbone.vae), "latents", watched)
        for epoch in range(200):
            source.batch([(0, epoch)])
    assert all(torch.equal(moments, given[0][0]) for moments, _ in given)
    samples = torch.stack([sample for _, sample in given])
    mean, std = given[0][0].chunk(2, dim=1)
    scale = 0.18215
    assert torch.allclose(samples.std(0).mean(), scale * std.mean(), rtol=0.05)
    assert float((samples.mean(0) - scale * mean).abs().max()) < 0.4 * scale * float(std.max())


def test_the_pictures_of_these_tests_are_what_they_claim():
    # trap 5 and 6 lean on sizes given as (width, height)
    import numpy as np
    from tiny_diffusion import picture

    with Image.open(io.BytesIO(picture(np.random.default_rng(0), 20, 10))) as image:
        assert image.size == (20, 10)
