"""The network: embedding, blocks of MLA and SwiGLU or MoE, head, the losses and the state a step leaves behind."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanokimi.config import ModelConfig
from nanokimi.model.attention import MLA, QKHeads
from nanokimi.model.cache import LatentCache, Place
from nanokimi.model.layers import Linear, RMSNorm, SwiGLU, at_least_fp32
from nanokimi.model.loss import linear_cross_entropy
from nanokimi.model.moe import MoE
from nanokimi.model.roles import EMBEDDING, HEAD, MATRIX, NORM, Declaration, Role
from nanokimi.model.rope import rotary_tables


class BlockStats(NamedTuple):
    """What a block reports beside its output: for QK-Clip, for the balance bias, for the loss."""

    max_logits: Tensor | None  # [H]
    expert_counts: Tensor | None  # [E]
    balance_loss: Tensor | None  # scalar


class Losses(NamedTuple):
    """Mean cross-entropy per token in nats, and the experts' balance loss; both are minimised."""

    cross_entropy: Tensor
    balance: Tensor


class Block(nn.Module):
    """One pre-norm layer; ``mlp`` is dense in the leading layers, sparse behind them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = MLA(config, layer)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        dense = layer < config.n_dense_layers
        self.mlp: SwiGLU | MoE = SwiGLU(config.dim, config.inter_dim) if dense else MoE(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        place: Place | None,
        *,
        documents: Tensor | None = None,
        exact: bool,
        last_only: bool = False,
    ) -> tuple[Tensor, BlockStats]:
        """``[B, T, D] -> [B, T, D]`` (``last_only``: ``[B, 1, D]``) and what the layer has to report."""
        out, max_logits = self.attention(
            self.attention_norm(x), rope, place, documents=documents, exact=exact, last_only=last_only
        )
        x = (x[:, -1:] if last_only else x) + out
        if isinstance(self.mlp, MoE):
            out, counts, balance_loss = self.mlp(self.mlp_norm(x))
            return x + out, BlockStats(max_logits, counts, balance_loss)
        return x + self.mlp(self.mlp_norm(x)), BlockStats(max_logits, None, None)

    def declare(self) -> list[Declaration]:
        """The role of each own parameter; see ``model.roles``."""
        norms = [(NORM, self.attention_norm.weight), (NORM, self.mlp_norm.weight)]
        mlp = self.mlp.declare() if isinstance(self.mlp, MoE) else [(MATRIX, p) for p in self.mlp.parameters()]
        return [*norms, *self.attention.declare(), *mlp]


class Transformer(nn.Module):
    """A language model in the DeepSeek-V3 / Kimi K2 layout.

    Attributes:
        config: its ``ModelConfig``.
        max_logits: ``[L, H]``, the largest attention logit of each head over all training forward passes
            since ``reset_stats`` (-inf before the first).
        expert_counts: ``[MoE layers, E]``, the tokens each expert saw over the same passes.
        exact_logits: measure ``max_logits`` exactly instead of from above; costs most of an attention pass.
        checkpointing: keep only the input of each block in training, and compute the block again for its gradient
            (Chen et al., 2016): less memory, a third more time, the same results.
    """

    cos: Tensor
    sin: Tensor
    max_logits: Tensor
    expert_counts: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.exact_logits = False
        self.checkpointing = False
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size)
        for name in ("cos", "sin"):
            angles = torch.empty(config.max_seq_length, config.qk_rope_head_dim // 2)
            self.register_buffer(name, angles, persistent=False)
        self.register_buffer("max_logits", torch.empty(config.n_layers, config.n_heads), persistent=False)
        counts = torch.empty(config.n_moe_layers, config.n_routed_experts, dtype=torch.int64)
        self.register_buffer("expert_counts", counts, persistent=False)
        self.reset_parameters()
        self.reset_buffers()

    def reset_parameters(self) -> None:
        """Fresh weights: matrices and embedding normal with ``init_std``, norms one, balance biases zero."""
        for role, parameter in self.declare():
            self.fill(role, parameter)
        for moe in self.moe_layers():
            nn.init.zeros_(moe.router.balance_bias)

    def fill(self, role: Role, parameter: Tensor) -> None:
        """Fresh values for one parameter."""
        if role == NORM:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=self.config.init_std)

    def reset_buffers(self) -> None:
        """Fills what no checkpoint holds: rotary tables and step statistics (after ``to_empty``, say)."""
        cos, sin = rotary_tables(self.config)
        self.cos.copy_(cos)
        self.sin.copy_(sin)
        self.reset_stats()

    def forward(self, tokens: Tensor, cache: LatentCache | None = None, *, last_only: bool = False) -> Tensor:
        """Next-token logits.

        Args:
            tokens: ``[B, T]`` int64, each below ``vocab_size``.
            cache: continue behind the tokens it holds, and add these to it.
            last_only: logits of the last position only.

        Returns:
            ``[B, T, vocab]`` (``last_only``: ``[B, 1, vocab]``) in fp32.

        Raises:
            ValueError: more tokens than the context or the cache holds.
        """
        x, _ = self.hidden(tokens, cache, last_only=last_only)
        return at_least_fp32(self.head(x[:, -1:] if last_only else x))

    def loss(self, tokens: Tensor, labels: Tensor, documents: Tensor | None = None) -> Losses:
        """The losses of predicting ``labels`` ``[B, T]`` from ``tokens`` ``[B, T]``.

        With ``documents`` ``[B, T]`` (see ``document_numbers``) tokens attend within their document only.
        """
        x, balance = self.hidden(tokens, documents=documents)
        return Losses(linear_cross_entropy(x.flatten(0, 1), self.head.weight, labels.flatten()), balance)

    def hidden(
        self,
        tokens: Tensor,
        cache: LatentCache | None = None,
        *,
        documents: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Normalised output of the last block ``[B, T, D]``, and the sum of the layers' balance losses.

        ``last_only`` with a cache: ``[B, 1, D]``. The last layer then computes no more than that and what it caches.
        """
        assert documents is None or (cache is None and documents.shape == tokens.shape)
        place = cache.place(tokens.shape[1]) if cache is not None else None
        end = place.span if place is not None else tokens.shape[1]
        if end > self.config.max_seq_length:
            raise ValueError(f"{end} tokens exceed the context of {self.config.max_seq_length} (max_seq_length)")
        # Positions run on across documents: rotated logits depend on distances alone (Su et al., 2021, section 3.2).
        positions = place.positions if place is not None else slice(end)
        rope = (self.cos[positions], self.sin[positions])
        x = F.embedding(tokens, self.embed)
        reports = []
        for layer in self.blocks():
            narrow = last_only and place is not None and layer is self.layers[-1]
            run = partial(checkpoint, layer, use_reentrant=False) if self.checkpointing and self.training else layer
            x, stats = run(x, rope, place, documents=documents, exact=self.exact_logits, last_only=narrow)
            reports.append(stats)
        if cache is not None:
            cache.advance(tokens.shape[1])
        elif self.training:
            self.accumulate_stats(reports)
        balance = [stats.balance_loss for stats in reports if stats.balance_loss is not None]
        return self.norm(x), torch.stack(balance).sum() if balance else x.new_zeros(())

    @torch.no_grad()
    def accumulate_stats(self, reports: list[BlockStats]) -> None:
        """Adds one forward pass to ``max_logits`` and ``expert_counts``, without waiting for the device."""
        logits = torch.stack([stats.max_logits for stats in reports if stats.max_logits is not None])
        self.max_logits.copy_(torch.maximum(self.max_logits, logits))
        counts = [stats.expert_counts for stats in reports if stats.expert_counts is not None]
        if counts:
            self.expert_counts += torch.stack(counts)

    @torch.no_grad()
    def reset_stats(self) -> None:
        """Forgets the forward passes seen so far: called after each optimizer step, taken or skipped."""
        self.max_logits.fill_(-torch.inf)
        self.expert_counts.zero_()

    def update_balance(self) -> None:
        """Moves the balance biases of all MoE layers by the load seen since ``reset_stats``."""
        for moe, counts in zip(self.moe_layers(), self.expert_counts, strict=True):
            moe.router.update_balance(counts)

    def blocks(self) -> list[Block]:
        """The layers, first to last, by their type."""
        return cast("list[Block]", list(self.layers))

    def moe_layers(self) -> list[MoE]:
        """The sparse layers, first to last."""
        return [block.mlp for block in self.blocks() if isinstance(block.mlp, MoE)]

    def declare(self) -> list[Declaration]:
        """The role of every parameter, each once; what ``MuonClip`` goes by."""
        blocks = [declaration for block in self.blocks() for declaration in block.declare()]
        return [(EMBEDDING, self.embed), *blocks, (NORM, self.norm.weight), (HEAD, self.head.weight)]

    def qk_heads(self) -> list[QKHeads]:
        """Per layer, the views of the weights that QK-Clip scales."""
        return [block.attention.qk_heads() for block in self.blocks()]

    def num_parameters(self, active: bool = False) -> int:
        """Parameters in all, or those that work on one token: all but the routed experts it does not visit."""
        total = sum(p.numel() for p in self.parameters())
        if not active:
            return total
        routed = sum(p.numel() for moe in self.moe_layers() for p in moe.experts.parameters())
        return total - routed // self.config.n_routed_experts * (
            self.config.n_routed_experts - self.config.n_activated_experts
        )


def document_numbers(tokens: Tensor, eot_id: int) -> Tensor:
    """Numbers the documents of packed sequences: int64 ``[B, T] -> [B, T]``, from 0 in each sequence.

    An end-of-text token belongs to the document that it ends; the token behind it begins the next one.
    """
    ends = (tokens == eot_id).long()
    return ends.cumsum(-1) - ends
