"""What a vision-language judge says of pairs and of images, as tables of scores.

Every question is asked once, however often its prompt and images come up: its key is made from
the judge, the prompt and the images' bytes, and its answer is kept as it arrives. A table is made
from the answers alone, so a run that was killed ends with the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.config import Compute, Score
from fifa.console import echo, note
from fifa.data.images import Images, unique_images
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.batch import Imported, read_answers, write_requests
from fifa.scoring.elsewhere import answered, ask_elsewhere
from fifa.scoring.endpoint import Answers
from fifa.scoring.judges.judge import Question, VLMJudge
from fifa.scoring.judges.pictures import Pictures
from fifa.scoring.rewards.engine import Distinct, Engine, unreadable, unreadable_path
from fifa.scoring.rewards.metrics import accuracy, fit_temperature, wilson
from fifa.scoring.specs import Spec
from fifa.scoring.table import score_facts, score_path, scored_once
from fifa.shards.files import column_digest, digest, read_table, write_table
from fifa.shards.ledger import Ledger
from fifa.shards.pool import Executor, is_elsewhere, store_of
from fifa.shards.sealed import DamagedError

Numbers = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Ask = tuple[str, tuple[int, ...]]  # a prompt, and the rows of the different images that it shows

BAD = b"fifa.bad"  # in a table's metadata: why images could not be read, by their rows
FIRST = 16  # pairs whose tokens are counted before a budget of tokens is shared out


def judge_pairs(
    pairs: Pairs,
    spec: Spec,
    folder: Path | None = None,
    *,
    compute: Compute | None = None,
    allow_download: bool = False,
    budget: int | float = Score.budget,
    cheaper: Numbers | None = None,
    executor: Executor | None = None,
) -> pa.Table:
    """What a judge gives both images of every pair.

    With d_1 what it says in favour of image 0 where that is shown first, and d_2 where it is
    shown second::

        d = (d_1 + d_2) / 2,    reward_0 = d / 2,    reward_1 = -d / 2

    so that a preference for a place cancels out. A judge that sees one image at a time gives each
    its grade. Two images with the same bytes are not asked about: d = 0.

    Parameters
    ----------
    pairs
        The pairs, with images.
    spec
        A judge's.
    folder
        Where answers and tables are kept; None keeps nothing.
    compute
        Requests in flight, tokens of an answer, and how images are sent.
    allow_download
        Fetch images that are only known by URL.
    budget
        The share of the pairs that is asked about, or (a whole number) as many tokens as that may
        take, the pairs with the smallest \\|d\\| by ``cheaper`` first. The others keep that d.
        Both are divided by their `fifa.scoring.rewards.metrics.fit_temperature`, so that they are
        log-odds of what people prefer.
    cheaper
        d of a cheaper judge, float32 [pairs]; NaN where it has none.
    executor
        Who reads images and asks; by default this process.

    Returns
    -------
    pyarrow.Table
        `fifa.scoring.table.MARGIN`, row by row with ``pairs.table``; NaN where an image could not
        be read or an order was not answered. Of two images in a message also ``shown_first`` and
        ``shown_second`` (d_1 and d_2, float32) and the aspects' shares for image 0, means over both
        orders; of single images the grade of each aspect. Under a budget also ``judged`` (bool).

    Raises
    ------
    FifaError
        As `fifa.scoring.endpoint.Endpoint.ask`; and for a budget without a cheaper judge, or of
        tokens that the server does not count.
    """
    compute = compute or Compute()
    judge: VLMJudge = spec.make(folder, compute)
    if is_all(budget):
        cheaper = None
    elif cheaper is None:
        raise FifaError(
            "a budget needs a cheaper judge that scores all pairs",
            where=spec.text,
            do="add one: --margin pickscore, or --margin column:NAME_0,NAME_1",
        )
    images, of_slot = unique_images(pairs)
    asking = Asking.of(judge, images, compute, folder, allow_download, executor)
    prompts = pairs.prompts["prompt"].take(pairs.table["prompt_index"].combine_chunks())
    label = pairs.table["label"].to_numpy()
    identity: list[object] = [judge.identity, pairs.pairs_digest, asking.distinct.identity]
    if cheaper is not None:
        identity += [budget, digest(cheaper.tobytes(), label.tobytes())]
    path = folder and score_path(folder, "margin", judge.name, *identity, column_digest(prompts))
    _forget_unanswered(path)

    def make(ledger: Ledger) -> pa.Table:
        asking.ledger = ledger
        asks = asking.asks(pairs, of_slot)
        order = np.arange(len(pairs))
        if cheaper is not None:  # the least certain first, those without a margin before all
            order = np.argsort(np.nan_to_num(np.abs(cheaper), nan=-1.0), kind="stable")
        rows = _ask_within(budget, asking, asks, order)
        table, facts = _table(pairs, judge, asking, asks, rows)
        if cheaper is not None:
            table, facts["cascade"] = _cascade(table, cheaper, label, rows)
        if path is not None:
            bad = unreadable(images, asking.distinct, asking.bad)
            write_table(unreadable_path(path), bad)
        _say(judge, facts)
        return table.replace_schema_metadata({"fifa.score": json.dumps(facts)})

    return scored_once(path, make, _facts(judge), store_of(executor))


def judge_images(
    images: Images,
    prompts: Sequence[str],
    spec: Spec,
    folder: Path | None,
    compute: Compute,
    executor: Executor | None = None,
) -> Numbers:
    """The grade that a judge gives each image for its prompt, float32 [images].

    NaN where an image could not be read or there was no answer. The rest as for `judge_pairs`.
    """
    judge: VLMJudge = spec.make(folder, compute, shown=1)
    asking = Asking.of(judge, images, compute, folder, executor=executor)
    identity = (judge.identity, asking.distinct.identity, *prompts)
    path = folder and score_path(folder, "rewards", judge.name, *identity)
    _forget_unanswered(path)

    def make(ledger: Ledger) -> pa.Table:
        asking.ledger = ledger
        rows = asking.distinct.of_image.tolist()
        asks = [(prompt, (row,)) for prompt, row in zip(prompts, rows, strict=True)]
        asking(asks)
        facts = {"unanswered": asking.unanswered(asks), "questions": len(set(asks))}
        _say(judge, facts)
        values = pa.array([asking.value(ask) for ask in asks], pa.float32())
        table = pa.table({"reward": values})
        return table.replace_schema_metadata({"fifa.score": json.dumps(facts)})

    made = scored_once(path, make, _facts(judge), store_of(executor))
    rewards: Numbers = made["reward"].to_numpy()
    return rewards


def write_batch(
    pairs: Pairs,
    spec: Spec,
    path: Path,
    *,
    folder: Path | None = None,
    compute: Compute | None = None,
    allow_download: bool = False,
    reasoning: bool = False,
) -> int:
    """Write what `judge_pairs` would ask to ``path``: see `fifa.scoring.batch.write_requests`.

    The images are in the file. The parameters are those of `judge_pairs`.
    """
    asking, asks = _all_asks(pairs, spec, folder, compute, allow_download)
    with asking.questions(asking.keys(asks)) as questions:
        return write_requests(asking.judge, questions, path, folder=folder, reasoning=reasoning)


def read_batch(
    pairs: Pairs,
    spec: Spec,
    path: Path,
    *,
    folder: Path,
    compute: Compute | None = None,
    allow_download: bool = False,
) -> Imported:
    """Put the answers of a finished batch into the cache that `judge_pairs` reads.

    All but ``path`` as they were given to `write_batch`; the rest, and what is raised, as for
    `fifa.scoring.batch.read_answers`.
    """
    asking, asks = _all_asks(pairs, spec, folder, compute, allow_download)
    return read_answers(asking.judge, asking.keys(asks), path, folder=folder)


def _all_asks(
    pairs: Pairs, spec: Spec, folder: Path | None, compute: Compute | None, allow_download: bool
) -> tuple[Asking, list[Ask]]:
    compute = compute or Compute()
    judge: VLMJudge = spec.make(folder, compute)
    images, of_slot = unique_images(pairs)
    asking = Asking.of(judge, images, compute, folder, allow_download)
    return asking, [ask for own in asking.asks(pairs, of_slot) for ask in own]


def is_all(budget: int | float) -> bool:
    """Whether a budget is for all pairs: the share 1.0, not a count of tokens."""
    return isinstance(budget, float) and budget == 1.0


@dataclass
class Asking:
    """A judge, the different images that it may be shown, and what it has said of them."""

    judge: VLMJudge
    images: Images  # the different ones
    distinct: Distinct
    how: dict[str, Any]
    said: dict[Ask, Any] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    executor: Executor | None = None

    @classmethod
    def of(
        cls,
        judge: VLMJudge,
        images: Images,
        compute: Compute,
        folder: Path | None,
        allow_download: bool = False,
        executor: Executor | None = None,
    ) -> Asking:
        """The images told apart as reward models do."""
        # to tell images apart by their bytes would fetch all of a remote source once more
        trust = True if images.remote else None
        options: dict[str, Any] = {"trust_keys": trust, "allow_download": allow_download}
        distinct = Engine(None, folder, compute, executor, **options).distinct(images)
        how = {"compute": compute, "folder": folder, "allow_download": allow_download}
        return cls(judge, images.take(distinct.first), distinct, how, executor=executor)

    def asks(self, pairs: Pairs, of_slot: Integers) -> list[list[Ask]]:
        """The questions of every pair: both orders, or both images.

        ``of_slot`` as from `unique_images`. An image against itself is no question.
        """
        prompts = pairs.prompts["prompt"].take(pairs.table["prompt_index"].combine_chunks())
        slots = self.distinct.of_image[of_slot].reshape(-1, 2).tolist()
        found: list[list[Ask]] = []
        for prompt, (a, b) in zip(prompts.to_pylist(), slots, strict=True):
            if self.judge.shown == 1:
                found.append([(prompt, (a,)), (prompt, (b,))])
            else:
                found.append([(prompt, (a, b)), (prompt, (b, a))] if a != b else [])
        return found

    def keys(self, asks: Iterable[Ask]) -> dict[str, Ask]:
        """The questions by what names them: the judge, the prompt and the images' contents."""
        contents, judge = self.distinct.contents.to_pylist(), digest(self.judge.asks)
        named: dict[str, Ask] = {}
        for prompt, rows in asks:
            text = prompt.encode("utf-8", "surrogatepass")
            named[digest(judge, text, *(contents[row] for row in rows))] = prompt, rows
        return named

    @contextmanager
    def questions(self, named: dict[str, Ask]) -> Iterator[dict[str, Question]]:
        """What the judge is given, as long as the block lasts; known answers read no image."""
        with closing(Answers(self.judge.folder)) as answers:
            known = answers.get(list(named))
        new = {key: ask for key, ask in named.items() if key not in known}
        rows = sorted({row for _, shown in new.values() for row in shown})
        with closing(Pictures(self.images, rows, **self.how)) as pictures:
            yield _questions(named, pictures)
            self.bad |= pictures.bad

    def __call__(self, asks: Iterable[Ask]) -> None:
        """Ask what was not asked before."""
        named = self.keys(ask for ask in asks if ask not in self.said)
        if is_elsewhere(self.executor, self.ledger):
            named = self._asked_elsewhere(named, self.executor)
        with self.questions(named) as questions:
            found = self.judge.ask(questions)
        self.said |= {named[key]: judgement for key, judgement in found.items()}

    def _asked_elsewhere(self, named: dict[str, Ask], executor: Executor) -> dict[str, Ask]:
        """Have workers ask; what has an answer now."""

        def prepare(part: list[str]) -> tuple[dict[str, Ask], list[int], Images]:
            asks = {key: named[key] for key in part}
            rows = sorted({row for _, shown in asks.values() for row in shown})
            return asks, rows, self.images.take(np.array(rows, np.int64))

        ask = AskElsewhere(self.judge, {**self.how, "folder": None})
        known, tables = ask_elsewhere(self.judge, list(named), ask, prepare, self.ledger, executor)
        for table in tables:
            told = (table.schema.metadata or {}).get(BAD, b"{}")
            self.bad |= {int(row): why for row, why in json.loads(told).items()}
        return {key: ask for key, ask in named.items() if key in known}

    def value(self, ask: Ask) -> float:
        """What was said; NaN for nothing."""
        return self.said[ask].value if ask in self.said else float("nan")

    def unanswered(self, asks: Iterable[Ask]) -> int:
        """How many different questions have no answer though their images could be read."""
        left = {ask for ask in asks if ask not in self.said}
        return sum(not set(rows) & set(self.bad) for _, rows in left)


