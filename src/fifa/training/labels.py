"""What a training makes of labels: soft ones, weights by doubt, and a loss for their noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fifa.config import Train, changed
from fifa.console import echo, note
from fifa.data.subset import SUBSET_FILE
from fifa.errors import FifaError
from fifa.formatting import percent
from fifa.scoring.rewards.metrics import fit_temperature
from fifa.selection.export import load_subset
from fifa.selection.labels import LabelFacts
from fifa.shards.mirror import local
from fifa.training.losses import LOSSES
from fifa.training.pairs import TrainingPairs, find_subset
from fifa.training.ratings import balance

Floats = npt.NDArray[np.float64]

# What `fifa.scoring.rewards.metrics.wrong_labels` finds in 300 pairs of Pick-a-Pic with five public
# scorers (0.17 to 0.29): Poly-DPO's a of 8 was the best one for that data set (arXiv 2604.24953).
PICKAPIC = 0.23


def choose_loss(train: Train) -> tuple[Train, str]:
    """The training with the loss that ``auto`` stands for, and why; "" where one was given.

    A training that is taken up again, or compared with another, is one with that loss.
    """
    if train.loss != "auto":
        return train, ""
    a, why = _poly(train.poly, find_subset(local(train.source)))
    chosen = changed(train, loss="poly", poly=a) if a else changed(train, loss="sigmoid")
    named = f"poly with a = {a:g}" if a else "sigmoid"
    echo(f"loss: {named}, as {why}")
    note(loss=named, loss_why=why)
    return chosen, why


def _poly(most: float, folder: Path | None) -> tuple[float, str]:
    """Poly-DPO's a for the labels of a subset, ``most`` for those of Pick-a-Pic; and why."""
    if folder is None:
        return 0.0, "nothing tells how many labels are wrong: the source is no subset of fifa's"
    facts = load_subset(folder / SUBSET_FILE).labels
    if facts is None:
        return 0.0, "the subset was written by a fifa that did not measure it: export it again"
    if facts.noise is None or facts.low is None or facts.high is None:
        few = "one needs two or more --margin" if facts.scorers < 2 else "its scorers cannot tell"
        return 0.0, f"the subset has no estimate of how many labels are wrong: {few}"
    between = f"{100 * facts.low:.1f} to {percent(facts.high)}"
    found = (
        f"{percent(facts.noise)} ({between}) of the labels are wrong, as far as {facts.scorers} "
        f"scorers tell on {facts.pairs:,} pairs"
    )
    if facts.low <= 0:
        return 0.0, f"{found}: that may be none"
    # a = 8 * min(1, noise / Pick-a-Pic's noise)
    return round(most * min(1.0, facts.noise / PICKAPIC), 1), found


def reward_probability(margin: Floats, temperature: float) -> Floats:
    """The calibrated probability that people prefer the winner; 1/2 without a margin."""
    # r = sigmoid(signed margin / T), T fitted to labels (Guo et al. 2017, arXiv 1706.04599)
    scaled = np.clip(np.nan_to_num(margin) / temperature, -500, 500)
    return np.asarray(1 / (1 + np.exp(-scaled)))


def blended(label: Floats, votes: Floats, reward: Floats, strength: float) -> Floats:
    """The votes and the reward's probability in one label: a reward is worth ``strength`` votes.

    The mean of a beta distribution with the reward's as its prior, after the votes (Gelman et al.,
    Bayesian Data Analysis, 2.4).
    """
    # q = (n s + m r) / (n + m),  n votes, of which s for the winner
    return np.asarray((votes * label + strength * reward) / (votes + strength))


def mislabelled(reward: Floats, noise: float) -> Floats:
    """The probability that each label is wrong, where the share ``noise`` of all labels is.

    Bayes' rule, for people who err independently of the reward (Dawid and Skene 1979).
    """
    # P(wrong) = e (1 - r) / (e (1 - r) + (1 - e) r)
    wrong, right = noise * (1 - reward), (1 - noise) * reward
    return np.asarray(wrong / (wrong + right))


def with_labels(train: Train, pairs: TrainingPairs) -> TrainingPairs:
    """The pairs with the soft labels and weights that the training asks for.

    Raises `FifaError` where the source lacks what they are made of.
    """
    label, weight = pairs.label.astype(np.float64), pairs.weight.astype(np.float64)
    margin = pairs.margin.astype(np.float64)
    if not train.weights:
        weight = np.ones_like(weight)
    if pairs.sides == 1:
        weight = balance(label > 0.5, weight, train.good_share)
    of_margin = train.label if LOSSES[train.loss].reads_label else "people"
    missing = int(np.isnan(margin).sum())
    if of_margin == "margin":
        if missing:
            raise FifaError(
                f"{missing:,} of {len(pairs):,} pairs have no margin to make a soft label of",
                where=train.source,
                do="train on a subset that `fifa export` wrote, or with --label people or blend",
            )
        # q = sigmoid(scale * (r_winner - r_loser))
        label = reward_probability(train.label_scale * margin, 1.0)
    if of_margin == "blend" or train.weigh_labels:
        facts = load_subset(pairs.folder / SUBSET_FILE).labels if pairs.folder else None
        reward = reward_probability(margin, _temperature(train, pairs, facts))
        if of_margin == "blend":
            both = blended(label, pairs.votes.astype(np.float64), reward, train.label_votes)
            label = np.where(np.isnan(margin), label, both)
        if train.weigh_labels:
            right = 1 - mislabelled(reward, _noise(train, facts))
            weight = weight * right / right.mean()
        if missing:
            echo(
                f"{missing:,} of {len(pairs):,} pairs have no margin: people's label is theirs, "
                "and is as likely wrong as any"
            )
    return replace(pairs, label=label.astype(np.float32), weight=weight.astype(np.float32))


def _temperature(train: Train, pairs: TrainingPairs, facts: LabelFacts | None) -> float:
    """What makes log-odds of the margins."""
    known = ~np.isnan(pairs.margin)
    if not known.any() or (facts and facts.temperature is None):
        why = "no pair has a margin" if not known.any() else "the margin was made from the labels"
        raise FifaError(
            f"{why}, so nothing but the label says who is preferred",
            where=train.source,
            do="leave --label blend and --weigh-labels out, or score with another --margin",
        )
    if facts and facts.temperature:
        echo(f"margins become log-odds at temperature {facts.temperature:.3g}, by the run's pairs")
        return facts.temperature
    temperature = fit_temperature(pairs.margin[known], pairs.label[known])
    echo(
        f"margins become log-odds at temperature {temperature:.3g}, by these pairs: if they were "
        "selected by how they agree with a margin, it looks surer than it is"
    )
    return temperature


def _noise(train: Train, facts: LabelFacts | None) -> float:
    if facts is None or facts.noise is None:
        raise FifaError(
            "--weigh-labels needs to know how many labels are wrong, and nothing tells it",
            where=train.source,
            do="train on a subset that `fifa export` wrote of a run with two or more --margin",
        )
    return facts.noise
