"""Whether a run compiles the model, and how it goes on when the compiler fails."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from nanokimi.config import TrainConfig
from nanokimi.console import log
from nanokimi.device import compiles_well
from nanokimi.errors import RunError
from nanokimi.model.transformer import Transformer
from nanokimi.parallel.ranks import ParallelModel

# On a CPU compiling takes a minute or more. A pass is then 1.07 times (nano-243m) or 1.4 times (tiny) as fast, which
# has paid off after 1e14 or 2e13 floating-point operations. Runs that are a few times as long are compiled.
WORTH_FLOPS = 3e14
FLOPS_PER_SECOND = 1e11  # about what two cores reach; turns a limit of seconds into floating-point operations


def compiles(config: TrainConfig, model: Transformer, device: torch.device) -> bool:
    """Whether this run compiles; it follows from the settings alone, so that a resume decides the same."""
    if config.compile != "auto":
        return config.compile == "on"
    if device.type == "cpu":
        return planned_flops(config, model) >= WORTH_FLOPS and _has_cpp_compiler()
    return compiles_well(device)


def planned_flops(config: TrainConfig, model: Transformer) -> float:
    """Floating-point operations of the whole run: 6 per token and active weight, the embedding left out."""
    sequences = config.max_steps * config.batch_size * config.gradient_accumulation
    weights = model.num_parameters(active=True) - model.embed.weight.numel()
    flops = 6.0 * weights * sequences * model.config.max_seq_length
    return min(flops, config.max_seconds * FLOPS_PER_SECOND) if config.max_seconds else flops


def _has_cpp_compiler() -> bool:
    """Whether there is the compiler that torch.compile calls on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def failed_to_compile(error: Exception) -> bool:
    """Whether ``error`` comes from the compiler and not from the model."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return isinstance(error, (TorchDynamoException, CppCompileError, InvalidCxxCompiler))


def without_compiler(error: Exception, config: TrainConfig, model: ParallelModel) -> nn.Module:
    """The model without the compiler, after a line that says so.

    Raises:
        RunError: the user asked for ``--compile on``; or other ranks are in the middle of the same pass.
    """
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()[:200]
    if config.compile == "on":
        raise RunError(f"--compile on: torch.compile failed ({reason}): use --compile off, or auto") from error
    if model.layout.mode != "one":
        raise RunError(f"torch.compile failed ({reason}): use --compile off") from error
    log(f"note: torch.compile failed ({reason}): training goes on without it")
    return model.training_module(compiled=False)
