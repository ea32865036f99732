"""A server for tests of the page: the real application over a debug model that waits, fails or speaks when told to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from conftest import lively
from served import serving
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer
from nanokimi.inference.chat_template import ChatTemplate
from nanokimi.inference.decoder import EagerDecoder
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

    def __init__(self, template: str) -> None:
        self.model = lively(Transformer(ModelConfig.preset("debug")))
        self.tokenizer: Tokenizer = load_tokenizer("byte")
        self.template = ChatTemplate(template, self.tokenizer) if template else None
        self.decoder = StagedDecoder(self.model)
        self.address = ""

    def stage(self, *, seconds: float = 0.0, script: bytes | None = None, fail_at: int | None = None) -> None:
        """How the model behaves from now on."""
        self.decoder.seconds, self.decoder.script, self.decoder.fail_at = seconds, script, fail_at


@contextmanager
def page_server(template: str = "") -> Iterator[PageServer]:
    """Serves until the end of the block; ``template`` makes it a model that chats."""
    here = PageServer(template)
    with serving(here.model, [here.decoder], chat=template, max_queue=4) as server:
        here.address = server.url
        yield here
