"""What a model has to compute and to read at the least: the numerators of every fraction of a roof.

Letters: B batch, T sequence, S cached length, L layers, R latent rank, P rope head width.
"""

from __future__ import annotations

from nanokimi.config import ModelConfig
from nanokimi.insight.planner import forward_flops, working_weights

BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0}


def training_flops(config: ModelConfig, active_parameters: int, batch_size: int, length: int) -> int:
    """FLOPs of forward and backward: ``6 weights B T`` and three times the forward attention.

    The backward pass multiplies twice for each product of the forward pass: by the weights for the gradient of the
    input, by the input for the gradient of the weights (Kaplan et al., 2020, section 2.1). What is computed again
    to save memory does not count.
    """
    return 3 * forward_flops(config, active_parameters, batch_size, length)


def prefill_flops(config: ModelConfig, active_parameters: int, length: int) -> int:
    """FLOPs of reading a prompt: a forward pass whose head works for the last token only."""
    head = 2 * config.vocab_size * config.dim
    return forward_flops(config, active_parameters, 1, length) - head * (length - 1)


def cache_bytes(config: ModelConfig, length: int, *, bytes_per_value: float = 4.0) -> float:
    """Bytes of the cache of one sequence: ``L S (R + P)`` values with MLA."""
    return config.n_layers * length * sum(config.cache_widths) * bytes_per_value


def token_bytes(config: ModelConfig, active_parameters: int, length: int, weights: str) -> float:
    """Bytes that decoding one token at batch 1 cannot do without: working weights in their format, and the cache.

    Scales, norms and routers, which stay fp32, are left out: under one part in a hundred.
    """
    return working_weights(config, active_parameters) * BYTES_PER_WEIGHT[weights] + cache_bytes(config, length)
