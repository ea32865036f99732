"""Multi-head Latent Attention (DeepSeek-V2, section 2.1): training form and absorbed decoding form.

One latent of rank R per token stands in for all keys and values. Training expands it into per-head
keys and values and runs a fused kernel. Decoding never does: ``wkv_b`` is absorbed into the query
and the output, so that attention runs in the latent space and the cache holds R + P numbers per
token and layer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanokimi.config import ModelConfig
from nanokimi.model.cache import Place
from nanokimi.model.kernels import causal_attention, largest_logits, masked_attention
from nanokimi.model.layers import LATENT_EPS, Linear, RMSNorm, at_least_fp32
from nanokimi.model.roles import MATRIX, NORM, QUERY_KEY, Declaration
from nanokimi.model.rope import apply_rope, softmax_scale

QUERIES_AT_ONCE = 256  # of a long text behind a cache: bounds the memory of the scores


class QKHeads(NamedTuple):
    """Views ``[H, rows, in]`` of the weights that attention logits are linear in; see ``optim.qk_clip``."""

    q_nope: Tensor
    q_rope: Tensor
    k_nope: Tensor


class MLA(nn.Module):
    """Multi-head Latent Attention of one layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.scale = softmax_scale(config)
        heads = config.n_heads
        if config.q_lora_rank:
            self.wq_a = Linear(config.dim, config.q_lora_rank)
            self.q_norm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.wq_b = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        else:
            self.wq = Linear(config.dim, heads * config.qk_head_dim)
        self.wkv_a = Linear(config.dim, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_norm = RMSNorm(config.kv_lora_rank, LATENT_EPS)
        self.wkv_b = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.wo = Linear(heads * config.v_head_dim, config.dim)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        place: Place | None = None,
        *,
        documents: Tensor | None = None,
        exact: bool = False,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, D] -> [B, T, D]`` and the largest attention logit of each head, ``[H]``.

        The second value is an upper bound from the log-sum-exp (``exact``: the logit itself); it is
        None when the tokens attend through the cache, which nothing trains on.

        Args:
            place: where in a cache the tokens go.
            documents: ``[B, T]``; tokens attend to those with their own number only.
            last_only: output of the last position only, ``[B, 1, D]``; wants a ``place``.
        """
        latent, k_rope = self.latents(x, rope)
        if last_only:
            x, rope = x[:, -1:], (rope[0][..., -1:, :], rope[1][..., -1:, :])
        q_nope, q_rope = self.queries(x, rope)
        if place is not None:
            past = place.append(self.layer, torch.cat((latent, k_rope), dim=-1))
            if past.shape[1] > x.shape[1]:
                if place.hidden is not None and x.shape[1] > self.worth_expanding():
                    return self.wo(self.attend_expanded_past(q_nope, q_rope, past, place.hidden)), None
                return self.wo(self.attend_absorbed(q_nope, q_rope, past, place.hidden)), None
        out, logits = self.attend_expanded(q_nope, q_rope, latent, k_rope, documents, exact=exact)
        return self.wo(out), logits

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """``[B, T, D]`` -> position-free ``[B, T, H, N]`` and rotated ``[B, T, H, P]`` parts."""
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.config.q_lora_rank else self.wq(x)
        q = q.unflatten(-1, (self.config.n_heads, self.config.qk_head_dim))
        q_nope, q_rope = q.split((self.config.qk_nope_head_dim, self.config.qk_rope_head_dim), dim=-1)
        return q_nope, apply_rope(q_rope, *rope)

    def latents(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """``[B, T, D]`` -> normalised latent ``[B, T, R]`` and the rotated key all heads share ``[B, T, P]``."""
        latent, k_rope = self.wkv_a(x).split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), dim=-1)
        return self.kv_norm(latent), apply_rope(k_rope.unsqueeze(2), *rope).squeeze(2)

    def attend_expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, documents: Tensor | None, *, exact: bool
    ) -> tuple[Tensor, Tensor]:
        """Training form: per-head keys and values, causal within sequence or document; ``[B, T, H V]`` and ``[H]``."""
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
        k, v = self.expand(latent, k_rope)
        out, lse = causal_attention(q, k, v, self.scale, documents)
        logits = largest_logits(q, k, self.scale, documents) if exact else lse.detach().amax(dim=(0, 2))
        return out.transpose(1, 2).flatten(2), logits

    def attend_expanded_past(self, q_nope: Tensor, q_rope: Tensor, past: Tensor, hidden: Tensor) -> Tensor:
        """As ``attend_absorbed``, over keys and values of all S entries: cheaper for many queries."""
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
        k, v = self.expand(*past.split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), dim=-1))
        return masked_attention(q, k, v, self.scale, hidden).transpose(1, 2).flatten(2)

    def expand(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, S, R]`` and ``[B, S, P]`` -> keys ``[B, H, S, N + P]`` and values ``[B, H, S, V]`` of every head."""
        heads, nope, value = self.config.n_heads, self.config.qk_nope_head_dim, self.config.v_head_dim
        k_nope, v = self.wkv_b(latent).unflatten(-1, (heads, nope + value)).split((nope, value), dim=-1)
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, heads, -1)
        return torch.cat((k_nope, k_rope), dim=-1).transpose(1, 2), v.transpose(1, 2)

    def worth_expanding(self) -> float:
        """From how many queries on expanding the past takes fewer multiplications than absorbing ``wkv_b``.

        A pair of query and entry costs 2 R + P absorbed and N + P + V expanded; an entry costs R (N + V) to expand.
        """
        rank, widths = self.config.kv_lora_rank, self.config.qk_nope_head_dim + self.config.v_head_dim
        saved = 2 * rank - widths
        return rank * widths / saved if saved > 0 else math.inf

    def attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, past: Tensor, hidden: Tensor | None) -> Tensor:
        """Decoding form: T new queries against S cached entries ``[B, S, R + P]``; returns ``[B, T, H V]``.

        ``hidden`` is that of ``Place``; its last T rows count.
        """
        w_k, w_v = self.wkv_b_heads()
        q = torch.cat((torch.einsum("bthn,hnr->bthr", q_nope, w_k), q_rope), dim=-1)
        parts = q.split(QUERIES_AT_ONCE, dim=1)
        if hidden is None:
            mixed = [self.mix(part, past, None) for part in parts]
        else:
            masks = hidden[..., -q.shape[1] :, :].split(QUERIES_AT_ONCE, dim=-2)
            mixed = [self.mix(part, past, mask) for part, mask in zip(parts, masks, strict=True)]
        return torch.einsum("bthr,hvr->bthv", torch.cat(mixed, dim=1), w_v).flatten(2)

    def mix(self, q: Tensor, past: Tensor, hidden: Tensor | None) -> Tensor:
        """Queries ``[B, T, H, R + P]`` in latent space -> the latents that they attend to, mixed, ``[B, T, H, R]``."""
        scores = at_least_fp32(torch.einsum("bthc,bsc->bhts", q, past) * self.scale)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = scores.softmax(dim=-1).type_as(past)
        return torch.einsum("bhts,bsr->bthr", weights, past[..., : self.config.kv_lora_rank])

    def wkv_b_heads(self, wkv_b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Views of ``wkv_b``: what makes the keys ``[H, N, R]``, what makes the values ``[H, V, R]``."""
        rows = (self.config.qk_nope_head_dim, self.config.v_head_dim)
        weight = self.wkv_b.weight if wkv_b is None else wkv_b
        w_k, w_v = weight.unflatten(0, (self.config.n_heads, sum(rows))).split(rows, dim=1)
        return w_k, w_v

    def qk_weights(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The two weights whose rows attention logits are linear in, that of the queries and ``wkv_b``."""
        return (self.wq_b if self.config.q_lora_rank else self.wq).weight, self.wkv_b.weight

    def qk_heads(self, query: Tensor | None = None, wkv_b: Tensor | None = None) -> QKHeads:
        """The slices QK-Clip scales, as views into ``qk_weights()``, or into two tensors with as many rows."""
        weight = self.qk_weights()[0] if query is None else query
        per_head = weight.unflatten(0, (self.config.n_heads, self.config.qk_head_dim))
        q_nope, q_rope = per_head.split((self.config.qk_nope_head_dim, self.config.qk_rope_head_dim), dim=1)
        return QKHeads(q_nope, q_rope, self.wkv_b_heads(wkv_b)[0])

    def declare(self) -> list[Declaration]:
        """The role of each own parameter; see ``model.roles``."""
        if self.config.q_lora_rank:
            query = [(QUERY_KEY, self.wq_a.weight), (NORM, self.q_norm.weight), (QUERY_KEY, self.wq_b.weight)]
        else:
            query = [(QUERY_KEY, self.wq.weight)]
        latent = [(QUERY_KEY, self.wkv_a.weight), (NORM, self.kv_norm.weight), (QUERY_KEY, self.wkv_b.weight)]
        return [*query, *latent, (MATRIX, self.wo.weight)]