@dataclass(frozen=True)
class AskElsewhere:
    """Asks a judge in a worker, which reads the images itself."""

    judge: VLMJudge
    how: dict[str, Any]

    def __call__(self, given: tuple[int, tuple[dict[str, Ask], list[int], Images]]) -> pa.Table:
        """`fifa.scoring.elsewhere.ANSWERED`, with `BAD` in the table's metadata."""
        known, (asks, rows, images) = given
        place = {row: i for i, row in enumerate(rows)}
        named = {key: (p, tuple(place[r] for r in shown)) for key, (p, shown) in asks.items()}
        with closing(Pictures(images, range(len(rows)), **self.how)) as pictures:
            table = answered(self.judge, (known, _questions(named, pictures)))
            bad = {rows[row]: why for row, why in pictures.bad.items()}
        return table.replace_schema_metadata({BAD: json.dumps(bad)})


def _questions(named: dict[str, Ask], pictures: Pictures) -> dict[str, Question]:
    return {
        key: Question(prompt, partial(pictures.urls, rows)) for key, (prompt, rows) in named.items()
    }


def _ask_within(
    budget: int | float, asking: Asking, asks: Sequence[list[Ask]], order: Integers
) -> Integers:
    """Ask about as many pairs as a budget allows; the rows of those, in ``order``.

    Tokens are counted after every round of questions, and the next round is as many pairs as
    would take what is left if they took what pairs took so far.
    """
    if isinstance(budget, float):
        rows = order[: math.ceil(budget * len(order))]
        asking([ask for row in rows for ask in asks[row]])
        return rows
    spent, at, step = 0, 0, FIRST
    while at < len(order) and step >= 1:
        part = [ask for row in order[at : at + step] for ask in asks[row]]
        asking(part)
        spent += sum(asking.said[ask].tokens for ask in part if ask in asking.said)
        at = min(at + step, len(order))
        if not spent:
            raise FifaError(
                "the server does not count tokens, so a budget of tokens means nothing",
                where=f"{asking.judge.model} at {asking.judge.public_url}",
                do="give a share of the pairs: --budget 20%",
            )
        step = int((budget - spent) * at / spent)
    return order[:at]


