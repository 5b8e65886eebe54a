"""A reward model from the feedback itself, by PickScore's recipe: `fifa reward train`.

`crossfit_rewards` is ``--margin proxy``: it scores every pair, and never by a model that has seen
the pair's label.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.config import Reward
from fifa.console import echo, note
from fifa.data.read import read_pairs
from fifa.data.table import Pairs
from fifa.models.hub import CONFIG_AND_WEIGHTS, model_digest, model_folder
from fifa.models.optional import require
from fifa.models.runtime import Runtime, make_runtime
from fifa.scoring.encoders import make_encoder
from fifa.scoring.rewards import RewardModel
from fifa.scoring.rewards.engine import Engine, score_pairs
from fifa.scoring.rewards.features import Features, frozen_features
from fifa.scoring.rewards.finetune import finetune_clip
from fifa.scoring.rewards.head import Comparisons, Head, HeadPath, prompt_folds, prompt_weights
from fifa.scoring.rewards.image_encoders import make_image_encoder
from fifa.scoring.rewards.metrics import Metrics, fit_temperature
from fifa.scoring.rewards.proxy import SETTINGS, load_proxy, reward_facts, save_head
from fifa.scoring.table import MARGIN, score_path, scored_once
from fifa.shards.files import atomic_folder, check_free, column_digest
from fifa.shards.ledger import Ledger
from fifa.shards.lock import only_writer
from fifa.shards.pool import Executor, Shard, cores, map_shards

PENALTIES = tuple(float(10 ** (-1 - step / 2)) for step in range(11))  # strongest first
HEADS = 2  # another number, other rewards of the same pairs: goes into the file's name
PATIENCE = 2  # penalties that may pass without gain on held-out prompts

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
# From what is trained on, bool [pairs], and the rows to score, to the rewards of both sides of
# those and the temperature that they were divided by.
Fold = Callable[[npt.NDArray[np.bool_], Integers], tuple[list[Any], float]]

FOLD = pa.schema(
    [
        ("row", pa.int64()),
        ("reward_0", pa.float32()),
        ("reward_1", pa.float32()),
        ("fold", pa.int32()),
        ("temperature", pa.float32()),  # what the fold's rewards were divided by
    ]
)


@dataclass(frozen=True)
class TrainedReward:
    """A reward that has just been trained.

    Parameters
    ----------
    folder
        Where it lies.
    metrics
        On prompts it was not trained on, after calibration.
    before
        The same before it.
    temperature
        What the rewards were divided by.
    """

    folder: Path
    metrics: Metrics
    before: Metrics
    temperature: float

    def load(self, runtime: Runtime | None = None) -> RewardModel:
        """The reward model."""
        return load_proxy(self.folder, runtime)


@dataclass(frozen=True)
class FittedHead:
    """A head, and how it was chosen.

    Parameters
    ----------
    head
        Calibrated, fitted to all pairs.
    held_out
        Before calibration: reward_0 - reward_1 of every pair by the head that had not seen its
        prompt, float64 [pairs].
    temperature
        Fitted to ``held_out``; the head's rewards are already divided by it.
    penalty
        The penalty that held-out prompts liked best.
    """

    head: Head
    held_out: Array
    temperature: float
    penalty: float


def train_reward(
    source_or_pairs: str | Path | Pairs,
    out: str | Path,
    options: Reward | None = None,
    *,
    cache: Path | None = None,
) -> TrainedReward:
    """Train a reward model on people's labels and write it to a folder.

    The loss is the Bradley-Terry cross-entropy against soft labels, so a tie pulls towards
    1/2 : 1/2, each pair weighted by 1 / (pairs of its prompt): PickScore's (Kirstain et al.
    2023, arXiv:2305.01569). Held-out prompts decide when to stop, set the temperature, and are
    what the model card reports.

    Parameters
    ----------
    source_or_pairs
        A source as for `fifa.read_pairs`, or pairs.
    out
        The folder; one that a former training wrote is replaced.
    options
        How.
    cache
        Where features are kept between runs; None keeps nothing.

    Raises
    ------
    FifaError
        For a folder that is not ours, pairs without images, and too few prompts.
    """
    options, out = options or Reward(), Path(out)
    with only_writer(out, beside=True):
        return _train_reward(source_or_pairs, out, options, cache)


def _train_reward(
    source_or_pairs: str | Path | Pairs, out: Path, options: Reward, cache: Path | None
) -> TrainedReward:
    if not (out / SETTINGS).is_file():
        check_free(out, "reward")
    pairs = source_or_pairs if isinstance(source_or_pairs, Pairs) else read_pairs(source_or_pairs)
    if options.base == "features":
        settings = _train_head(pairs, out, options, cache)
    else:
        settings = finetune_clip(pairs, out, options)
    before, after = (Metrics(**settings["metrics"][when]) for when in ("before", "after"))
    note(reward_pairs=after.pairs, reward_accuracy=after.accuracy, reward_ece=after.ece)
    echo(
        f"reward: accuracy {after.accuracy:.3f} ({after.low:.3f} to {after.high:.3f}) on "
        f"{after.prompts:,} held-out prompts, calibration error {after.ece:.3f}; in {out}"
    )
    return TrainedReward(out, after, before, settings["temperature"])


def comparisons(pairs: Pairs, features: Features) -> tuple[Comparisons, npt.NDArray[np.bool_]]:
    """The pairs as a head sees them, and which of them have both images."""
    return Comparisons.of(pairs, features.of_pair, np.isnan(features.images[:, 0]))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Here numpy's products take one thread: the folds share the cores instead.

    Memory is what such products wait for, and on busy cores their threads wait for each other.
    And their sums do not depend on how many cores there are.
    """
    with require("threadpoolctl", what="training a head").threadpool_limits(1):
        yield


