"""Sparse Mixture of Experts with auxiliary-loss-free balancing (DeepSeek-V3, section 2.1.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanokimi.config import ModelConfig
from nanokimi.model.layers import ParamRole, PreciseBuffers, SwiGLU
from nanokimi.ops.products import at_least_fp32, gated, grouped_linear, permute


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


class Load(NamedTuple):
    """How even the experts' load was, over the tokens that count.

    Attributes:
        counts: ``[E]`` tokens that each expert saw.
        imbalance: ``[B]``, of each sequence: what the balance loss is the mean of; 1 at an even load.
    """

    counts: Tensor
    imbalance: Tensor


class Router(PreciseBuffers):
    """Scores in fp32; the bias steers the selection and never enters a gate value."""

    balance_bias: Tensor
    param_role: ParamRole = "matrix"

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
            weights = normalised(weights)
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


def normalised(scores: Tensor) -> Tensor:
    """``scores`` divided by the sum of each row; a row of zeros, as where all scores underflow, stays zero.

    The small number is that of DeepSeek-V3's published code, which every engine that reads these weights adds too.
    """
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)


class Experts(nn.Module):
    """The routed experts, each a SwiGLU: ``w1``, ``w3`` ``[E, F, D]`` and ``w2`` ``[E, D, F]``."""

    param_role: ParamRole = "experts"

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
        inner = gated(grouped_linear(rows, self.w1, ends), grouped_linear(rows, self.w3, ends))
        return grouped_linear(inner, self.w2, ends)


class MoE(nn.Module):
    """Routed experts plus the shared ones, which every token visits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config)
        width = config.n_shared_experts * config.moe_inter_dim
        self.shared = SwiGLU(config.dim, width) if width else None

    def forward(self, x: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Load | None]:
        """``[B, T, D] -> [B, T, D]``, and the load by the tokens ``counted``, bool ``[B, T]``; None: nobody asks."""
        flat = x.flatten(0, 1)
        routing = self.router(flat)
        out = self.routed(flat, routing)
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.view_as(x), None if counted is None else self.load(routing, counted)

    def routed(self, x: Tensor, routing: Routing) -> Tensor:
        """``[tokens, D] -> [tokens, D]``: what each token's experts make of it, weighted and summed.

        Copies of the tokens are sorted by expert, and their results sorted back.
        """
        tokens, chosen = routing.experts.shape
        by_expert, order = routing.experts.flatten().sort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        numbers = torch.arange(self.config.n_routed_experts, device=x.device)
        ends = torch.searchsorted(by_expert, numbers, right=True, out_int32=True)
        counts = ends.diff(prepend=ends.new_zeros(1))
        copies = x.unsqueeze(1).expand(-1, chosen, -1).flatten(0, 1)
        results = self.experts(permute(copies, order, inverse), counts)
        out = permute(results, inverse, order).unflatten(0, (tokens, chosen))
        weighted: Tensor = (out * routing.weights.unsqueeze(-1).type_as(out)).sum(dim=1)
        return weighted

    def load(self, routing: Routing, counted: Tensor) -> Load:
        """The load of the tokens ``counted``; its imbalance as in DeepSeek-V3, equations 17 to 20."""
        visited = torch.zeros_like(routing.scores, dtype=torch.bool).scatter_(-1, routing.experts, True)
        visited = visited.view(*counted.shape, -1) & counted.unsqueeze(-1)  # [B, T, E]
        tokens = counted.sum(dim=1, keepdim=True).clamp(min=1)
        scores = normalised(routing.scores).view(visited.shape)
        share = (scores * counted.unsqueeze(-1)).sum(dim=1) / tokens
        chosen = visited.sum(dim=1).to(scores.dtype) / tokens
        load = chosen * self.config.n_routed_experts / self.config.n_activated_experts
        return Load(visited.sum(dim=(0, 1)), (load * share).sum(dim=-1))
