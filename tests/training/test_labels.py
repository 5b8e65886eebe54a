"""Soft labels, weights by doubt, and the loss that is chosen by how many labels are wrong."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tiny_diffusion import write_pairs
from trainings import quick

import fifa
from fifa.config import Train
from fifa.config.train import FACTS_FILE, TRAIN_FILE
from fifa.errors import FifaError
from fifa.selection.labels import LabelFacts
from fifa.shards.files import read_json, write_json
from fifa.training.job import plan_training, run_training
from fifa.training.labels import (
    PICKAPIC,
    blended,
    choose_loss,
    mislabelled,
    reward_probability,
    with_labels,
)
from fifa.training.pairs import read_training_pairs

N = 60
SPECS = ("column:first_0,first_1", "column:second_0,second_1")


@pytest.fixture(scope="module")
def subset(tmp_path_factory):
    """Eight pairs of sixty, some with several votes, by two scorers who see the truth dimly."""
    folder = tmp_path_factory.mktemp("subset")
    draw = np.random.default_rng(1)
    truth = draw.normal(0, 2, N)
    columns = {f"{name}_0": truth + draw.normal(0, 2, N) for name in ("first", "second")}
    columns |= {f"{name}_1": np.zeros(N) for name in ("first", "second")}
    labels = (np.where(draw.random(N) < 0.2, -truth, truth) > 0).astype(float)
    source = write_pairs(
        folder / "source.parquet",
        [((64, 64), (64, 64))] * N,
        label_0=labels.tolist(),
        image_0_uid=[f"a{i}" for i in range(N)],
        image_1_uid=[f"b{i}" for i in range(N)],
        **{name: values.tolist() for name, values in columns.items()},
    )
    pairs = fifa.read_pairs(source)
    scores = fifa.score(pairs, margin=SPECS, quality="none", diversity="none")
    fifa.export(pairs, fifa.select(pairs, scores, keep=8), scores, folder / "subset")
    return folder / "subset"


def test_labels_and_weights_are_their_formulas():
    margins, votes, shares = [2.0, -1.0, 0.0, math.nan], [1.0, 4.0, 9.0, 1.0], [1.0, 0.75, 2 / 3, 1]
    reward = reward_probability(np.array(margins), 0.5)
    joined = blended(np.array(shares), np.array(votes), reward, 2.0)
    wrong = mislabelled(reward, 0.2)
    for i, margin in enumerate(margins):
        r = 0.5 if math.isnan(margin) else 1 / (1 + math.exp(-margin / 0.5))
        # two more people, of whom the share r prefers the winner
        assert joined[i] == pytest.approx((votes[i] * shares[i] + 2 * r) / (votes[i] + 2))
        # of five labels one is wrong, and the reward says so with 1 - r
        assert wrong[i] == pytest.approx(0.2 * (1 - r) / (0.2 * (1 - r) + 0.8 * r))
    assert wrong[3] == pytest.approx(0.2)
    assert mislabelled(reward, 0.0).tolist() == [0.0] * 4


def test_a_subset_knows_its_margins_scale_and_its_labels_noise(subset, tmp_path, capfd):
    facts = LabelFacts(**read_json(subset / "subset.json", "the subset")["labels"])
    assert facts.scorers == 2 and facts.pairs == N
    assert facts.low <= facts.noise <= facts.high and 0 < facts.noise < 0.5
    pairs = read_training_pairs(subset)
    train = Train(source=str(subset), loss="soft", label="blend", weigh_labels=True)
    found = with_labels(train, pairs)
    reward = reward_probability(pairs.margin.astype(float), facts.temperature)
    assert found.label == pytest.approx((pairs.votes * pairs.label + reward) / (pairs.votes + 1))
    right = 1 - mislabelled(reward, facts.noise)
    assert found.weight == pytest.approx(right / right.mean(), rel=1e-6)
    assert found.weight.mean() == pytest.approx(1.0)
    assert "by the run's pairs" in capfd.readouterr().err
    # it is all in what rebuilds it
    fifa.rebuild(subset / "subset.json", tmp_path / "again")
    assert (tmp_path / "again" / "subset.json").read_bytes() == (
        subset / "subset.json"
    ).read_bytes()


def test_what_has_neither_votes_nor_a_margin_keeps_its_label(tmp_path, capfd):
    margins = [0.5, None, -0.25, 1.0]
    path = write_pairs(tmp_path / "a.parquet", signed_margin=margins, votes=[3, 3, None, 1])
    train = Train(source=str(path), loss="smpo", label="blend")
    pairs = read_training_pairs(path)
    assert pairs.votes.tolist() == [3, 3, 1, 1]
    found = with_labels(train, pairs)
    said = capfd.readouterr().err
    assert "by these pairs" in said and "1 of 4 pairs have no margin" in said
    assert found.label[1] == 1.0 and found.label[2] < found.label[0] < 1.0
    for knobs, message in (
        ({"loss": "sigmoid", "label": "people", "weigh_labels": True}, "how many labels are wrong"),
        ({"label": "margin"}, "1 of 4 pairs have no margin"),
    ):
        with pytest.raises(FifaError, match=message):
            with_labels(replace(train, **knobs), pairs)
    bare = replace(pairs, margin=np.full(4, np.nan, np.float32))
    with pytest.raises(FifaError, match="no pair has a margin"):
        with_labels(train, bare)
    with pytest.raises(FifaError, match="the loss sigmoid reads no soft label"):
        Train(label="blend")


def test_the_loss_is_chosen_by_the_labels_noise(subset, tmp_path, world, capfd):
    here = read_json(subset / "subset.json", "the subset")
    cases = [
        ({"noise": PICKAPIC, "low": 0.2, "high": 0.3, "scorers": 5, "pairs": 90}, "poly", 8.0),
        ({"noise": 0.4, "low": 0.3, "high": 0.5, "scorers": 5, "pairs": 90}, "poly", 8.0),
        ({"noise": PICKAPIC / 4, "low": 0.01, "high": 0.1, "scorers": 2, "pairs": 9}, "poly", 2.0),
        ({"noise": 0.03, "low": 0.0, "high": 0.1, "scorers": 2, "pairs": 9}, "may be none", None),
        ({"scorers": 1}, "two or more --margin", None),
        ({"scorers": 3}, "cannot tell", None),
        (None, "export it again", None),
    ]
    folder = tmp_path / "subset"
    folder.mkdir()
    for facts, said, a in cases:
        known = {**here, "labels": facts and {"temperature": 1.0, **facts}}
        write_json(folder / "subset.json", known, sealed=True)
        train, why = choose_loss(Train(source=str(folder), loss="auto"))
        assert train == Train(
            source=str(folder), loss="poly" if a else "sigmoid", poly=a or Train.poly
        )
        assert said in why or a
        assert f"loss: {train.loss}" in capfd.readouterr().err
    train, why = choose_loss(quick(world, loss="auto"))
    assert train == quick(world) and "no subset of fifa's" in why
    assert choose_loss(quick(world)) == (quick(world), "")


def test_a_training_is_the_one_with_the_loss_that_was_chosen(subset, tmp_path, world):
    facts = read_json(subset / "subset.json", "the subset")["labels"]
    a = round(min(1.0, facts["noise"] / PICKAPIC) * 8, 1)
    train = replace(quick(world, loss="auto", steps=2, weigh_labels=True), source=str(subset))
    out = run_training(train, tmp_path / "out")
    assert plan_training(train, out).train.loss == "poly"
    kept = Train.from_yaml(out / TRAIN_FILE)
    assert kept == replace(train, loss="poly", poly=a)
    told = json.loads((out / FACTS_FILE).read_text())
    assert "of the labels are wrong, as far as 2 scorers tell" in told["loss_why"]
    assert told["loss_why"] in (out / "README.md").read_text()
    plan_training(kept, out)  # the same training
    with pytest.raises(FifaError, match="another training"):
        plan_training(replace(kept, loss="sigmoid"), out)
