"""Sparse Mixture of Experts with auxiliary-loss-free balancing (DeepSeek-V3, section 2.1.2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanokimi.config import ModelConfig
from nanokimi.model.layers import SwiGLU, at_least_fp32, gated
from nanokimi.model.roles import EXPERTS, MATRIX, Declaration
from nanokimi.products import grouped_linear


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
        weights: ``[tokens, K]`` gate values.
        experts: ``[tokens, K]`` indices of the chosen experts.
        scores: ``[tokens, E]`` unbiased scores.
    """

    weights: Tensor
    experts: Tensor
    scores: Tensor


class Router(nn.Module):
    """Scores in fp32; the bias steers the selection and never enters a gate value."""

    balance_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim))
        self.register_buffer("balance_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Routing:
        """``[tokens, D]`` -> ``Routing``."""
        with torch.autocast(x.device.type, enabled=False):
            logits = at_least_fp32(x) @ at_least_fp32(self.weight).T
        scores = logits.sigmoid() if self.config.score_func == "sigmoid" else logits.softmax(dim=-1)
        experts = self.reachable(scores.detach() + self.balance_bias).topk(self.config.n_activated_experts).indices
        weights = scores.gather(-1, experts)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(weights * self.config.route_scale, experts, scores)

    def reachable(self, biased: Tensor) -> Tensor:
        """Group-limited routing: masks with -inf all experts outside each token's best groups, ``[tokens, E]``."""
        groups = self.config.n_expert_groups
        if groups == self.config.n_limited_groups:
            return biased
        grouped: Tensor = biased.unflatten(-1, (groups, -1))
        best = 2 if self.config.score_func == "sigmoid" else 1
        group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)
        chosen = group_scores.topk(self.config.n_limited_groups, dim=-1).indices
        open_groups = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, chosen, True)
        return grouped.masked_fill(~open_groups.unsqueeze(-1), -torch.inf).flatten(-2)

    @torch.no_grad()
    def update_balance(self, counts: Tensor) -> None:
        """Moves each bias one step towards an even load, given the tokens each expert saw ``[E]``."""
        counts = counts.to(self.balance_bias.dtype)
        self.balance_bias += self.config.bias_update_rate * torch.sign(counts.mean() - counts)


class Experts(nn.Module):
    """The routed experts, each a SwiGLU: ``w1``, ``w3`` ``[E, F, D]`` and ``w2`` ``[E, D, F]``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n, dim, width = config.n_routed_experts, config.dim, config.moe_inter_dim
        self.w1 = nn.Parameter(torch.empty(n, width, dim))
        self.w2 = nn.Parameter(torch.empty(n, dim, width))
        self.w3 = nn.Parameter(torch.empty(n, width, dim))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """``[n, D] -> [n, D]``: the first ``counts[0]`` rows by the first expert, and so on; ``counts`` is ``[E]``.

        Every expert multiplies one dense block, and nothing is padded.
        """
        ends = counts.cumsum(0, dtype=torch.int32)
        hidden = gated(grouped_linear(rows, self.w1, ends), grouped_linear(rows, self.w3, ends))
        return grouped_linear(hidden, self.w2, ends)


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[order]`` of rows, whose gradient is gathered by ``inverse``: nothing is filled with zeros and added to."""
    out: Tensor = _Permutation.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return out


class _Permutation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class MoE(nn.Module):
    """Routed experts plus the shared ones, which every token visits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config)
        width = config.n_shared_experts * config.moe_inter_dim
        self.shared = SwiGLU(config.dim, width) if width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, T, D]`` -> output ``[B, T, D]``, tokens per expert ``[E]``, balance loss (a scalar)."""
        flat = x.flatten(0, 1)
        routing = self.router(flat)
        out, counts = self.routed(flat, routing)
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.view_as(x), counts, self.balance_loss(routing, x.shape[0])

    def routed(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """``[tokens, D] -> [tokens, D]``: each token's experts, weighted and summed; and the tokens of each, ``[E]``.

        Copies of the tokens are sorted by expert, and their results sorted back.
        """
        tokens, chosen = routing.experts.shape
        by_expert, order = routing.experts.flatten().sort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        numbers = torch.arange(self.config.n_routed_experts, device=x.device)
        ends = torch.searchsorted(by_expert, numbers, right=True, out_int32=True)
        counts = ends.diff(prepend=ends.new_zeros(1))
        copies = x.unsqueeze(1).expand(-1, chosen, -1).flatten(0, 1)
        results = self.experts(permute(copies, order, place), counts)
        out = permute(results, place, order).unflatten(0, (tokens, chosen))
        return (out * routing.weights.unsqueeze(-1).type_as(out)).sum(dim=1), counts

    def balance_loss(self, routing: Routing, sequences: int) -> Tensor:
        """Sequence-wise balance loss (DeepSeek-V3, equations 17 to 20), the mean over the sequences."""
        if not self.training or not self.config.aux_loss_coeff:
            return routing.scores.new_zeros(())
        scores = routing.scores.unflatten(0, (sequences, -1))
        chosen = torch.zeros_like(routing.scores).scatter_(-1, routing.experts, 1.0).view_as(scores)
        load = chosen.mean(dim=1) * self.config.n_routed_experts / self.config.n_activated_experts
        share = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=1)
        loss: Tensor = (load * share).sum(dim=-1).mean()
        return self.config.aux_loss_coeff * loss

    def declare(self) -> list[Declaration]:
        """The role of each own parameter; see ``model.roles``."""
        stacks = [(EXPERTS, self.experts.w1), (EXPERTS, self.experts.w2), (EXPERTS, self.experts.w3)]
        shared = [(MATRIX, p) for p in self.shared.parameters()] if self.shared is not None else []
        return [(MATRIX, self.router.weight), *stacks, *shared]
