"""Loss, gradients and weights against a plain transcription: every backbone, every loss of the
script (`test_losses.py` has the formulas of all)."""

import pytest
import torch
from plain import LOSSES, Plain
from tiny_diffusion import KINDS, write_pairs
from trainings import assemble, furthest, quick

BACKBONES = ("sd15", "sd2", "sdxl", "sd3", "flux-dev", *KINDS[-5:])
LABELS = [0.9, 0.2, 1.0, 0.35]  # of image 0: the winner is what the label says


@pytest.fixture(scope="module")
def zoo(models):
    """A folder of models, and pairs with soft labels."""
    hard = [float(label > 0.5) for label in LABELS]
    pairs = {"label": LABELS, "label_0": hard, "label_1": [1 - one for one in hard]}
    write_pairs(models.root / "pairs.parquet", **pairs)
    return models


def shaken(loop):
    """Adapters away from their start, where half of the gradients would be zero."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in loop.state.weights().values():
            weight.copy_(0.05 * torch.randn(weight.shape, generator=draw))
    return loop


def pair_of(zoo, tmp_path, kind, **knobs):
    """Ours and the plain one, with the same adapters."""
    knobs = {"batch": 2, "micro_batch": 2, "prompt_dropout": 0.3, "rank": 2, "beta": 50.0, **knobs}
    train = quick(zoo[kind].parent, kind, **knobs)
    loop = shaken(assemble(train, tmp_path))
    plain = Plain(zoo[kind], zoo.root / "pairs.parquet", train)
    return loop, plain.with_lora(loop.state.weights())


def of_step(loop, step):
    """The pairs' ids, and the labels of those of a step."""
    [(part, _)] = loop.parts(step, loop.train.micro_batch)
    labels = [max(LABELS[i], 1 - LABELS[i]) for i, _ in part]
    return loop.source.pairs.pair_id, torch.tensor(labels)


def close(found, expected, scale):
    far = float((found - expected).abs().max())
    # to 1e-6, and where numbers are small (IPO's gradients are), still five digits of them
    assert far <= min(1e-6 * max(1.0, scale), 1e-5 * scale)


@pytest.mark.parametrize("kind", BACKBONES)
def test_loss_and_gradients_are_the_formulas(kind, zoo, tmp_path):
    # SANA's gradients are the largest, and so is their rounding
    loop, plain = pair_of(zoo, tmp_path, kind, beta=20.0 if kind == "sana" else 50.0)
    ids, labels = of_step(loop, 0)
    for name in LOSSES if kind not in KINDS[-5:] else LOSSES[:1]:
        for sft in (0.0, 0.5):
            settings = {"loss": name, "sft": sft}
            for one in (loop, plain):
                object.__setattr__(one, "train", replace_in(loop.train, **settings))
            [(part, _)] = loop.parts(0, loop.train.micro_batch)
            ours, _ = loop.forward(loop.source.batch(part))
            found = torch.autograd.grad(ours.sum() / loop.train.batch, learned(loop))
            loss = plain.loss(0, ids, labels)
            expected = torch.autograd.grad(loss, list(plain.learned().values()))
            close(ours.mean().detach(), loss.detach(), float(loss.detach()))
            largest = max(float(grad.abs().max()) for grad in expected)
            assert largest > 1e-7, "nothing to compare"
            for mine, theirs in zip(found, expected, strict=True):
                close(mine, theirs, largest)


def learned(loop):
    return [p for p in loop.state.model.parameters() if p.requires_grad]


def replace_in(train, **knobs):
    from dataclasses import replace

    return replace(train, **knobs)


LONG = [kind for kind in BACKBONES if kind not in ("qwenimage", "flux2", "klein")]
CASES = [(kind, "sigmoid") for kind in LONG] + [("sd15", name) for name in tuple(LOSSES)[1:]]


@pytest.mark.parametrize(("kind", "loss"), CASES)
def test_weights_after_eight_steps_are_the_plain_ones(kind, loss, zoo, tmp_path):
    loop, plain = pair_of(zoo, tmp_path, kind, loss=loss, steps=8, sft=0.1, lr=1e-4, batch=1)
    start = {name: value.clone() for name, value in loop.state.weights().items()}
    labels = [of_step(loop, step) for step in range(8)]
    loop.run()
    optimizer = torch.optim.AdamW(plain.learned().values(), lr=1e-4, weight_decay=0.01)
    for step in range(8):
        optimizer.zero_grad()
        plain.loss(step, *labels[step]).backward()
        torch.nn.utils.clip_grad_norm_(plain.learned().values(), 1.0)
        optimizer.step()
        if loss == "kto":
            plain.gain = 0.9 * plain.gain + 0.1 * plain.latest
    expected = {name: value.detach() for name, value in plain.learned().items()}
    assert furthest(start, expected) > 5e-4
    assert furthest(loop.state.weights(), expected) < 1e-6
