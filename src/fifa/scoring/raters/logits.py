"""A causal language model read by its logits: one forward pass a prompt gives everything.

The pass sees ``[start][prompt][end][question 1][question 2][question 3]``. The start's keys
and values are computed once and shared. The questions do not see each other (a tree-shaped
attention mask), so each is answered as if it were asked alone; the prompt's own logits, which the
pass has anyway, give its negative log-likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fifa.console import note
from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.models.transformer import length_batches
from fifa.scoring.rubric import QUALITIES, load_rubric, shortened

Numbers = npt.NDArray[np.float32]

LONGEST = 256  # tokens of a prompt that are read; the text encoders in use read 77 to 512
TOKENS = 2048  # tokens of a batch, padding included
ROWS = 64  # prompts of a batch: each holds its own copy of the start's keys and values


@dataclass(frozen=True)
class Reading:
    """What one pass says about every prompt.

    Parameters
    ----------
    grades
        Expected grade over the digits 1 to 5, float32 [n, 3], as in `QUALITIES`.
    nats
        Negative log-likelihood of the prompt after the start, float32 [n].
    units
        UTF-8 bytes that ``nats`` is over, float32 [n].
    """

    grades: Numbers
    nats: Numbers
    units: Numbers


class LogitReader:
    """A causal language model and the rubric's completion, ready to read prompts.

    Parameters
    ----------
    model, tokenizer
        A transformers causal language model and a `tokenizers.Tokenizer`.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.torch = require("torch")
        self.model, self.tokenizer = model, tokenizer
        self.device = model.device
        texts = load_rubric().completion
        self.start, self.end = self._ids(texts["start"]), self._ids(texts["end"])
        asked = [_digit_tokens(self._ids, texts[quality]) for quality in QUALITIES]
        self.questions = [question for question, _ in asked]
        self.digits = self.torch.tensor([digits for _, digits in asked], device=self.device)
        self.tail = len(self.end) + sum(map(len, self.questions))
        with self.torch.inference_mode():
            ids = self.torch.tensor([self.start], device=self.device)
            out = model.base_model(ids, use_cache=True)
            self.keys_values = [(x.keys, x.values) for x in out.past_key_values.layers]
            # The state that predicts a prompt's first token.
            self.last = out.last_hidden_state[0, -1:]

    def read(self, prompts: Sequence[str]) -> Reading:
        """Read ``prompts``; a prompt's numbers depend on its batch only by rounding."""
        texts = [shortened(prompt) for prompt in prompts]
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [encoding.ids[:LONGEST] for encoding in encoded]
        units = np.array(
            [
                len((text if len(e.ids) <= LONGEST else self.tokenizer.decode(row)).encode())
                for text, e, row in zip(texts, encoded, ids, strict=True)
            ],
            np.float32,
        )
        grades = np.empty((len(prompts), len(QUALITIES)), np.float32)
        nats = np.empty(len(prompts), np.float32)
        widths = [len(row) + self.tail for row in ids]
        for batch in length_batches(widths, TOKENS, ROWS):
            grades[batch], nats[batch] = self._pass([ids[row] for row in batch])
        note(tokens_read=sum(map(len, ids)) + self.tail * len(ids))
        return Reading(grades, nats, np.maximum(units, 1))

    def _pass(self, ids: list[list[int]]) -> tuple[Numbers, Numbers]:
        torch = self.torch
        tokens, positions, mask = self._tree(ids)
        with torch.inference_mode():
            hidden = self.model.base_model(
                tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._shared(len(ids)),
                use_cache=True,
            ).last_hidden_state
            states, targets, owner = self._own_tokens(hidden, ids)
            nll = self._nll(states, targets)
            nats = torch.zeros(len(ids), device=self.device).index_add_(0, owner, nll)
            # The last token of question q of row b is where its digit is read.
            lasts = len(self.end) + np.cumsum([len(question) for question in self.questions]) - 1
            at = torch.tensor(np.add.outer([len(row) for row in ids], lasts), device=self.device)
            read = hidden[torch.arange(len(ids), device=self.device)[:, None], at]
            head = self.model.get_output_embeddings().weight
            # E[grade] = sum_g g p(g), p the softmax over the five digits' logits alone
            logits = torch.einsum("bqd,qgd->bqg", read.float(), head[self.digits].float())
            grade = torch.arange(1.0, 6.0, device=self.device)
            grades = (logits.softmax(-1) * grade).sum(-1)
        return grades.cpu().numpy(), nats.cpu().numpy()

    def _tree(self, ids: list[list[int]]) -> tuple[Any, Any, Any]:
        """Tokens, positions and additive mask [b, 1, t, start + t] of a batch."""
        torch = self.torch
        start, width = len(self.start), max(map(len, ids)) + self.tail
        tokens = np.zeros((len(ids), width), np.int64)
        positions = np.zeros((len(ids), width), np.int64)
        # branch: 0 for the prompt, 1.. for the questions, -1 for padding
        branch = np.full((len(ids), width), -1, np.int8)
        for b, row in enumerate(ids):
            filled = stem = len(row) + len(self.end)
            tokens[b, :filled], branch[b, :filled] = row + self.end, 0
            positions[b, :filled] = start + np.arange(filled)
            for q, question in enumerate(self.questions, start=1):
                part = slice(filled, filled + len(question))
                tokens[b, part], branch[b, part] = question, q
                positions[b, part] = start + stem + np.arange(len(question))
                filled = part.stop
        # A token sees the start, and of what is before it the prompt and its own question.
        kin = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        seen = np.concatenate(
            [np.ones((len(ids), width, start), bool), kin & np.tri(width, dtype=bool)], axis=2
        )
        dtype = self.model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=self.device)
        mask.masked_fill_(torch.from_numpy(~seen).to(self.device), torch.finfo(dtype).min)
        place = [torch.from_numpy(x).to(self.device) for x in (tokens, positions)]
        return *place, mask[:, None]

    def _shared(self, rows: int) -> Any:
        """The start's keys and values, for ``rows`` prompts at once."""
        cache = require("transformers").DynamicCache()
        for layer, (keys, values) in enumerate(self.keys_values):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache

    def _own_tokens(self, hidden: Any, ids: list[list[int]]) -> tuple[Any, Any, Any]:
        """States that predict the prompts' own tokens, those tokens, and whose they are."""
        torch = self.torch
        states = [torch.cat([self.last, hidden[b, : len(r) - 1]]) for b, r in enumerate(ids) if r]
        targets = torch.tensor([t for row in ids for t in row], device=self.device).long()
        owner = [b for b, row in enumerate(ids) for _ in row]
        states = torch.cat(states) if states else hidden[:0, 0]
        return states, targets, torch.tensor(owner, device=self.device).long()

    def _nll(self, states: Any, targets: Any) -> Any:
        # -log p(token) = logsumexp(logits) - logit[token], a few rows at a time: the logits of
        # a vocabulary of 49,152 then stay in the processor's cache (3x faster, measured).
        head, torch = self.model.get_output_embeddings(), self.torch
        parts = []
        for some, wanted in zip(states.split(128), targets.split(128), strict=True):
            logits = head(some).float()
            parts.append(logits.logsumexp(-1) - logits.gather(1, wanted[:, None])[:, 0])
        return torch.cat(parts) if parts else torch.zeros(0, device=self.device)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def _digit_tokens(ids: Any, question: str) -> tuple[list[int], list[int]]:
    """The question's tokens and those of the five digits after it.

    Some vocabularies have the space as a token before the digit, others one token for both.
    """
    for asked, digits in ((question, "12345"), (question.rstrip(" "), [f" {d}" for d in "12345"])):
        before = ids(asked)
        after = [ids(asked + digit) for digit in digits]
        last = [row[-1] for row in after]
        if all(row[:-1] == before for row in after) and len(set(last)) == 5:
            return before, last
    raise FifaError(
        "the language model's vocabulary has no single tokens for the digits 1 to 5",
        do="choose another, or serve it and rate with openai:MODEL@URL",
    )
