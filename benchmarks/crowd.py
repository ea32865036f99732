"""Clients that cost next to nothing, and a crowd of them who come, read, and leave when they like."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any


def completion(prompt: str | list[int], **choices: Any) -> dict[str, Any]:
    """The body of a request to ``/v1/completions``."""
    return {"prompt": prompt, **choices}


@dataclass
class Streamed:
    """What came of one stream: text is not kept."""

    tokens: int = 0
    first_seconds: float = 0.0
    chunks: int = 0
    complete: bool = False


class Client:
    """One connection to the server, kept open; HTTP/1.1 by hand."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Client:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def text(self, path: str) -> str:
        """What lies at ``path``."""
        await self._send("GET", path, b"")
        return b"".join([chunk async for chunk in self._body(await self._head())]).decode()

    async def post(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer of a completion that is not streamed."""
        await self._send("POST", "/v1/completions", json.dumps(body).encode())
        head = await self._head()
        return head.status, json.loads(b"".join([chunk async for chunk in self._body(head)]))

    async def stream(self, body: dict[str, Any], *, leave_after: int | None = None) -> Streamed:
        """Reads a streamed completion, or leaves behind ``leave_after`` chunks of it.

        Raises:
            RuntimeError: the status is not 200, or an error came in the stream.
        """
        asked = body | {"stream": True, "stream_options": {"include_usage": True}}
        started = time.perf_counter()
        await self._send("POST", "/v1/completions", json.dumps(asked).encode())
        head = await self._head()
        if head.status != 200:
            raise RuntimeError(f"status {head.status}")
        found, tail = Streamed(), b""
        async for chunk in self._body(head):
            if not found.chunks:
                found.first_seconds = time.perf_counter() - started
            found.chunks += 1
            tail = (tail + chunk)[-2000:]
            if b'data: {"error"' in tail:
                raise RuntimeError(tail.decode())
            if leave_after is not None and found.chunks >= leave_after:
                return found
        found.complete = tail.endswith(b"data: [DONE]\n\n")
        usage = tail.rpartition(b'"completion_tokens":')[2]
        found.tokens = int(usage.partition(b",")[0]) if found.complete else 0
        return found

    async def _send(self, method: str, path: str, body: bytes) -> None:
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        await self._writer.drain()

    async def _head(self) -> Head:
        status = int((await self._reader.readline()).split()[1])
        length: int | None = None
        while (line := await self._reader.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return Head(status, length)

    async def _body(self, head: Head) -> Any:
        if head.length is not None:
            yield await self._reader.readexactly(head.length)
            return
        while size := int(await self._reader.readline(), 16):
            yield await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)


@dataclass
class Head:
    """Of an answer; ``length`` is None where it comes in chunks."""

    status: int
    length: int | None


@dataclass
class Tally:
    """What a crowd has seen."""

    finished: int = 0
    left: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)


class Crowd:
    """``clients`` at once: a third of all requests are left in mid-stream, some are not streamed at all."""

    def __init__(self, port: int, *, clients: int, seed: int) -> None:
        self.port, self.clients = port, clients
        self.tally = Tally()
        self._random = random.Random(seed)

    async def run(self, seconds: float) -> None:
        """Sends requests until the time is over; those that run then are read to their end."""
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._client(number, end) for number in range(self.clients)))

    async def _client(self, number: int, end: float) -> None:
        while time.monotonic() < end:
            try:
                async with Client(self.port) as client:
                    await self._request(client, leaves=number % 3 == 0)
            except (RuntimeError, OSError, ValueError, asyncio.IncompleteReadError) as error:
                self.tally.errors.append(f"{type(error).__name__}: {error}")

    async def _request(self, client: Client, *, leaves: bool) -> None:
        choose = self._random
        body = completion(
            [choose.randrange(200) for _ in range(choose.choice((1, 5, 40, 150)))],
            max_tokens=choose.choice((5, 30, 100)),
            seed=choose.randrange(1000),
            n=choose.choice((1, 1, 1, 2)),
            temperature=choose.choice((0, 0.7, 1)),
            top_p=choose.choice((1, 0.9)),
            logprobs=choose.choice((None, None, 3)),
            stop=choose.choice((None, "the", ["zz", "\n\n\n"])),
        )
        if leaves:
            found = await client.stream(body | {"max_tokens": 100, "stop": None}, leave_after=choose.randrange(1, 6))
            self.tally.left += not found.complete
            return
        if choose.random() < 0.2:
            status, answer = await client.post(body)
            if status != 200:
                raise RuntimeError(f"status {status}: {answer}")
            self.tally.tokens += answer["usage"]["completion_tokens"]
        else:
            found = await client.stream(body)
            if not found.complete:
                raise RuntimeError("a stream ended without [DONE]")
            self.tally.tokens += found.tokens
        self.tally.finished += 1
