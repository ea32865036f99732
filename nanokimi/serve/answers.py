"""From what the engine writes to answers: one JSON object, or server-sent events as the text comes."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nanokimi.inference.engine import GenerationArguments, TextChunk, Token
from nanokimi.serve.api import ApiError, Served
from nanokimi.serve.bodies import ChatBody, CompletionBody, StreamOptions
from nanokimi.serve.worker import Update, Worker

LAST_WORDS = 5.0  # seconds that a client has to take the rest of an answer whose time is over
EVENTS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy may hold events back
LOWEST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's stand-in
Json = dict[str, Any]


class Answer(ABC):
    """The answer to one request, submitted to ``worker``; subclasses know the fields of OpenAI's two interfaces.

    Whoever makes an answer calls ``whole`` or sends its ``events``.
    """

    id_prefix: str
    kind: str
    chunk_kind: str
    opening: ClassVar[Json] = {}  # fields of a choice in a chunk before all text, if there must be one

    def __init__(
        self, worker: Worker, served: Served, body: CompletionBody | ChatBody, arguments: Sequence[GenerationArguments]
    ) -> None:
        self.worker, self.job, self.body = worker, worker.submit(arguments), body
        self.prompt_tokens = sum(len(one.prompt) for one in arguments[:: body.n or 1])  # of every prompt once
        self._bytes_of = served.tokenizer.token_bytes
        self._head = {"id": self.id_prefix + secrets.token_hex(12), "created": int(time.time()), "model": served.name}
        asked = body.stream_options or StreamOptions()
        self._include_usage, self._counts_on = bool(asked.include_usage), bool(asked.continuous_usage_stats)
        self._written = 0  # tokens in the events so far

    @abstractmethod
    def fields(self, text: str | None, *, whole: bool = False) -> Json:
        """The fields of a choice that hold more text, or the whole text; None in the last chunk."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[Token]) -> Json:
        """The log-probabilities of ``tokens``."""

    def prompt_of(self, choice: int) -> TextChunk:
        """What the text of a choice begins with before the model has written any of it."""
        return TextChunk("", ())

    async def whole(self, receive: Receive) -> Json:
        """Waits for the end; ApiError if it was broken off, or the client has left."""
        watch = asyncio.ensure_future(self._watch(receive))
        try:
            news = await self.job.news(whole=True)
        finally:
            watch.cancel()
            self.worker.close(self.job)
        joined = (self._after_prompt(one, whole=True) for one in sorted(news))
        choices = [self._choice(one, self.fields(one.text, whole=True), whole=True) for one in joined]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._usage(self.job.tokens)}

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.job.fail(ApiError(499, "the client has left"))

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, those that are due together in one string; an error is the last one, without [DONE]."""
        try:
            starts = [Update(i, *self.prompt_of(i)) for i in range(len(self.job.arguments))]
            if self.opening or self.body.return_token_ids or any(start.tokens for start in starts):
                choices = [self._choice(one, self.opening or self.fields(one.text), prompt=True) for one in starts]
                yield "".join(self._event([choice]) for choice in choices)
            while news := await self.job.news():
                if events := "".join(event for update in news for event in self._events(update)):
                    yield events
        except ApiError as error:
            yield f"data: {error.body}\n\n"
            return
        if self._include_usage:
            yield self._event([], self._usage(self.job.tokens))
        yield "data: [DONE]\n\n"

    def _after_prompt(self, update: Update, *, whole: bool = False) -> Update:
        """``update`` with offsets from the start of the whole text, and for the ``whole`` with the prompt."""
        text, tokens = self.prompt_of(update.choice)
        moved = tuple(one._replace(text_offset=one.text_offset + len(text)) for one in update.tokens)
        return (
            update._replace(text=text + update.text, tokens=tokens + moved) if whole else update._replace(tokens=moved)
        )

    def _events(self, update: Update) -> Iterator[str]:
        update = self._after_prompt(update)
        self._written += len(update.tokens)
        if update.text or update.tokens:
            yield self._event([self._choice(update._replace(end=None), self.fields(update.text))])
        if update.end is not None:
            yield self._event([self._choice(Update(update.choice, end=update.end), self.fields(None))])

    def _event(self, choices: Sequence[Json], usage: Json | None = None) -> str:
        chunk = {**self._head, "object": self.chunk_kind, "choices": choices}
        if self._counts_on and usage is None:
            usage = self._usage(self._written)
        if self._include_usage or self._counts_on:
            chunk["usage"] = usage
        return f"data: {json.dumps(chunk)}\n\n"

    def _choice(self, update: Update, fields: Json, *, whole: bool = False, prompt: bool = False) -> Json:
        arguments = self.job.arguments[update.choice]
        logprobs = self.logprobs(update.tokens) if arguments.logprobs is not None and (whole or update.tokens) else None
        reason = None if update.end is None else update.end.finish_reason
        choice = {"index": update.choice, **fields, "logprobs": logprobs, "finish_reason": reason}
        if self.body.return_token_ids:
            if whole or prompt:
                choice["prompt_token_ids"] = arguments.prompt
            choice["token_ids"] = [token.id for token in update.tokens]
        return choice

    def _usage(self, written: int) -> Json:
        prompt = self.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


class CompletionAnswer(Answer):
    """The answer of ``/v1/completions``."""

    id_prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(
        self,
        worker: Worker,
        served: Served,
        body: CompletionBody,
        arguments: Sequence[GenerationArguments],
        echoes: Sequence[TextChunk] = (),
    ) -> None:
        """``echoes``: every prompt, if the answer is to begin with it."""
        super().__init__(worker, served, body, arguments)
        self._echoes = echoes

    def prompt_of(self, choice: int) -> TextChunk:
        return self._echoes[choice // (self.body.n or 1)] if self._echoes else super().prompt_of(choice)

    def fields(self, text: str | None, *, whole: bool = False) -> Json:
        return {"text": text or ""}

    def logprobs(self, tokens: Sequence[Token]) -> Json:
        """``text_offset`` counts from the start of the text; a first token of all has nothing before it."""
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
            "text_offset": [token.text_offset for token in tokens],
        }

    def _likeliest(self, token: Token) -> Json | None:
        """Log-probabilities by text, with the token's own; of several tokens with the same text the likeliest."""
        if token.logprob is None:
            return None
        found: Json = {}
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
    opening: ClassVar[Json] = {"delta": {"role": "assistant", "content": ""}}

    def fields(self, text: str | None, *, whole: bool = False) -> Json:
        if whole:
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"delta": {} if text is None else {"content": text}}

    def logprobs(self, tokens: Sequence[Token]) -> Json:
        """``bytes`` are exact where ``token`` cannot be."""
        content = [
            {**self._entry(token.id, token.logprob), "top_logprobs": [self._entry(*one) for one in token.likeliest]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> Json:
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
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(super().__call__(scope, receive, send), self._worker.max_seconds + LAST_WORDS)
        finally:
            self._worker.close(self._job)


def finite(logprob: float | None) -> float | None:
    """``logprob``, which JSON can always hold; None, of a first token, stays."""
    return None if logprob is None else max(logprob, LOWEST_LOGPROB)
