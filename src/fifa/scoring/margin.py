"""The preference margin: how far apart reward models put a pair's two images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from fifa.config import Compute, Read, Reward, Score, Select
from fifa.console import echo, note
from fifa.data.images import Images, has_pixels
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.arena import arena_rewards
from fifa.scoring.encoders import keep_embeddings
from fifa.scoring.judges.pairs import judge_images, judge_pairs
from fifa.scoring.rewards import load_reward
from fifa.scoring.rewards.engine import Engine
from fifa.scoring.rewards.fit import crossfit_rewards
from fifa.scoring.rewards.worker import runtime_of
from fifa.scoring.specs import REWARDS, Spec
from fifa.scoring.table import (
    BLIND,
    MARGIN,
    NUMERIC,
    SIGMAS,
    score_path,
    scored_once,
    source_columns,
)
from fifa.shards.executors import executor_of
from fifa.shards.ledger import Ledger
from fifa.shards.pool import Executor

Numbers = npt.NDArray[np.float32]

READINGS = ("raw", "logodds")
SMALLEST = 1e-7  # probabilities are clipped here before the logarithm
CHUNK = 1 << 18  # pairs at a time: the temporaries stay in the processor's cache


@dataclass(frozen=True)
class CommitteeMargin:
    """How far apart a committee puts the images of every pair.

    Parameters
    ----------
    margin
        |d|, float32 [pairs]; NaN where a scorer could not score.
    signed_margin
        Positive where the committee agrees with the person, float32 [pairs]; NaN for ties too.
    agreement
        The share of the scorers that agree with the person, float32 [pairs] in [0, 1]; a scorer
        that sees no difference counts half; NaN where ``signed_margin`` is.
    spreads
        What every scorer's differences were divided by.
    """

    margin: Numbers
    signed_margin: Numbers
    agreement: Numbers
    spreads: tuple[float, ...]


def margin_scores(
    pairs: Pairs,
    spec: str,
    folder: Path | None = None,
    *,
    compute: Compute | None = None,
    allow_download: bool = False,
    executor: Executor | None = None,
    budget: int | float = Score.budget,
    cheaper: Sequence[pa.Table] = (),
) -> pa.Table:
    """What one reward model gives both images of every pair.

    Parameters
    ----------
    pairs
        The pairs, with the source's score columns, and images unless the spec names columns.
    spec
        One of `fifa.scoring.specs.REWARDS`.

        ``column:NAME_0,NAME_1``: two columns of the source. Where both lie in [0, 1] and sum to
        1 (within 0.001) in every finite row they are read as probabilities, and the reward is
        log p (p clipped at 1e-7), so that the difference of rewards is the log-odds. Otherwise
        they are rewards as they stand. ``column:raw:A,B`` and ``column:logodds:A,B`` decide it.

        ``proxy``: trained here on the pairs' own labels and cross-fitted over prompts;
        ``proxy@clip:MODEL`` the same on both towers of that CLIP, ``proxy@ENCODER`` on another
        image encoder (`fifa.scoring.specs.IMAGE_ENCODERS`). ``proxy:FOLDER``: one that
        `fifa.scoring.rewards.fit.train_reward` wrote.

        ``arena`` and ``arena:names``: from the generators' names (`fifa.scoring.arena`).
    folder
        Where scores are kept; None keeps nothing.
    compute, allow_download
        How to look at images, and whether to fetch those that are only known by URL.
    executor
        Who runs models; by default whom ``compute`` names.
    budget, cheaper
        Of a vision-language judge: about which part of the pairs it is asked
        (`fifa.config.Score`), and the tables of cheaper scorers that say which.

    Returns
    -------
    pyarrow.Table
        `fifa.scoring.table.MARGIN`, row by row with ``pairs.table``; `fifa.scoring.table.SIGMAS`
        of a model that says how sure it is. NaN where an image could not be read; NaN and infinite
        scores of a column stay as they are. Selection reports both.

    Raises
    ------
    FifaError
        For a column that the source does not have, a source without images where they are looked
        at, and a spec that names no reward model.
    """
    parsed = REWARDS.parse(spec)
    if parsed.is_column:
        return _column_rewards(pairs, parsed, folder)
    if parsed.by_generator:
        return arena_rewards(pairs, parsed, folder)
    if not allow_download and not has_pixels(pairs.table, pairs.origin):
        raise FifaError(
            f"the margin {spec!r} needs images, and the source only refers to them",
            where=pairs.origin.source,
            do="--allow-download fetches them; score columns need none: --margin column:A_0,A_1",
        )
    compute = compute or Compute()
    how: dict[str, Any] = {"compute": compute, "allow_download": allow_download}
    if executor is None:
        with executor_of(compute) as own:
            how |= {"budget": budget, "cheaper": cheaper, "executor": own}
            return margin_scores(pairs, spec, folder, **how)
    if parsed.is_judge:
        rewards = [(t["reward_0"].to_numpy(), t["reward_1"].to_numpy()) for t in cheaper]
        # against a label of 1 the signed margin is d itself
        d = committee(rewards, np.ones(len(pairs))).signed_margin if rewards else None
        how |= {"budget": budget, "cheaper": d, "executor": executor}
        return judge_pairs(pairs, parsed, folder, **how)
    if parsed.trained_here:
        train = _training(parsed, compute, allow_download)
        return crossfit_rewards(pairs, folder=folder, options=train, executor=executor)
    return _model_rewards(pairs, _engine(spec, folder, compute, executor, allow_download), folder)


def _training(proxy: Spec, compute: Compute, allow_download: bool) -> Reward:
    """How a proxy is trained: with the encoder that its spec names, a CLIP's for prompts, too."""
    train = Reward(read=Read(allow_download=allow_download), device=compute.device)
    if image := proxy.at:
        text = image if image.startswith("clip:") else train.text
        train = replace(train, image=image, text=text)
    return train


