"""`fifa plan`: hours, money, disk and network of a run, told before they are spent.

Plain arithmetic: a step takes start + each * n seconds for n things, by the rates that
`fifa.run.passes` times on a sample of the source. What cannot be timed there follows from
`fifa.run.bench`, and what an endpoint takes from the user's prices.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fifa.config import PRESETS, Plan, Recipe, Train, changed, preset
from fifa.config.knobs import build
from fifa.config.plan import Endpoint, Prices
from fifa.console import echo
from fifa.data.images import has_pixels
from fifa.data.read import read_source
from fifa.data.source import find_files
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.formatting import seconds, text_table
from fifa.models.runtime import make_runtime
from fifa.run.bench import VECTORS, Rate, bench_rate, tower_flops
from fifa.run.passes import Passes, is_here, runs, sample_of
from fifa.scoring import check_specs
from fifa.scoring.diversity import EXACT_UP_TO, ON_CUDA_FROM
from fifa.scoring.encoders import column_embeddings
from fifa.scoring.endpoint import VLLM
from fifa.scoring.margin import margin_scores
from fifa.scoring.quality import column_ratings
from fifa.scoring.rubric import load_rubric
from fifa.scoring.specs import ENCODERS, RATERS, REWARDS
from fifa.shards.files import read_yaml
from fifa.training.holdout import DRAWS, FROM, SHARE, steps_between

MANY = 1 << 30  # bytes of files, above which of more than `FEW_FILES` only these are read
FEW_FILES = 4
LETTERS = 4  # of a text in a token
PATCH = 28  # pixels a side of an image's token, as Qwen's models cut it
FORWARD = 0.25  # of a pair's step: reference, policy, and a backward pass like two of them
QUESTION, ANSWER = 500, 60  # tokens of a judge's question without its images, and of an answer
# Layers, width and tokens of image towers, for reward models that are not on this machine
TOWERS = {
    **dict.fromkeys(("pickscore", "hpsv2", "hpsv2.1", "mps"), (32, 1280, 257)),
    **dict.fromkeys(("clipscore", "aesthetic"), (24, 1024, 257)),
    **{"clipscore-b32": (12, 768, 50), "imagereward": (24, 1024, 197)},
}


@dataclass(frozen=True)
class Facts:
    """What is known of a source; no image was opened for it.

    Parameters
    ----------
    pairs, prompts, images
        How many different ones there are, images by their keys; extrapolated where not all is read.
    files, read
        How many files there are, and how many were read.
    seconds
        That reading takes, extrapolated alike.
    is_remote
        Whether images have to be fetched.
    sample
        The pairs that were read: all of them, or those of the first file.
    """

    pairs: int
    prompts: int
    images: int
    files: int
    read: int
    seconds: float
    is_remote: bool
    sample: Pairs

    def __str__(self) -> str:
        """For people."""
        how = (
            "counted" if self.read == self.files else f"from {self.read:,} of {self.files:,} files"
        )
        return (
            f"{self.pairs:,} pairs, {self.prompts:,} prompts, {self.images:,} images by their keys "
            f"({how}; no image was opened)"
        )


@dataclass(frozen=True)
class Step:
    """What a step takes.

    Parameters
    ----------
    name, count
        Which, and of how many things: ``620 prompts``.
    seconds
        None where they cannot be told.
    disk, network
        Bytes that it leaves, and that it fetches.
    tokens
        In and out of an endpoint: what they cost, where the prices say it. None without prices.
    why
        What the numbers rest on.
    """

    name: str
    count: str
    seconds: float | None
    why: str
    disk: float = 0.0
    network: float = 0.0
    tokens: float | None = None


@dataclass(frozen=True)
class Cost:
    """What a run takes, step by step.

    Parameters
    ----------
    facts
        Of its source.
    steps
        In their order.
    prices
        What money is reckoned with.
    """

    facts: Facts
    steps: tuple[Step, ...]
    prices: Prices

    def money(self, step: Step) -> float | None:
        """What a step costs, without its disk; None where prices or hours lack."""
        prices, parts = self.prices, []
        if prices.machine_hour is not None:
            if step.seconds is None:
                return step.tokens
            parts.append(step.seconds / 3600 * prices.machine_hour)
        if prices.network_gb is not None:
            parts.append(step.network / 1e9 * prices.network_gb)
        if step.tokens is not None:
            parts.append(step.tokens)
        return sum(parts) if parts else None

    @property
    def seconds(self) -> float:
        """Of all steps whose time is told."""
        return sum(step.seconds or 0.0 for step in self.steps)

    @property
    def disk(self) -> float:
        """Bytes that all steps leave."""
        return sum(step.disk for step in self.steps)

    @property
    def total(self) -> float | None:
        """What all steps cost; None where nothing has a price."""
        known = [money for step in self.steps if (money := self.money(step)) is not None]
        return sum(known) if known else None

    @property
    def month(self) -> float | None:
        """What the disk costs for a month; None without its price."""
        price = self.prices.disk_gb_month
        return None if price is None else self.disk / 1e9 * price

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        facts = {name: value for name, value in vars(self.facts).items() if name != "sample"}
        steps = [
            {**{k: v for k, v in asdict(one).items() if k != "tokens"}, "money": self.money(one)}
            for one in self.steps
        ]
        sums = {"seconds": self.seconds, "disk": self.disk, "money": self.total}
        sums["network"] = sum(step.network for step in self.steps)
        known = {"currency": self.prices.currency, "disk_month": self.month}
        return {"source": facts, "steps": steps, "together": sums, **known}


def cost_text(cost: Cost) -> str:
    """The table for a terminal, and what each line rests on."""
    rows = [("step", "of", "time", "money", "disk", "network")]
    for step in cost.steps:
        time_ = "not told" if step.seconds is None else seconds(step.seconds)
        sizes = (_bytes(step.disk), _bytes(step.network))
        rows.append((step.name, step.count, time_, _money(cost, cost.money(step)), *sizes))
    network = sum(step.network for step in cost.steps)
    sums = (seconds(cost.seconds), _money(cost, cost.total), _bytes(cost.disk), _bytes(network))
    rows.append(("together", "", *sums))
    lines = [str(cost.facts), "", *text_table(rows), ""]
    if any(step.seconds is None for step in cost.steps):
        lines.append("together is without the steps whose time is not told")
    if cost.total is None:
        lines.append(f"money is not told: no prices (--prices FILE, a copy of {PRICES})")
    if cost.month is not None:
        lines.append(f"the disk costs {_money(cost, cost.month)} a month more")
    lines += [f"{step.name:<9} {step.why}" for step in cost.steps]
    return "\n".join(lines)


PRICES = Path(__file__).with_name("prices.yaml")  # all that may stand there, without a number


def plan_cost(plan: Plan) -> Cost:
    """What a run and its training would take; writes nothing but the rates that it measures.

    Raises `FifaError` for a source, a recipe, a training or prices that there are not.
    """
    check_specs(plan.score)
    prices, train = read_prices(plan.prices), training_of(plan)
    began = time.perf_counter()
    facts = facts_of(plan)
    echo(str(facts))
    check_columns(facts.sample, plan)
    recipe = Recipe(plan.read, plan.score, plan.select, plan.compute)
    shares = [_question(one, facts, recipe)[2] for one in plan.score.margin if _is_judge(one)]
    passes = Passes(facts.sample, recipe, plan.seconds, plan.fresh, max(shares, default=1.0))
    rates = passes.rates()
    keep = 1.0 if plan.select.strategy == "weights" else plan.select.keep
    kept = min(facts.pairs, keep if isinstance(keep, int) else max(1, round(keep * facts.pairs)))
    steps = [*_filter_steps(facts, recipe, prices, rates, kept)]
    if train:
        steps += _train_steps(facts, passes, train, plan, kept)
    echo(f"measured and reckoned in {seconds(time.perf_counter() - began)}")
    return Cost(facts, tuple(steps), prices)


def check_columns(pairs: Pairs, plan: Plan) -> None:
    """Raise `FifaError` for a score column that the source lacks, before anything is measured."""
    few, score = sample_of(pairs, 1), plan.score
    for one in score.margin:
        if REWARDS.parse(one).is_column:
            margin_scores(few, one)
    if (spec := score.quality) != "none" and RATERS.parse(spec).is_column:
        column_ratings(few, RATERS.parse(spec).model)
    if (spec := score.diversity) != "none" and ENCODERS.parse(spec).is_column:
        column_embeddings(few, ENCODERS.parse(spec).model)


def read_prices(path: str | None) -> Prices:
    """The prices in a file; none at all without one. Raises `FifaError` for anything else in it."""
    if path is None:
        return Prices()
    values = read_yaml(Path(path), "the prices")
    given = {name: value for name, value in values.items() if value is not None}
    return build(Prices, given, where=path, what="the prices")


def training_of(plan: Plan) -> Train | None:
    """The training that is asked for; None without one."""
    if plan.train is None and plan.model is None:
        return None
    named = plan.train or "lora-small"
    train = preset(named) if named in PRESETS else Train.from_yaml(Path(named))
    train = changed(train, model=plan.model)
    if not train.model:
        raise FifaError(
            "the training names no model", where=named, do="give it with --model, or in the file"
        )
    return train


def facts_of(plan: Plan) -> Facts:
    """What is known of a source. Of many large files some are read, and the rest extrapolated.

    Pairs grow with the bytes of the files. Of n prompts in a file, o are in another one too: if
    files draw from N prompts, o = n^2 / N, and k files have N (1 - (1 - n / N)^k) different ones
    (Lincoln's estimate from marked and recaptured animals); likewise of images.
    """
    found = find_files(plan.read.source)
    files, is_remote = found.files, found.root.is_remote or plan.read.allow_download
    whole = sum(max(0, file.size) for file in files)
    began = time.perf_counter()
    if len(files) <= FEW_FILES or (whole <= MANY and not found.root.is_remote):
        pairs = read_source(plan.read)
        took = time.perf_counter() - began
        prompts, images = pairs.prompts.num_rows, len(_keys(pairs))
        n = len(files)
        return Facts(len(pairs), prompts, images, n, n, took, is_remote, pairs)
    chosen = [files[i * len(files) // FEW_FILES] for i in range(FEW_FILES)]
    parts = [read_source(plan.read, found.root.name(file.path)) for file in chosen]
    took = time.perf_counter() - began
    scale = whole / sum(file.size for file in chosen)
    k = scale * len(chosen)
    return Facts(
        pairs=round(scale * sum(map(len, parts))),
        prompts=different([set(part.prompts["prompt_id"].to_pylist()) for part in parts], k),
        images=different([set(_keys(part).to_pylist()) for part in parts], k),
        files=len(files),
        read=len(chosen),
        seconds=took * scale,
        is_remote=is_remote,
        sample=parts[0],
    )


def different(files: Sequence[set[str]], k: float) -> int:
    """How many different things k files have in all, by those of some: see `facts_of`."""
    n = float(np.mean([len(file) for file in files]))
    shared = float(np.mean([len(a & b) for a, b in combinations(files, 2)]))
    share = shared / n if n else 0.0  # n / N
    every: float = n / share * (1 - (1 - share) ** k) if share else k * n
    return round(every)


def _keys(pairs: Pairs) -> pa.Array:
    columns = [pairs.table[f"image_{side}"] for side in (0, 1)]
    return pa.chunked_array([chunk for one in columns for chunk in one.chunks]).unique()


def _filter_steps(
    facts: Facts, recipe: Recipe, prices: Prices, rates: dict[str, Rate], kept: int
) -> Iterator[Step]:
    """The steps of `fifa filter`."""
    score = recipe.score
    how = "the reading itself was timed"
    if facts.read < facts.files:
        how += f" on {facts.read:,} of {facts.files:,} files, the rest by their bytes"
    size = rates["read"].size * facts.pairs
    yield Step("read", f"{facts.pairs:,} pairs", facts.seconds, how, size)

    image = rates["export"].size / 2  # bytes of one, as it is exported
    there = any(not REWARDS.parse(one).is_column for one in score.margin)
    fetched = image * facts.images if facts.is_remote and there else 0.0
    here = [one for one in score.margin if runs(REWARDS, one)]
    if here:
        yield _step("margin", rates["margin"], facts.pairs, fetched, f"{', '.join(here)}: ")
    for one in score.margin:
        if one not in here:
            yield _margin_elsewhere(one, facts, recipe, prices, 0.0 if here else fetched)
    if score.diversity != "none":
        yield _diversity(rates["diversity"], facts, recipe)
    if score.quality.startswith("openai:"):
        yield _asked_quality(facts, recipe, prices)
    elif score.quality != "none" and not runs(RATERS, score.quality):
        yield Step("quality", f"{facts.prompts:,} prompts", None, _not_here(score.quality))
    elif score.quality != "none":
        yield _step("quality", rates["quality"], facts.prompts, 0.0, f"{score.quality}: ")
    strategy = recipe.select.strategy
    slow = f"; {strategy!r} compares all prompts, which is not counted"
    note = slow if strategy in ("facility", "farthest") else ""
    again = image * 2 * kept if facts.is_remote and not there else 0.0
    yield _step("select", rates["select"], kept, again, "images of kept pairs are decoded: ", note)
    yield _step("export", rates["export"], kept, 0.0)
    yield _step("report", rates["report"], kept, 0.0)


def _step(name: str, rate: Rate, n: int, network: float, before: str = "", after: str = "") -> Step:
    why = f"{before}{rate.start:.1f} s to begin and {_each(rate)}, {rate.of}{after}"
    return Step(name, f"{n:,} {rate.unit}", rate.seconds(n), why, rate.size * n, network)


def _each(rate: Rate) -> str:
    unit = {"pairs": "pair", "prompts": "prompt", "kept pairs": "kept pair"}[rate.unit]
    return f"{rate.each * 1000:.3g} ms a {unit}"


def _not_here(spec: str) -> str:
    what = "its model or vLLM" if spec.startswith(VLLM) else spec
    return f"{what} is not on this machine and no figure stands for it: fetch it first"


def _margin_elsewhere(
    text: str, facts: Facts, recipe: Recipe, prices: Prices, network: float
) -> Step:
    """A scorer that cannot be timed on the sample: by an endpoint, or not fetched yet."""
    spec = REWARDS.parse(text)
    if _is_judge(text) and spec.name != VLLM:
        questions, images, share = _question(text, facts, recipe)
        asked, pixels = round(share * questions), recipe.compute.judge_side
        side = (pixels / PATCH) ** 2
        why = f"{images} image(s) of {pixels} pixels, {side:.0f} tokens each at most, "
        why += f"and {QUESTION} of text a question"
        tokens = QUESTION + images * side
        of, name = f"{asked:,} questions", spec.model or "default"
        return _asked("margin", of, asked, tokens, name, why, recipe, prices)
    of = f"{facts.images:,} images"
    if spec.name not in TOWERS:
        return Step("margin", of, None, _not_here(text), network=network)
    tower, flops = bench_rate("image tower"), tower_flops(*TOWERS[spec.name])
    slowest = max(tower.each * flops / tower_flops(), bench_rate("decoding").each)
    took = facts.images * slowest
    why = f"{text} is not on this machine: {flops / 1e9:.0f} GFLOP an image of its tower, as quick "
    why += f"as {tower.of}; decoding meanwhile; its text, download and disk are not counted"
    return Step("margin", of, took, why, network=network)


def _is_judge(text: str) -> bool:
    return REWARDS.parse(text).is_judge


def _question(text: str, facts: Facts, recipe: Recipe) -> tuple[int, int, float]:
    """A judge's questions about all pairs, the images in each, and the share that is asked."""
    alone, budget = REWARDS.parse(text).alone, recipe.score.budget
    # both orders of a pair
    questions, images = (facts.images, 1) if alone else (2 * facts.pairs, 2)
    if isinstance(budget, float):
        return questions, images, budget
    tokens = QUESTION + images * (recipe.compute.judge_side / PATCH) ** 2
    return questions, images, min(1.0, budget / (tokens + ANSWER) / questions)


def _asked_quality(facts: Facts, recipe: Recipe, prices: Prices) -> Step:
    """The rater behind an endpoint."""
    prompts: list[str] = facts.sample.prompts["prompt"].slice(0, 1000).to_pylist()
    letters = [sum(len(m["content"]) for m in load_rubric().messages(p)) for p in prompts]
    tokens = float(np.mean(letters)) / LETTERS
    why, n = f"{tokens:.0f} tokens a question ({LETTERS} letters each)", facts.prompts
    name, of = RATERS.parse(recipe.score.quality).model, f"{facts.prompts:,} prompts"
    return _asked("quality", of, n, tokens, name, why, recipe, prices)


def _asked(
    step: str,
    of: str,
    asked: int,
    tokens: float,
    model: str,
    why: str,
    recipe: Recipe,
    prices: Prices,
) -> Step:
    """What an endpoint takes for questions of so many tokens each."""
    price = prices.endpoints.get(model) or prices.endpoints.get("default") or Endpoint()
    answer = ANSWER if price.answer is None else price.answer
    money = None
    if price.input is not None or price.output is not None:
        each = tokens * (price.input or 0.0) + answer * (price.output or 0.0)
        money = asked * each / 1e6
    took = None
    why += f", {answer:g} an answer, {(tokens + answer) * asked / 1e6:,.1f} million tokens in all"
    if price.seconds is not None:
        took = asked * price.seconds / recipe.compute.in_flight
        why += f"; {price.seconds:g} s an answer, {recipe.compute.in_flight} at a time"
    else:
        why += f"; the prices have no seconds for {model}"
    return Step(step, of, took, why, tokens=money)


def _diversity(rate: Rate, facts: Facts, recipe: Recipe) -> Step:
    """Embeddings by their number, nearest neighbours by its square, or by an index."""
    spec, n = recipe.score.diversity, facts.prompts
    if not runs(ENCODERS, spec):
        return Step("diversity", f"{n:,} prompts", None, _not_here(spec))
    step = _step("diversity", rate, n, 0.0, f"{spec}: ")
    on_gpu = n >= ON_CUDA_FROM and make_runtime(recipe.compute.device).device.startswith("cuda")
    if n <= EXACT_UP_TO or on_gpu:
        near = bench_rate("neighbours on a GPU" if on_gpu else "neighbours")
        took, by = near.each * n**2, "by the square of the prompts"
    else:  # 64 sqrt(n) codes a query are looked at: `fifa.scoring.neighbours`
        near = bench_rate("approximate neighbours")
        took = near.each * n * max(1.0, (n / VECTORS) ** 0.5)
        by = "by the prompts to the power of 1.5"
    why = f"{step.why}; neighbours {seconds(took)}, {by}, from {near.of}"
    return replace(step, seconds=(step.seconds or 0.0) + took, why=why)


def _train_steps(
    facts: Facts, passes: Passes, train: Train, plan: Plan, kept: int
) -> Iterator[Step]:
    """The steps of `fifa train` on what is kept."""
    if not is_here(train.model):
        yield Step("training", f"{kept:,} pairs", None, _not_here(train.model))
        return
    if not has_pixels(facts.sample.table, facts.sample.origin) and not plan.read.allow_download:
        why = "the source only refers to its images: --allow-download fetches them"
        yield Step("training", f"{kept:,} pairs", None, why)
        return
    rates = passes.training(train)
    share = train.holdout if train.holdout is not None else SHARE * (kept >= FROM)
    held = round(kept * share)
    steps = train.steps_of(max(1, kept - held))
    cache, each, state = rates["cache"], rates["pair"], rates["state"]
    encoded = kept
    if train.order == "random":  # as `fifa.training.order.presented`
        encoded = held + min(kept - held, steps * train.batch)
    # of all held-out pairs: the reference before the training, the policy several times in it
    measured = held * len(DRAWS) * FORWARD * each.each
    times = ceil(steps / steps_between(train, steps, held)) if held else 0
    took = cache.seconds(encoded) + measured
    why = f"{cache.start:.1f} s to begin, {_each(cache)}, {cache.of}"
    why += f"; {seconds(measured)} for the reference's errors on held-out pairs" if held else ""
    yield Step("encode", f"{encoded:,} pairs", took, why, cache.size * encoded)
    took = each.seconds(steps * train.batch) + times * measured
    why = f"{each.each * 1000:.3g} ms a pair, {each.of}"
    why += f"; {held:,} held-out pairs are measured {times:,} times" if held else ""
    writing = bench_rate("writing")
    writes = steps // train.save_every
    took += writes * state.size * writing.each
    why += f"; {writes:,} states of {_bytes(state.size)} at {1e-6 / writing.each:,.0f} MB/s"
    checkpoints = steps // train.checkpoint_every if train.checkpoint_every else 0
    disk = state.size + (checkpoints + 1 + bool(held)) * rates["weights"].size
    yield Step("training", f"{steps:,} steps of {train.batch:,} pairs", took, why, disk)


def _bytes(number: float) -> str:
    if number < 1e5:
        return "0" if number == 0 else "< 0.1 MB"
    return f"{number / 1e6:,.1f} MB" if number < 1e9 else f"{number / 1e9:,.2f} GB"


def _money(cost: Cost, money: float | None) -> str:
    if money is None:
        return ""
    small = 0 < money < 0.01
    return f"{'< ' * small}{cost.prices.currency}{max(money, 0.01 * small):,.2f}"
