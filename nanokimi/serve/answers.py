"""From what the engine writes to answers: one JSON object, or server-sent events as the text comes."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, ClassVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nanokimi.inference.engine import GenerationArguments, Token
from nanokimi.serve.api import ApiError, ChatBody, CompletionBody, Served
from nanokimi.serve.worker import Update, Worker, merged

LAST_WORDS = 5.0  # seconds that a client has to take the rest of an answer whose time is over
EVENTS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy may hold events back
LOWEST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's stand-in


class Answer(ABC):
    """The answer to one HTTP request; its subclasses know the fields of OpenAI's two interfaces.

    Attributes:
        job: what the engine writes for it; whoever makes an answer calls ``whole`` or sends its ``events``.
        prompt_tokens: of every prompt once, whatever ``n`` is.

    Raises:
        ApiError: see ``Worker.submit``.
    """

    id_prefix: str
    kind: str
    chunk_kind: str
    opening: ClassVar[dict[str, Any]] = {}  # fields of a choice in a chunk before all text, if there must be one

    def __init__(
        self, worker: Worker, served: Served, body: CompletionBody | ChatBody, requests: Sequence[GenerationArguments]
    ) -> None:
        self.worker, self.job, self._body = worker, worker.submit(requests), body
        self.prompt_tokens = sum(len(request.prompt) for request in requests[:: body.n or 1])
        self._tokens = 0
        self._bytes_of = served.tokenizer.token_bytes
        self._head = {"id": self.id_prefix + secrets.token_hex(12), "created": int(time.time()), "model": served.name}
        self._chunk = {**self._head, "object": self.chunk_kind}
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)

    @abstractmethod
    def fields(self, text: str | None, *, whole: bool = False) -> dict[str, Any]:
        """The fields of a choice that hold more text, or the whole text; None in the last chunk."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The log-probabilities of ``tokens``."""

    async def whole(self, receive: Receive) -> dict[str, Any]:
        """Waits for the end.

        Raises:
            ApiError: it was broken off, or the client has left.
        """
        updates: list[Update] = []
        watch = asyncio.ensure_future(self._watch(receive))
        try:
            while news := await self.job.news():
                updates += news
        finally:
            watch.cancel()
            self.worker.close(self.job)
        choices = []
        for choice, text, tokens, end in sorted(merged(updates)):
            assert end is not None
            self._tokens += end.tokens
            fields = self.fields(text, whole=True)
            choices.append(self._choice(choice, fields, tokens, end.finish_reason, with_prompt=True))
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._usage()}

    async def _watch(self, receive: Receive) -> None:
        """Breaks the job off when the client leaves."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.job.fail(ApiError(499, "the client has left"))

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, those that are due together in one string; an error is the last one, without [DONE]."""
        try:
            if self.opening or self._body.return_token_ids:
                fields = self.opening or self.fields(None)
                yield self._events([self._choice(i, fields, with_prompt=True) for i in range(len(self.job.requests))])
            while news := await self.job.news():
                if events := self._events([choice for update in news for choice in self._choices(update)]):
                    yield events
        except ApiError as error:
            yield f"data: {error.json()}\n\n"
            return
        if self._include_usage:
            yield f"data: {json.dumps({**self._chunk, 'choices': [], 'usage': self._usage()})}\n\n"
        yield "data: [DONE]\n\n"

    def _events(self, choices: Sequence[dict[str, Any]]) -> str:
        usage = {"usage": None} if self._include_usage else {}
        return "".join(f"data: {json.dumps({**self._chunk, 'choices': [choice], **usage})}\n\n" for choice in choices)

    def _choices(self, update: Update) -> Iterator[dict[str, Any]]:
        """What is new as choices of chunks."""
        if update.text or update.tokens:
            yield self._choice(update.choice, self.fields(update.text), update.tokens or None)
        if update.end is not None:
            self._tokens += update.end.tokens
            yield self._choice(update.choice, self.fields(None), reason=update.end.finish_reason)

    def _choice(
        self,
        index: int,
        fields: dict[str, Any],
        tokens: Sequence[Token] | None = None,
        reason: str | None = None,
        *,
        with_prompt: bool = False,
    ) -> dict[str, Any]:
        request = self.job.requests[index]
        logprobs = None if tokens is None or request.logprobs is None else self.logprobs(tokens)
        choice = {"index": index, **fields, "logprobs": logprobs, "finish_reason": reason}
        if self._body.return_token_ids:
            if with_prompt:
                choice["prompt_token_ids"] = request.prompt
            choice["token_ids"] = [token.id for token in tokens or ()]
        return choice

    def _usage(self) -> dict[str, int]:
        prompt = self.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": self._tokens, "total_tokens": prompt + self._tokens}


class CompletionAnswer(Answer):
    """The answer of ``/v1/completions``."""

    id_prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def fields(self, text: str | None, *, whole: bool = False) -> dict[str, Any]:
        return {"text": text or ""}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """``text_offset`` counts from the start of the continuation."""
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
            "text_offset": [token.text_offset for token in tokens],
        }

    def _likeliest(self, token: Token) -> dict[str, float | None]:
        """Log-probabilities by text, with the token's own; of several tokens with the same text the likeliest."""
        found: dict[str, float | None] = {}
        for alternative, logprob in (*token.likeliest, (token.id, token.logprob)):
            found.setdefault(self._name(alternative), finite(logprob))
        return found

    def _name(self, token: int) -> str:
        """Its text; bytes that are no whole characters are spelt out, as OpenAI's completions do."""
        own = self._bytes_of(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


class ChatAnswer(Answer):
    """The answer of ``/v1/chat/completions``."""

    id_prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    opening: ClassVar[dict[str, Any]] = {"delta": {"role": "assistant", "content": ""}}

    def fields(self, text: str | None, *, whole: bool = False) -> dict[str, Any]:
        if whole:
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"delta": {} if text is None else {"content": text}}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """``bytes`` are exact where ``token`` cannot be."""
        content = [
            {**self._entry(token.id, token.logprob), "top_logprobs": [self._entry(*one) for one in token.likeliest]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        own = self._bytes_of(token)
        return {"token": own.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(own)}


class EventStream(StreamingResponse):
    """An answer as server-sent events."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.events(), headers=EVENTS, media_type="text/event-stream")
        self._worker, self._job = answer.worker, answer.job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until the client leaves; one that does not read makes ``send`` wait, and is given up."""
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._worker.max_seconds + LAST_WORDS)
        except asyncio.TimeoutError:
            pass
        finally:
            self._worker.close(self._job)


def finite(logprob: float | None) -> float | None:
    """``logprob``, which JSON can always hold; None, of a first token, stays."""
    return None if logprob is None else max(logprob, LOWEST_LOGPROB)
