"""Attention of one layer: what all kinds have in common, MLA, grouped-query attention, and rotary positions.

In Multi-head Latent Attention (MLA; DeepSeek-V2, section 2.1) one latent of rank R per token stands in for all keys and
values. Training expands it into keys and values of each head and runs a fused kernel. Decoding never does: ``wkv_b`` is
absorbed into the query and the output, so that attention runs in the latent space and the cache holds R + P numbers per
token and layer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanokimi.config import ModelConfig
from nanokimi.model.cache import CacheSlots
from nanokimi.model.layers import LATENT_EPS, Linear, RMSNorm, is_plain
from nanokimi.ops.attention import DocumentMask, causal_attention, largest_logits, masked_attention
from nanokimi.ops.products import at_least_fp32

QUERIES_AT_ONCE = 256  # of a long text after a cache: bounds the memory of the scores
QUERY_SHARE = 0.5  # of QK-Clip's factor, as a power: what the query takes where each head has a key of its own

Rope = tuple[Tensor, Tensor]


class QKRows(NamedTuple):
    """Rows of a weight that the attention logits of each head are linear in: what QK-Clip scales.

    Attributes:
        weight: ``[H * rows of a head, in]``.
        heads: H.
        rows: which of the rows of each head.
        power: QK-Clip multiplies the rows by this power of the head's factor; the powers of the weights that a logit is
            a product of add up to 1.
    """

    weight: nn.Parameter
    heads: int
    rows: slice
    power: float

    def of(self, tensor: Tensor) -> Tensor:
        """The rows of a ``tensor`` that has as many as the weight, as a view ``[H, rows, ...]``."""
        by_head: Tensor = tensor.unflatten(0, (self.heads, -1))
        return by_head[:, self.rows]


class Attention(nn.Module):
    """Causal attention with rotary positions: what every kind of it has in common.

    A kind says what a cache remembers of a token, how queries are made, how keys and values are made of what is
    remembered, and which weights the logits depend on. Its last projection is ``wo``.
    """

    wo: Linear

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.scale = softmax_scale(config)
        self.qk_widths = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        self.cache_widths = config.cache_widths

    def remembered(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """``[B, T, D]`` -> the two parts that a cache holds, ``[B, T, width]`` each: ``ModelConfig.cache_widths``."""
        raise NotImplementedError

    def queries(self, x: Tensor, rope: Rope) -> Tensor:
        """``[B, T, D] -> [B, H, T, N + P]``."""
        raise NotImplementedError

    def expand(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The parts remembered of S tokens -> keys ``[B, H, S, N + P]`` and values ``[B, H, S, V]`` of every head."""
        raise NotImplementedError

    def qk_rows(self) -> list[QKRows]:
        """The weights that attention logits are linear in."""
        raise NotImplementedError

    def attend_past(self, q: Tensor, past: Tensor, attn_mask: Tensor | None) -> Tensor:
        """T queries to S remembered tokens ``[B, S, sum of the widths]``; ``[B, T, H V]``.

        ``attn_mask``: bool, broadcasts to ``[B, H, T, S]``, what a query may attend to; None: to everything.
        """
        k, v = self.expand(*past.split(self.cache_widths, dim=-1))
        return masked_attention(q, k, v, self.scale, attn_mask).transpose(1, 2).flatten(2)

    def rotated(self, x: Tensor, rope: Rope) -> Tensor:
        """``[B, T, heads (N + P)] -> [B, T, heads, N + P]``; the last P of each head turn with their position."""
        nope, turning = x.unflatten(-1, (-1, sum(self.qk_widths))).split(self.qk_widths, dim=-1)
        return torch.cat((nope, apply_rope(turning, *rope)), dim=-1)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        slots: CacheSlots | None = None,
        *,
        mask: DocumentMask | None = None,
        counted: Tensor | None = None,
        exact: bool = False,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, D] -> [B, T, D]`` and the largest attention logit of each head, ``[H]``.

        The second value is an upper bound from the log-sum-exp (``exact``: the logit itself); it is None when the
        tokens attend to a cache, which nothing trains on.

        Args:
            slots: where in a cache the tokens go.
            mask: tokens attend within their document only.
            counted: bool ``[B, T]``; the logits of other queries are left out.
            last_only: output of the last position only, ``[B, 1, D]``; needs ``slots``.
        """
        parts = self.remembered(x, rope)
        if last_only:
            x, rope = x[:, -1:], (rope[0][..., -1:, :], rope[1][..., -1:, :])
        q = self.queries(x, rope)
        if slots is not None:
            past = slots.append(self.layer, torch.cat(parts, dim=-1))
            if past.shape[1] > x.shape[1]:
                attn_mask = None if slots.attn_mask is None else slots.attn_mask[..., -x.shape[1] :, :]
                return self.wo(self.attend_past(q, past, attn_mask)), None
        k, v = self.expand(*parts)
        out, lse = causal_attention(q, k, v, self.scale, mask)
        if exact:
            logits = largest_logits(q, k, self.scale, mask, counted)
        else:
            lse = lse.detach() if counted is None else lse.detach().masked_fill(~counted[:, None], -torch.inf)
            logits = lse.amax(dim=(0, 2))
        return self.wo(out.transpose(1, 2).flatten(2)), logits


class MLA(Attention):
    """Multi-head Latent Attention; remembers the normalised latent and the rotated key that all heads share."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        heads = config.n_heads
        if config.q_lora_rank:
            self.wq_a = Linear(config.dim, config.q_lora_rank, "query_key")
            self.q_norm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.wq_b = Linear(config.q_lora_rank, heads * config.qk_head_dim, "query_key")
        else:
            self.wq = Linear(config.dim, heads * config.qk_head_dim, "query_key")
        self.wkv_a = Linear(config.dim, config.kv_lora_rank + config.qk_rope_head_dim, "query_key")
        self.kv_norm = RMSNorm(config.kv_lora_rank, LATENT_EPS)
        self.wkv_b = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), "query_key")
        self.wo = Linear(heads * config.v_head_dim, config.dim)

    def remembered(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """``[B, T, D]`` -> normalised latent ``[B, T, R]`` and the rotated key all heads share ``[B, T, P]``."""
        latent, k_rope = self.wkv_a(x).split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), dim=-1)
        return self.kv_norm(latent), apply_rope(k_rope.unsqueeze(2), *rope).squeeze(2)

    def queries(self, x: Tensor, rope: Rope) -> Tensor:
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.config.q_lora_rank else self.wq(x)
        return self.rotated(q, rope).transpose(1, 2)

    def expand(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        heads, nope, value = self.config.n_heads, self.config.qk_nope_head_dim, self.config.v_head_dim
        k_nope, v = self.wkv_b(latent).unflatten(-1, (heads, nope + value)).split((nope, value), dim=-1)
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, heads, -1)
        return torch.cat((k_nope, k_rope), dim=-1).transpose(1, 2), v.transpose(1, 2)

    def attend_past(self, q: Tensor, past: Tensor, attn_mask: Tensor | None) -> Tensor:
        """The decoding form, or for many queries the training form: whichever multiplies less."""
        many = attn_mask is not None and q.shape[2] > self.worth_expanding()
        if many or not is_plain(self.wkv_b):
            return super().attend_past(q, past, attn_mask)
        return self.attend_absorbed(q, past, attn_mask)

    def worth_expanding(self) -> float:
        """From how many queries on expanding the past takes fewer multiplications than absorbing ``wkv_b``.

        A pair of query and entry costs 2 R + P absorbed and N + P + V expanded; an entry costs R (N + V) to expand.
        """
        rank, widths = self.config.kv_lora_rank, self.config.qk_nope_head_dim + self.config.v_head_dim
        saved = 2 * rank - widths
        return rank * widths / saved if saved > 0 else math.inf

    def attend_absorbed(self, q: Tensor, past: Tensor, attn_mask: Tensor | None) -> Tensor:
        """``attend_past`` in the latent space, where the past ``[B, S, R + P]`` is used as it is."""
        w_k, w_v = self.wkv_b_heads()
        q_nope, q_rope = q.transpose(1, 2).split(self.qk_widths, dim=-1)
        q = torch.cat((torch.einsum("bthn,hnr->bthr", q_nope, w_k), q_rope), dim=-1)
        mixed = []
        for start in range(0, q.shape[1], QUERIES_AT_ONCE):
            rows = slice(start, start + QUERIES_AT_ONCE)
            scores = at_least_fp32(torch.einsum("bthc,bsc->bhts", q[:, rows], past) * self.scale)
            if attn_mask is not None:
                scores = torch.where(attn_mask[..., rows, :], scores, -torch.inf)
            weights = scores.softmax(dim=-1).type_as(past)
            mixed.append(torch.einsum("bhts,bsr->bthr", weights, past[..., : self.config.kv_lora_rank]))
        return torch.einsum("bthr,hvr->bthv", torch.cat(mixed, dim=1), w_v).flatten(2)

    def wkv_b_heads(self) -> tuple[Tensor, Tensor]:
        """Views of ``wkv_b``: what makes the keys ``[H, N, R]``, what makes the values ``[H, V, R]``."""
        rows = (self.config.qk_nope_head_dim, self.config.v_head_dim)
        w_k, w_v = self.wkv_b.weight.unflatten(0, (self.config.n_heads, sum(rows))).split(rows, dim=1)
        return w_k, w_v

    def qk_rows(self) -> list[QKRows]:
        """The rotary key is shared by all heads, so the query takes the whole factor of the rotary part."""
        heads, nope = self.config.n_heads, self.config.qk_nope_head_dim
        query = (self.wq_b if self.config.q_lora_rank else self.wq).weight
        return [
            QKRows(query, heads, slice(nope), QUERY_SHARE),
            QKRows(query, heads, slice(nope, None), 1.0),
            QKRows(self.wkv_b.weight, heads, slice(nope), 1 - QUERY_SHARE),
        ]