@_one_thread_each()
def fit_head(pairs: Pairs, features: Features, data: Comparisons, options: Reward) -> FittedHead:
    """The head that held-out prompts like best.

    The prompts are dealt into ``options.folds``. From the strongest penalty on, one head a fold
    is fitted to the others, until the cross-entropy on the held-out prompts has not fallen for
    `PATIENCE` penalties: early stopping. With and without products with the prompt; whichever
    held-out prompts like better, without if in doubt. Then one head is fitted to all pairs.

    Parameters
    ----------
    pairs
        Where ``data`` comes from; only ``prompts`` is read.
    features
        Of all images and prompts.
    data
        The pairs to learn from, all with both images.
    options
        ``folds``, ``text`` and ``seed`` are read.
    """
    ids = pairs.prompts["prompt_id"]
    folds = min(options.folds, len(np.unique(data.prompt)))
    fold = prompt_folds(ids, data.prompt, data.image, folds=folds, seed=options.seed)[data.prompt]
    best: tuple[float, bool, float, Array] | None = None
    for reads_prompts in (False, True) if features.prompts.shape[1] else (False,):
        loss, penalty, logits = _walk(features, data, fold, reads_prompts, options.shared)
        if best is None or loss < best[0]:
            best = (loss, reads_prompts, penalty, logits)
    assert best is not None
    _, reads_prompts, penalty, logits = best
    path = HeadPath(
        features.images, features.prompts, data, reads_prompts=reads_prompts, shared=options.shared
    )
    temperature = fit_temperature(logits, data.label)
    return FittedHead(path.fit(penalty).over(temperature), logits, temperature, penalty)


