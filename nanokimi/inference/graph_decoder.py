"""Decoding on CUDA without the cost of launching kernels: one recorded graph per shape of a step.

A step has a fixed shape: the first B slots, whether they take part or not, over the first S columns of the cache.
B and S are rounded up, so that few shapes occur, and each is recorded when it is first met. Positions lie on the
device; neither attention nor the experts ever ask the host how many tokens there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nanokimi.inference.decoder import EagerDecoder
from nanokimi.model.cache import ragged_slots
from nanokimi.model.moe import Experts, MoE
from nanokimi.model.transformer import Transformer
from nanokimi.ops.products import at_least_fp32

SHORTEST_SPAN = 128  # S doubles from here on
GATHER_COST = 3  # a gathered weight is read, written and read again


class GraphDecoder(EagerDecoder):
    """Prefills as ``EagerDecoder`` does and decodes by replaying graphs; the weights are used in place.

    Args:
        capture: False runs the same steps without recording them, on any device.
    """

    def __init__(
        self, model: Transformer, *, slots: int = 1, max_length: int | None = None, capture: bool = True
    ) -> None:
        super().__init__(model, slots=slots, max_length=max_length)
        self.pool = torch.cuda.graph_pool_handle() if capture else None
        self.steps: dict[tuple[int, int], FixedStep] = {}

    @torch.inference_mode()
    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """As ``Decoder`` says; slots in use cost least when they are the lowest."""
        self.check_room(slots)
        batch = _rounded_up(max(slots) + 1, 1, self.slots)
        span = _rounded_up(max(self.lengths[slot] for slot in slots) + 1, SHORTEST_SPAN, self.max_length)
        # Slots that take no part write after what they hold (or over the end of a full one, which nothing reads).
        positions = [min(length, self.max_length - 1) for length in self.lengths[:batch]]
        inputs = [0] * batch
        for slot, token in zip(slots, tokens, strict=True):
            inputs[slot] = token
        if (batch, span) not in self.steps:
            step = FixedStep(self.model, self.cache.entries[:, :batch], span)
            if self.pool is not None:
                step.capture(self.pool, positions)
            self.steps[batch, span] = step
        logits = self.steps[batch, span](inputs, positions)
        for slot in slots:
            self.lengths[slot] += 1
        return logits.index_select(0, torch.tensor(slots).to(self.device, non_blocking=True))


def _rounded_up(n: int, least: int, most: int) -> int:
    """The smallest of ``least``, 2 ``least``, 4 ``least``, ... that is ``n`` or more; never above ``most``."""
    size = least
    while size < n:
        size *= 2
    return min(size, most)


class FixedStep:
    """A step of B slots over S columns: ``[B]`` tokens at ``[B]`` positions give fp32 logits ``[B, vocab]``.

    The logits are valid until the next call of any step that shares the pool.
    """

    def __init__(self, model: Transformer, entries: Tensor, span: int) -> None:
        self.model, self.entries, self.span = model, entries, span
        self.inputs = torch.zeros(2, entries.shape[1], dtype=torch.int64, device=entries.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def __call__(self, tokens: list[int], positions: list[int]) -> Tensor:
        self.inputs.copy_(torch.tensor((tokens, positions)), non_blocking=True)
        if self.graph is None or self.logits is None:
            return self.run()
        self.graph.replay()
        return self.logits

    def capture(self, pool: Any, positions: list[int]) -> None:
        """Records the step; what it writes meanwhile lands at ``positions``, where the first real step does too."""
        self.inputs[1].copy_(torch.tensor(positions), non_blocking=True)
        with torch.cuda.device(self.entries.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries set themselves up outside the recording
                for _ in range(2):
                    self.run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.logits = self.run()
        self.graph = graph

    def run(self) -> Tensor:
        """The step itself, from ``inputs``: no shape in it depends on their values."""
        tokens, positions = self.inputs.unsqueeze(-1).unbind()  # [B, 1] each
        rows = torch.arange(len(tokens), device=tokens.device)
        slots = ragged_slots(self.entries, rows, positions, seen=slice(None), span=self.span)
        rope = (self.model.cos[positions], self.model.sin[positions])
        x = self.model.embed(tokens)
        for block in self.model.blocks():
            x = x + block.attention(block.attention_norm(x), rope, slots)[0]
            h = block.mlp_norm(x)
            x = x + (sparse_mlp(block.mlp, h) if isinstance(block.mlp, MoE) else block.mlp(h))
        return at_least_fp32(self.model.head(self.model.norm(x)))[:, 0]


def sparse_mlp(moe: MoE, x: Tensor) -> Tensor:
    """What ``moe`` makes of ``[B, 1, D]``, in shapes that do not depend on where its router sends the tokens."""
    flat = x.flatten(0, 1)
    routing = moe.router(flat)
    few = GATHER_COST * routing.experts.numel() < moe.config.n_routed_experts
    chosen = (gathered_experts if few else all_experts)(moe.experts, flat, routing.experts)
    out: Tensor = (chosen * routing.weights.unsqueeze(-1).type_as(chosen)).sum(dim=1)
    if moe.shared is not None:
        out = out + moe.shared(flat)
    return out.view_as(x)


def gathered_experts(experts: Experts, x: Tensor, chosen: Tensor) -> Tensor:
    """``[n, K, D]``: what the experts ``chosen`` ``[n, K]`` make of ``x`` ``[n, D]``; copies out their weights."""
    w1, w2, w3 = (w[chosen] for w in (experts.w1, experts.w2, experts.w3))  # [n, K, F, D], w2 [n, K, D, F]
    hidden = F.silu(torch.einsum("nd,nkfd->nkf", x, w1)) * torch.einsum("nd,nkfd->nkf", x, w3)
    return torch.einsum("nkf,nkdf->nkd", hidden, w2)


def all_experts(experts: Experts, x: Tensor, chosen: Tensor) -> Tensor:
    """The same, where all experts compute and the chosen outputs are picked: costs the reading of all weights once."""
    hidden = F.silu(x @ experts.w1.mT) * (x @ experts.w3.mT)  # [E, n, F]
    out = hidden @ experts.w2.mT  # [E, n, D]
    return out[chosen, torch.arange(len(x), device=x.device)[:, None]]
