"""A rubric from people's labels: yes-or-no questions, and what each answer is worth.

`train_rubric` is ``fifa reward rubric``: a vision-language judge answers questions, given or
written by itself, about the images of some labelled pairs, and an L1 logistic regression on the
answers keeps those that tell what people prefer (as AutoRubric-T2I does, arXiv 2605.17602).
``rubric:FOLDER`` then scores with the kept ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, create_model

from fifa.config import Compute, Rubric
from fifa.console import echo
from fifa.data.images import unique_images
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.endpoint import OPENAI, VLLM
from fifa.scoring.judges.formats import (
    Format,
    Judgement,
    Tokens,
    alternatives,
    closed_object,
    load_text,
)
from fifa.scoring.judges.judge import VLMJudge, make_judge
from fifa.scoring.judges.pairs import Asking
from fifa.scoring.replies import last_object, text_of
from fifa.scoring.rewards.fit import TrainedReward
from fifa.scoring.rewards.head import Comparisons, prompt_folds, prompt_weights
from fifa.scoring.rewards.metrics import Metrics, fit_temperature, nll
from fifa.scoring.rewards.proxy import FORMAT, SETTINGS, reward_facts, save_settings
from fifa.scoring.specs import REWARDS, Spec
from fifa.shards.files import atomic_folder, check_free, read_json
from fifa.shards.lock import only_writer
from fifa.shards.manifest import check_manifest

Array = npt.NDArray[np.float64]

SHOWN = 8  # pairs that the judge is shown to write questions
LONGEST = 300  # characters of a question
STEPS = 20  # penalties, from the one that leaves nothing down to a hundredth of it
SURE, ROUNDS = 1e-7, 5000  # a fit is done when no weight changes by more, or after so many steps


@dataclass(frozen=True)
class RubricJudge(VLMJudge):
    """A judge that answers a rubric's questions about one image at a time.

    Parameters
    ----------
    questions
        To be answered with yes or no.
    weights
        What a yes is worth, in log-odds that people prefer the image.
    """

    questions: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """For people and file names."""
        return f"rubric-{Path(self.model).name if self.is_offline else self.model}"

    @property
    def format(self) -> Format:
        """The questions, as they are asked."""
        return question_format(self.questions)

    @property
    def identity(self) -> dict[str, Any]:
        """What is asked, and what the answers are worth."""
        return {**self.asks, "weights": self.weights}

    def ask(self, questions: dict[str, Any], before: int = 0) -> dict[str, Any]:
        """As `fifa.scoring.endpoint.Endpoint.ask`; a judgement's value is the weighted sum."""
        found = super().ask(questions, before)
        for one in found.values():
            answers = [one.aspects[name] for name in _names(self.questions)]
            # r = sum over q of w_q P(yes to q)
            one.value = float(np.dot(self.weights, answers))
        return found


class Written(BaseModel):
    """Questions that a judge wrote."""

    model_config = ConfigDict(extra="ignore")

    questions: list[str]


@dataclass(frozen=True)
class QuestionWriter(VLMJudge):
    """A judge that sees which of two images people prefer, and writes questions."""

    answer_type: ClassVar[type[BaseModel]] = Written
    words = ("asking for", "lists of questions", "written")

    @property
    def format(self) -> Format:
        """What is asked."""
        item: dict[str, Any] = {"type": "array", "items": {"type": "string"}, "maxItems": 10}
        schema = closed_object(("questions",), item)
        return Format("write", load_text("questions", "write"), _unread, "", schema)

    def read_reply(self, reply: Any) -> Written | str:
        """The questions in a completion."""
        text = text_of(reply, self.secrets())
        return last_object(text, Written.model_validate, Written.model_fields)


