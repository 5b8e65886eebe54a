"""Each loss against its formula written with Python's math, pair by pair."""

import math
from functools import partial
from typing import get_args, get_type_hints

import pytest
import torch

from fifa.config import Train, changed
from fifa.errors import FifaError
from fifa.training.losses import (
    LOSSES,
    beta_from_diffusers,
    beta_from_kto,
    beta_from_simpletuner,
    beta_from_smpo,
    beta_now,
    errors,
    logits,
    safeguarded,
)

N = 6
BETA = 50.0


def loss_of(name, beta=BETA, **knobs):
    return partial(LOSSES[name], Train(loss=name, beta=beta, **knobs))


def test_every_loss_of_the_configuration_is_here():
    assert get_args(get_type_hints(Train)["loss"]) == (*LOSSES, "auto")


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    policy, reference = torch.rand(2, N, 2, generator=draw, dtype=torch.float64)
    label = 0.5 + 0.5 * torch.rand(N, generator=draw, dtype=torch.float64)
    return policy, reference, label, torch.rand(N, generator=draw, dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def by_hand(kind: str, ew: float, el: float, rw: float, rl: float, q: float) -> float:
    inside = -0.5 * BETA * ((ew - el) - (rw - rl))
    p = 1 / (1 + math.exp(-inside))
    if kind == "sigmoid":
        return -math.log(p)
    if kind == "ipo":
        return ((rw - rl) - (ew - el) - 1 / (2 * (BETA / 2))) ** 2
    if kind == "hinge":
        return max(0.0, 1 - inside)
    if kind == "poly":
        return -math.log(p) + 3 * (1 - p)
    if kind == "soft":
        return -q * math.log(p) - (1 - q) * math.log(1 - p)
    if kind == "smpo":
        return -log_sigmoid((2 * q - 1) * inside)
    if kind == "kto":
        good, bad = (1 / (1 + math.exp(-BETA / 2 * g)) for g in (rw - ew, el - rl))
        return 1 - (good + bad) / 2

    def f(e: float) -> float:
        return 0.5 * e / (math.exp(0.5 * e) - 1)

    return ew - 0.2 * log_sigmoid(1000 * (f(ew) - f(el)))


@pytest.mark.parametrize("sft", [0.0, 0.7])
@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_is_its_formula(kind, sft, batch):
    policy, reference, label, weight = batch
    found = loss_of(kind, BETA, poly=3.0, mapo=0.2, sft=sft)(policy, reference, label, weight)
    expected = [
        float(weight[i])
        * (by_hand(kind, *policy[i].tolist(), *reference[i].tolist(), float(label[i])))
        + float(weight[i]) * sft * float(policy[i, 0])
        for i in range(N)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_push_the_winner_down_and_the_loser_up(kind, batch):
    policy, _, label, _ = batch
    policy = policy.clone().requires_grad_()
    loss_of(kind, BETA)(policy, policy.detach() + 1e-3, label, torch.ones(N)).sum().backward()
    assert (policy.grad[:, 0] > 0).all()
    assert (policy.grad[:, 1] < 0).all()


def test_a_certain_label_makes_the_soft_losses_diffusion_dpo(batch):
    policy, reference, _, weight = batch
    sure = torch.ones(N, dtype=torch.float64)
    expected = loss_of("sigmoid", BETA)(policy, reference, sure, weight)
    for kind in ("soft", "smpo"):
        assert torch.allclose(loss_of(kind, BETA)(policy, reference, sure, weight), expected)
    assert torch.allclose(
        loss_of("poly", BETA, poly=0.0)(policy, reference, sure, weight), expected
    )


def test_only_mapo_does_without_a_reference(batch):
    policy, reference, label, weight = batch
    loss = loss_of("mapo")
    assert torch.equal(loss(policy, None, label, weight), loss(policy, reference, label, weight))
    with pytest.raises(FifaError, match="needs a reference"):
        loss_of("sigmoid")(policy, None, label, weight)
    with pytest.raises(FifaError, match="loss"):
        changed(Train(), loss="orpo")


def test_of_kto_both_images_are_measured_from_what_steps_before_gained(batch):
    policy, reference, label, weight = batch
    moved = loss_of("kto")(policy, reference, label, weight, running=(9.0, 0.05))
    shifted = loss_of("kto")(policy, reference - 0.05, label, weight)
    assert torch.allclose(moved, shifted)
    assert not torch.allclose(moved, loss_of("kto")(policy, reference, label, weight))


def test_a_winner_that_got_worse_costs_more_inside_of_the_logarithm(batch):
    policy, reference, label, weight = batch
    found = loss_of("sigmoid", dpop=3.0)(policy, reference, label, weight)
    for i, (ew, el) in enumerate(policy.tolist()):
        rw, rl = reference[i].tolist()
        z = -BETA / 2 * ((ew - el) - (rw - rl) + 3.0 * max(0.0, ew - rw))
        assert float(found[i]) == pytest.approx(-float(weight[i]) * log_sigmoid(z))


def test_the_losers_gradient_leaves_the_winner_its_gain():
    draw = torch.Generator().manual_seed(3)
    target, noise = torch.rand(2, 8, 4, 6, 6, generator=draw)
    common = torch.rand(4, 4, 6, 6, generator=draw)
    for mu in (0.0, 0.4, 0.9, 1.0):
        # winners and losers of which some pull the same way, some apart
        signs = torch.tensor([1.0, 1, 1, 1, 3, 0.2, -1, -3]).view(8, 1, 1, 1)
        prediction = (target + common.repeat(2, 1, 1, 1) * signs + 0.1 * noise).requires_grad_()
        before = errors(prediction, target).view(2, -1).T
        policy = safeguarded(before, prediction, target, mu)
        assert torch.equal(policy, before)
        (before[:, 0].sum()).backward(retain_graph=True)
        own = prediction.grad[:4].clone()
        prediction.grad = None
        (policy[:, 0] - policy[:, 1]).sum().backward()
        # a step down both images' gradients, in what one network would share
        change = (own * (prediction.grad[:4] + prediction.grad[4:])).sum((1, 2, 3))
        least = mu * own.square().sum((1, 2, 3))
        assert (change >= least - 1e-6).all()
        assert torch.isclose(change[0], least[0], rtol=1e-4)  # its loser pulls hardest
        full = (own * (own + prediction.grad[4:])).sum((1, 2, 3))
        assert (full[2:] > own.square().sum((1, 2, 3))[2:]).all()  # apart: nothing is scaled


def test_of_one_pair_the_losers_share_is_the_authors_scripts():
    draw = torch.Generator().manual_seed(7)
    for mu in (0.0, 0.3, 0.9):
        for pull in (3.0, 0.5, -1.0):  # the loser's error as a multiple of the winner's
            target, off = torch.rand(2, 1, 4, 6, 6, generator=draw)
            both = torch.cat([target + off, target + pull * off]).requires_grad_()
            targets = target.repeat(2, 1, 1, 1)
            before = errors(both, targets).view(2, -1).T
            mine = logits(safeguarded(before, both, targets, mu), torch.zeros(1, 2), BETA)
            [found] = torch.autograd.grad(-torch.nn.functional.logsigmoid(mine), both)
            # get_adaptive_lose_l_scale and the loss of train.py
            winner, loser = both.detach().requires_grad_().chunk(2)
            g_w = torch.autograd.grad((winner - target).pow(2).mean(), winner)[0]
            g_l = torch.autograd.grad((loser - target).pow(2).mean(), loser)[0]
            cap = (1 - mu) * g_w.pow(2).sum() / ((g_l * g_w).sum() + 1e-9)
            scale = cap.clamp(0, 1) if (g_l * g_w).sum() > 0 else 1.0
            model_w, model_l = (both - targets).pow(2).mean(dim=[1, 2, 3]).chunk(2)
            scaled = model_l.detach() + scale * (model_l - model_l.detach())
            loss = -torch.nn.functional.logsigmoid(-0.5 * BETA * (model_w - scaled))
            [expected] = torch.autograd.grad(loss, both)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-9)


def test_beta_falls_until_logits_have_the_size_that_is_asked_for(batch):
    policy, reference, label, weight = batch
    train = Train(beta=5000.0, beta_target=1.4)
    spread = float(logits(policy, reference, 2.0).abs().mean())
    beta = beta_now(train, torch.tensor(spread))
    assert float(logits(policy, reference, beta).abs().mean()) == pytest.approx(1.4)
    # SimpleTuner's _beta_for_margin: -2 logit(g) / mean |margin|, for its auto_beta_target_gf g
    target = -float(torch.logit(torch.tensor(0.2)))
    theirs = 2.0 * target / spread
    assert float(beta_now(Train(beta=5000.0, beta_target=target), spread)) == pytest.approx(theirs)
    assert float(beta_now(train, 0.0)) == float(beta_now(train, 1e-9)) == 5000.0
    assert beta_now(Train(beta=5000.0), spread) == 5000.0
    found = LOSSES["sigmoid"](train, policy, reference, label, weight, running=(spread, 0.0))
    expected = loss_of("sigmoid", float(beta))(policy, reference, label, weight)
    assert torch.allclose(found, expected)
    for knobs in ({"loss": "ipo", "beta_target": 1.0}, {"loss": "mapo", "dpop": 1.0}):
        with pytest.raises(FifaError, match="does nothing for the loss"):
            Train(**knobs)


# What the other trainers compute, with their own beta, of predictions and targets [2, 4, 8, 8].


def sides():
    draw = torch.Generator().manual_seed(1)
    return [torch.rand(2, 4, 8, 8, generator=draw) for _ in range(3)]


def salesforce(prediction, base, target, beta):
    model = (prediction - target).pow(2).mean(dim=[1, 2, 3])
    ref = (base - target).pow(2).mean(dim=[1, 2, 3])
    inside = -0.5 * beta * ((model[0] - model[1]) - (ref[0] - ref[1]))
    return -torch.nn.functional.logsigmoid(inside)


def diffusers_sd15(prediction, base, target, beta):
    mse = torch.nn.functional.mse_loss
    model, ref = (mse(x, target, reduction="none").mean([1, 2, 3]) for x in (prediction, base))
    return -torch.nn.functional.logsigmoid(beta * ((ref[0] - ref[1]) - (model[0] - model[1])))


def simpletuner_sum(prediction, base, target, beta):
    model, ref = ((x - target).pow(2).flatten(1).sum(1) for x in (prediction, base))
    margin = (ref[0] - model[0]) + (model[1] - ref[1])
    return -torch.nn.functional.logsigmoid(0.5 * beta * margin)


@pytest.mark.parametrize(
    ("theirs", "beta", "ours"),
    [
        (salesforce, 40.0, 40.0),
        (salesforce, 40.0, beta_from_diffusers(40.0, "sdxl")),
        (diffusers_sd15, 20.0, beta_from_diffusers(20.0, "sd15")),
        (simpletuner_sum, 0.25, beta_from_simpletuner(0.25, (4, 8, 8))),
    ],
)
def test_a_converted_beta_gives_the_other_trainers_loss(theirs, beta, ours):
    prediction, base, target = sides()
    policy, reference = (errors(x, target)[None] for x in (prediction, base))
    one = torch.ones(1)
    found = loss_of("sigmoid", ours)(policy, reference, one, one)
    assert float(found) == pytest.approx(float(theirs(prediction, base, target, beta)), rel=1e-5)


def test_smpos_beta_carries_the_scripts_factor_of_ten(batch):
    policy, reference, label, weight = batch
    inside = (
        -0.5
        * 5.0
        * (2 * label - 1)
        * 10
        * (policy[:, 0] - policy[:, 1] - (reference[:, 0] - reference[:, 1]))
    )
    expected = -weight * torch.nn.functional.logsigmoid(inside)
    assert torch.allclose(loss_of("smpo", beta_from_smpo(5.0))(*batch), expected)


def test_ktos_beta_has_no_half(batch):
    policy, reference, _, weight = batch
    good, bad = (5.0 * (reference - policy)).T
    expected = weight * (1 - 0.5 * (good.sigmoid() + (-bad).sigmoid()))
    assert torch.allclose(loss_of("kto", beta_from_kto(5.0))(*batch), expected)


def test_an_unknown_script_has_no_beta():
    with pytest.raises(FifaError, match="no such script"):
        beta_from_diffusers(1.0, "flux")


def test_logits_are_zero_where_policy_is_reference():
    same = torch.rand(3, 2)
    assert logits(same, same, 5000.0).tolist() == [0.0] * 3
