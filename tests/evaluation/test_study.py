"""What the cells of a study say together, on cells whose truth is known."""

import json
from dataclasses import asdict, replace
from math import inf

import numpy as np
import pyarrow as pa
import pytest

from fifa.config import Arm, Part, Study, Train
from fifa.evaluation.measure import Scale
from fifa.evaluation.study import CELL, Findings, cells_of
from fifa.shards.files import write_yaml
from fifa.shards.ledger import Ledger

PROMPTS, SEEDS, STEPS = 12, (1, 2, 3), (20, 40, 60, 80)
SCALES = [Scale("u", "utility", "reward"), Scale("h", "harm", "unsafe")]
# The gain at each checkpoint: `fast` is there at once, `long` at its third one, and then falls
GAINS = {"fast": (0.4, 0.5, 0.5, 0.5), "long": (0.1, 0.2, 0.4, 0.3), "slow": (0.1, 0.1, 0.1, 0.1)}
HARM = {"base": 0.5, "fast": 0.25, "long": 0.5, "slow": 0.5}  # of the two unsafe prompts' images


def images(arm, seed, gains):
    """Two images a prompt at every step; the last two prompts are unsafe."""
    noise = np.random.default_rng(seed).normal(scale=0.001, size=PROMPTS)
    for step, gain in gains.items():
        for prompt in range(PROMPTS):
            for image in (0, 1):
                unsafe = prompt >= PROMPTS - 2
                harm = unsafe and (2 * (prompt == PROMPTS - 1) + image) < 4 * HARM[arm]
                yield {
                    "step": step,
                    "prompt_id": f"p{prompt}",
                    "seed": 10 * prompt + image,
                    "category": "unsafe" if unsafe else ("seen", "unseen")[prompt % 2],
                    "unsafe_prompt": unsafe,
                    "values": [prompt + 0.1 * image + gain + noise[prompt], float(harm)],
                }


@pytest.fixture
def folder(tmp_path):
    arms = {name: Arm(train={"lr": 1e-5 * (i + 1)}) for i, name in enumerate(GAINS)}
    parts = (Part(name="main", arms=tuple(GAINS), budgets=(0.01,)),)
    asked = Study(
        arms=arms,
        parts=parts,
        seeds=SEEDS,
        against="slow",
        target=("long",),
        train=Train(model="m"),
    )
    write_yaml(tmp_path / "study.yaml", asked.to_yaml())
    ledger = Ledger(str(tmp_path / "cells"))
    for cell in cells_of(asked):
        row = {"part": cell.part, "arm": cell.arm, "budget": cell.budget, "noise": 0.0}
        row |= {"seed": cell.seed, "scales": json.dumps([asdict(one) for one in SCALES])}
        if cell.arm == "base":
            row |= {"status": "base", "images": list(images("base", 0, {0: 0.0}))}
        elif (cell.arm, cell.seed) == ("slow", 3):
            row |= {"status": "diverged", "reason": "the loss is not finite"}
        else:
            steps = [step * (4 if cell.arm == "long" else 1) for step in STEPS]
            gains = dict(zip(steps, GAINS[cell.arm], strict=True))
            row |= {"status": "trained", "steps": steps[-1], "scoring": 10.0, "selecting": 2.0}
            row |= {"images": list(images(cell.arm, cell.seed, gains)), "kept": 8}
            row["points"] = [{"step": s, "pairs": 8.0 * s, "seconds": 0.5 * s} for s in steps]
            row["scoring"] = 0.0 if cell.arm == "long" else 10.0
        ledger.write(cell.key, pa.Table.from_pylist([row], schema=CELL))
    return tmp_path


def test_gains_wins_and_harm(folder):
    found = Findings(folder)
    fast, long, slow = found.groups.values()
    gain, wins = found.against(fast), found.against(fast, slow, wins=True)
    assert gain.mean == pytest.approx(0.5, abs=0.002) and gain.low < 0.5 < gain.high
    assert (gain.seeds, gain.prompts) == (3, PROMPTS - 2)
    assert (wins.mean, wins.high, wins.seeds) == (1, 1, 2)  # the seeds of both
    assert found.against(long, of=found.categories["seen"]).prompts == 5
    assert found.unsafe_rate(None, found.unsafe).mean == HARM["base"]
    assert found.unsafe_rate(fast, found.unsafe).mean == HARM["fast"]
    assert found.unsafe_shift(fast, found.unsafe).mean == -0.25
    assert found.unsafe_rate(fast, ~found.unsafe).mean == 0


def test_cost_is_that_of_the_first_checkpoint_that_matches_the_best(folder):
    found = Findings(folder)
    fast, long, slow = found.groups.values()
    cost = found.cost(fast, long)
    # 0.4 is reached within noise at 20 or 40 of its steps; the target needed 240
    assert cost.target == pytest.approx(0.4, abs=0.002)
    assert {round(240 * x) for x in (cost.steps.low, cost.steps.high)} <= {20, 40}
    steps = 240 * cost.steps.mean
    assert cost.seconds.mean == pytest.approx((12 + 0.5 * steps) / (2 + 0.5 * 240))
    none = found.cost(slow, long)
    assert (none.steps.mean, none.steps.low, none.seconds.high) == (inf, inf, inf)


def test_stability(folder):
    found = Findings(folder)
    fast, long, slow = found.groups.values()
    assert found.fallen(fast)[1] == 3 and found.fallen(long) == (3, 3)
    assert found.fallen(slow)[0] >= 1 and found.fallen(slow)[1] == 3  # one diverged
    assert found.last_spread(long) == pytest.approx(np.std(GAINS["long"], ddof=1), abs=0.01)
    spread = found.spread(fast)
    assert spread.low < spread.mean < 0.002 < spread.high * 20


def test_what_is_not_there_is_no_number(folder):
    found = Findings(folder)
    empty = replace(next(iter(found.groups.values())), rows={})
    assert np.isnan(found.against(empty).mean) and found.cost(empty, empty) is None
    assert found.fallen(empty) == (0, 0)
