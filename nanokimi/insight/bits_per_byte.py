"""Bits per byte and perplexity of whole documents, as lm-evaluation-harness defines them.

Every document is scored by itself: it begins behind an end of text, which is not scored, and the end of text behind it
is not scored either. ``training.evaluation`` measures something else, faster and while it trains: packed sequences, in
which a document sees the ones before it and its end of text counts. So the two figures differ a little.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.insight.eval_text import Part
from nanokimi.insight.likelihood import Scoring, score, windows
from nanokimi.model.transformer import Transformer


@dataclass
class TextScore:
    """What a text costs.

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
    """Scores documents; memory does not grow with the text.

    Args:
        model: in evaluation mode.
        stride: see ``windows``.
        max_tokens: end behind so many tokens; 0 takes all.
    """
    found = TextScore()
    counted = _counted(parts if not max_tokens else _first(parts, max_tokens, tokenizer), found)
    cut = windows(counted, [tokenizer.eot_id], context=model.config.max_seq_length, stride=stride)
    for part in score(model, cut, scoring):
        found.nats -= part.log_prob
        found.windows += 1
    return found


def _counted(parts: Iterable[Part], found: TextScore) -> Iterator[tuple[list[int], bool]]:
    """Tokens, and whether a document ends with them; adds up what passes."""
    has_text = False
    for part in parts:
        found.tokens += len(part.tokens)
        found.n_bytes += part.n_bytes
        has_text = has_text or bool(part.tokens)
        if part.ends_document:
            found.documents += has_text
            found.empty += not has_text
            has_text = False
        yield part.tokens, part.ends_document


def _first(parts: Iterable[Part], most: int, tokenizer: Tokenizer) -> Iterator[Part]:
    """The first ``most`` tokens."""
    for part in parts:
        if len(part.tokens) >= most:
            tokens = part.tokens[:most]
            whole = len(tokens) == len(part.tokens)
            yield Part(tokens, part.n_bytes if whole else tokenizer.count_bytes(torch.tensor(tokens)), True)
            return
        most -= len(part.tokens)
        yield part
