"""Images that were judged one by one: read, balanced, and trained on by Diffusion-KTO."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from plain import Plain
from tiny_diffusion import picture, write_model, write_pairs
from trainings import assemble, furthest, quick, weights_of

from fifa.config import Train
from fifa.errors import FifaError
from fifa.training.batches import predict
from fifa.training.holdout import DRAWS
from fifa.training.job import run_training
from fifa.training.metrics import sided
from fifa.training.ratings import balance, read_ratings, read_training

GOOD = [True, False, False, True, False, False]
RATINGS = [5.0, 1.0, 3.5, 4.0, 2.0, 0.0]


def write_images(path, sizes=((64, 64),) * 6, **columns):
    draw = np.random.default_rng(2)
    images = [picture(draw, *size) for size in sizes]
    prompts = [f"the dog number {i // 2}" for i in range(len(sizes))]
    rows = {"jpg": images, "caption": prompts, **columns}
    pq.write_table(pa.table({name: some for name, some in rows.items() if some is not None}), path)
    return path


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A folder with a tiny model, and ``images.parquet``: six images, two of them good."""
    folder = tmp_path_factory.mktemp("judged")
    write_model(folder / "sd15")
    write_images(folder / "images.parquet", label=GOOD)
    return folder


def of_images(judged, **knobs):
    train = replace(quick(judged, loss="kto", **knobs), source=str(judged / "images.parquet"))
    return replace(train, beta=2_000.0)


def test_labels_and_ratings_say_which_images_are_good(tmp_path, capfd):
    whole = read_ratings([write_images(tmp_path / "a.parquet", label=GOOD)], "a", None)
    assert whole.sides == 1 and len(whole) == 6
    assert whole.label.tolist() == [1, 0, 0, 1, 0, 0]
    assert "6 images: 2 good, 4 bad" in capfd.readouterr().err
    # the same under other names, as datasets writes them, and by a threshold
    images = pq.read_table(tmp_path / "a.parquet")["jpg"].to_pylist()
    cells = [{"bytes": one, "path": None} for one in images]
    other = write_images(tmp_path / "b.parquet", jpg=None, image=cells, score=RATINGS)
    rated = read_training(Train(source=str(other), loss="kto", good_from=4.0))
    assert rated.digest == whole.digest and rated.pair_id == whole.pair_id
    # what cannot be used is counted, and what contradicts itself told
    more = {"caption": ["a", " ", "b", "c", "d", None], "label": [1, 1, 0.5, None, 0, 0]}
    some = read_ratings([write_images(tmp_path / "c.parquet", **more, weight=[2.0] * 6)], "c", None)
    assert some.dropped == {"no_label": 1, "no_prompt": 2, "undecided": 1}
    assert some.caption == ["a", "d"] and some.weight.tolist() == [2, 2]
    twice = pa.concat_tables([pq.read_table(tmp_path / "a.parquet")] * 2)
    twice = twice.set_column(2, "label", pa.array([*GOOD, *[True] * 6]))
    pq.write_table(twice, tmp_path / "d.parquet")
    assert len(set(read_ratings([tmp_path / "d.parquet"], "d", None).pair_id)) == 12
    assert "4 images are good in one row and bad in another" in capfd.readouterr().err


def test_what_is_no_judgement_is_refused(judged, tmp_path):
    cases = [
        ({"label": [3.0, 1, 0, 0, 0, 0]}, {}, "a label is 3"),
        ({"rating": RATINGS}, {}, "say from which rating"),
        ({"label": GOOD}, {"good_from": 4.0}, "has no column rating"),
        ({"caption": None, "label": GOOD}, {}, "has no column caption"),
        ({"rating": RATINGS}, {"good_from": 9.0}, "no image is good"),
        ({"label": GOOD, "weight": [0.0, 1, 1, 0, 1, 1]}, {}, "no image is good, or has a weight"),
        ({"label": pa.nulls(6, pa.float64())}, {}, "no image has a prompt and a judgement"),
        ({"label": GOOD}, {"loss": "sigmoid"}, "the loss sigmoid needs pairs"),
        ({"label": GOOD}, {"sdpo": 0.9}, "sdpo needs pairs"),
        ({"label": GOOD}, {"weigh_labels": True}, "weigh_labels needs pairs"),
    ]
    for columns, knobs, message in cases:
        path = write_images(tmp_path / "a.parquet", **columns)
        with pytest.raises(FifaError, match=message):
            read_training(Train(**{"source": str(path), "loss": "kto", **knobs}))
    pairs = write_pairs(tmp_path / "pairs.parquet")
    for knobs in ({"good_from": 4.0}, {"good_share": 0.6}):
        with pytest.raises(FifaError, match="the source has pairs"):
            read_training(Train(source=str(pairs), loss="kto", **knobs))