def _table(
    pairs: Pairs, judge: VLMJudge, asking: Asking, asks: Sequence[list[Ask]], rows: Integers
) -> tuple[pa.Table, dict[str, Any]]:
    """The scores of some rows, the others NaN, and what there is to say of them."""
    n, two = len(pairs), judge.shown == 2
    values = np.full((n, 2), np.nan, np.float32)
    aspects: dict[str, Numbers] = {}
    for row in rows.tolist():
        both = [asking.said.get(ask) for ask in asks[row]]
        if not both:
            values[row] = 0
        for place, said in enumerate(both):
            if said is None:
                continue
            # d_2 is said of the other image
            values[row, place] = -said.value if two and place else said.value
            for name, share in said.aspects.items():
                column = aspects.setdefault(name, np.full((n, 2), np.nan, np.float32))
                column[row, place] = 1 - share if two and place else share
    d = values.mean(1)
    rewards = [d / 2, -d / 2] if two else [values[:, 0], values[:, 1]]
    columns = {"reward_0": rewards[0], "reward_1": rewards[1]}
    if two:
        columns |= {"shown_first": values[:, 0], "shown_second": values[:, 1]}
        columns |= {name: shares.mean(1) for name, shares in sorted(aspects.items())}
    else:
        sides = [(f"{name}_{i}", column[:, i]) for name, column in aspects.items() for i in (0, 1)]
        columns |= dict(sorted(sides))
    asked = [ask for row in rows.tolist() for ask in asks[row]]
    answers = [asking.said[ask] for ask in dict.fromkeys(asked) if ask in asking.said]
    facts: dict[str, Any] = {
        "pairs": len(rows),
        "questions": len(set(asked)),
        "unanswered": asking.unanswered(asked),
        "measured": sum(one.measured for one in answers),
        "tokens": sum(one.tokens for one in answers),
    }
    if two:
        first, second = values[:, 0], values[:, 1]
        known = np.isfinite(first) & np.isfinite(second)
        turned = known & (np.sign(first) != np.sign(second))
        facts["orders"] = {
            "pairs": int(known.sum()),
            "turned": int(turned.sum()),
            "to_first": int((turned & (first >= second)).sum()),
        }
    ids = pairs.table["pair_id"].combine_chunks()
    return pa.table({"pair_id": ids, **{name: pa.array(c) for name, c in columns.items()}}), facts


