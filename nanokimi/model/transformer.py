"""The network: embedding, blocks of attention and SwiGLU or MoE, head, losses, and the statistics of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanokimi.config import ModelConfig
from nanokimi.errors import ConfigError
from nanokimi.model.attention import ATTENTIONS, Attention, QKRows, rotary_tables
from nanokimi.model.cache import CacheSlots, LatentCache
from nanokimi.model.layers import Embedding, Linear, ParamRole, PreciseBuffers, RMSNorm, SwiGLU, is_plain, precise
from nanokimi.model.moe import Load, MoE, Router
from nanokimi.ops.attention import DocumentMask, document_mask
from nanokimi.ops.loss import IGNORED, linear_cross_entropy, linear_log_probabilities, log_probabilities_by
from nanokimi.ops.products import at_least_fp32, multiplied_dtype


class BlockStats(NamedTuple):
    """What a block reports beside its output: for QK-Clip, for the balance bias, for the loss."""

    max_logits: Tensor | None  # [H]
    load: Load | None


class Losses(NamedTuple):
    """Cross-entropy in nats, and the experts' balance loss; training minimises their sum ``loss``."""

    cross_entropy: Tensor
    balance: Tensor

    @property
    def loss(self) -> Tensor:
        """What to call ``backward()`` on."""
        return self.cross_entropy + self.balance