def load_rubric_judge(
    spec: Spec,
    folder: Path | None = None,
    compute: Compute | None = None,
    *,
    shown: int | None = None,
) -> RubricJudge:
    """The judge that ``rubric:FOLDER`` names; ``rubric:FOLDER@URL`` asks it elsewhere.

    Raises `FifaError` for a folder that holds no rubric of ours.
    """
    place = Path(spec.model).expanduser()
    settings = read_json(place / SETTINGS, "the rubric")
    check_manifest(place)
    try:
        questions, weights = map(tuple, (settings["questions"], settings["weights"]))
        told = settings["judge"]
        whole = settings["format"] == FORMAT and len(questions) == len(weights) > 0
        whole = whole and all(isinstance(q, str) for q in questions)
        whole = whole and all(isinstance(w, float) and isfinite(w) for w in weights)
        judge = REWARDS.parse(told)
    except (KeyError, TypeError, FifaError):
        whole = False
    if not whole:
        raise FifaError(
            "not a rubric of this version of fifa",
            where=str(place / SETTINGS),
            do="make one: fifa reward rubric SOURCE --judge vlm:MODEL@URL --out FOLDER",
        )
    if spec.at and judge.name == VLLM:
        judge = REWARDS.parse(f"vlm:{judge.model}")
    made = make_judge(replace(judge, at=spec.at or judge.at), folder, compute, shown=1)
    return RubricJudge(**{**vars(made), "questions": questions, "weights": weights})


def train_rubric(pairs: Pairs, out: str | Path, options: Rubric, compute: Compute) -> TrainedReward:
    """Learn from people's labels which yes-or-no questions tell what they prefer.

    Parameters
    ----------
    pairs
        The pairs, with images; at most ``options.limit`` of those with a winner are looked at.
    out
        The folder; a rubric that lies there is replaced. The answers are kept in
        ``.NAME-answers`` beside it, so a run that was killed asks nothing twice.
    options, compute
        How.

    Raises
    ------
    FifaError
        For a judge that is none, pairs without labels, an endpoint that is down, and where no
        question tells preferred images from others.
    """
    out = Path(out)
    spec = REWARDS.parse(options.judge)
    if not spec.is_judge or spec.name == "rubric":
        raise FifaError(f"{options.judge} answers no questions", do="--judge vlm:MODEL@URL")
    with only_writer(out, beside=True):
        if not (out / SETTINGS).is_file():
            check_free(out, "rubric")
        return _train_rubric(pairs, out, spec, options, compute)


def _train_rubric(
    pairs: Pairs, out: Path, spec: Spec, options: Rubric, compute: Compute
) -> TrainedReward:
    won = np.flatnonzero(pairs.table["label"].to_numpy() != 0.5)
    drawn = np.random.default_rng(options.seed).permutation(won)[: options.limit]
    if len(drawn) < 2 * options.folds:
        raise FifaError(
            f"only {len(drawn)} pairs have a winner, too few to learn from",
            where=pairs.origin.source,
            do=f"give at least {2 * options.folds} labelled pairs",
        )
    pairs = replace(pairs, table=pairs.table.take(np.sort(drawn)))
    answers = out.with_name(f".{out.name}-answers")
    judge = make_judge(spec, answers, compute, shown=1)
    download = options.read.allow_download
    if options.questions:
        questions = _given(Path(options.questions))
    else:
        questions = write_questions(pairs, judge, compute, options.count, download)
    data, x, readable = _answers(pairs, judge, questions, compute, download)
    fold = _folds(pairs, data, options)
    penalty, _ = choose_penalty(x, data, fold)
    weights = fit_l1(x, data.label, prompt_weights(data.prompt), penalty)
    kept = tuple(q for q, w in zip(questions, weights, strict=True) if w)
    if not kept:
        raise FifaError(
            f"none of {len(questions)} questions tells what people prefer, in "
            f"{len(data.label)} pairs",
            where=pairs.origin.source,
            do="give other questions with --questions, more pairs with --limit, or another judge",
        )
    # the kept ones are asked alone, as they will be
    data, x, readable = _answers(pairs, judge, kept, compute, download)
    fold = _folds(pairs, data, options)
    penalty, held_out = choose_penalty(x, data, fold)
    temperature = fit_temperature(held_out, data.label)
    weights = fit_l1(x, data.label, prompt_weights(data.prompt), penalty) / temperature
    order = np.argsort(-np.abs(weights), kind="stable")
    lines = [f"| {weights[i]:+.3f} | {kept[i]} |" for i in order]
    model = judge.model
    if judge.url not in (OPENAI, VLLM):
        model += f"@{judge.public_url}"
    settings = {
        "questions": [kept[i] for i in order],
        "weights": [float(weights[i]) for i in order],
        "judge": f"{spec.name}:{model}",
        **reward_facts(pairs, readable, data, data, held_out, temperature, options),
        "judged": "each by weights that were fitted without its prompt, with the same penalty",
        "what": f"{judge.model} answers {len(kept)} questions about an image with yes or no; the "
        f"reward is the sum of the weights, each times its probability of a yes.\n\n"
        "| weight | question |\n|---|---|\n" + "\n".join(lines),
        "limits": f"The questions are what was left of {len(questions)} by an L1 penalty; their "
        "answers are a\nmodel's, with its mistakes.\n",
    }
    with atomic_folder(out) as folder:
        save_settings(folder, "rubric", settings)
    before, after = (Metrics(**settings["metrics"][when]) for when in ("before", "after"))
    echo(
        f"rubric: {len(kept)} of {len(questions)} questions; accuracy {after.accuracy:.3f} "
        f"({after.low:.3f} to {after.high:.3f}) on {after.prompts:,} held-out prompts; in {out}"
    )
    return TrainedReward(out, after, before, temperature)


