"""Attention of one layer: what the rest of the package needs of it, and Multi-head Latent Attention.

In MLA (DeepSeek-V2, section 2.1) one latent of rank R per token stands in for all keys and values. Training expands it
into per-head keys and values and runs a fused kernel. Decoding never does: ``wkv_b`` is absorbed into the query and the
output, so that attention runs in the latent space and the cache holds R + P numbers per token and layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanokimi.config import ModelConfig
from nanokimi.model.cache import CacheSlots
from nanokimi.model.layers import LATENT_EPS, Linear, RMSNorm, is_plain
from nanokimi.model.roles import QUERY_KEY
from nanokimi.model.rope import apply_rope, softmax_scale
from nanokimi.ops.attention import causal_attention, largest_logits, masked_attention
from nanokimi.ops.products import at_least_fp32

QUERIES_AT_ONCE = 256  # of a long text behind a cache: bounds the memory of the scores
QUERY_SHARE = 0.5  # of QK-Clip's factor, as a power: what the query takes where each head has a key of its own

Rope = tuple[Tensor, Tensor]


class QKRows(NamedTuple):
    """Rows of a weight that the attention logits of each head are linear in: what QK-Clip scales.

    Attributes:
        weight: ``[H * rows of a head, in]``.
        heads: H.
        rows: which of the rows of each head.
        power: of the head's factor, by which they are multiplied; all of a head's add up to 1 for each logit.
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
    """Causal attention with rotary positions: the one interface to every kind of it.

    A kind says what is remembered of a token, how queries are made, how tokens attend to each other and to what is
    remembered, and which weights the logits depend on. Its last projection is ``wo``.
    """

    wo: Linear

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.scale = softmax_scale(config)

    def remembered(self, x: Tensor, rope: Rope) -> tuple[Tensor, ...]:
        """``[B, T, D]`` -> the parts that a cache holds, ``[B, T, width]`` each: ``ModelConfig.cache_widths``."""
        raise NotImplementedError

    def queries(self, x: Tensor, rope: Rope) -> Any:
        """``[B, T, D]`` -> queries, in the form that ``attend`` and ``attend_past`` take."""
        raise NotImplementedError

    def attend(
        self, q: Any, parts: Sequence[Tensor], documents: Tensor | None, counted: Tensor | None, *, exact: bool
    ) -> tuple[Tensor, Tensor]:
        """Among the T tokens themselves: ``[B, T, H V]``, and the largest logits ``[H]``; else as in ``forward``."""
        raise NotImplementedError

    def attend_past(self, q: Any, past: Tensor, hidden: Tensor | None) -> Tensor:
        """To S remembered tokens ``[B, S, sum of the widths]``; ``[B, T, H V]``.

        ``hidden``: bool, broadcasts to ``[B, H, T, S]``, what a token must not see; None: each sees all.
        """
        raise NotImplementedError

    def qk_rows(self) -> list[QKRows]:
        """The weights that attention logits are linear in."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        place: CacheSlots | None = None,
        *,
        documents: Tensor | None = None,
        counted: Tensor | None = None,
        exact: bool = False,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, D] -> [B, T, D]`` and the largest attention logit of each head, ``[H]``.

        The second value is an upper bound from the log-sum-exp (``exact``: the logit itself); it is None when the
        tokens attend to a cache, which nothing trains on.

        Args:
            place: where in a cache the tokens go.
            documents: ``[B, T]``; tokens attend to those with their own number only.
            counted: bool ``[B, T]``; the logits of other queries are left out.
            last_only: output of the last position only, ``[B, 1, D]``; wants a ``place``.
        """
        parts = self.remembered(x, rope)
        if last_only:
            x, rope = x[:, -1:], (rope[0][..., -1:, :], rope[1][..., -1:, :])
        q = self.queries(x, rope)
        if place is not None:
            past = place.append(self.layer, torch.cat(parts, dim=-1))
            if past.shape[1] > x.shape[1]:
                hidden = None if place.hidden is None else place.hidden[..., -x.shape[1] :, :]
                return self.wo(self.attend_past(q, past, hidden)), None
        out, logits = self.attend(q, parts, documents, counted, exact=exact)
        return self.wo(out), logits


