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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fifa.config import Train
from fifa.errors import FifaError
from fifa.models.optional import require

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["sigmoid", "ipo", "hinge", "mapo", "poly", "soft", "smpo"]
KINDS: tuple[Kind, ...] = ("sigmoid", "ipo", "hinge", "mapo", "poly", "soft", "smpo")
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
    kind
        | ``sigmoid``: Diffusion-DPO, Wallace et al. 2023 (arXiv 2311.12908).
        | ``ipo``: Azar et al. 2023 (arXiv 2310.12036), on the logit without its scale.
        | ``hinge``: Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425).
        | ``mapo``: Hong et al. 2024 (arXiv 2406.06424); no reference, and beta plays no part.
        | ``poly``: Poly-DPO, Li et al. 2026 (ViPO, arXiv 2604.24953).
        | ``soft``: cross-entropy against a label between 0 and 1 (conservative DPO).
        | ``smpo``: SmPO-Diffusion, Lu et al. 2025 (arXiv 2506.02698): the label scales the logit.
    beta
        Strength of the pull towards the reference (see the module).
    poly
        a of Poly-DPO.
    mapo
        Weight of MaPO's ratio term.
    sft
        Weight of the anchor: the winner's error is added to the loss, so that it cannot rise
        unpunished.
    """

    kind: Kind = "sigmoid"
    beta: float = Train.beta
    poly: float = Train.poly
    mapo: float = Train.mapo
    sft: float = Train.sft

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FifaError(f"no such loss: {self.kind}", do=", ".join(KINDS))

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's errors enter."""
        return self.kind != "mapo"

    def __call__(
        self, policy: Tensor, reference: Tensor | None, label: Tensor, weight: Tensor
    ) -> Tensor:
        """The weighted loss of each pair, float32 ``[n]``.

        Parameters
        ----------
        policy, reference
            Errors ``[n, 2]`` of (winner, loser); the reference may be None for MaPO.
        label
            float32 ``[n]``: the probability that the winner is preferred; read by ``soft`` and
            ``smpo`` only.
        weight
            float32 ``[n]``, of mean 1 over the data set unless the selection meant otherwise.
        """
        winner = policy[:, 0]
        if reference is None:
            if self.needs_reference:
                raise FifaError(f"the loss {self.kind} needs a reference")
            loss = self._mapo(policy)
        else:
            loss = self._of_logit(logits(policy, reference, self.beta), label, policy)
        # l = w * (l + sft * e(winner))
        return weight * (loss + self.sft * winner)

    def _of_logit(self, z: Tensor, label: Tensor, policy: Tensor) -> Tensor:
        functional = require("torch.nn.functional", "train")
        log_p: Tensor = functional.logsigmoid(z)
        loss: Tensor
        if self.kind == "sigmoid":
            # -log p,  p = sigmoid(z)
            loss = -log_p
        elif self.kind == "ipo":
            # (z / b - 1 / (2 b))^2,  b = beta / 2: the difference of errors should be 1 / beta
            half = 0.5 * self.beta
            loss = (z / half - 1 / (2 * half)).square()
        elif self.kind == "hinge":
            # max(0, 1 - z)
            loss = functional.relu(1 - z)
        elif self.kind == "poly":
            # -log p + a (1 - p)
            loss = -log_p + self.poly * (1 - log_p.exp())
        elif self.kind == "soft":
            # -q log p - (1 - q) log(1 - p),  1 - p = sigmoid(-z)
            loss = -label * log_p - (1 - label) * functional.logsigmoid(-z)
        elif self.kind == "smpo":
            # -log sigmoid((2 q - 1) z)
            loss = -functional.logsigmoid((2 * label - 1) * z)
        else:
            loss = self._mapo(policy)
        return loss

    def _mapo(self, policy: Tensor) -> Tensor:
        functional = require("torch.nn.functional", "train")

        def f(e: Tensor) -> Tensor:
            # f(e) = 0.5 e / (exp(0.5 e) - 1)
            return 0.5 * e / (0.5 * e).expm1()

        winner, loser = policy[:, 0], policy[:, 1]
        # e(winner) - 0.1 log sigmoid(T (f(e(winner)) - f(e(loser))))
        ratio = functional.logsigmoid(TRAIN_TIMES * (f(winner) - f(loser)))
        loss: Tensor = winner - self.mapo * ratio
        return loss


def margin_labels(margin: Tensor, scale: float) -> Tensor:
    """Soft labels from reward margins, ``[n]``: ``q = sigmoid(scale * margin)``.

    SmPO's: ``scale = 1 / (max - min)`` of PickScores over its data set, about 6 on cosines. A
    negative margin gives a label below 1/2: the reward model overrules the person.
    """
    # q = sigmoid(scale * (r_winner - r_loser))
    return (scale * margin).sigmoid()


def beta_from_salesforce(beta: float) -> float:
    """Salesforce's ``--beta_dpo`` is ours: ``-log sigmoid(-(beta / 2) * ...)``, mean errors."""
    return float(beta)


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
