"""Decoders compute the next-token logits of several sequences, each of its own length, over caches of fixed size.

There are three: the PyTorch model as it is (``EagerDecoder``, the reference), compiled kernels on a CPU
(``native_decoder``), and CUDA graphs (``graph_decoder``). ``decoding.new_decoder`` chooses one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from nanokimi.model.cache import LatentCache
from nanokimi.model.transformer import Transformer


class Decoder(ABC):
    """Next-token logits of up to ``slots`` sequences. A slot's logits do not depend on what else is decoded.

    Args:
        max_length: no more than the model's context, which is the default.

    Attributes:
        slots: sequences that can be held.
        max_length: most tokens of each.
        lengths: tokens held by each slot; for reading only.
        slot_bytes: memory of one slot.
    """

    slot_bytes: int

    def __init__(self, model: Transformer, slots: int, max_length: int | None) -> None:
        context = model.config.max_seq_length
        self.model, self.slots = model, slots
        self.max_length = context if max_length is None else min(max_length, context)
        self.lengths = [0] * slots

    def reset(self, slot: int) -> None:
        """Forgets a slot's tokens."""
        self.lengths[slot] = 0

    @abstractmethod
    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """Adds one or more tokens to a slot, after those it holds; the logits after the last, fp32 ``[vocab]``."""

    @abstractmethod
    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Adds one token to each of n different slots; the logits after them, fp32 ``[n, vocab]``."""

    def check_room(self, slots: Sequence[int], tokens: int = 1) -> None:
        """ValueError if one of ``slots`` cannot take so many tokens more: before any of them has changed."""
        if (end := max(self.lengths[slot] for slot in slots) + tokens) > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {end} are needed")


class EagerDecoder(Decoder):
    """The PyTorch model as it is, on any device and in any precision: what every other decoder is compared with.

    It always uses the model's present weights. On a CPU it takes one slot after another: sums inside a matrix
    product depend on its number of rows there, and a slot's logits must not depend on its neighbours.
    """

    def __init__(self, model: Transformer, *, slots: int = 1, max_length: int | None = None) -> None:
        super().__init__(model, slots, max_length)
        weight = next(model.parameters())
        self.device = weight.device
        self.cache = LatentCache(model.config, slots, self.max_length, device=weight.device, dtype=weight.dtype)
        self.lengths = self.cache.lengths
        self.slot_bytes = self.cache.entries.nbytes // slots
        self.one_by_one = weight.device.type == "cpu"

    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        return self._forward([slot], [list(tokens)])[0]

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        self.check_room(slots)
        if self.one_by_one:
            return torch.cat([self._forward([slot], [[token]]) for slot, token in zip(slots, tokens, strict=True)])
        return self._forward(slots, [[token] for token in tokens])

    @torch.inference_mode()
    def _forward(self, slots: Sequence[int], tokens: list[list[int]]) -> Tensor:
        inputs = torch.tensor(tokens, device=self.device)
        logits: Tensor = self.model(inputs, cache=self.cache.select(slots), last_only=True)
        return logits[:, -1]


def extended(model: Transformer) -> str | None:
    """Why ``model`` has to be called module by module, or None if its own weights say all that it does."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "the model has hooks, which --decoder eager alone calls"
    if len(model.param_roles()) < sum(1 for _ in model.parameters()):
        return "the model carries adapters, which --decoder eager alone calls: use that, or merge them"
    return None
