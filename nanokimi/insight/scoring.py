"""Log-probabilities of given tokens, on which bits per byte, multiple choice and the harness rest; bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import RunError
from nanokimi.insight.text import Part
from nanokimi.model.transformer import Transformer
from nanokimi.ops.products import at_least_fp32

# B batch, T sequence, D model width, S scored positions of a batch

SORTED_BATCHES = 32  # read ahead and sorted, so that a batch holds windows of about one length
MOST_LOGITS = 1 << 25  # at a time: S is cut so that [S, vocab] stays below


class Window(NamedTuple):
    """Tokens that fit the model: inputs are all but the last, and the last ``scored`` of them are predicted."""

    tokens: list[int]
    scored: int


class Score(NamedTuple):
    """Log-probability in nats, and whether each token was the most likely one at its place."""

    log_prob: float
    greedy: bool


class Scoring(NamedTuple):
    """How windows are run through a model."""

    batch_size: int = 8  # windows of a forward pass; no score depends on it except for rounding
    precision: AbstractContextManager[object] | None = None  # an autocast context for the forward passes


def windows(
    chunks: Iterable[tuple[Sequence[int], bool]], prefix: Sequence[int], *, context: int, stride: int = 0
) -> Iterator[Window]:
    """Cuts rows of tokens of any length so that every token is predicted exactly once, in bounded memory.

    Windows do not overlap, except that the last one of a row looks back so that it is full: what
    ``lm_eval.utils.get_rolling_token_windows`` does with a ``context_len`` of 1.

    Args:
        chunks: stretches of tokens in their order, and for each whether it ends a row.
        prefix: what stands before every row, not scored; one that is too long is cut at its left.
        context: most inputs of a window.
        stride: tokens predicted by every window of a row except the first, 1 to ``context``: a smaller one sees more
            of what came before (their ``context_len`` is ``context - stride + 1``); 0 takes ``context``.
    """
    row, at, room = list(prefix), len(prefix), context
    for tokens, ends_row in chunks:
        row += tokens
        while len(row) - at >= room or (ends_row and at < len(row)):
            end = min(at + room, len(row))
            yield Window(row[max(0, end - 1 - context) : end], end - at)
            at, room = end, stride or context
        done = max(0, at - context)
        del row[:done]
        at -= done
        if ends_row:
            row, at, room = list(prefix), len(prefix), context


def score(model: Transformer, cut: Iterable[Window], scoring: Scoring) -> Iterator[Score]:
    """The score of each window, in their order.

    Args:
        model: in evaluation mode.

    Raises:
        RunError: the model's logits are not finite.
    """
    assert not model.training
    waiting = iter(cut)
    while group := list(islice(waiting, scoring.batch_size * SORTED_BATCHES)):
        # The longest first: if memory is too small for a batch, this shows at once.
        order = sorted(range(len(group)), key=lambda number: -len(group[number].tokens))
        scores: dict[int, Score] = {}
        for start in range(0, len(order), scoring.batch_size):
            chosen = order[start : start + scoring.batch_size]
            with scoring.precision or nullcontext():
                scores.update(zip(chosen, _score_batch(model, [group[number] for number in chosen]), strict=True))
        yield from (scores[number] for number in range(len(group)))


def score_rows(
    model: Transformer, rows: Iterable[tuple[Sequence[int], Sequence[int]]], scoring: Scoring
) -> Iterator[Score]:
    """The score of each row, a prefix and the tokens after it, in their order; a row without tokens scores 0.

    Tokens that do not fit the context after their prefix are scored in several windows.
    """
    context = model.config.max_seq_length
    cut = [list(windows([(tokens, True)], prefix, context=context)) for prefix, tokens in rows]
    scores = score(model, chain.from_iterable(cut), scoring)
    for row in cut:
        parts = list(islice(scores, len(row)))
        yield Score(sum(part.log_prob for part in parts), all(part.greedy for part in parts))


@torch.inference_mode()
def _score_batch(model: Transformer, batch: Sequence[Window]) -> list[Score]:
    """Scores some windows together, padded at their right, which no earlier position sees."""
    device = model.embed.weight.device
    rows = pad_sequence([torch.tensor(window.tokens) for window in batch], batch_first=True)  # [B, T + 1]
    chosen = torch.zeros(len(batch), rows.shape[1] - 1, dtype=torch.bool)
    for is_scored, window in zip(chosen, batch, strict=True):
        end = len(window.tokens) - 1
        is_scored[end - window.scored : end] = True
    rows, chosen = rows.to(device), chosen.to(device)
    hidden, labels = model.hidden_states(rows[:, :-1])[chosen], rows[:, 1:][chosen]  # [S, D], [S]
    log_probs, hits = [], []
    size = max(1, MOST_LOGITS // model.config.vocab_size)
    for part, label in zip(hidden.split(size), labels.split(size), strict=True):
        logits = at_least_fp32(model.head(part))
        log_probs.append(logits.gather(1, label[:, None])[:, 0] - logits.logsumexp(dim=1))
        hits.append(logits.argmax(dim=1) == label)
    counts = [window.scored for window in batch]
    sums = [float(part.sum()) for part in torch.cat(log_probs).cpu().double().split(counts)]
    if not all(map(math.isfinite, sums)):
        raise RunError("the model's logits are not finite: its weights are damaged, try an earlier checkpoint")
    greedy = [bool(part.all()) for part in torch.cat(hits).cpu().split(counts)]
    return list(map(Score, sums, greedy))


# ---- whole documents ----------------------------------------------------------------------------


@dataclass
class TextScore:
    """What it costs to predict a text."""

    nats: float = 0.0  # minus the log-probability of all of it
    documents: int = 0  # with text
    empty: int = 0  # documents without
    tokens: int = 0
    n_bytes: int = 0  # in UTF-8
    windows: int = 0  # stretches of at most a context in which it was scored

    @property
    def bits_per_byte(self) -> float:
        """The measure that does not depend on the tokenizer."""
        return self.nats / math.log(2) / max(1, self.n_bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """Per token; infinite where no float holds it."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def score_text(
    model: Transformer,
    tokenizer: Tokenizer,
    parts: Iterable[Part],
    scoring: Scoring,
    *,
    stride: int = 0,
    max_tokens: int = 0,
) -> TextScore:
    """Scores documents, as lm-evaluation-harness defines bits per byte; memory does not grow with the text.

    Every document is scored by itself: it stands after the token that begins a text (the end of text, where a tokenizer
    has no such token), which is not scored, and the end of text after it is not scored either.
    ``training.step.evaluate`` measures something else, faster and while it trains: packed sequences, in which a
    document sees the ones before it and its end of text counts.

    Args:
        model: in evaluation mode.
        stride: see ``windows``.
        max_tokens: scores only the first so many tokens; 0 takes all.
    """
    found = TextScore()
    counted = _counted(parts, found, tokenizer, max_tokens)
    cut = windows(counted, [tokenizer.bos_id], context=model.config.max_seq_length, stride=stride)
    for window_score in score(model, cut, scoring):
        found.nats -= window_score.log_prob
        found.windows += 1
    return found


def _counted(
    parts: Iterable[Part], found: TextScore, tokenizer: Tokenizer, max_tokens: int
) -> Iterator[tuple[list[int], bool]]:
    """Tokens, the first ``max_tokens`` of them, and whether a document ends with them; adds up what passes."""
    has_text = False
    for tokens, n_bytes, ends_document in parts:
        excess = found.tokens + len(tokens) - max_tokens if max_tokens else -1
        is_last = excess >= 0
        if excess > 0:
            tokens = tokens[:-excess]
            n_bytes = tokenizer.count_bytes(torch.tensor(tokens))
        found.tokens += len(tokens)
        found.n_bytes += n_bytes
        has_text = has_text or bool(tokens)
        if ends_document or is_last:
            found.documents += has_text
            found.empty += not has_text
            has_text = False
        yield tokens, ends_document or is_last
        if is_last:
            return