def _cascade(
    table: pa.Table, cheaper: Numbers, label: Numbers, rows: Integers
) -> tuple[pa.Table, dict[str, Any]]:
    """The judge's d where it has one, and the cheaper d elsewhere, both as log-odds."""
    own = table["reward_0"].to_numpy() - table["reward_1"].to_numpy()
    before = (cheaper / fit_temperature(cheaper, label)).astype(np.float32)
    judged = np.zeros(len(own), bool)
    judged[rows] = np.isfinite(own[rows])
    after = np.where(judged, own / fit_temperature(own, label), before).astype(np.float32)
    for i, reward in ((1, after / 2), (2, -after / 2)):
        table = table.set_column(i, table.schema.names[i], pa.array(reward, pa.float32()))
    both = judged & np.isfinite(before)
    return table.append_column("judged", pa.array(judged)), {
        "pairs": len(own),
        "asked": len(rows),
        "judged": int(judged.sum()),
        "changed": int((np.sign(before[both]) != np.sign(after[both])).sum()),
        "cheaper": accuracy(before[both], label[both]),
        "judge": accuracy(after[both], label[both]),
    }


def findings(facts: dict[str, Any]) -> list[str]:
    """What a table's facts say of its judge, a sentence each: for people."""
    found = []
    orders, cascade = facts.get("orders") or {"pairs": 0}, facts.get("cascade")
    if pairs := orders["pairs"]:
        turned = orders["turned"]
        found.append(
            f"in {turned:,} of {pairs:,} pairs ({turned / pairs:.1%}) the winner turned with the "
            "order of the images" + _position_bias(turned, orders["to_first"])
        )
    if facts.get("unanswered"):
        found.append(f"{facts['unanswered']:,} of {facts['questions']:,} questions have no answer")
    measured, answered = facts.get("measured", 0), facts.get("questions", 0)
    if 0 < measured < answered - facts["unanswered"]:
        found.append(f"log-probabilities came with {measured:,} of {answered:,} answers")
    if cascade:
        found.append(
            f"asked about {cascade['asked']:,} of {cascade['pairs']:,} pairs, those that the "
            f"others were least sure of ({facts['tokens']:,} tokens); {cascade['changed']:,} "
            f"winners changed; agreement with the labels there: {cascade['cheaper']:.1%} before, "
            f"{cascade['judge']:.1%} after"
        )
    return found