def _walk(
    features: Features,
    data: Comparisons,
    fold: npt.NDArray[np.int64],
    reads_prompts: bool,
    shared: bool,
) -> tuple[float, float, Array]:
    """The smallest held-out loss, its penalty and the held-out logits."""
    weight = prompt_weights(data.prompt)
    groups = [fold == k for k in np.unique(fold)]
    images, prompts = features.images, features.prompts

    def start(group: npt.NDArray[np.bool_]) -> HeadPath:
        part = data.part(~group)
        return HeadPath(images, prompts, part, reads_prompts=reads_prompts, shared=shared)

    def judged(penalty: float, group: npt.NDArray[np.bool_], path: HeadPath) -> Array:
        return path.fit(penalty).logits(images, prompts, data.part(group))

    best, since = (np.inf, PENALTIES[0], np.zeros(len(fold))), 0
    with ThreadPoolExecutor(min(len(groups), cores())) as pool:
        paths = list(pool.map(start, groups))
        for penalty in PENALTIES:
            logits = np.empty(len(fold))
            found = pool.map(partial(judged, penalty), groups, paths)
            for group, held_out in zip(groups, found, strict=True):
                logits[group] = held_out
            losses = np.logaddexp(0, logits) - data.label * logits
            loss = float(weight @ losses / weight.sum())
            if loss < best[0]:
                best, since = (loss, penalty, logits), 0
            elif (since := since + 1) >= PATIENCE:
                break
    return best


def _train_head(pairs: Pairs, out: Path, options: Reward, cache: Path | None) -> dict[str, Any]:
    features, encoder = frozen_features(pairs, options, cache)
    data, readable = comparisons(pairs, features)
    data = data.part(readable)
    fitted = fit_head(pairs, features, data, options)
    logits, temperature, reads = fitted.held_out, fitted.temperature, fitted.head.reads_prompts
    text = make_encoder(options.text, dtype="float32").identity if reads else None
    what = f"A linear head on frozen {encoder.name} features"
    limits = (
        "It does not read the prompt: on held-out prompts that bought nothing here. It says\n"
        "which picture is the better one, not which fits the prompt.\n"
    )
    settings = {
        "image": {"spec": options.image, "identity": encoder.identity},
        "text": {"spec": options.text, "identity": text} if reads else None,
        **reward_facts(pairs, readable, data, data, logits, temperature, options),
        "judged": "each by a head that was not trained on its prompt, with the same penalty",
        "what": what + (" and their products with the prompt's." if reads else "."),
        "limits": "" if reads else limits,
    }
    settings["training"] |= {"penalty": fitted.penalty, "reads the prompt": reads}
    with atomic_folder(out) as folder:
        save_head(folder, fitted.head, settings)
    return settings


def crossfit_rewards(
    pairs: Pairs,
    *,
    folds: int = Reward.folds,
    seed: int = 0,
    folder: Path | None = None,
    options: Reward | None = None,
    executor: Executor | None = None,
) -> pa.Table:
    """What a proxy gives both images of every pair, trained on the other prompts' pairs.

    Parameters
    ----------
    pairs
        The pairs, with labels and images.
    folds
        A model each. Its own choices (penalty, temperature, when to stop) are made within the
        other folds.
    seed
        Of the folds.
    folder
        Where scores are kept; a run that was killed goes on with the fold it was at. None keeps
        nothing.
    options
        How each model is trained.
    executor
        Who makes the features that heads are trained on; by default this process.

    Returns
    -------
    pyarrow.Table
        `fifa.scoring.table.MARGIN`, row by row with ``pairs.table``: calibrated log-odds, so that
        folds are on one scale. NaN where an image could not be read.

    Notes
    -----
    Prompts that share an image are in one fold (`fifa.scoring.rewards.head.prompt_folds`). Those
    that say almost the same are not looked for, nor are images that look almost the same: neither
    carries the label of the pair itself.
    """
    options = options or Reward()
    path = folder and score_path(folder, "margin", "proxy", _identity(pairs, options, folds, seed))
    facts = {"scorer": "proxy", "folds": folds, "seed": seed, "options": options.settings()}

    def make(ledger: Ledger) -> pa.Table:
        how: dict[str, Any] = {"folds": folds, "seed": seed, "options": options}
        table = crossfit_folds(pairs, folder=folder, ledger=ledger, executor=executor, **how)
        rewards = (table[f"reward_{side}"].combine_chunks() for side in (0, 1))
        return pa.table([pairs.table["pair_id"].combine_chunks(), *rewards], schema=MARGIN)

    return scored_once(path, make, facts)


