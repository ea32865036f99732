"""Makes a model ready for decoding: rounds its weights, chooses a decoder, and limits the threads.

Weights are rounded for formats of fewer bytes; activations and sums stay fp32 in all of them. The model with rounded
values is the reference for everything that computes with packed ones.
"""

from __future__ import annotations

from contextlib import suppress

import torch

from nanokimi.config import ModelConfig
from nanokimi.errors import RunError, UserError
from nanokimi.inference.decoder import Decoder, EagerDecoder, extended
from nanokimi.inference.graph_decoder import GraphDecoder
from nanokimi.inference.native_decoder import PRODUCTS_PER_THREAD, NativeDecoder, supports
from nanokimi.inference.options import DECODERS, WEIGHT_FORMATS
from nanokimi.model.transformer import Transformer
from nanokimi.native.build import cache_folder
from nanokimi.native.packed_model import HALVES, padded, quantised
from nanokimi.ops.measured import Choice, machine_choice
from nanokimi.ops.products import multiply_fp32_by
from nanokimi.optim.muonclip import largest_matrix

WORTH_COMPILING = 2_000_000  # parameters: below, building the kernels once costs more than they will ever save


def new_decoder(
    model: Transformer, *, slots: int = 1, max_length: int | None = None, kind: str = "auto", weights: str = "fp32"
) -> Decoder:
    """A decoder for the weights that ``model`` has now.

    ``auto`` is ``graph`` on CUDA; on a CPU ``native`` for models of ``WORTH_COMPILING`` parameters or more that the
    kernels know, where a compiler is found; else ``eager``. A model in training mode, or with adapters or hooks, is
    decoded eagerly. The choice depends on nothing else, so that a seed keeps its meaning.

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
    device = next(model.parameters()).device.type
    if kind == "auto" and not model.training:
        if device == "cuda" and not extended(model):
            kind = "graph"
        elif device == "cpu" and sum(parameter.numel() for parameter in model.parameters()) >= WORTH_COMPILING:
            with suppress(UserError, RunError):
                return new_decoder(model, slots=slots, max_length=max_length, kind="native", weights=weights)
    if kind == "native":
        if reason := supports(model):
            raise UserError(f"--decoder native: {reason}; use --decoder eager")
        return NativeDecoder(model, slots=slots, max_length=max_length, weights=weights)
    if kind == "graph":
        if reason := "needs a CUDA device" if device != "cuda" else extended(model):
            raise UserError(f"--decoder graph {reason}: use --decoder auto")
        return GraphDecoder(model, slots=slots, max_length=max_length)
    return EagerDecoder(model, slots=slots, max_length=max_length)


def cache_bytes(config: ModelConfig, slots: int) -> int:
    """Most bytes that the caches of a decoder for an fp32 model can take, before there is one."""
    entry = sum(map(padded, config.cache_widths)) * torch.float32.itemsize
    return slots * config.n_layers * config.max_seq_length * entry


def choose_products(model: Transformer) -> Choice | None:
    """Has this process multiply fp32 matrices, those of prompts, by the library that is faster here, and says which.

    None, and nothing changes, where the products are not worth it: off the CPU, or with few parameters.
    """
    if next(model.parameters()).device.type != "cpu" or model.num_parameters(active=True) < PRODUCTS_PER_THREAD:
        return None
    choice = machine_choice(largest_matrix(model), cache_folder())
    multiply_fp32_by(choice.library)
    return choice


def limit_threads(model: Transformer) -> None:
    """Has PyTorch use one thread in this process from here on, if a token of ``model`` is no work for more.

    Decoders keep the number of threads that they were made with.
    """
    if next(model.parameters()).device.type == "cpu" and model.num_parameters(active=True) < PRODUCTS_PER_THREAD:
        torch.set_num_threads(1)


@torch.no_grad()
def use_weights_(model: Transformer, weights: str) -> None:
    """Rounds, in place, every matrix of an fp32 ``model`` that decoding reads to values that ``weights`` can hold.

    Norms, routers and the embedding table keep theirs: they are small or read one row at a time. int8 is symmetric,
    one scale per output row: its largest magnitude / 127. On CUDA the model is also stored in bf16 or fp16, and
    computes so.

    Raises:
        UserError: an unknown format, int8 on a device other than a CPU, or a weight too large for fp16.
    """
    device = next(model.parameters()).device.type
    if weights not in WEIGHT_FORMATS:
        raise UserError(f"--weights {weights}: choose one of {', '.join(WEIGHT_FORMATS)}")
    if weights == "int8" and device != "cpu":
        raise UserError(f"--weights int8 is for a CPU, this is {device}: use --device cpu or --weights bf16")
    if weights == "fp32":
        return
    routers = {id(router.weight) for router in model.routers()}
    for param_role, weight in model.param_roles():
        if param_role in ("norm", "embedding") or id(weight) in routers:
            continue
        if weights == "int8":
            values, scale = quantised(weight)
            weight.copy_(values * scale.unsqueeze(-1))
        else:
            half = weight.to(HALVES[weights])
            if not half.isfinite().all():
                raise UserError(f"--weights {weights}: a weight is larger than it can hold; use bf16")
            weight.copy_(half)
    if device == "cuda":
        store_parameters_(model, HALVES[weights])


def store_parameters_(model: Transformer, dtype: torch.dtype) -> None:
    """Turns the parameters of ``model`` into ``dtype``, all but those of the routers; tables and buffers stay fp32.

    ``model.to(dtype)`` would cost the rotary tables their precision.
    """
    routers = {id(router.weight) for router in model.routers()}
    for parameter in model.parameters():
        if id(parameter) not in routers:
            parameter.data = parameter.data.to(dtype)