def _position_bias(turned: int, first: int) -> str:
    """The end of a sentence on the pairs whose winner turned with the order.

    Without a preference for a place one half of them would go to the image shown first: where a
    95 % interval excludes that, there is one.
    """
    low, high = wilson(first, turned)
    if not turned or low <= 0.5 <= high:
        return ""
    place, count = ("first", first) if low > 0.5 else ("second", turned - first)
    return f"; position bias: {count:,} of these went to the image shown {place}"


def _say(judge: VLMJudge, facts: dict[str, Any]) -> None:
    for finding in findings(facts):
        echo(f"judge {judge.model}: {finding}")
    if "orders" in facts:
        note(pairs_turned=facts["orders"]["turned"])
    if "cascade" in facts:
        note(pairs_asked=facts["cascade"]["asked"], winners_changed=facts["cascade"]["changed"])


def _facts(judge: VLMJudge) -> dict[str, Any]:
    return {"scorer": judge.name, "scale": judge.scale, "identity": judge.identity}


def _forget_unanswered(path: Path | None) -> None:
    """Remove a table with questions that were not answered: the others' answers are kept."""
    if path is None or not path.exists():
        return
    with suppress(DamagedError):  # then it is made again as a whole
        table = read_table(path)
        if unanswered := score_facts(table).get("unanswered"):
            echo(f"asking again {unanswered:,} questions that were not answered before")
            path.unlink()