class Block(nn.Module):
    """One pre-norm layer; ``mlp`` is dense in the leading layers, sparse after them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention: Attention = ATTENTIONS[config.attention](config, layer)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        dense = layer < config.n_dense_layers
        self.mlp: SwiGLU | MoE = SwiGLU(config.dim, config.inter_dim) if dense else MoE(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        slots: CacheSlots | None,
        *,
        mask: DocumentMask | None = None,
        counted: Tensor | None = None,
        exact: bool,
        last_only: bool = False,
    ) -> tuple[Tensor, BlockStats]:
        """``[B, T, D] -> [B, T, D]`` (``last_only``: ``[B, 1, D]``) and what the layer has to report."""
        out, max_logits = self.attention(
            self.attention_norm(x), rope, slots, mask=mask, counted=counted, exact=exact, last_only=last_only
        )
        x = (x[:, -1:] if last_only else x) + out
        if isinstance(self.mlp, MoE):
            out, load = self.mlp(self.mlp_norm(x), counted)
            return x + out, BlockStats(max_logits, load)
        return x + self.mlp(self.mlp_norm(x)), BlockStats(max_logits, None)


class Transformer(PreciseBuffers):
    """A language model in the DeepSeek-V3 / Kimi K2 layout.

    Attributes:
        config: its ``ModelConfig``.
        max_logits: ``[L, H]``, the largest attention logit of each head over all training forward passes
            since ``reset_stats`` (-inf before the first).
        expert_counts: ``[MoE layers, E]``, the tokens each expert saw over the same passes.
        exact_logits: measure ``max_logits`` exactly instead of from above; costs most of an attention pass.
        checkpointing: keep only the input of each block in training, and compute the block again for its gradient
            (Chen et al., 2016): less memory, a third more time, the same results.

    Padding, and what comes after the last label of a sequence, enters neither the statistics nor the losses. The
    statistics are not buffers: DistributedDataParallel would overwrite those of every rank with the first one's.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.exact_logits = False
        self.checkpointing = False
        self.embed = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size, "head")
        for name in ("cos", "sin"):
            angles = torch.empty(config.max_seq_length, config.qk_rope_head_dim // 2)
            self.register_buffer(name, angles, persistent=False)
        self.max_logits = torch.empty(config.n_layers, config.n_heads)
        self.expert_counts = torch.empty(config.n_moe_layers, config.n_routed_experts, dtype=torch.int64)
        self.reset_parameters()
        self.reset_buffers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.max_logits, self.expert_counts = precise(fn, self.max_logits), precise(fn, self.expert_counts)
        return self

    # ---- initial values, files ------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Fresh weights: matrices and embedding normal with ``init_std``, norms one, balance biases zero."""
        for role, parameter in self.param_roles():
            self.fill(role, parameter)
        for router in self.routers():
            nn.init.zeros_(router.balance_bias)

    def fill(self, role: ParamRole, parameter: Tensor) -> None:
        """Fresh values for one parameter."""
        if role == "norm":
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=self.config.init_std)

    def reset_buffers(self) -> None:
        """Fills what no checkpoint holds: rotary tables and step statistics (after ``to_empty``, say)."""
        cos, sin = rotary_tables(self.config)
        self.cos.copy_(cos)
        self.sin.copy_(sin)
        self.reset_stats()

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Transformer:
        """The model of a checkpoint, of a Hugging Face folder, or of a hub repository ``owner/name``, for inference.

        Args:
            dtype: of the weights; tables, balance biases and statistics stay fp32.

        Raises:
            UserError: missing, damaged or foreign files, another architecture; the message says which and why.
        """
        from nanokimi.interop.loading import load_pretrained

        return load_pretrained(name, device).to(dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes weights and configuration as a Hugging Face folder, which transformers opens too; no tokenizer.

        Raises:
            UserError: ``folder`` is there already, or transformers has no such model.
        """
        from nanokimi.interop.hf_writer import save_model

        save_model(Path(folder), self.config, self.state_dict())

    # ---- forward --------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        cache: LatentCache | None = None,
        label_count: float | Tensor | None = None,
        per_token: bool = False,
        last_only: bool = False,
    ) -> Tensor | Losses:
        """Next-token logits, or with ``labels`` the losses of predicting them.

        Args:
            tokens: ``[B, T]`` int64, each below ``vocab_size``.
            labels: ``[B, T]`` int64, the token to predict at each place; -100 where none counts.
            documents: ``[B, T]`` int64: tokens attend to those with their own number only; -1 is padding.
            cache: continue after the tokens it holds, and add these to it.
            label_count: what the losses are divided by, a number or a scalar: the labels that count, of these
                sequences by default. With those of a whole step (under DistributedDataParallel or FSDP, which average
                over the ranks: divided by their number) the gradients of its parts add up to those of its mean.
            per_token: ``cross_entropy`` is that of each token, ``[B, T]``, 0 where no label counts: the negative
                log-probability of the label.
            last_only: logits of the last position only.

        Returns:
            logits ``[B, T, vocab]`` (``last_only``: ``[B, 1, vocab]``) in fp32, or ``Losses``.

        Raises:
            ValueError: more tokens than the context or the cache holds.
        """
        if labels is None:
            x, _ = self._run(tokens, cache=cache, documents=documents, last_only=last_only)
            return at_least_fp32(self.head(x[:, -1:] if last_only else x))
        assert cache is None, "losses are those of whole sequences"
        labelled = labels != IGNORED
        x, reports = self._run(tokens, documents=documents, labelled=labelled)
        count = labelled.sum().clamp(min=1) if label_count is None else label_count
        if isinstance(count, Tensor):
            count = count.to(torch.promote_types(x.dtype, torch.float32))  # not to change the losses' type
        cross_entropy = self._cross_entropy(x, labels, count, per_token=per_token)
        return Losses(cross_entropy, self._balance(reports, labelled, count, like=x))

    def hidden_states(self, tokens: Tensor, *, documents: Tensor | None = None) -> Tensor:
        """Normalised output of the last block, ``[B, T] -> [B, T, D]``: what the head makes logits of."""
        return self._run(tokens, documents=documents)[0]

    def _run(
        self,
        tokens: Tensor,
        *,
        cache: LatentCache | None = None,
        documents: Tensor | None = None,
        labelled: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, list[BlockStats]]:
        """Normalised output of the last block ``[B, T, D]``, and what each block had to report.

        Args:
            labelled: bool ``[B, T]``, where a label counts; None: there are no labels.
            last_only: with a cache the output is ``[B, 1, D]``, and the last layer computes no more than that and what
                it caches.
        """
        assert documents is None or (cache is None and documents.shape == tokens.shape)
        slots = cache.slots(tokens.shape[1]) if cache is not None else None
        end = slots.span if slots is not None else tokens.shape[1]
        if end > self.config.max_seq_length:
            raise ValueError(f"{end} tokens exceed the context of {self.config.max_seq_length} (max_seq_length)")
        # Positions run on across documents: rotated logits depend on distances alone (Su et al., 2021, section 3.2).
        positions = slots.positions if slots is not None else slice(end)
        rope = (self.cos[positions], self.sin[positions])
        counted = _counted(tokens, labelled, documents) if self.training and cache is None else None
        x, reports = self.embed(tokens), []
        mask = None if documents is None else document_mask(documents, multiplied_dtype(x))  # one for all layers
        for layer in self.blocks():
            narrow = last_only and slots is not None and layer is self.layers[-1]
            run = partial(checkpoint, layer, use_reentrant=False) if self.checkpointing and self.training else layer
            x, stats = run(x, rope, slots, mask=mask, counted=counted, exact=self.exact_logits, last_only=narrow)
            reports.append(stats)
        if cache is not None:
            cache.advance(tokens.shape[1])
        elif self.training:
            self.accumulate_stats(reports)
        return self.norm(x), reports

    # ---- losses ---------------------------------------------------------------------------------

    def _cross_entropy(self, x: Tensor, labels: Tensor, count: float | Tensor, *, per_token: bool) -> Tensor:
        """Sum over the labels that count, divided by ``count``; or the loss of each token."""
        rows, targets, fused = x.flatten(0, 1), labels.flatten(), is_plain(self.head)
        if fused and not per_token:
            return linear_cross_entropy(rows, self.head.weight, targets, count)
        if fused:
            found = linear_log_probabilities(rows, self.head.weight, targets)
        else:
            found = log_probabilities_by(self.head, rows, targets)
        return -found.view_as(labels) if per_token else -found.sum() / count

    def _balance(self, reports: list[BlockStats], labelled: Tensor, count: float | Tensor, *, like: Tensor) -> Tensor:
        """Sum of the layers' balance losses: of each the mean over the sequences, weighted by the labels that count."""
        coefficient, weights = self.config.aux_loss_coeff, labelled.sum(dim=1)
        loads = [stats.load for stats in reports if stats.load is not None]
        if not loads or not coefficient:
            return like.new_zeros(())
        return torch.stack([coefficient * ((load.imbalance * weights).sum() / count) for load in loads]).sum()

    # ---- statistics of a step -------------------------------------------------------------------

    @torch.no_grad()
    def accumulate_stats(self, reports: list[BlockStats]) -> None:
        """Adds one forward pass to ``max_logits`` and ``expert_counts``, without waiting for the device."""
        logits = torch.stack([stats.max_logits for stats in reports if stats.max_logits is not None])
        self.max_logits.copy_(torch.maximum(self.max_logits, logits))
        counts = [stats.load.counts for stats in reports if stats.load is not None]
        if counts:
            self.expert_counts += torch.stack(counts)

    @torch.no_grad()
    def reset_stats(self) -> None:
        """Forgets the forward passes seen so far: called after each optimizer step, taken or skipped."""
        self.max_logits.fill_(-torch.inf)
        self.expert_counts.zero_()

    def update_balance(self) -> None:
        """Moves the balance biases of all MoE layers by the load seen since ``reset_stats``."""
        for router, counts in zip(self.routers(), self.expert_counts, strict=True):
            router.update_balance(counts)

    # ---- parts ----------------------------------------------------------------------------------

    def blocks(self) -> list[Block]:
        """The layers, first to last, by their type."""
        return cast("list[Block]", list(self.layers))

    def moe_layers(self) -> list[MoE]:
        """The sparse layers, first to last."""
        return [block.mlp for block in self.blocks() if isinstance(block.mlp, MoE)]

    def routers(self) -> list[Router]:
        """Those of the sparse layers, first to last; an adapter around one is passed over."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def param_roles(self) -> list[tuple[ParamRole, nn.Parameter]]:
        """Every parameter once, with its role, by which ``MuonClip`` chooses how to update it.

        Initial weights are drawn in this order, and checkpoints hold the optimizer state in it.
        """
        blocks = [(b.attention_norm, b.mlp_norm, b.attention, b.mlp) for b in self.blocks()]
        parts = (self.embed, *chain.from_iterable(blocks), self.norm, self.head)
        holders = [module for part in parts for module in part.modules() if hasattr(module, "param_role")]
        return [(cast(ParamRole, module.param_role), p) for module in holders for p in module.parameters(recurse=False)]

    @property
    def logit_excess(self) -> float:
        """By how much ``max_logits`` may pass the true ones unless ``exact_logits``: log-sum-exp over a context."""
        return math.log(self.config.max_seq_length)

    def qk_rows(self) -> list[list[QKRows]]:
        """Per layer, the rows of weights that QK-Clip scales."""
        return [block.attention.qk_rows() for block in self.blocks()]

    def num_parameters(self, active: bool = False) -> int:
        """Parameters in all, or those that work on one token: all but the routed experts it does not visit."""
        total = sum(p.numel() for p in self.parameters())
        if not active:
            return total
        routed = sum(p.numel() for moe in self.moe_layers() for p in moe.experts.parameters())
        experts, active_experts = self.config.n_routed_experts, self.config.n_activated_experts
        return total - routed // experts * (experts - active_experts)


def _counted(tokens: Tensor, labelled: Tensor | None, documents: Tensor | None) -> Tensor:
    """What enters the statistics of a pass: all that a label can depend on, without padding. Bool ``[B, T]``."""
    counted = torch.ones_like(tokens, dtype=torch.bool)
    if labelled is not None:
        positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        counted = positions <= (labelled * positions).amax(dim=1, keepdim=True)  # up to the last label of a sequence
    return counted if documents is None else counted & (documents >= 0)


@cache
def meta_model(config: ModelConfig) -> Transformer:
    """``Transformer(config)`` on the meta device, for its names, shapes and counts: it needs no memory.

    ConfigError if a weight has more elements than 64 bits count, which is all that can fail there.
    """
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (TypeError, RuntimeError) as error:
        shape = f"dim {config.dim}, inter_dim {config.inter_dim}, moe_inter_dim {config.moe_inter_dim}"
        raise ConfigError(f"no memory could ever hold this model: lower its widths ({shape}, ...)") from error


def weight_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The shape of every tensor in the state dict of ``Transformer(config)``, by name."""
    return {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