def _model_rewards(pairs: Pairs, engine: Engine, folder: Path | None) -> pa.Table:
    """What a reward model gives; its vectors of the prompts are kept for the diversity step."""
    table = engine.score_pairs(pairs)
    encoder = getattr(engine.model, "encoder", None)
    if folder is not None and encoder is not None:
        vectors = engine.prompt_features(pairs.prompts["prompt"])
        keep_embeddings(pairs, encoder, vectors, folder)
    return table


def image_rewards(
    sets: Iterable[tuple[Images, pa.Array]], spec: str, folder: Path, compute: Compute
) -> list[Numbers]:
    """What a reward model, loaded once, gives every image for its own prompt: float32 [images].

    ``spec`` is one of a model that looks at images; each of ``sets`` has images and a string an
    image, and an array of its own, kept in a file of its own. The rest as for `margin_scores`.
    """
    parsed = REWARDS.parse(spec)
    rewards = []
    with executor_of(compute) as executor:
        if parsed.is_judge:
            asked = ((images, prompts.to_pylist()) for images, prompts in sets)
            return [judge_images(*one, parsed, folder, compute, executor) for one in asked]
        engine = _engine(spec, folder, compute, executor)
        for images, prompts in sets:
            coded = prompts.dictionary_encode()
            different = pa.chunked_array([coded.dictionary])
            rows = np.arange(len(images)), coded.indices.to_numpy().astype(np.int64)
            rewards.append(engine.score(images, different, *rows)["reward"].to_numpy())
    return rewards


def _engine(
    spec: str,
    folder: Path | None,
    compute: Compute,
    executor: Executor,
    allow_download: bool = False,
) -> Engine:
    """The engine of a reward model, fed as ``compute`` says."""
    load = partial(
        load_reward,
        spec,
        device=compute.device,
        dtype=compute.dtype,
        compile=compute.compile,
        channels_last=compute.channels_last,
    )
    model = load()
    # workers elsewhere may have other devices; the precision that names the scores is this one
    load = partial(load, dtype=runtime_of(model).dtype)
    return Engine(model, folder, compute, executor, load, allow_download=allow_download)


