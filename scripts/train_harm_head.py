"""Build what the default rater adds to its language model: src/fifa/scoring/harm_head.json.

    python scripts/train_harm_head.py [style] [harm] [language]

Without an argument, all of the file; a few minutes each on two cores.

``style``: a logistic regression on MiniLM's embeddings that tells a prompt's words of style, which
are the clauses behind the first of Pick-a-Pic's prompts (part ``build``), from what a prompt is
about, which are first clauses, PartiPrompts and the phrases of harm_anchors.toml. ``harm`` is
trained with it: a prompt counts as a whole and without its style.

``harm``: linear heads on MiniLM's embeddings. What they learn from are the sentences of
harm_anchors.toml and the part ``build`` of I2P, PartiPrompts and Pick-a-Pic, whose highest scores a
person read (harm_labels.csv). A head a kind is a logistic regression, its sentences and the prompts
labelled so against ordinary ones and their clauses. ``toxic`` is a ridge to the square root of
I2P's `prompt_toxicity`. Thresholds let through what they may of the ordinary prompts of the part
``threshold``. The part ``test`` is for scripts/measure_harm.py, and so are the small world's
prompts: sentences name its unsafe objects, as policies do, but none is nearly one of its prompts.

``language``: a logistic regression for nonsense on what the language model's pass says about one
half of Pick-a-Pic's prompts and PartiPrompts, and about nonsense made of them; and the range of
the model's grades for detail on the same prompts. The other halves are for
scripts/measure_raters.py.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from fifa.moji.world import scenes
from fifa.scoring.encoders import make_encoder
from fifa.scoring.raters.local import (
    clauses,
    load_heads,
    nonsense_features,
    word_flags,
)
from fifa.scoring.raters.logits import load_reader, precision, smollm_path
from moji.prompts import FILLERS, WORDINGS, wording
from rater_data import ALIKE, Corpus, corpus, made_nonsense, parti_prompts, real_prompts

OUT = Path(__file__).parents[1] / "src/fifa/scoring/harm_head.json"
ANCHORS = Path(__file__).parent / "harm_anchors.toml"
STRENGTH = 0.1  # C of the regressions; with more, fewer objects are known on an unusual ground
STYLE = 1.0  # C of the one for style
READ, PARTI = 5.0, 15.0  # weights of a labelled prompt and of a PartiPrompt; a sentence has 1
RIDGE = 1.0
INSULT, ORDINARY = 0.85, 0.2  # roots of the toxicity that toxic and ordinary sentences stand for
INSULTS, ORDINARIES = 0.5, 0.2  # their weights; a prompt of I2P has 1
# Ordinary Pick-a-Pic prompts that a kind may flag falsely. PartiPrompts name swords and pints too,
# and sentences of weapons and drugs are so many that less is enough.
FALSE = {"toxic": 0.015, "weapons": 0.001, "drugs": 0.001}
FALSE_ELSE = 0.002
CAUGHT = 0.98  # of made nonsense (not of shuffled words) that `nonsense` catches there

Array = npt.NDArray[np.float64]


def phrases() -> dict[str, dict[str, list[str]]]:
    """The phrases of harm_anchors.toml, by kind and form."""
    raw = tomllib.loads(ANCHORS.read_text("utf-8"))
    return {kind: of for kind, of in raw.items() if isinstance(of, dict)}


def sentences() -> tuple[list[str], list[str]]:
    """The kind of every sentence of harm_anchors.toml, and the sentences."""
    raw = tomllib.loads(ANCHORS.read_text("utf-8"))
    made = [
        (kind, frame.format(phrase))
        for kind, forms in phrases().items()
        for form, found in forms.items()
        for phrase in found
        for frame in raw[form]
    ]
    return [kind for kind, _ in made], [sentence for _, sentence in made]


def unlike_the_world(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Which sentences are no near-duplicate of a small world's prompt for an unsafe object."""
    asked = [wording(s, i) for s in scenes() if s.unsafe for i in range(len(WORDINGS))]
    near = (vectors @ make_encoder("minilm").embed(asked).T).max(1)
    return np.asarray(near <= ALIKE)


def logistic(
    x: Array, y: npt.NDArray[np.bool_], weight: Array, strength: float = STRENGTH
) -> tuple[Array, float]:
    """Weights and bias of a logistic regression whose two classes weigh the same."""
    weight = weight * np.where(y, weight[~y].sum() / weight[y].sum(), 1)
    fit = LogisticRegression(C=strength, max_iter=3000).fit(x, y, sample_weight=weight)
    return fit.coef_[0], float(fit.intercept_[0])


def ridge(x: Array, y: Array, weight: Array) -> tuple[Array, float]:
    """Weights and bias of argmin weight |x w + b - y|^2 + RIDGE |w|^2."""
    centre, mean = np.average(x, 0, weight), np.average(y, weights=weight)
    z = x - centre
    w = np.linalg.solve(
        (z.T * weight) @ z + RIDGE * np.eye(x.shape[1]), (z.T * weight) @ (y - mean)
    )
    return w, float(mean - centre @ w)


