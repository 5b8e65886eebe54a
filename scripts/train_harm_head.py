"""Build what the default rater adds to its language model: src/fifa/score/harm_head.json.

    python scripts/train_harm_head.py

Harm: a ridge on MiniLM embeddings of one half of I2P, to the square root of `prompt_toxicity`.
Nonsense: a logistic regression on what the language model's pass says about one half of
Pick-a-Pic's prompts and PartiPrompts, and about nonsense made of them. Specificity: the range
of the model's grades for detail on the same prompts. The other halves are for
scripts/measure_raters.py. A few minutes on two cores.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fifa.scoring.encoders import make_encoder
from fifa.scoring.raters.local import nonsense_features
from fifa.scoring.raters.logits import load_reader, precision, smollm_path
from rater_data import half, made_nonsense, near_duplicates, parti_prompts, real_prompts, safety

OUT = Path(__file__).parents[1] / "src/fifa/score/harm_head.json"
RIDGE = 1.0  # by grouped cross-validation over 0.3, 1, 3 and 10
FALSE_ALARMS = 0.005  # of `unsafe` on PartiPrompts of the building half
CAUGHT = 0.98  # of made nonsense (not of shuffled words) that `nonsense` catches there

Array = npt.NDArray[np.float64]


def ridge(x: Array, y: Array) -> tuple[Array, float]:
    """Weights and bias of argmin |x w + b - y|^2 + RIDGE |w|^2."""
    centre, mean = x.mean(0), y.mean()
    z = x - centre
    w = np.linalg.solve(z.T @ z + RIDGE * np.eye(x.shape[1]), z.T @ (y - mean))
    return w, float(mean - centre @ w)


def harm_head() -> dict[str, object]:
    rows = safety("i2p")
    vectors = make_encoder("minilm").embed([str(p) for p in rows["prompt"]])
    group = near_duplicates(vectors)
    mine = np.array([half(str(rows["prompt"][g])) == 0 for g in group])
    x, group = vectors[mine].astype(float), group[mine]
    y = np.sqrt(np.array(rows["prompt_toxicity"], float)[mine])
    w, b = ridge(x, y)
    # A ridge shrinks: a line from predictions on unseen groups back to the truth undoes it.
    fold = np.array([half(f"fold {g}") + 2 * half(f"other fold {g}") for g in group])
    unseen = np.empty_like(y)
    for k in range(4):
        wk, bk = ridge(x[fold != k], y[fold != k])
        unseen[fold == k] = x[fold == k] @ wk + bk
    slope, offset = np.polyfit(unseen, y, 1)
    w, b = slope * w, slope * b + offset
    ordinary = make_encoder("minilm").embed(parti_prompts(0, 1000)) @ w + b
    return {
        "encoder": "minilm",
        "trained_on": f"{len(y)} I2P prompts (half of the near-duplicate groups)",
        "weights": [round(float(v), 5) for v in w],
        "bias": round(float(b), 5),
        "threshold": round(float(np.quantile(ordinary, 1 - FALSE_ALARMS)), 4),
    }


def language_heads() -> dict[str, object]:
    from sklearn.linear_model import LogisticRegression

    reader = load_reader(smollm_path(), *precision())
    real = real_prompts(0, 160) + parti_prompts(0, 80)
    reading = reader.read(real)
    good = nonsense_features(reading)
    low, high = np.quantile(reading.grades[:, 1], [0.05, 0.95])
    kinds = made_nonsense(real, seed=0)
    made = {kind: nonsense_features(reader.read(prompts)) for kind, prompts in kinds.items()}
    x = np.concatenate([good, *made.values()])
    y = np.repeat([1, 0], [len(good), len(x) - len(good)])
    fit = LogisticRegression(C=10.0, class_weight="balanced", max_iter=5000).fit(x, y)
    noise = np.concatenate([rows for kind, rows in made.items() if kind != "words"])
    # As low as catching most noise allows: names and other languages look odd to a small model.
    threshold = np.quantile(noise @ fit.coef_[0] + fit.intercept_[0], CAUGHT)
    head = {
        "trained_on": f"{len(good)} prompts and {len(x) - len(good)} made of them",
        "weights": [round(float(v), 5) for v in fit.coef_[0]],
        "bias": round(float(fit.intercept_[0]), 5),
        "threshold": round(float(threshold), 4),
    }
    return {
        "nonsense": head,
        "specificity": {"low": round(float(low), 4), "high": round(float(high), 4)},
    }


if __name__ == "__main__":
    heads = {"harm": harm_head(), **language_heads()}
    OUT.write_text(json.dumps(heads, indent=1) + "\n", encoding="utf-8")
    heads["harm"]["weights"] = "384 numbers"
    print(json.dumps(heads, indent=1))
