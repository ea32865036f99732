"""A server for tests of the page: the real application over a debug model that waits, fails or speaks when told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import uvicorn
from conftest import lively
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer
from nanokimi.inference.chat_template import ChatTemplate
from nanokimi.inference.decoder import EagerDecoder
from nanokimi.inference.engine import Engine
from nanokimi.inference.server.app import new_app
from nanokimi.inference.server.metrics import Metrics
from nanokimi.inference.server.plans import Served
from nanokimi.inference.server.rules import Rules
from nanokimi.inference.server.run import address, bind
from nanokimi.inference.server.worker import Worker
from nanokimi.model.transformer import Transformer

NAME = "debug"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


class StagedDecoder(EagerDecoder):
    """Decodes like any other, unless it is told to wait, to say a text, or to fail.

    Attributes:
        seconds: spent on every token.
        script: the bytes that are by far the likeliest, from the first token of a continuation on.
        fail_at: the token at which the model's logits stop being finite.
    """

    seconds = 0.0
    script: bytes | None = None
    fail_at: int | None = None
    written = 0

    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        self.written = 0
        return self._staged(super().prefill(slot, tokens))

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        return self._staged(super().step(slots, tokens))

    def _staged(self, logits: Tensor) -> Tensor:
        time.sleep(self.seconds)
        if self.script is not None and self.written < len(self.script):
            logits = logits.clone()
            logits[..., self.script[self.written]] = 1000.0
        if self.written == self.fail_at:
            logits = torch.full_like(logits, torch.nan)
        self.written += 1
        return logits


class PageServer:
    """Where it is, and what stands behind it."""

    def __init__(self, template: str | None) -> None:
        self.model = lively(Transformer(ModelConfig.preset("debug")))
        self.tokenizer: Tokenizer = load_tokenizer("byte")
        self.template = None if template is None else ChatTemplate(template, self.tokenizer)
        self.decoder = StagedDecoder(self.model)
        self.address = ""

    def stage(self, *, seconds: float = 0.0, script: bytes | None = None, fail_at: int | None = None) -> None:
        """How the model behaves from now on."""
        self.decoder.seconds, self.decoder.script, self.decoder.fail_at = seconds, script, fail_at

    def new_engine(self) -> Engine:
        return Engine(self.model, self.tokenizer, decoder=self.decoder)


@contextmanager
def page_server(template: str | None = None) -> Iterator[PageServer]:
    """Serves until the end of the block; ``template`` makes it a model that chats."""
    here = PageServer(template)
    context = here.model.config.max_seq_length
    served = Served(NAME, here.model, here.tokenizer, here.template, context, context, 1, created=0)
    metrics = Metrics()
    worker = Worker(here.new_engine(), here.new_engine, max_queue=4, max_seconds=60, metrics=metrics)
    app = new_app(served, worker, Rules(), metrics, max_body=1_000_000)
    listener = bind("127.0.0.1", 0, 60)
    here.address = address(listener)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        server.should_exit = True
        thread.join()