def bounded_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None, counted: Tensor | None, *, exact: bool
) -> tuple[Tensor, Tensor]:
    """Causal attention ``[B, T, H V]``, and the largest logit of each head ``[H]`` or (not ``exact``) a bound of it.

    Args:
        q, k, v: ``[B, H, T, width]``.
    """
    out, lse = causal_attention(q, k, v, scale, documents)
    if exact:
        logits = largest_logits(q, k, scale, documents, counted)
    else:
        seen = lse.detach() if counted is None else lse.detach().masked_fill(~counted[:, None], -torch.inf)
        logits = seen.amax(dim=(0, 2))
    return out.transpose(1, 2).flatten(2), logits


class MLA(Attention):
    """Multi-head Latent Attention; remembers the normalised latent and the rotated key that all heads share."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        heads = config.n_heads
        if config.q_lora_rank:
            self.wq_a = Linear(config.dim, config.q_lora_rank, QUERY_KEY)
            self.q_norm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.wq_b = Linear(config.q_lora_rank, heads * config.qk_head_dim, QUERY_KEY)
        else:
            self.wq = Linear(config.dim, heads * config.qk_head_dim, QUERY_KEY)
        self.wkv_a = Linear(config.dim, config.kv_lora_rank + config.qk_rope_head_dim, QUERY_KEY)
        self.kv_norm = RMSNorm(config.kv_lora_rank, LATENT_EPS)
        self.wkv_b = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), QUERY_KEY)
        self.wo = Linear(heads * config.v_head_dim, config.dim)

    def queries(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """``[B, T, D]`` -> position-free ``[B, T, H, N]`` and rotated ``[B, T, H, P]`` parts."""
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.config.q_lora_rank else self.wq(x)
        q = q.unflatten(-1, (self.config.n_heads, self.config.qk_head_dim))
        q_nope, q_rope = q.split((self.config.qk_nope_head_dim, self.config.qk_rope_head_dim), dim=-1)
        return q_nope, apply_rope(q_rope, *rope)

    def remembered(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """``[B, T, D]`` -> normalised latent ``[B, T, R]`` and the rotated key all heads share ``[B, T, P]``."""
        latent, k_rope = self.wkv_a(x).split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), dim=-1)
        return self.kv_norm(latent), apply_rope(k_rope.unsqueeze(2), *rope).squeeze(2)

    def attend(
        self, q: Any, parts: Sequence[Tensor], documents: Tensor | None, counted: Tensor | None, *, exact: bool
    ) -> tuple[Tensor, Tensor]:
        """Training form: per-head keys and values, causal within sequence or document."""
        k, v = self.expand(*parts)
        return bounded_attention(torch.cat(q, -1).transpose(1, 2), k, v, self.scale, documents, counted, exact=exact)

    def attend_past(self, q: Any, past: Tensor, hidden: Tensor | None) -> Tensor:
        """Decoding form, or for many queries the training form: whichever multiplies less."""
        many = hidden is not None and q[0].shape[1] > self.worth_expanding()
        if many or not is_plain(self.wkv_b):
            k, v = self.expand(*past.split(self.config.cache_widths, dim=-1))
            out = masked_attention(torch.cat(q, dim=-1).transpose(1, 2), k, v, self.scale, hidden)
            return out.transpose(1, 2).flatten(2)
        q_nope, q_rope = q
        return self.attend_absorbed(q_nope, q_rope, past, hidden)

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
        """T new queries against S cached entries ``[B, S, R + P]`` in the latent space; returns ``[B, T, H V]``."""
        w_k, w_v = self.wkv_b_heads()
        q = torch.cat((torch.einsum("bthn,hnr->bthr", q_nope, w_k), q_rope), dim=-1)
        parts = q.split(QUERIES_AT_ONCE, dim=1)
        if hidden is None:
            mixed = [self.mix(part, past, None) for part in parts]
        else:
            masks = hidden.split(QUERIES_AT_ONCE, dim=-2)
            mixed = [self.mix(part, past, mask) for part, mask in zip(parts, masks, strict=True)]
        return torch.einsum("bthr,hvr->bthv", torch.cat(mixed, dim=1), w_v).flatten(2)

    def mix(self, q: Tensor, past: Tensor, hidden: Tensor | None) -> Tensor:
        """Queries ``[B, T, H, R + P]`` in latent space -> the latents that they attend to, mixed, ``[B, T, H, R]``."""
        scores = at_least_fp32(torch.einsum("bthc,bsc->bhts", q, past) * self.scale)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = scores.softmax(dim=-1).type_as(past)
        return torch.einsum("bhts,bsr->bthr", weights, past[..., : self.config.kv_lora_rank])

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
        heads, shared = config.n_heads, config.key_value_heads
        self.wq = Linear(config.dim, heads * config.qk_head_dim, QUERY_KEY)
        self.wk = Linear(config.dim, shared * config.qk_head_dim, QUERY_KEY)
        self.wv = Linear(config.dim, shared * config.v_head_dim)
        self.wo = Linear(heads * config.v_head_dim, config.dim)

    def rotated(self, x: Tensor, rope: Rope) -> Tensor:
        """``[B, T, heads (N + P)] -> [B, T, heads, N + P]``; the last P of each head turn with their position."""
        widths = (self.config.qk_nope_head_dim, self.config.qk_rope_head_dim)
        nope, turning = x.unflatten(-1, (-1, sum(widths))).split(widths, dim=-1)
        return torch.cat((nope, apply_rope(turning, *rope)), dim=-1)

    def queries(self, x: Tensor, rope: Rope) -> Tensor:
        """``[B, T, D] -> [B, H, T, N + P]``."""
        return self.rotated(self.wq(x), rope).transpose(1, 2)

    def remembered(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """``[B, T, D]`` -> rotated keys and values, the heads one after the other."""
        return self.rotated(self.wk(x), rope).flatten(2), self.wv(x)

    def expand(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What is remembered of S tokens, for every query head: ``[B, H, S, N + P]`` and ``[B, H, S, V]``."""
        return self.for_every_head(k), self.for_every_head(v)

    def for_every_head(self, part: Tensor) -> Tensor:
        """``[B, S, heads width] -> [B, H, S, width]``."""
        heads, shared = self.config.n_heads, self.config.key_value_heads
        by_head: Tensor = part.unflatten(-1, (shared, -1)).transpose(1, 2)
        return by_head if shared == heads else by_head.repeat_interleave(heads // shared, dim=1)

    def attend(
        self, q: Any, parts: Sequence[Tensor], documents: Tensor | None, counted: Tensor | None, *, exact: bool
    ) -> tuple[Tensor, Tensor]:
        """See ``Attention``."""
        k, v = self.expand(*parts)
        return bounded_attention(q, k, v, self.scale, documents, counted, exact=exact)

    def attend_past(self, q: Any, past: Tensor, hidden: Tensor | None) -> Tensor:
        """See ``Attention``."""
        k, v = self.expand(*past.split(self.config.cache_widths, dim=-1))
        return masked_attention(q, k, v, self.scale, hidden).transpose(1, 2).flatten(2)

    def qk_rows(self) -> list[QKRows]:
        """Keys that several heads share would be scaled for all of them: there the query takes the whole factor."""
        query, heads, own = self.wq.weight, self.config.n_heads, self.config.key_value_heads
        if own < heads:
            return [QKRows(query, heads, slice(None), 1.0)]
        return [
            QKRows(query, heads, slice(None), QUERY_SHARE),
            QKRows(self.wk.weight, heads, slice(None), 1 - QUERY_SHARE),
        ]


ATTENTIONS: dict[str, type[Attention]] = {
    "mla": MLA,
    "mha": GroupedQuery,
    "gqa": GroupedQuery,
}  # the values of ``ModelConfig.attention``
