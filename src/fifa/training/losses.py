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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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


def logits(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """z of each pair, ``[n]``, from errors ``[n, 2]`` of (winner, loser)."""
    d_policy, d_reference = policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]
    # z = -(beta / 2) * (d_policy - d_reference)
    return -0.5 * beta * (d_policy - d_reference)


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
    """

    formula: Callable[[Train, Tensor, Tensor], Tensor]
    needs_reference: bool = True
    reads_label: bool = False

    def __call__(
        self, train: Train, policy: Tensor, reference: Tensor | None, label: Tensor, weight: Tensor
    ) -> Tensor:
        """The weighted loss of each pair, float32 ``[n]``.

        Parameters
        ----------
        train
            Its ``beta`` (see the module), the loss's own knobs, and ``sft``, the weight of the
            anchor: the winner's error is added to the loss, so that it cannot rise unpunished.
        policy, reference
            Errors ``[n, 2]`` of (winner, loser); the reference may be None where none is needed.
        label
            float32 ``[n]``: the probability that the winner is preferred.
        weight
            float32 ``[n]``, of mean 1 over the data set unless the selection meant otherwise.
        """
        x = policy
        if self.needs_reference:
            if reference is None:
                raise FifaError(f"the loss {train.loss} needs a reference")
            x = logits(policy, reference, train.beta)
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


# By the name that `fifa.config.Train.loss` has for it.
LOSSES = {
    "sigmoid": Loss(_sigmoid),
    "ipo": Loss(_ipo),
    "hinge": Loss(_hinge),
    "mapo": Loss(_mapo, needs_reference=False),
    "poly": Loss(_poly),
    "soft": Loss(_soft, reads_label=True),
    "smpo": Loss(_smpo, reads_label=True),
}


def margin_labels(margin: Tensor, scale: float) -> Tensor:
    """Soft labels from reward margins, ``[n]``: ``q = sigmoid(scale * margin)``.

    SmPO's: ``scale = 1 / (max - min)`` of PickScores over its data set, about 6 on cosines. A
    negative margin gives a label below 1/2: the reward model overrules the person.
    """
    # q = sigmoid(scale * (r_winner - r_loser))
    return (scale * margin).sigmoid()


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


def beta_from_smpo(beta: float) -> float:
    """SmPO's ``--beta_dpo``: its script multiplies the logit by 10 beside it."""
    # (beta / 2) * 10 (2 q - 1) * (...) = (beta_ours / 2) * (2 q - 1) * (...)
    return 10.0 * beta
