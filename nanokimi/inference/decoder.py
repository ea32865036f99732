"""Decoders: the next-token logits of several sequences, each of its own length, over latent caches of fixed size.

One interface, three ways: the PyTorch model as it is (``EagerDecoder``, the reference), compiled kernels on a CPU
(``native_decoder``), and CUDA graphs (``graph_decoder``). Which one is taken, and from what size on, ``new_decoder``
says.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from nanokimi.errors import RunError, UserError
from nanokimi.inference.settings import DECODERS
from nanokimi.model.cache import LatentCache
from nanokimi.model.transformer import Transformer

PRODUCTS_PER_THREAD = 8_000_000  # multiply-adds: with fewer in a step a thread is not worth waking
WORTH_COMPILING = 2_000_000  # parameters: below, building the kernels once costs more than they will ever save


class Decoder(Protocol):
    """Next-token logits of up to ``slots`` sequences. A slot's logits do not depend on what else is decoded.

    Attributes:
        slots: sequences that can be held.
        max_length: most tokens of each.
        lengths: tokens held by each slot; for reading only.
        slot_bytes: memory of one slot.
    """

    slots: int
    max_length: int
    lengths: list[int]
    slot_bytes: int

    def reset(self, slot: int) -> None:
        """Forgets a slot's tokens."""

    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """Adds one or more tokens to a slot, behind those it holds; the logits behind the last, fp32 ``[vocab]``."""

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Adds one token to each of n different slots; the logits behind them, fp32 ``[n, vocab]``."""


class EagerDecoder:
    """The PyTorch model as it is, on any device and in any precision: what every other decoder is compared with.

    It always uses the model's present weights. On a CPU it takes one slot after another: sums inside a matrix
    product depend on its number of rows there, and a slot's logits must not depend on its neighbours.
    """

    def __init__(self, model: Transformer, *, slots: int = 1, max_length: int | None = None) -> None:
        weight = next(model.parameters())
        self.model, self.device = model, weight.device
        self.slots, self.max_length = slots, fitting_length(model, max_length)
        self.cache = LatentCache(model.config, slots, self.max_length, device=weight.device, dtype=weight.dtype)
        self.lengths = self.cache.lengths
        self.slot_bytes = self.cache.entries.nbytes // slots
        self.one_by_one = weight.device.type == "cpu"

    def reset(self, slot: int) -> None:
        """See ``Decoder``."""
        self.lengths[slot] = 0

    def prefill(self, slot: int, tokens: Sequence[int]) -> Tensor:
        """See ``Decoder``."""
        return self._forward([slot], [list(tokens)])[0]

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """See ``Decoder``."""
        self.check_room(slots)
        if self.one_by_one:
            return torch.cat([self._forward([slot], [[token]]) for slot, token in zip(slots, tokens, strict=True)])
        return self._forward(slots, [[token] for token in tokens])

    def check_room(self, slots: Sequence[int]) -> None:
        """ValueError if one of ``slots`` is full: before any of them has changed."""
        if max(self.lengths[slot] for slot in slots) >= self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {self.max_length + 1} are needed")

    @torch.inference_mode()
    def _forward(self, slots: Sequence[int], tokens: list[list[int]]) -> Tensor:
        inputs = torch.tensor(tokens, device=self.device)
        logits: Tensor = self.model(inputs, cache=self.cache.select(slots), last_only=True)
        return logits[:, -1]


def new_decoder(
    model: Transformer, *, slots: int = 1, max_length: int | None = None, kind: str = "auto", weights: str = "fp32"
) -> Decoder:
    """A decoder for the weights that ``model`` has now.

    ``auto`` is ``graph`` on CUDA; on a CPU ``native`` for models of ``WORTH_COMPILING`` parameters or more, where a
    compiler is found and the model is one that the kernels know; else ``eager``. A model in training mode is decoded
    eagerly: its weights are about to change; so is one with adapters or hooks (see ``extended``). The choice depends on
    nothing else, so that a seed keeps its meaning.

    Args:
        slots: sequences decoded together.
        max_length: most tokens of each (default: the model's context).
        kind: one of ``DECODERS``.
        weights: what the compiled kernels store the matrices in; round the model to it first, see ``use_weights_``.

    Raises:
        UserError: ``kind`` is unknown or impossible for this model.
        RunError: the kernels cannot be built.
    """
    if kind not in DECODERS:
        raise UserError(f"--decoder {kind}: unknown; choose {', '.join(DECODERS)}")
    if kind == "native":
        return _native(model, slots, max_length, weights)
    device = next(model.parameters()).device.type
    reason = extended(model)
    if kind == "graph" or (kind == "auto" and device == "cuda" and not model.training and not reason):
        if device != "cuda" or reason:
            raise UserError(
                f"--decoder graph {'needs a CUDA device' if device != 'cuda' else reason}: use --decoder auto"
            )
        from nanokimi.inference.graph_decoder import GraphDecoder

        return GraphDecoder(model, slots=slots, max_length=max_length)
    if kind == "auto" and device == "cpu" and not model.training and _size(model) >= WORTH_COMPILING:
        with suppress(UserError, RunError):
            return _native(model, slots, max_length, weights)
    return EagerDecoder(model, slots=slots, max_length=max_length)


def extended(model: Transformer) -> str | None:
    """Why ``model`` has to be called module by module, or None where its own weights say all that it does."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "the model has hooks, which --decoder eager alone calls"
    if len(model.param_roles()) < sum(1 for _ in model.parameters()):
        return "the model carries adapters, which --decoder eager alone calls: use that, or merge them"
    return None


def _native(model: Transformer, slots: int, max_length: int | None, weights: str) -> Decoder:
    from nanokimi.inference.native_decoder import NativeDecoder, supports

    if reason := supports(model):
        raise UserError(f"--decoder native: {reason}; use --decoder eager")
    return NativeDecoder(model, slots=slots, max_length=max_length, weights=weights)


def _size(model: Transformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def limit_threads(model: Transformer) -> None:
    """Has PyTorch use one thread in this process from here on, if a token of ``model`` is no work for more.

    Decoders keep the number of threads that they were made with.
    """
    if next(model.parameters()).device.type == "cpu" and model.num_parameters(active=True) < PRODUCTS_PER_THREAD:
        torch.set_num_threads(1)


def fitting_length(model: Transformer, max_length: int | None) -> int:
    """``max_length``, or the model's context where that is shorter or nothing is asked."""
    context = model.config.max_seq_length
    return context if max_length is None else min(max_length, context)


def use_weights_(model: Transformer, weights: str) -> None:
    """Rounds the matrices of an fp32 ``model`` in place to what ``weights`` can hold; on CUDA it then computes so.

    Raises:
        UserError: int8 on a device other than a CPU.
    """
    if weights == "fp32":
        return
    from nanokimi.inference.weights import round_weights_

    device = next(model.parameters()).device.type
    if weights == "int8" and device != "cpu":
        raise UserError(f"--weights int8 is for a CPU, this is {device}: use --device cpu or --weights bf16")
    round_weights_(model, weights)
    if device == "cuda":
        store_parameters_(model, {"bf16": torch.bfloat16, "fp16": torch.float16}[weights])


def store_parameters_(model: Transformer, dtype: torch.dtype) -> None:
    """Turns the parameters of ``model`` into ``dtype``, all but those of the routers; tables and buffers stay fp32.

    What ``model.to(dtype)`` does would cost the rotary tables their precision.
    """
    routers = {id(router.weight) for router in model.routers()}
    for parameter in model.parameters():
        if id(parameter) not in routers:
            parameter.data = parameter.data.to(dtype)