@cache
def question_format(questions: tuple[str, ...]) -> Format:
    """How questions are asked about one image; aspects are the probabilities of a yes."""
    names = _names(questions)
    listed = "\n".join(f"{n}: {q}" for n, q in zip(names, questions, strict=True))
    fields: dict[str, Any] = dict.fromkeys(names, (Literal["yes", "no"], ...))
    answer = create_model("Answered", **fields)

    def validate(plain: dict[str, Any]) -> BaseModel:
        tidy = {str(key).strip().lower(): str(v).strip().lower() for key, v in plain.items()}
        made: BaseModel = answer.model_validate(tidy)
        return made

    def read(text: str, tokens: Tokens) -> Judgement | str:
        found = last_object(text, validate, names)
        if isinstance(found, str):
            return found
        said, measured = {}, bool(tokens)
        for name in names:
            p = alternatives(tokens, name)
            yes, no = p.get("yes", 0.0), p.get("no", 0.0)
            measured = measured and yes + no > 0
            said[name] = yes / (yes + no) if yes + no else float(getattr(found, name) == "yes")
        return Judgement(value=0.0, measured=measured, aspects=said)

    schema = closed_object(names, {"type": "string", "enum": ["yes", "no"]})
    text = load_text("questions", "answer").replace("{questions}", listed)
    return Format("questions", text, read, "log-odds that people prefer the image", schema)


def write_questions(
    pairs: Pairs, judge: VLMJudge, compute: Compute, most: int, allow_download: bool = False
) -> tuple[str, ...]:
    """Questions that the judge writes when it is shown pairs of which people prefer one image.

    Each of `SHOWN` pairs gives some; one of each in turn is taken, up to ``most``.
    """
    writer = QuestionWriter(**{**vars(judge), "shown": 2})
    images, of_slot = unique_images(pairs)
    asking = Asking.of(writer, images, compute, judge.folder, allow_download)
    label = pairs.table["label"].to_numpy()
    orders = zip(asking.asks(pairs, of_slot), label, strict=True)
    shown = [own[int(y < 0.5)] for own, y in orders if own][:SHOWN]  # the preferred one first
    asking(shown)
    lists = [asking.said[ask].questions for ask in shown if ask in asking.said]
    turns = zip_longest(*lists, fillvalue="")
    found = _tidy([question for turn in turns for question in turn])[:most]
    if not found:
        raise FifaError("the judge wrote no questions", do="give some with --questions FILE")
    return found


def choose_penalty(x: Array, data: Comparisons, fold: npt.NDArray[np.int64]) -> tuple[float, Array]:
    """The L1 penalty that held-out prompts like best, and the held-out logits, [pairs].

    From the smallest penalty that leaves no weight down to a hundredth of it, in `STEPS`.
    """
    weight = prompt_weights(data.prompt)
    largest = np.abs(weight / weight.sum() * (data.label - 0.5) @ x).max()
    path = np.geomspace(1, 0.01, STEPS) * max(largest, 1e-12)
    logits = np.empty((STEPS, len(x)))
    for k in np.unique(fold):
        own, w = fold == k, None
        for i, penalty in enumerate(path):
            w = fit_l1(x[~own], data.label[~own], weight[~own], float(penalty), w)
            logits[i, own] = x[own] @ w
    best = int(np.argmin([nll(row, data.label) for row in logits]))
    return float(path[best]), logits[best]