def test_good_images_have_their_share_of_the_loss():
    good = np.array([True, False, False, True, False, False])
    weight = np.array([1.0, 2, 1, 3, 1, 4])
    for share in (0.5, 0.8):
        found = balance(good, weight, share)
        assert found.sum() == pytest.approx(weight.sum())
        assert found[good].sum() == pytest.approx(share * weight.sum())
        assert found[3] == pytest.approx(3 * found[0])
    # means of either side, of a sample that has their share
    errors = torch.tensor([[0.2], [0.5], [0.7], [0.4], [0.1], [0.3]])
    sides = sided(errors, torch.from_numpy(good).float(), 1 / 3).sum(0) / 6
    assert sides.tolist() == pytest.approx([0.3, 0.4])


def test_weights_after_six_steps_are_the_plain_ones(judged, tmp_path):
    train = of_images(judged, steps=6, batch=2, micro_batch=2, prompt_dropout=0.3, rank=2)
    loop = assemble(train, tmp_path)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in loop.state.weights().values():
            weight.copy_(0.05 * torch.randn(weight.shape, generator=draw))
    start = {name: value.clone() for name, value in loop.state.weights().items()}
    plain = Plain(judged / "sd15", train.source, train, sides=1).with_lora(loop.state.weights())
    ids = loop.source.pairs.pair_id
    labels = [
        torch.tensor([float(GOOD[i]) for part, _ in loop.parts(step, 2) for i, _ in part])
        for step in range(6)
    ]
    loop.run()
    optimizer = torch.optim.AdamW(plain.learned().values(), lr=1e-3, weight_decay=0.01)
    for step in range(6):
        optimizer.zero_grad()
        plain.loss(step, ids, labels[step]).backward()
        torch.nn.utils.clip_grad_norm_(plain.learned().values(), 1.0)
        optimizer.step()
        plain.gain = 0.9 * plain.gain + 0.1 * plain.latest
    expected = {name: value.detach() for name, value in plain.learned().items()}
    assert float(plain.gain) > 0
    assert furthest(start, expected) > 3e-3
    assert furthest(loop.state.weights(), expected) < 1e-6


def test_a_training_on_single_images_is_a_training_like_any_other(judged, tmp_path):
    train = of_images(judged, steps=4, batch=4, validate_every=2, holdout=0.3, flips=True)
    out = run_training(train, tmp_path / "whole")
    small = run_training(replace(train, micro_batch=1), tmp_path / "small")
    whole, parts = weights_of(out), weights_of(small)
    apart = torch.cat([(whole[name] - parts[name]).abs().flatten() for name in whole])
    # AdamW divides by the gradient's size: where that is next to nothing, rounding is a step
    assert float(apart.quantile(0.999)) < 1e-5
    facts = json.loads((out / "train.json").read_text())
    assert facts["pairs"] == 4 and facts["held_out"] == 2 and facts["trained_on"] == "images"
    card = (out / "README.md").read_text()
    assert "aligned with 4 rated images" in card and "Diffusion-KTO" in card
    # held-out images, by hand, with the base that no step has changed
    loop = assemble(replace(train, draws=2), tmp_path / "again")
    found = loop.holdout.measure(loop.state, 4)
    batch = loop.source.batch([(row, d) for row in loop.source.held for d in DRAWS])
    assert batch.noisy.shape == (8, 4, 8, 8)
    with torch.no_grad():
        errors, _ = predict(loop.source.backbone, batch)
    assert errors.shape == (8, 1)
    pool = loop.source.batch([(row, d) for row in loop.source.taught for d in (0, 1)])
    with torch.no_grad():
        assert torch.allclose(loop.reference(pool)[0], predict(loop.source.backbone, pool)[0])
    for name, side in (("winner", 1.0), ("loser", 0.0)):
        own = errors[batch.label == side]
        error = found[f"heldout_{name}_error"]
        assert (error is None) == (len(own) == 0)
        assert error is None or error == pytest.approx(float(own.mean()), rel=1e-5)
    # of the base every z is 0: half of the weights
    assert found["heldout_loss"] == pytest.approx(0.5 * float(batch.weight.mean()), rel=1e-3)
