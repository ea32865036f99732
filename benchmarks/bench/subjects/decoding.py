"""Decoding and prefill: our decoders, and ``generate`` of transformers, both greedy over random weights."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench.clock import seconds
from benchmarks.bench.subjects.peers import deepseek_v3
from benchmarks.bench.subjects.shapes import model_of, random_tokens, use
from nanokimi.config import ModelConfig
from nanokimi.inference.decoder import new_decoder, use_weights_

# A continuation goes on where the one before it ended, so the prefill is paid once and not timed.


class Ours:
    """One of our decoders.

    Args:
        length: tokens that each sequence has room for.
        slots: sequences at most.
        weights, kind: see ``new_decoder``.
    """

    def __init__(
        self, preset: str, length: int, slots: int, weights: str, kind: str, device: str, threads: int
    ) -> None:
        self.device = use(device, threads)
        model = model_of(preset, self.device, max_seq_length=length).eval()
        use_weights_(model, weights)
        self.config = model.config
        self.decoder = new_decoder(model, slots=slots, max_length=length, kind=kind, weights=weights)
        self.tokens: list[int] = []

    @torch.inference_mode()
    def fill(self, context: int, rows: int = 1) -> dict[str, Any]:
        """Prefills ``rows`` sequences of ``context`` tokens each; tokens per second are all of theirs."""
        prompts = random_tokens(self.config, rows, context).tolist()

        def work() -> None:
            self.tokens = [int(self.decoder.prefill(row, prompt).argmax()) for row, prompt in enumerate(prompts)]

        for row in range(self.decoder.slots):
            self.decoder.reset(row)
        return {"seconds": seconds(work, self.device)}

    @torch.inference_mode()
    def decode(self, count: int) -> dict[str, Any]:
        """``count`` greedy tokens for every sequence that ``fill`` made: seconds of one of them."""

        def work() -> None:
            rows = list(range(len(self.tokens)))
            for _ in range(count):
                self.tokens = self.decoder.step(rows, self.tokens).argmax(-1).tolist()

        return {"seconds": seconds(work, self.device) / count}


class Transformers:
    """transformers' ``generate``, greedy, with its cache.

    Args:
        weights: ``fp32`` or ``bf16``.
    """

    def __init__(self, preset: str, length: int, weights: str, device: str, threads: int) -> None:
        self.device = use(device, threads)
        self.config = ModelConfig.preset(preset, max_seq_length=length)
        self.model = deepseek_v3(self.config, self.device).eval()
        if weights == "bf16":
            self.model.bfloat16()
        self.ids = torch.empty(0)
        self.cache: Any = None

    def fill(self, context: int, rows: int = 1) -> dict[str, Any]:
        """As ``Ours.fill``: up to the first token that ``generate`` gives."""
        self.cache = import_module("transformers").DynamicCache(config=self.model.config)
        self.ids = random_tokens(self.config, rows, context).to(self.device)
        return {"seconds": seconds(lambda: self._generate(1), self.device)}

    def decode(self, count: int) -> dict[str, Any]:
        """As ``Ours.decode``, by one call of ``generate``."""
        return {"seconds": seconds(lambda: self._generate(count), self.device) / count}

    @torch.inference_mode()
    def _generate(self, count: int) -> None:
        ids: Tensor = self.model.generate(
            self.ids, attention_mask=torch.ones_like(self.ids), past_key_values=self.cache, max_new_tokens=count,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert ids.shape[1] == self.ids.shape[1] + count
        self.ids = ids
