"""What a model has to compute and to read at the least: the numerators of every fraction of a roof.

Letters: B batch, T sequence, S cached length, L layers, H heads, N/P/V nope/rope/value head widths, R latent rank.
"""

from __future__ import annotations

from nanokimi.config import ModelConfig

BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0}


def causal_pairs(length: int) -> int:
    """Pairs of a query and a key it sees, in one sequence of ``length`` tokens: T (T + 1) / 2."""
    return length * (length + 1) // 2


def attention_flops(config: ModelConfig, batch_size: int, length: int) -> int:
    """Forward FLOPs of causal attention, expanded form: ``2 L H B T (T + 1) / 2 ((N + P) + V)``.

    A pair costs N + P multiply-adds for its logit and V for its share of the output; projections are weights and
    counted with these.
    """
    per_pair = 2 * config.n_layers * config.n_heads * (config.qk_head_dim + config.v_head_dim)
    return per_pair * batch_size * causal_pairs(length)


def working_weights(config: ModelConfig, active_parameters: int) -> int:
    """Active weights without the input embedding, of which a token reads one row."""
    return active_parameters - config.vocab_size * config.dim


def forward_flops(config: ModelConfig, active_parameters: int, batch_size: int, length: int) -> int:
    """FLOPs of one forward pass: 2 per working weight and token, and attention."""
    weights = working_weights(config, active_parameters)
    return 2 * weights * batch_size * length + attention_flops(config, batch_size, length)


def prefill_flops(config: ModelConfig, active_parameters: int, length: int) -> int:
    """FLOPs of reading a prompt: a forward pass whose head works for the last token only."""
    head = 2 * config.vocab_size * config.dim
    return forward_flops(config, active_parameters, 1, length) - head * (length - 1)


def training_flops(config: ModelConfig, active_parameters: int, batch_size: int, length: int) -> int:
    """FLOPs of forward and backward: ``6 weights B T`` and three times the forward attention.

    The backward pass multiplies twice for each product of the forward pass: by the weights for the gradient of the
    input, by the input for the gradient of the weights (Kaplan et al., 2020, section 2.1). What is computed again
    to save memory does not count.
    """
    return 3 * forward_flops(config, active_parameters, batch_size, length)


def newton_schulz_flops(rows: int, cols: int) -> int:
    """That of ``ops.newton_schulz``, imported when it is called, so that ``nanokimi plan --help`` loads no torch."""
    from nanokimi.ops import newton_schulz

    return newton_schulz.newton_schulz_flops(rows, cols)


def cache_bytes(config: ModelConfig, length: int, *, bytes_per_value: float = 4.0) -> float:
    """Bytes of the cache of one sequence: ``L S (R + P)`` values with MLA."""
    return config.n_layers * length * sum(config.cache_widths) * bytes_per_value


def token_bytes(config: ModelConfig, active_parameters: int, length: int, weights: str) -> float:
    """Bytes that decoding one token at batch 1 cannot do without: working weights in their format, and the cache.

    Scales, norms and routers, which stay fp32, are left out: under one part in a hundred.
    """
    return working_weights(config, active_parameters) * BYTES_PER_WEIGHT[weights] + cache_bytes(config, length)