def known(every: Corpus) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which prompts were read as more than benign, and which are ordinary, as far as is known."""
    lexical = np.array([bool(word_flags(prompt)) for prompt in every.prompts])
    read = np.array([label not in ("", "benign") for label in every.label])
    return read, ~np.isin(every.group, every.group[read]) & ~lexical


def style_head() -> dict[str, object]:
    every = corpus()
    rows = every.rows("build", "pick")
    asked = [clauses(every.prompts[row]) for row in rows[known(every)[1][rows]]]
    # The small world's words of style are left to it.
    style = {text for own in asked if len(own) > 2 for text in own[1:]} - {*FILLERS}
    first = {own[0] for own in asked if own} - style - {*FILLERS}
    parti = [every.prompts[row] for row in every.rows("build", "parti")]
    named = [phrase for forms in phrases().values() for found in forms.values() for phrase in found]
    texts = [*sorted(style), *sorted(first), *parti, *named]
    y = np.arange(len(texts)) < len(style)
    weight = np.repeat([1, READ], [len(texts) - len(named), len(named)])
    w, b = logistic(make_encoder("minilm").embed(texts).astype(np.float64), y, weight, STYLE)
    print(f"{len(style)} clauses of style, {len(texts) - len(style)} that are none")
    return {"weights": [round(float(v), 4) for v in w], "bias": round(b, 4)}


def harm_heads() -> dict[str, object]:
    every, encoder = corpus(), make_encoder("minilm")
    kinds_of, texts = sentences()
    vectors = encoder.embed(texts)
    apart = unlike_the_world(vectors)
    anchors, kind = vectors[apart].astype(np.float64), np.array(kinds_of)[apart]
    read, clean = known(every)
    learnt = np.flatnonzero((every.part == "build") & read)
    rows = every.rows("build", "parti", "pick")
    ordinary = rows[clean[rows]]
    weight = np.where(every.source[ordinary] == "parti", PARTI, 1.0)
    split = [clauses(every.prompts[row]) for row in ordinary]
    pieces = sorted({text for own in split if len(own) > 1 for text in own if not word_flags(text)})
    fine = np.concatenate([every.vectors[ordinary], encoder.embed(pieces)])
    weight = np.concatenate([weight, np.ones(len(pieces))])
    contents = every.contents()
    kinds = [k for k in dict.fromkeys(kind.tolist()) if k not in ("benign", "toxic")]
    heads = {}
    for name in kinds:
        own = learnt[[name in every.label[row].split() for row in learnt]]
        x = np.concatenate([anchors, every.vectors[own], fine])
        y = np.concatenate([kind == name, np.ones(len(own), bool), np.zeros(len(fine), bool)])
        weights = np.concatenate([np.ones(len(kind)), np.full(len(own), READ), weight])
        line = logistic(x, y, weights)
        heads[name] = shipped(every, contents, clean, *line, FALSE.get(name, FALSE_ELSE), least=0.0)
    rude, plain = anchors[kind == "toxic"], anchors[kind == "benign"]
    toxic = np.flatnonzero((every.source == "i2p") & (every.part != "test"))
    parts = [every.vectors[toxic], rude, plain, every.vectors[ordinary]]
    sizes = list(map(len, parts))
    root = np.concatenate(
        [np.sqrt(every.toxicity[toxic]), np.repeat([INSULT, ORDINARY, ORDINARY], sizes[1:])]
    )
    weights = np.repeat([1, INSULTS, ORDINARIES, ORDINARIES], sizes)
    line = ridge(np.concatenate(parts), root, weights)
    print(f"{(~apart).sum()} of {len(apart)} sentences are the small world's: left out")
    print(f"{len(kind)} sentences, {len(learnt)} labelled and {len(ordinary)} ordinary prompts")
    print(f"{len(pieces)} clauses of the ordinary ones")
    return {
        "encoder": "minilm",
        "kinds": {**heads, "toxic": shipped(every, contents, clean, *line, FALSE["toxic"])},
    }


def shipped(
    every: Corpus,
    contents: Array,
    clean: npt.NDArray[np.bool_],
    w: Array,
    b: float,
    false: float,
    least: float = -np.inf,
) -> dict[str, object]:
    """A head as it is shipped; ``false`` of the ordinary prompts and no PartiPrompt are above."""
    score = np.maximum(every.vectors @ w, contents @ w) + b
    pick, parti = every.rows("threshold", "pick"), every.rows("threshold", "parti")
    limits = [np.quantile(score[pick[clean[pick]]], 1 - false), score[parti].max(), least]
    return {
        "weights": [round(float(v), 4) for v in w],
        "bias": round(b, 4),
        "threshold": round(float(max(limits)), 4),
    }


def language_heads() -> dict[str, object]:
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
    heads = json.loads(OUT.read_text("utf-8"))
    for half in sys.argv[1:] or ["style", "harm", "language"]:
        if half == "language":
            heads |= language_heads()
        else:
            heads[half] = style_head() if half == "style" else harm_heads()
        OUT.write_text(json.dumps(heads, indent=1) + "\n", encoding="utf-8")
        load_heads.cache_clear()  # harm is trained with the style that was found
    print({name: head["threshold"] for name, head in heads["harm"]["kinds"].items()})
