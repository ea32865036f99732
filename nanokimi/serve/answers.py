"""From what the engine writes to answers: one JSON object, or server-sent events as the text comes."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanokimi.inference.engine import TextChunk, Token
from nanokimi.serve.errors import ApiError
from nanokimi.serve.plans import Plan
from nanokimi.serve.shapes import Shape
from nanokimi.serve.worker import End, Job, Worker

LAST_WORDS = 5.0  # seconds that a client has to take the rest of an answer whose time is over
EVENTS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy may hold events back


class Answer:
    """The answer to one request.

    Args:
        name: of the model.
    """

    def __init__(self, worker: Worker, job: Job, plan: Plan, shape: Shape, name: str) -> None:
        self.worker, self.job, self.plan, self.shape = worker, job, plan, shape
        self._head = {"id": shape.prefix + secrets.token_hex(12), "created": int(time.time()), "model": name}
        self._tokens = 0

    async def whole(self, receive: Receive) -> dict[str, Any]:
        """Waits for the end.

        Raises:
            ApiError: it was broken off, or the client has left.
        """
        texts: list[list[str]] = [[] for _ in self.plan.requests]
        tokens: list[list[Token]] = [[] for _ in self.plan.requests]
        reasons: list[str | None] = [None for _ in self.plan.requests]
        async with self._while_client_stays(receive):
            while updates := await self.job.news():
                for index, piece, end in updates:
                    if piece is not None:
                        texts[index].append(piece.text)
                        tokens[index] += piece.tokens
                    if end is not None:
                        reasons[index] = end.finish_reason
                        self._tokens += end.tokens
        choices = [
            self._choice(index, "".join(texts[index]), tokens[index], reasons[index])
            for index in range(len(self.plan.requests))
        ]
        return {**self._head, "object": self.shape.kind, "choices": choices, "usage": self._usage()}

    def _choice(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        logprobs = self.shape.logprobs(tokens) if self.plan.logprobs else None
        choice = {"index": index, **self.shape.whole(text), "logprobs": logprobs, "finish_reason": reason}
        if self.plan.token_ids:
            choice["prompt_token_ids"] = self.plan.requests[index].prompt
            choice["token_ids"] = [token.id for token in tokens]
        return choice

    def _usage(self) -> dict[str, int]:
        prompt = self.plan.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": self._tokens, "total_tokens": prompt + self._tokens}

    # ---- events ---------------------------------------------------------------------------------

    async def events(self, receive: Receive) -> AsyncGenerator[str, None]:
        """Server-sent events, those that are due together in one string; an error is the last one, without [DONE]."""
        head = json.dumps({**self._head, "object": self.shape.chunk_kind})[:-1]
        self._starts = [f'data: {head},"choices":[{{"index":{index},' for index in range(len(self.plan.requests))]
        self._end = '}],"usage":null}\n\n' if self.plan.include_usage else "}]}\n\n"
        try:
            async with self._while_client_stays(receive):
                if opening := self._opening():
                    yield opening
                while updates := await self.job.news():
                    if text := "".join([self._event(*update) for update in updates]):
                        yield text
        except ApiError as error:
            yield f"data: {error.json()}\n\n"
            return
        if self.plan.include_usage:
            yield f'data: {head},"choices":[],"usage":{json.dumps(self._usage())}}}\n\n'
        yield "data: [DONE]\n\n"

    def _opening(self) -> str:
        """A first chunk for every choice where there is something to say in front of the text."""
        if not self.shape.opening and not self.plan.token_ids:
            return ""
        chunks = []
        for index, request in enumerate(self.plan.requests):
            ids = f',"prompt_token_ids":{json.dumps(request.prompt)}' if self.plan.token_ids else ""
            chunks.append(self._chunk(index, self.shape.opening or self.shape.last, (), "null", ids))
        return "".join(chunks)

    def _event(self, index: int, piece: TextChunk | None, end: End | None) -> str:
        text = ""
        if piece is not None:
            text = self._chunk(index, self.shape.delta(piece.text), piece.tokens)
        if end is not None:
            self._tokens += end.tokens
            text += self._chunk(index, self.shape.last, (), json.dumps(end.finish_reason))
        return text

    def _chunk(self, index: int, field: str, tokens: Sequence[Token], reason: str = "null", extra: str = "") -> str:
        """One event. It is put together from ready parts: this runs for every token of every client."""
        logprobs = json.dumps(self.shape.logprobs(tokens)) if self.plan.logprobs and tokens else "null"
        if self.plan.token_ids:
            extra += f',"token_ids":{json.dumps([token.id for token in tokens])}'
        return f'{self._starts[index]}{field},"logprobs":{logprobs},"finish_reason":{reason}{extra}{self._end}'

    @asynccontextmanager
    async def _while_client_stays(self, receive: Receive) -> AsyncIterator[None]:
        """Breaks the job off when the client leaves; in the end nothing of it runs any more."""
        watch = asyncio.ensure_future(self._watch(receive))
        try:
            yield
        finally:
            watch.cancel()
            self.worker.close(self.job)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.job.fail(ApiError(499, "the client has left"))
        self.worker.close(self.job)


class EventStream(Response):
    """The answer as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, max_seconds: float) -> None:
        super().__init__(headers=EVENTS)
        del self.headers["content-length"]
        self._answer, self._max_seconds = answer, max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. A client that does not read makes ``send`` wait; it is left alone in the end."""
        try:
            await asyncio.wait_for(self._write(receive, send), self._max_seconds + LAST_WORDS)
        except asyncio.TimeoutError:
            self._answer.worker.close(self._answer.job)

    async def _write(self, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._answer.events(receive)) as events:
            async for text in events:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