def fit_l1(
    x: Array, label: Array, weight: Array, penalty: float, start: Array | None = None
) -> Array:
    """The weights of a logistic regression under an L1 penalty, float64 [questions]::

        argmin over w of sum over i of s_i (log(1 + e^(x_i w)) - y_i x_i w) + penalty |w|_1

    with s the weights of the pairs over their sum. No intercept: swapping the images of a pair
    swaps the sign. By proximal gradients with Nesterov's momentum (FISTA, Beck and Teboulle 2009).

    Parameters
    ----------
    x
        Differences of the answers, [pairs, questions].
    label, weight
        The probability that people prefer image 0, and what a pair counts, [pairs].
    penalty
        At least 0.
    start
        Weights to begin with; None: zeros.
    """
    share = weight / weight.sum()
    # the loss's curvature is at most that of x^T diag(s / 4) x
    step = 4 / max(float(np.linalg.norm((x * share[:, None]).T @ x, 2)), 1e-12)
    w = ahead = np.zeros(x.shape[1]) if start is None else start
    momentum = 1.0
    for _ in range(ROUNDS):
        p = 1 / (1 + np.exp(-np.clip(x @ ahead, -500, 500)))
        moved = ahead - step * (x.T @ (share * (p - label)))
        new = np.sign(moved) * np.maximum(np.abs(moved) - step * penalty, 0)
        faster = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / faster * (new - w)
        done = np.abs(new - w).max(initial=0) < SURE
        w, momentum = new, faster
        if done:
            break
    return w


def _answers(
    pairs: Pairs, judge: VLMJudge, questions: tuple[str, ...], compute: Compute, download: bool
) -> tuple[Comparisons, Array, npt.NDArray[np.bool_]]:
    """The pairs that were answered, the differences of their answers, and which they are."""
    zeros = (0.0,) * len(questions)
    asked = RubricJudge(**{**vars(judge), "questions": questions, "weights": zeros})
    images, of_slot = unique_images(pairs)
    asking = Asking.of(asked, images, compute, judge.folder, download)
    asks = asking.asks(pairs, of_slot)
    asking([ask for own in asks for ask in own])
    names, none = _names(questions), Judgement(value=0.0)
    sides = np.array(
        [
            [[asking.said.get(ask, none).aspects.get(n, np.nan) for n in names] for ask in own]
            for own in asks
        ],
        np.float64,
    )
    x = sides[:, 0] - sides[:, 1]
    slots = asking.distinct.of_image[of_slot].reshape(-1, 2)
    data, _ = Comparisons.of(pairs, slots, np.zeros(len(asking.distinct), bool))
    known: npt.NDArray[np.bool_] = np.asarray(np.isfinite(x).all(axis=1))
    return data.part(known), x[known], known


def _folds(pairs: Pairs, data: Comparisons, options: Rubric) -> npt.NDArray[np.int64]:
    folds = min(options.folds, len(np.unique(data.prompt)))
    ids = pairs.prompts["prompt_id"]
    dealt = prompt_folds(ids, data.prompt, data.image, folds=folds, seed=options.seed)
    return dealt[data.prompt]


def _given(path: Path) -> tuple[str, ...]:
    """The questions in a text file, a line each."""
    try:
        found = _tidy(path.read_text("utf-8").splitlines())
    except (OSError, UnicodeError) as error:
        raise FifaError(f"cannot read the questions: {error}", where=str(path)) from error
    if not found:
        raise FifaError("there are no questions in it", where=str(path), do="a question a line")
    return found


def _tidy(questions: Sequence[str]) -> tuple[str, ...]:
    """Questions on one line each, without what a format would take for its own, and once each."""
    lines = (" ".join(q.replace("{", "(").replace("}", ")").split())[:LONGEST] for q in questions)
    once = {line.lower(): line for line in lines if line and not line.startswith("#")}
    return tuple(once.values())


def _names(questions: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"q{i}" for i in range(1, len(questions) + 1))


def _unread(text: str, tokens: Tokens) -> Judgement | str:
    return "it is read as a list"