def _column_rewards(pairs: Pairs, spec: Spec, folder: Path | None) -> pa.Table:
    """The rewards that two columns of the source hold."""
    forced, sources = _columns(pairs, spec)
    reading = forced or ("logodds" if _are_probabilities(*sources) else "raw")
    outside = [s[np.isfinite(s) & ((s < 0) | (s > 1))] for s in sources]
    if reading == "logodds" and (wrong := np.concatenate(outside)).size:
        raise FifaError(
            f"not probabilities: there is a {wrong[0]:g}",
            where=spec.text,
            do="column:raw:NAME_0,NAME_1",
        )
    content = xxhash.xxh3_128(sources[0].tobytes())
    content.update(sources[1].tobytes())
    identity = (reading, pairs.pairs_digest, content.hexdigest())
    path = folder and score_path(folder, "margin", spec.text, *identity)

    def make(ledger: Ledger) -> pa.Table:
        with np.errstate(over="ignore"):
            # r = log p, so that r_0 - r_1 = log(p_0 / p_1); NaN and infinity pass through
            logs = (np.log(np.maximum(s, SMALLEST)) if reading == "logodds" else s for s in sources)
            rewards = [source.astype(np.float32) for source in logs]
        lost = int((~np.isfinite(rewards[0]) | ~np.isfinite(rewards[1])).sum())
        meaning = "log-odds of probabilities" if reading == "logodds" else "rewards as they stand"
        echo(f"margin {spec.text}: {meaning}" + (f"; {lost:,} pairs not finite" if lost else ""))
        note(margin_pairs=len(pairs), margin_not_finite=lost)
        ids = pairs.table["pair_id"]  # which are mapped from the disk
        return pa.table([ids, *(pa.array(r) for r in rewards)], schema=MARGIN)

    return scored_once(path, make, {"scorer": spec.text, "reading": reading})


def pair_rewards(
    table: pa.Table, unit: str = Select.margin_unit, *, blind: bool = False
) -> tuple[Numbers, Numbers]:
    """The rewards of both images of every pair, float32 [pairs] each, in the unit asked for.

    In the unit ``sigma``, of a reward model that says how sure it is, their difference is::

        z = (r_0 - r_1) / sqrt(sigma_0^2 + sigma_1^2)

    Parameters
    ----------
    table
        `fifa.scoring.table.MARGIN`, with or without `fifa.scoring.table.SIGMAS`: without them the
        rewards stay as they are.
    unit
        ``reward`` or ``sigma``, as `fifa.config.Select.margin_unit`.
    blind
        Without what they know of the person's choice: `fifa.scoring.table.BLIND`.
    """
    if blind and BLIND in table.column_names:
        difference: Numbers = table[BLIND].to_numpy()
        return difference, 0 * difference
    reward_0, reward_1, *sigmas = (
        table[name].to_numpy().astype(np.float32, copy=False)  # nulls are NaN
        for name in (*MARGIN.names[1:], *SIGMAS.names)
        if name in table.column_names
    )
    if unit == "reward" or not sigmas:
        return reward_0, reward_1
    sigma = np.hypot(*sigmas)
    with np.errstate(divide="ignore", invalid="ignore"):
        return reward_0 / sigma, reward_1 / sigma