class GroupedQuery(Attention):
    """Grouped-query attention (Ainslie et al., 2023): each head of keys and values serves several query heads.

    With as many of them as query heads it is multi-head attention (Vaswani et al., 2017). Remembers keys and values.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        heads, self.kv_heads = config.n_heads, config.key_value_heads
        self.wq = Linear(config.dim, heads * config.qk_head_dim, "query_key")
        self.wk = Linear(config.dim, self.kv_heads * config.qk_head_dim, "query_key")
        self.wv = Linear(config.dim, self.kv_heads * config.v_head_dim)
        self.wo = Linear(heads * config.v_head_dim, config.dim)

    def remembered(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """``[B, T, D]`` -> rotated keys and values, the heads one after the other."""
        return self.rotated(self.wk(x), rope).flatten(2), self.wv(x)

    def queries(self, x: Tensor, rope: Rope) -> Tensor:
        return self.rotated(self.wq(x), rope).transpose(1, 2)

    def expand(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        repeats = self.config.n_heads // self.kv_heads
        k, v = (part.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for part in (k, v))
        return (k, v) if repeats == 1 else (k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1))

    def qk_rows(self) -> list[QKRows]:
        """Keys that several heads share would be scaled for all of them: there the query takes the whole factor."""
        query, heads = self.wq.weight, self.config.n_heads
        if self.kv_heads < heads:
            return [QKRows(query, heads, slice(None), 1.0)]
        return [
            QKRows(query, heads, slice(None), QUERY_SHARE),
            QKRows(self.wk.weight, heads, slice(None), 1 - QUERY_SHARE),
        ]


# The values of ``ModelConfig.attention``.
ATTENTIONS: dict[str, type[Attention]] = {"mla": MLA, "mha": GroupedQuery, "gqa": GroupedQuery}


# ---- rotary positions ---------------------------------------------------------------------------
#
# RoPE (Su et al., 2021), and YaRN (Peng et al., 2023), which stretches it to longer contexts as in DeepSeek-V3 (its
# report, section 4.3): pairs that turn often within the original context stay as they are, pairs that hardly turn are
# slowed down by ``rope_factor``, those between are blended; and logits grow, as longer contexts flatten the attention.


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[max_seq_length, P / 2]`` in fp32 for every position of the context and every pair."""
    angles = torch.outer(torch.arange(config.max_seq_length, dtype=torch.float32), frequencies(config))
    scale = _growth(config, 1.0)  # where mscale and mscale_all_dim are not told apart: as in the paper, section 3.4
    if config.mscale and config.mscale_all_dim:
        scale = _growth(config, config.mscale) / _growth(config, config.mscale_all_dim)
    return angles.cos() * scale, angles.sin() * scale