def crossfit_folds(
    pairs: Pairs,
    *,
    folds: int = Reward.folds,
    seed: int = 0,
    folder: Path | None = None,
    options: Reward | None = None,
    ledger: Ledger | None = None,
    executor: Executor | None = None,
) -> pa.Table:
    """As `crossfit_rewards`, with the fold and its temperature beside every pair: `FOLD`.

    Finished folds are kept in ``ledger``; None keeps none.
    """
    options = options or Reward()
    prepare = _heads if options.base == "features" else _clips
    images, score = prepare(pairs, options, folder, executor)
    prompt = pairs.table["prompt_index"].to_numpy().astype(np.int64)
    ids = pairs.prompts["prompt_id"]
    fold = prompt_folds(ids, prompt, images, folds=folds, seed=seed)[prompt]

    def one(k: int) -> pa.Table:
        rows = np.flatnonzero(fold == k)
        rewards, temperature = score(fold != k, rows)
        constant = np.ones(len(rows), np.float32)
        columns = [rows, *rewards, (k * constant).astype(np.int32), temperature * constant]
        return pa.table([pa.array(c) for c in columns], names=FOLD.names).cast(FOLD)

    # The ledger's name has the fingerprint of all that a fold depends on.
    shards = [Shard(f"fold-{k}", int(np.sum(fold == k)), k) for k in range(folds)]
    table = map_shards("cross-fitting", one, shards, ledger or Ledger())
    note(crossfit_folds=folds, crossfit_pairs=len(pairs))
    return table.sort_by("row")


def _heads(
    pairs: Pairs, options: Reward, folder: Path | None, executor: Executor | None
) -> tuple[Integers, Fold]:
    """A head a fold; the features, which know no labels, once for all."""
    features, _ = frozen_features(pairs, options, folder, executor)
    data, readable = comparisons(pairs, features)

    @_one_thread_each()
    def score(training: npt.NDArray[np.bool_], rows: Integers) -> tuple[list[Any], float]:
        fitted = fit_head(pairs, features, data.part(training & readable), options)
        image, prompts = data.image[rows], features.prompts[data.prompt[rows]]
        sides = (features.images[image[:, side]] for side in (0, 1))
        return [fitted.head.rewards(seen, prompts) for seen in sides], fitted.temperature

    return data.image, score


def _clips(
    pairs: Pairs, options: Reward, folder: Path | None, executor: Executor | None
) -> tuple[Integers, Fold]:
    """A fine-tuned CLIP a fold."""
    engine = Engine(None, folder, allow_download=options.read.allow_download)

    def some(rows: Integers) -> Pairs:
        return Pairs(pairs.table.take(pa.array(rows)), pairs.prompts, origin=pairs.origin)

    def score(training: npt.NDArray[np.bool_], rows: Integers) -> tuple[list[Any], float]:
        with tempfile.TemporaryDirectory() as scratch:
            learn = some(np.flatnonzero(training))
            trained = train_reward(learn, Path(scratch) / "reward", options)
            table = score_pairs(some(rows), trained.load())
        return [table[f"reward_{side}"].to_numpy() for side in (0, 1)], trained.temperature

    return engine.distinct_of(pairs)[1], score


def _identity(pairs: Pairs, options: Reward, folds: int, seed: int) -> list[Any]:
    """Everything that the rewards depend on."""
    if options.base == "features":
        runtime = make_runtime(options.device, "float32")
        text = None
        if options.text != "none":
            text = make_encoder(options.text, dtype="float32").identity
        models: Any = [make_image_encoder(options.image, runtime).identity, text, HEADS]
    else:
        models = [model_digest(model_folder(options.base), CONFIG_AND_WEIGHTS)]
        if not options.bf16 and make_runtime(options.device, "float32").precision == "tf32":
            models.append("tf32")
    labels = pairs.table["label"].cast(pa.string())
    content = [pairs.pairs_digest, column_digest(labels), pairs.origin.fingerprint]
    return [options.settings(), folds, seed, models, content]
