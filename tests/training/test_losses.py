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
    beta_from_simpletuner,
    beta_from_smpo,
    errors,
    logits,
    margin_labels,
)

N = 6
BETA = 50.0


def loss_of(name, beta=BETA, **knobs):
    return partial(LOSSES[name], Train(loss=name, beta=beta, **knobs))


def test_every_loss_of_the_configuration_is_here():
    assert get_args(get_type_hints(Train)["loss"]) == tuple(LOSSES)


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
        changed(Train(), loss="kto")


def test_margins_become_labels():
    labels = margin_labels(torch.tensor([0.0, 0.1, -0.1]), 6.0).tolist()
    assert labels == pytest.approx([0.5, 1 / (1 + math.exp(-0.6)), 1 / (1 + math.exp(0.6))])


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


def test_an_unknown_script_has_no_beta():
    with pytest.raises(FifaError, match="no such script"):
        beta_from_diffusers(1.0, "flux")


def test_logits_are_zero_where_policy_is_reference():
    same = torch.rand(3, 2)
    assert logits(same, same, 5000.0).tolist() == [0.0] * 3