def frequencies(config: ModelConfig) -> Tensor:
    """Radians per token of each pair ``[P / 2]``: ``theta ** (-2 i / P)``, stretched by YaRN (its section 3.2)."""
    width = config.qk_rope_head_dim
    powers = config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if config.rope_factor == 1:
        return 1.0 / powers
    first = max(math.floor(_pair_that_turns(config, config.beta_fast)), 0)
    last = min(math.ceil(_pair_that_turns(config, config.beta_slow)), width - 1)
    pairs = torch.arange(len(powers), dtype=torch.float32)
    kept = 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return 1.0 / (config.rope_factor * powers) * (1 - kept) + 1.0 / powers * kept


def _pair_that_turns(config: ModelConfig, turns: float) -> float:
    """Index, not a whole number, of the pair that makes so many full turns over the original context."""
    length, width = config.original_seq_len, config.qk_rope_head_dim
    return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))


def softmax_scale(config: ModelConfig) -> float:
    """The factor of attention logits: ``(N + P) ** -0.5``, corrected for YaRN over all dimensions."""
    return float(config.qk_head_dim**-0.5 * _growth(config, config.mscale_all_dim) ** 2)


def _growth(config: ModelConfig, mscale: float) -> float:
    """Square root of the factor by which logits grow when the context does; 1 without YaRN."""
    return 0.1 * mscale * math.log(config.rope_factor) + 1.0


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the interleaved pairs (0, 1), (2, 3), ... of ``x``.

    Args:
        x: ``[B, T, heads, P]``.
        cos, sin: ``[T, P / 2]`` in fp32, the positions of the T tokens; ``[B, T, P / 2]``: of each row's own.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)
