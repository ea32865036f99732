"""A server on loopback in a thread, and a decoder that writes a known text as fast as a test lets it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.inference.chat_template import ChatTemplate
from nanokimi.inference.decoder import Decoder
from nanokimi.inference.engine import Engine
from nanokimi.model.transformer import Transformer
from nanokimi.serve.api import Served
from nanokimi.serve.arguments import Rules
from nanokimi.serve.metrics import Metrics
from nanokimi.serve.server import DrainingServer, address, bind, new_app
from nanokimi.serve.worker import Worker

EOT = 256
TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class ScriptedDecoder:
    """Makes ``script[i]`` the i-th token of every slot; the last one repeats.

    Attributes:
        permits: when given, each step waits for one.
        fails_at: the step, counted from 0, at which all sequences fail.
        breaks: whether admitting a sequence fails, which nobody expects.
        steps: how many were made.
    """

    def __init__(
        self,
        script: bytes | list[int],
        *,
        slots: int = 4,
        max_length: int = 10_000,
        permits: threading.Semaphore | None = None,
        fails_at: int | None = None,
        breaks: bool = False,
    ) -> None:
        self.script, self.slots, self.max_length = list(script), slots, max_length
        self.permits, self.fails_at, self.breaks = permits, fails_at, breaks
        self.lengths, self.slot_bytes, self.steps = [0] * slots, 1000, 0
        self._written = [0] * slots

    def reset(self, slot: int) -> None:
        if self.breaks:
            raise ValueError("a cable is loose")
        self._written[slot] = 0

    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        return self._logits([slot])[0]

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        if self.permits is not None:
            assert self.permits.acquire(timeout=20)
        self.steps += 1
        if self.steps == self.fails_at:
            raise ValueError("a bit has flipped")
        return self._logits(slots)

    def _logits(self, slots: Sequence[int]) -> Tensor:
        logits = torch.zeros(len(slots), 257)
        for row, slot in enumerate(slots):
            logits[row, self.script[min(self._written[slot], len(self.script) - 1)]] = 1e4
            self._written[slot] += 1
        return logits


@dataclass
class Server:
    """What a test may want to look at."""

    url: str
    worker: Worker
    metrics: Metrics
    uvicorn: DrainingServer
    thread: threading.Thread


@contextmanager
def serving(
    model: Transformer | None = None,
    decoders: Sequence[Decoder] = (),
    *,
    rules: Rules | None = None,
    chat: bool | str = False,
    max_queue: int = 8,
    max_seconds: float = 60.0,
    max_body: int = 1 << 20,
    max_n: int = 8,
    max_tokens: int | None = None,
    drain_seconds: float = 20.0,
    slots: int = 4,
) -> Iterator[Server]:
    """A running server with the byte tokenizer; ``decoders`` are used one after another, when one has failed.

    ``chat``: by the template ``TURNS``, or by one of its own.
    """
    tokenizer = load_tokenizer("byte")
    model = model or Transformer(ModelConfig.preset("debug")).eval()
    left = iter(decoders)
    new_engine: Callable[[], Engine] = lambda: Engine(model, tokenizer, slots=slots, decoder=next(left, None))  # noqa: E731
    metrics = Metrics()
    worker = Worker(max_queue=max_queue, max_seconds=max_seconds, metrics=metrics)
    context = worker.use(new_engine).max_length
    template = ChatTemplate(chat if isinstance(chat, str) else TURNS, tokenizer) if chat else None
    served = Served("debug", model, tokenizer, template, context, max_tokens or context, max_n, created=1)
    app = new_app(served, worker, rules or Rules(), metrics, max_body=max_body)
    listener = bind("127.0.0.1", 0, max_seconds)
    server = DrainingServer(app, worker, drain_seconds, "a test")

    def run() -> None:
        server.run(sockets=[listener])
        worker.stop()

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: server.started)
    try:
        yield Server(address(listener), worker, metrics, server, thread)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def until(reached: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for something that happens on another thread."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)
