"""From token ids to text that is settled: whole characters, and no part of what may become a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from nanokimi.data.tokenizer import TextStream, Tokenizer
from nanokimi.inference.sampling import Report


class Token(NamedTuple):
    """One token of a continuation.

    Attributes:
        id: its number in the vocabulary.
        text_offset: characters of the continuation in front of the place where its bytes begin.
        logprob: natural logarithm of its probability as the model sees it, before temperature and filters; None
            unless it was asked for.
        likeliest: id and log-probability of the likeliest tokens in its place, best first, as many as were asked for.
    """

    id: int
    text_offset: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """Text that is settled, and the tokens that became settled with it."""

    text: str
    tokens: tuple[Token, ...]


class TextAssembly:
    """The text of one continuation, token by token.

    A token is settled when the text up to its last byte is. Those whose text begins at a stop string or behind it
    are dropped with it.

    Args:
        tokenizer: None for ids without text; every token is settled at once.
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._stop = stop
        self._held = ""  # decoded and not taken yet
        self._taken = 0  # characters
        self._tokens: deque[tuple[int, Token]] = deque()  # not taken yet, each with the place where its text ends
        self.ended = False

    def push(self, token: int, report: Report | None = None) -> bool:
        """Adds a token; True when a stop string is complete, which ends the text."""
        offset = end = self._taken + len(self._held)
        if self._stream is not None:
            text = self._stream.push(token)
            self._held += text
            end += len(text) + self._stream.pending
        self._tokens.append((end, Token(token, offset) if report is None else Token(token, offset, *report)))
        stop_start = _stop_start(self._held, self._stop) if self._stop else None
        if stop_start is not None:
            self._cut(stop_start)
        return self.ended

    def end(self) -> None:
        """Nothing more comes: what was held back is settled, less an incomplete character."""
        self.ended = True

    def take(self) -> Piece | None:
        """All that has become settled since the last call, or None."""
        ready = len(self._held) - (0 if self.ended else _undecided(self._held, self._stop))
        text, self._held = self._held[:ready], self._held[ready:]
        self._taken += ready
        tokens = []
        while self._tokens and (self.ended or self._tokens[0][0] <= self._taken):
            tokens.append(self._tokens.popleft()[1])
        return Piece(text, tuple(tokens)) if text or tokens else None

    def _cut(self, length: int) -> None:
        self._held = self._held[:length]
        end = self._taken + length
        while self._tokens and self._tokens[-1][1].text_offset >= end:
            self._tokens.pop()
        self.ended = True


def _stop_start(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first, and of several complete at once the longest.

    Going by the end makes the cut independent of how the text was split into tokens.
    """
    found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    return min(found)[1] if found else None


def _undecided(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of ``text`` with which some stop string begins."""
    lengths = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return max(lengths, default=0)
