"""Decoders compute the next-token logits of several sequences, each of its own length, over caches of fixed size.

There are three: the PyTorch model as it is (``EagerDecoder``, the reference), compiled kernels on a CPU
(``native_decoder``), and CUDA graphs (``graph_decoder``). ``new_decoder`` chooses one. The second half of the file
rounds weights for formats of fewer bytes; activations and sums stay fp32 in all of them. The model with rounded values
is the reference for everything that computes with packed ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from nanokimi.errors import RunError, UserError
from nanokimi.inference.options import DECODERS, WEIGHT_FORMATS
from nanokimi.model.cache import LatentCache
from nanokimi.model.transformer import Transformer
from nanokimi.native.packed_model import HALVES, quantised

PRODUCTS_PER_THREAD = 8_000_000  # multiply-adds: with fewer in a step a thread is not worth waking
WORTH_COMPILING = 2_000_000  # parameters: below, building the kernels once costs more than they will ever save


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
    large = sum(parameter.numel() for parameter in model.parameters()) >= WORTH_COMPILING
    if kind == "auto" and device == "cpu" and not model.training and large:
        with suppress(UserError, RunError):
            return _native(model, slots, max_length, weights)
    return EagerDecoder(model, slots=slots, max_length=max_length)


def _native(model: Transformer, slots: int, max_length: int | None, weights: str) -> Decoder:
    from nanokimi.inference.native_decoder import NativeDecoder, supports

    if reason := supports(model):
        raise UserError(f"--decoder native: {reason}; use --decoder eager")
    return NativeDecoder(model, slots=slots, max_length=max_length, weights=weights)


def extended(model: Transformer) -> str | None:
    """Why ``model`` has to be called module by module, or None if its own weights say all that it does."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "the model has hooks, which --decoder eager alone calls"
    if len(model.param_roles()) < sum(1 for _ in model.parameters()):
        return "the model carries adapters, which --decoder eager alone calls: use that, or merge them"
    return None


def limit_threads(model: Transformer) -> None:
    """Has PyTorch use one thread in this process from here on, if a token of ``model`` is no work for more.

    Decoders keep the number of threads that they were made with.
    """
    if next(model.parameters()).device.type == "cpu" and model.num_parameters(active=True) < PRODUCTS_PER_THREAD:
        torch.set_num_threads(1)


# ---- weights in fewer bytes -------------------------------------------------------------------------


def use_weights_(model: Transformer, weights: str) -> None:
    """Rounds the matrices of an fp32 ``model`` in place to what ``weights`` can hold; on CUDA it then computes so.

    Raises:
        UserError: int8 on a device other than a CPU; see also ``round_weights_``.
    """
    device = next(model.parameters()).device.type
    if weights == "int8" and device != "cpu":
        raise UserError(f"--weights int8 is for a CPU, this is {device}: use --device cpu or --weights bf16")
    round_weights_(model, weights)
    if device == "cuda" and weights in HALVES:
        store_parameters_(model, HALVES[weights])


def store_parameters_(model: Transformer, dtype: torch.dtype) -> None:
    """Turns the parameters of ``model`` into ``dtype``, all but those of the routers; tables and buffers stay fp32.

    ``model.to(dtype)`` would cost the rotary tables their precision.
    """
    routers = {id(router.weight) for router in model.routers()}
    for parameter in model.parameters():
        if id(parameter) not in routers:
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def round_weights_(model: Transformer, weight_format: str) -> None:
    """Rounds, in place, every matrix that decoding reads to values that ``weight_format`` can hold.

    Norms, routers and the embedding table keep theirs: they are small or read one row at a time. int8 is symmetric,
    one scale per output row: its largest magnitude / 127.

    Raises:
        UserError: an unknown format, or a weight too large for fp16.
    """
    if weight_format not in WEIGHT_FORMATS:
        raise UserError(f"--weights {weight_format}: choose one of {', '.join(WEIGHT_FORMATS)}")
    if weight_format == "fp32":
        return
    routers = {id(router.weight) for router in model.routers()}
    for param_role, weight in model.param_roles():
        if param_role in ("norm", "embedding") or id(weight) in routers:
            continue
        if weight_format == "int8":
            values, scale = quantised(weight)
            weight.copy_(values * scale.unsqueeze(-1))
        else:
            half = weight.to(HALVES[weight_format])
            if not half.isfinite().all():
                raise UserError(f"--weights {weight_format}: a weight is larger than it can hold; use bf16")
            weight.copy_(half)
