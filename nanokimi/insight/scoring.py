"""Log-probabilities of given tokens, on which bits per byte, multiple choice and the harness rest; bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

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
    """How windows are run through a model.

    Attributes:
        batch_size: windows of a forward pass; no score depends on it but for rounding.
        precision: an autocast context for the forward passes.
    """

    batch_size: int = 8
    precision: AbstractContextManager[object] | None = None


def windows(
    chunks: Iterable[tuple[Sequence[int], bool]], prefix: Sequence[int], *, context: int, stride: int = 0
) -> Iterator[Window]:
    """Cuts rows of tokens of any length so that every token is predicted exactly once, in bounded memory.

    Windows do not overlap but for the last one of a row, which looks back so that it is full: what
    ``lm_eval.utils.get_rolling_token_windows`` does with a ``context_len`` of 1.

    Args:
        chunks: stretches of tokens in their order, and for each whether it ends a row.
        prefix: what stands in front of every row, not scored; one that is too long is cut at its left.
        context: most inputs of a window.
        stride: tokens predicted by every window of a row but the first, 1 to ``context``: a smaller one sees more
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
    length = max(len(window.tokens) for window in batch)
    rows = torch.tensor([window.tokens + [0] * (length - len(window.tokens)) for window in batch])
    ends = torch.tensor([[len(window.tokens) - 1] for window in batch])
    starts = ends - torch.tensor([[window.scored] for window in batch])
    places = torch.arange(length - 1)
    device = model.embed.weight.device
    rows, chosen = rows.to(device), ((places >= starts) & (places < ends)).to(device)  # [B, T]
    hidden = model.hidden_states(rows[:, :-1])
    log_probs, hits = _read_off(model, hidden[chosen], rows[:, 1:][chosen])
    counts = [window.scored for window in batch]
    sums = [float(part.sum()) for part in log_probs.split(counts)]
    if not all(map(math.isfinite, sums)):
        raise RunError("the model's logits are not finite: its weights are damaged, try an earlier checkpoint")
    return [Score(total, bool(hit.all())) for total, hit in zip(sums, hits.split(counts), strict=True)]


def _read_off(model: Transformer, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability, in fp64, of ``labels`` ``[S]`` after ``hidden`` ``[S, D]``, and whether they are the likeliest.

    Both are on the CPU.
    """
    log_probs, hits = [], []
    size = max(1, MOST_LOGITS // model.config.vocab_size)
    for part, label in zip(hidden.split(size), labels.split(size), strict=True):
        logits = at_least_fp32(model.head(part))
        log_probs.append(logits.gather(1, label[:, None])[:, 0] - logits.logsumexp(dim=1))
        hits.append(logits.argmax(dim=1) == label)
    return torch.cat(log_probs).cpu().double(), torch.cat(hits).cpu()


# ---- whole documents ----------------------------------------------------------------------------


@dataclass
class TextScore:
    """What it costs to predict a text.

    Attributes:
        nats: minus the log-probability of all of it.
        documents: with text; ``empty`` ones are only counted.
        n_bytes: UTF-8 bytes.
        windows: stretches of at most a context in which it was scored.
    """

    nats: float = 0.0
    documents: int = 0
    empty: int = 0
    tokens: int = 0
    n_bytes: int = 0
    windows: int = 0

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

    Every document is scored by itself: it begins after an end-of-text token, which is not scored, and the end of text
    after it is not scored either. ``training.evaluation`` measures something else, faster and while it trains: packed
    sequences, in which a document sees the ones before it and its end of text counts.

    Args:
        model: in evaluation mode.
        stride: see ``windows``.
        max_tokens: scores only the first so many tokens; 0 takes all.
    """
    found = TextScore()
    counted = _counted(parts, found, tokenizer, max_tokens)
    cut = windows(counted, [tokenizer.eot_id], context=model.config.max_seq_length, stride=stride)
    for window_score in score(model, cut, scoring):
        found.nats -= window_score.log_prob
        found.windows += 1
    return found


def _counted(
    parts: Iterable[Part], found: TextScore, tokenizer: Tokenizer, max_tokens: int
) -> Iterator[tuple[list[int], bool]]:
    """Tokens, the first ``max_tokens`` of them, and whether a document ends with them; adds up what passes."""
    has_text = False
    for part in parts:
        room = max_tokens - found.tokens
        is_last = bool(max_tokens) and len(part.tokens) >= room
        if is_last:
            tokens = part.tokens[:room]
            n_bytes = part.n_bytes if len(tokens) == len(part.tokens) else tokenizer.count_bytes(torch.tensor(tokens))
            part = Part(tokens, n_bytes, True)
        found.tokens += len(part.tokens)
        found.n_bytes += part.n_bytes
        has_text = has_text or bool(part.tokens)
        if part.ends_document:
            found.documents += has_text
            found.empty += not has_text
            has_text = False
        yield part.tokens, part.ends_document
        if is_last:
            return