def committee(
    rewards: Sequence[tuple[Numbers, Numbers]], label: npt.NDArray[Any]
) -> CommitteeMargin:
    """The margin of one or several reward models.

    With r_s the rewards of scorer s, and d_s = r_s(c, x_0) - r_s(c, x_1)::

        d = mean over s of d_s / spread_s
        margin = |d|,  signed margin = d * sign(label - 1/2)

    For one scorer this is the paper's |r(c, x_w) - r(c, x_l)| on that scorer's own scale (its
    spread is 1). In a committee, spread_s is the root mean square of its finite differences.
    Nothing is centred: a difference keeps its sign, which is the scorer's verdict. A scorer
    that never sees a difference has spread 1 and adds nothing.

    Parameters
    ----------
    rewards
        ``(reward_0, reward_1)`` a scorer, [pairs] each.
    label
        The probability that a person prefers image 0, [pairs]; 0.5 is a tie.

    Returns
    -------
    CommitteeMargin
        NaN for a pair that any scorer could not score (NaN, infinite).

    Raises
    ------
    FifaError
        For no scorer at all.
    """
    if not rewards:
        raise FifaError("a margin needs a reward model", do="--margin column:NAME_0,NAME_1")
    n = len(label)
    spreads = (1.0,) if len(rewards) == 1 else tuple(_spread(*scorer) for scorer in rewards)
    margin, signed, agreement = (np.empty(n, np.float32) for _ in range(3))
    with np.errstate(invalid="ignore", over="ignore"):
        for part in _parts(n):
            # sign(label - 1/2) is 1, -1 or, for a tie, NaN
            person = np.sign(label[part].astype(np.float32, copy=False) - np.float32(0.5))
            person[person == 0] = np.nan
            d = np.zeros(len(person), np.float32)
            verdicts = np.zeros(len(person), np.float32)
            for (reward_0, reward_1), spread in zip(rewards, spreads, strict=True):
                own = np.subtract(reward_0[part], reward_1[part], dtype=np.float32)
                own -= own * 0  # an infinite difference becomes NaN, the others stay
                verdicts += np.sign(own)
                # d = mean over s of d_s / spread_s
                own /= np.float32(spread * len(rewards))
                d += own
            np.abs(d, out=margin[part])
            np.multiply(d, person, out=signed[part])
            # the share that agrees, a scorer's tie as a half: (1 + mean sign(d_s) * person) / 2
            verdicts *= person / np.float32(2 * len(rewards))
            np.add(verdicts, np.float32(0.5), out=agreement[part])
    return CommitteeMargin(margin, signed, agreement, spreads)


def _spread(reward_0: Numbers, reward_1: Numbers) -> float:
    """sqrt(mean d^2) over the finite differences; 1 where there are none but zeros."""
    total, count = 0.0, 0
    with np.errstate(invalid="ignore", over="ignore"):
        for part in _parts(len(reward_0)):
            d = np.subtract(reward_0[part], reward_1[part], dtype=np.float32)
            # pairwise, so float32 is enough and threads play no part
            squares = float(np.sum(d * d))
            if not np.isfinite(squares):
                d = d[np.isfinite(d)]
                squares = float(np.sum(np.square(d, dtype=np.float64)))
            total += squares
            count += len(d)
    return float(np.sqrt(total / count)) if total > 0 else 1.0


def _parts(n: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


def _columns(pairs: Pairs, spec: Spec) -> tuple[str, list[npt.NDArray[np.float64]]]:
    """The reading that ``spec`` forces ("" for none) and its two columns, null as NaN."""
    known = source_columns(pairs, *NUMERIC, pa.types.is_boolean)
    here = f"score columns here: {', '.join(known) or 'none'}"
    forced, _, named = spec.model.partition(":")
    if forced not in READINGS:
        forced, named = "", spec.model
    columns = named.split(",")
    if len(columns) != 2:
        raise FifaError(
            f"a margin takes two columns, one per image: {spec.text}",
            do=f"column:NAME_0,NAME_1; {here}",
        )
    for column in columns:
        if column not in known:
            raise FifaError(f"the source has no score column {column!r}", where=spec.text, do=here)
    values = (pairs.table[column].cast(pa.float64()).to_numpy() for column in columns)
    return forced, [np.ascontiguousarray(column, np.float64) for column in values]


def _are_probabilities(p_0: npt.NDArray[np.float64], p_1: npt.NDArray[np.float64]) -> bool:
    finite = np.isfinite(p_0) & np.isfinite(p_1)
    p_0, p_1 = p_0[finite], p_1[finite]
    within = (p_0 >= 0) & (p_0 <= 1) & (p_1 >= 0) & (p_1 <= 1) & (np.abs(p_0 + p_1 - 1) <= 1e-3)
    return bool(len(p_0) and within.all())
