"""What choices look like in OpenAI's two interfaces, whole and in chunks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from nanokimi.data.tokenizer import Tokenizer
from nanokimi.inference.engine import Token

LOWEST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's stand-in


class Shape(Protocol):
    """One of the two interfaces. ``opening``, ``delta`` and ``last`` are fields of a chunk's choice, as JSON."""

    prefix: str  # of ids
    kind: str
    chunk_kind: str
    opening: str  # of the first chunk; empty if there need not be one
    last: str

    def delta(self, text: str) -> str:
        """More text."""

    def whole(self, text: str) -> dict[str, Any]:
        """All text."""

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The log-probabilities of ``tokens``."""


class CompletionShape:
    """``/v1/completions``."""

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"
    opening, last = "", '"text":""'

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._piece = tokenizer.piece

    def delta(self, text: str) -> str:
        """See ``Shape``."""
        return f'"text":{json.dumps(text)}'

    def whole(self, text: str) -> dict[str, Any]:
        """See ``Shape``."""
        return {"text": text}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """See ``Shape``; ``text_offset`` counts from the start of the continuation."""
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [_asked(token.logprob) for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
            "text_offset": [token.text_offset for token in tokens],
        }

    def _likeliest(self, token: Token) -> dict[str, float]:
        """Log-probabilities by text, with the token's own; of several tokens with the same text the likeliest."""
        found: dict[str, float] = {}
        for alternative, logprob in (*token.likeliest, (token.id, token.logprob)):
            found.setdefault(self._name(alternative), _asked(logprob))
        return found

    def _name(self, token: int) -> str:
        """Its text; bytes that are no whole characters are spelt out, as OpenAI's completions do."""
        piece = self._piece(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class ChatShape:
    """``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    opening, last = '"delta":{"role":"assistant","content":""}', '"delta":{}'

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._piece = tokenizer.piece

    def delta(self, text: str) -> str:
        """See ``Shape``."""
        return f'"delta":{{"content":{json.dumps(text)}}}'

    def whole(self, text: str) -> dict[str, Any]:
        """See ``Shape``."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """See ``Shape``; ``bytes`` are exact where ``token`` cannot be."""
        content = [
            {**self._entry(token.id, token.logprob), "top_logprobs": [self._entry(*one) for one in token.likeliest]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        piece = self._piece(token)
        return {"token": piece.decode("utf-8", "replace"), "logprob": _asked(logprob), "bytes": list(piece)}


def finite(logprob: float) -> float:
    """``logprob``, which JSON can always hold."""
    return max(logprob, LOWEST_LOGPROB)


def _asked(logprob: float | None) -> float:
    assert logprob is not None, "the request did not ask for log-probabilities"
    return finite(logprob)
