"""Cross-fitting: a proxy scores every pair, and never one whose label it has seen."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.config import Reward
from fifa.console import note
from fifa.data.images import unique_images
from fifa.data.table import Pairs
from fifa.models.hub import CONFIG_AND_WEIGHTS, model_digest, model_folder
from fifa.models.runtime import make_runtime
from fifa.scoring.encoders import make_encoder
from fifa.scoring.rewards.engine import Engine, score_pairs
from fifa.scoring.rewards.features import make_image_encoder
from fifa.scoring.rewards.fit import comparisons, features_of, fit_head, train_reward
from fifa.scoring.rewards.split import prompt_folds
from fifa.scoring.table import MARGIN, score_path, scored_once
from fifa.shards.files import column_digest
from fifa.shards.ledger import Ledger
from fifa.shards.pool import Shard, map_shards

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


def crossfit_rewards(
    pairs: Pairs,
    *,
    folds: int = Reward.folds,
    seed: int = 0,
    folder: Path | None = None,
    options: Reward | None = None,
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

    Returns
    -------
    pyarrow.Table
        `fifa.scoring.table.MARGIN`, row by row with ``pairs.table``: calibrated log-odds, so that
        folds are on one scale. NaN where an image could not be read.

    Notes
    -----
    Prompts that share an image are in one fold (`fifa.scoring.rewards.split.prompt_folds`). Those
    that say almost the same are not looked for, nor are images that look almost the same: neither
    carries the label of the pair itself.
    """
    options = options or Reward()
    path = folder and score_path(folder, "margin", "proxy", _identity(pairs, options, folds, seed))
    facts = {"scorer": "proxy", "folds": folds, "seed": seed, "options": options.settings()}

    def make(ledger: Ledger) -> pa.Table:
        table = crossfit_folds(
            pairs, folds=folds, seed=seed, folder=folder, options=options, ledger=ledger
        )
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
) -> pa.Table:
    """As `crossfit_rewards`, with the fold and its temperature beside every pair: `FOLD`.

    Finished folds are kept in ``ledger``; None keeps none.
    """
    options = options or Reward()
    prepare = _heads if options.base == "features" else _clips
    images, score = prepare(pairs, options, folder)
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


def _heads(pairs: Pairs, options: Reward, folder: Path | None) -> tuple[Integers, Fold]:
    """A head a fold; the features, which know no labels, once for all."""
    features, _ = features_of(pairs, options, folder)
    data, readable = comparisons(pairs, features)

    def score(training: npt.NDArray[np.bool_], rows: Integers) -> tuple[list[Any], float]:
        fitted = fit_head(pairs, features, data.part(training & readable), options)
        image, prompts = data.image[rows], features.prompts[data.prompt[rows]]
        sides = (features.images[image[:, side]] for side in (0, 1))
        return [fitted.head.rewards(seen, prompts) for seen in sides], fitted.temperature

    return data.image, score


def _clips(pairs: Pairs, options: Reward, folder: Path | None) -> tuple[Integers, Fold]:
    """A fine-tuned CLIP a fold."""
    images, of_slot = unique_images(pairs)
    engine = Engine(None, folder, allow_download=options.read.allow_download)
    distinct = engine.distinct(images)

    def some(rows: Integers) -> Pairs:
        return Pairs(pairs.table.take(pa.array(rows)), pairs.prompts, origin=pairs.origin)

    def score(training: npt.NDArray[np.bool_], rows: Integers) -> tuple[list[Any], float]:
        with tempfile.TemporaryDirectory() as scratch:
            learn = some(np.flatnonzero(training))
            trained = train_reward(learn, Path(scratch) / "reward", options)
            table = score_pairs(some(rows), trained.load())
        return [table[f"reward_{side}"].to_numpy() for side in (0, 1)], trained.temperature

    return distinct.of_image[of_slot].reshape(-1, 2), score


def _identity(pairs: Pairs, options: Reward, folds: int, seed: int) -> list[Any]:
    """Everything that the rewards depend on."""
    if options.base == "features":
        text = None if options.text == "none" else make_encoder(options.text).identity
        models: Any = [make_image_encoder(options.image, make_runtime("cpu")).identity, text]
    else:
        models = [model_digest(model_folder(options.base), CONFIG_AND_WEIGHTS)]
    labels = pairs.table["label"].cast(pa.string())
    content = [pairs.pairs_digest, column_digest(labels), pairs.origin.fingerprint]
    return [options.settings(), folds, seed, models, content]
