"""What a pair costs: Diffusion-DPO and its relatives, on the errors of winner and loser.

For one image, one time and one noise, the error is the mean over the latent's numbers

    e(x) = mean_{c,h,w} (prediction - target)^2

and with ``d = e(winner) - e(loser)`` of the policy and of the reference, the logit is

    z = -(beta / 2) * (d_policy - d_reference)

so that ``sigmoid(z)`` is the probability with which the policy prefers the winner over the loser
more than the reference does. Every beta in fifa is the beta of this line: mean over the numbers,
the 1/2 written out, as in Salesforce's script. The functions ``beta_from_*`` bring others' here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from fifa.config import Train
from fifa.errors import FifaError

TRAIN_TIMES = 1000  # T in MaPO: the time steps of all the models it was published for


def errors(prediction: Tensor, target: Tensor) -> Tensor:
    """The error of each image, float32 ``[n]``, of predictions and targets ``[n, c, h, w]``.

    Reduced in float32 whatever the predictions come in: half precision would cost about 0.1 in
    the logit at a beta of 5,000.
    """
    # e(x) = mean_{c,h,w} (prediction - target)^2
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))


def logits(policy: Tensor, reference: Tensor, beta: float | Tensor) -> Tensor:
    """z of each pair, ``[n]``, from errors ``[n, 2]`` of (winner, loser)."""
    d_policy, d_reference = policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]
    # z = -(beta / 2) * (d_policy - d_reference)
    return -0.5 * beta * (d_policy - d_reference)


def safeguarded(policy: Tensor, prediction: Tensor, target: Tensor, mu: float) -> Tensor:
    """Diffusion-SDPO, Fu et al. 2025 (arXiv 2511.03317): the loser does not push the winner up.

    The same errors ``[n, 2]`` of (winner, loser); of the loser's gradient only so much is left that
    a small step lowers the winner's error by at least ``mu`` of what the winner's own gradient
    would, as far as gradients at the predictions ``[2n, c, h, w]`` tell. The authors' script has
    one factor for all pairs of a micro-batch; here each pair has its own.
    """
    with torch.no_grad():
        winner, loser = (prediction.float() - target.float()).chunk(2)
        own, common = (winner * one for one in (winner, loser))
        own, common = own.mean(dim=(1, 2, 3)), common.mean(dim=(1, 2, 3))
        # lambda = clamp((1 - mu) |g_w|^2 / (g_w . g_l), 0, 1), and 1 where g_w . g_l <= 0
        share = torch.where(common > 0, (1 - mu) * own / common, 1.0).clamp(0, 1)
    error = policy[:, 1]
    return torch.stack([policy[:, 0], share * error + ((1 - share) * error).detach()], 1)


# What the steps before have left, of the policy against the reference: the mean of
# |d_policy - d_reference|, and the mean over all images of e_reference - e_policy.
START = (0.0, 0.0)
MEMORY = 0.9  # the share of what was known before a step: a mean over about ten steps


def run_on(running: Tensor, spread: Tensor, gain: Tensor) -> Tensor:
    """``running`` after a step of which these are the means, float32 ``[2]``; the gain from 0 up.

    What a step computes depends on steps before it only, not on its own micro-batches.
    """
    return MEMORY * running + (1 - MEMORY) * torch.stack([spread, gain.clamp(min=0)])


def beta_now(train: Train, spread: float | Tensor) -> float | Tensor:
    """The beta of this step: with ``train.beta_target`` lowered until logits are of that size.

    As SimpleTuner's ``auto_beta``, whose ``auto_beta_target_gf`` g is a target of log((1 - g) / g):
    1.39 for its 0.2. Never above ``train.beta``, with which a training begins.
    """
    if train.beta_target is None:
        return train.beta
    # beta = 2 * target / mean |d_policy - d_reference|, so that mean |z| is the target
    return (2 * train.beta_target / torch.as_tensor(spread)).clamp(max=train.beta)


def _held_back(train: Train, policy: Tensor, reference: Tensor) -> Tensor:
    """DPO-Positive, Pal et al. 2024 (arXiv 2402.13228): a winner that gets worse costs more."""
    if not train.dpop:
        return policy
    # e(winner) + lambda * max(0, e(winner) - e_reference(winner)), inside of the logarithm
    winner = policy[:, 0]
    worse = relu(winner - reference[:, 0])
    return torch.stack([winner + train.dpop * worse, policy[:, 1]], 1)


@dataclass(frozen=True)
class Loss:
    """The loss of each pair; a batch's loss is their mean, outside of every logarithm.

    Parameters
    ----------
    formula
        The loss ``[n]`` of (the training's knobs, z ``[n]``, labels ``[n]``); without a reference
        it gets the policy's errors ``[n, 2]`` of (winner, loser) in the place of z.
    needs_reference
        Whether the reference's errors enter.
    reads_label
        Whether the soft label enters.
    single
        Whether images count one by one: in the place of z it gets z of each image, ``[n, 2]`` of
        (winner, loser) or ``[n, 1]``, by which the policy denoises it better than the reference.
    """

    formula: Callable[[Train, Tensor, Tensor], Tensor]
    needs_reference: bool = True
    reads_label: bool = False
    single: bool = False

    def __call__(
        self,
        train: Train,
        policy: Tensor,
        reference: Tensor | None,
        label: Tensor,
        weight: Tensor,
        running: Sequence[float] | Tensor = START,
    ) -> Tensor:
        """The weighted loss of each pair, float32 ``[n]``.

        Parameters
        ----------
        train
            Its ``beta`` (see the module), the loss's own knobs, ``sft``, the weight of the anchor
            (the winner's error is added to the loss, so that it cannot rise unpunished), ``dpop``
            and ``beta_target``.
        policy, reference
            Errors ``[n, 2]`` of (winner, loser); the reference may be None where none is needed.
        label
            float32 ``[n]``: the probability that the winner is preferred.
        weight
            float32 ``[n]``, of mean 1 over the data set unless the selection meant otherwise.
        running
            What the steps before have left: see `run_on`.
        """
        x = policy
        if self.needs_reference:
            if reference is None:
                raise FifaError(f"the loss {train.loss} needs a reference")
            spread, gain = running
            beta, held = beta_now(train, spread), _held_back(train, policy, reference)
            # z(x) = (beta / 2) * (e_reference(x) - e(x) - mean over all images of the same)
            x = (
                0.5 * beta * (reference - held - gain)
                if self.single
                else logits(held, reference, beta)
            )
        # l = w * (l + sft * e(winner))
        return weight * (self.formula(train, x, label) + train.sft * policy[:, 0])


def _sigmoid(train: Train, z: Tensor, label: Tensor) -> Tensor:
    """Diffusion-DPO, Wallace et al. 2023 (arXiv 2311.12908)."""
    # -log p,  p = sigmoid(z)
    return -logsigmoid(z)


def _ipo(train: Train, z: Tensor, label: Tensor) -> Tensor:
    """Azar et al. 2023 (arXiv 2310.12036), on the logit without its scale."""
    # (z / b - 1 / (2 b))^2,  b = beta / 2: the difference of errors should be 1 / beta
    half = 0.5 * train.beta
    return (z / half - 1 / (2 * half)).square()


def _hinge(train: Train, z: Tensor, label: Tensor) -> Tensor:
    """Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425)."""
    # max(0, 1 - z)
    return relu(1 - z)


def _mapo(train: Train, policy: Tensor, label: Tensor) -> Tensor:
    """Hong et al. 2024 (arXiv 2406.06424); beta plays no part."""

    def f(e: Tensor) -> Tensor:
        # f(e) = 0.5 e / (exp(0.5 e) - 1)
        return 0.5 * e / (0.5 * e).expm1()

    winner, loser = policy[:, 0], policy[:, 1]
    # e(winner) - 0.1 log sigmoid(T (f(e(winner)) - f(e(loser))))
    return winner - train.mapo * logsigmoid(TRAIN_TIMES * (f(winner) - f(loser)))


def _poly(train: Train, z: Tensor, label: Tensor) -> Tensor:
    """Poly-DPO, Li et al. 2026 (ViPO, arXiv 2604.24953)."""
    # -log p + a (1 - p)
    log_p = logsigmoid(z)
    return -log_p + train.poly * (1 - log_p.exp())


def _soft(train: Train, z: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy against a label between 0 and 1 (conservative DPO)."""
    # -q log p - (1 - q) log(1 - p),  1 - p = sigmoid(-z)
    return -label * logsigmoid(z) - (1 - label) * logsigmoid(-z)


def _smpo(train: Train, z: Tensor, label: Tensor) -> Tensor:
    """SmPO-Diffusion, Lu et al. 2025 (arXiv 2506.02698): the label scales the logit."""
    # -log sigmoid((2 q - 1) z)
    return -logsigmoid((2 * label - 1) * z)


def _kto(train: Train, z: Tensor, label: Tensor) -> Tensor:
    """Diffusion-KTO, Li et al. 2024 (arXiv 2404.04465), with the sigmoid as utility.

    Of images one by one, ``[n, 1]``, the label is 1 for a good one and 0 for a bad one, and the
    weight has KTO's lambda in it (`fifa.training.ratings.balance`).
    """
    if z.shape[1] == 1:
        # 1 - sigmoid(z) for a good image, 1 - sigmoid(-z) for a bad one
        return 1 - ((2 * label - 1) * z[:, 0]).sigmoid()
    # 1 - mean(sigmoid(z(winner)), sigmoid(-z(loser)))
    return 1 - 0.5 * (z[:, 0].sigmoid() + (-z[:, 1]).sigmoid())


# By the name that `fifa.config.Train.loss` has for it.
LOSSES = {
    "sigmoid": Loss(_sigmoid),
    "ipo": Loss(_ipo),
    "hinge": Loss(_hinge),
    "mapo": Loss(_mapo, needs_reference=False),
    "poly": Loss(_poly),
    "soft": Loss(_soft, reads_label=True),
    "smpo": Loss(_smpo, reads_label=True),
    "kto": Loss(_kto, single=True),
}


def beta_from_diffusers(beta: float, script: Literal["sd15", "sdxl"]) -> float:
    """``--beta_dpo`` of diffusers' two scripts.

    ``train_diffusion_dpo.py`` (``sd15``) has ``logsigmoid(beta * ...)``: the 1/2 is folded into
    it, so that its 2,500 is our 5,000. ``train_diffusion_dpo_sdxl.py`` keeps the 1/2.
    """
    if script not in ("sd15", "sdxl"):
        raise FifaError(f"no such script: {script}", do="sd15 or sdxl")
    # beta * (...) = (beta_ours / 2) * (...)
    return 2.0 * beta if script == "sd15" else float(beta)


def beta_from_simpletuner(beta: float, shape: tuple[int, int, int]) -> float:
    """SimpleTuner's Flow-DPO ``beta`` with ``norm_type: sum`` and ``auto_beta: false``.

    Its errors are sums over a latent's ``shape`` (c, h, w), ours are means; both keep the 1/2.
    With ``norm_type: mean`` its beta is ours.
    """
    c, h, w = shape
    # (beta / 2) * sum = (beta_ours / 2) * mean
    return float(beta) * c * h * w


def beta_from_kto(beta: float) -> float:
    """Diffusion-KTO's ``--beta_dpo``: its script multiplies an image's gain by it, without 1/2."""
    # beta * (...) = (beta_ours / 2) * (...)
    return 2.0 * beta


def beta_from_smpo(beta: float) -> float:
    """SmPO's ``--beta_dpo``: its script multiplies the logit by 10 beside it."""
    # (beta / 2) * 10 (2 q - 1) * (...) = (beta_ours / 2) * (2 q - 1) * (...)
    return 10.0 * beta
