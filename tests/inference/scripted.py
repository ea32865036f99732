"""A stand-in for a model that writes a given text, so that tests know every token beforehand."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from nanokimi.config import ModelConfig
from nanokimi.model.cache import LatentCache
from nanokimi.model.layers import ParamRole

HELD_BY_PADDING = 1000.0


class ScriptedModel(nn.Module):
    """Makes ``script[i]`` by far the likeliest i-th token, whatever the prompt; the last one repeats.

    ``padding`` adds that many ids after the script's vocabulary, likelier still; ``seconds`` is spent per token.
    """

    def __init__(self, script: bytes | list[int], *, context: int = 128, padding: int = 0, seconds: float = 0.0):
        super().__init__()
        self.config = ModelConfig.preset("debug", max_seq_length=context, vocab_size=257 + padding)
        self.weight = nn.Parameter(torch.zeros(1))
        self.script = list(script)
        self.seconds = seconds
        self.prompts: list[list[int]] = []
        self.written = 0

    def num_parameters(self, active: bool = False) -> int:
        return self.weight.numel()

    def param_roles(self) -> list[tuple[ParamRole, nn.Parameter]]:
        return [("norm", self.weight)]

    def forward(self, tokens: Tensor, cache: LatentCache, *, last_only: bool) -> Tensor:
        time.sleep(self.seconds)
        (row,) = cache.rows
        if cache.lengths[row] == 0:
            self.prompts.append(tokens[0].tolist())
            self.written = 0
        cache.advance(tokens.shape[1])
        assert last_only
        assert cache.lengths[row] <= cache.max_length <= self.config.max_seq_length
        logits = torch.zeros(1, 1, self.config.vocab_size)
        logits[..., self.script[min(self.written, len(self.script) - 1)]] = 100.0
        logits[..., 257:] = HELD_BY_PADDING
        self.written += 1
        return logits


class InterruptedModel(ScriptedModel):
    """As if Ctrl-C were pressed while the token after ``script`` is computed."""

    def forward(self, tokens: Tensor, cache: LatentCache, *, last_only: bool) -> Tensor:
        logits = super().forward(tokens, cache, last_only=last_only)
        if self.written > len(self.script):
            raise KeyboardInterrupt
        return logits
