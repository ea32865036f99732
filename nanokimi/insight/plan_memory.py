"""Bytes that training takes on a rank, component by component.

What lies there from step to step is counted. What comes and goes is estimated from what each operation keeps for the
backward pass: without torch.compile, which keeps less, and with as many tokens for each expert as for any other.

Letters as in ``plan_layouts`` and ``model.layers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanokimi.config import ModelConfig
from nanokimi.insight.plan_layouts import Matrix, gathered, is_dealt, local, parameters, total_local
from nanokimi.insight.plan_shares import Shares, shares
from nanokimi.parallel.layout import ONE, Layout

FP32, INT64 = 4, 8
LOGIT_ROWS = 512  # that ops.loss takes at once; on a CPU so many entries of the vocabulary:
CPU_STRIP = 4096
CPU_BATCHED = 64 * 1024  # elements of a matrix up to which a CPU orthogonalises all of one shape together
STATIC = ("weights", "gradients", "momentum", "adamw", "tables")  # from step to step
IN_PASSES = ("activations", "half_weights", "root")  # all through forward and backward


@dataclass(frozen=True)
class Device:
    """How a device computes.

    Attributes:
        half: bf16 autocast.
        cuda: kernels of CUDA, else those of a CPU.
    """

    half: bool = True
    cuda: bool = True

    @property
    def product(self) -> int:
        """Bytes of a number that a matrix product makes."""
        return 2 if self.half else FP32

    @property
    def newton_schulz(self) -> int:
        """Bytes of a number in Newton-Schulz."""
        return 2 if self.cuda else FP32


GPU, CPU = Device(), Device(half=False, cuda=False)


def memory(
    config: ModelConfig, layout: Layout, sequences: int, *, device: Device = GPU, checkpointing: bool = False
) -> dict[str, float]:
    """Bytes on the rank that has most, by component; ``peak`` says how much of it is there at one time.

    Args:
        sequences: of one forward pass on one rank, ``max_seq_length`` tokens each.
        checkpointing: ``--activation_checkpointing``.

    Raises:
        UserError: the experts cannot be dealt out so.
    """
    layout.check_experts(config.n_routed_experts)
    matrices = parameters(config)
    tokens = sequences * config.max_seq_length
    weights = FP32 * total_local(matrices, layout)
    muon = FP32 * sum(local(m, layout) for m in matrices if m.muon)
    kept, halves = _kept(config, layout, device, checkpointing)
    return {
        "weights": weights,
        "gradients": weights,
        "momentum": muon,
        "adamw": 2 * (weights - muon),
        "tables": FP32 * config.max_seq_length * config.qk_rope_head_dim,
        "activations": tokens * kept,
        "half_weights": halves,
        "root": _root(matrices, layout),
        "blocks": FP32 * _blocks(matrices, layout) if layout.mode == "fsdp" else 0,
        "logits": _logits(config, tokens, device),
        "newton_schulz": max(_workspace(share, layout, device) for share in shares(config, layout)),
    }


def peak(parts: dict[str, float]) -> float:
    """The largest sum of components of ``memory`` that are there at one time: in a pass, or in the update."""
    passes = sum(parts[name] for name in IN_PASSES) + max(parts["blocks"], parts["logits"])
    return sum(parts[name] for name in STATIC) + max(passes, parts["newton_schulz"])


def replica_bytes(
    config: ModelConfig, sequences: int, *, ranks: int = 1, device: Device = GPU, checkpointing: bool = False
) -> float:
    """What each of ``ranks`` needs to hold a replica: the ``peak`` under ``--parallel ddp``."""
    layout = Layout("ddp", ranks) if ranks > 1 else ONE
    return peak(memory(config, layout, sequences, device=device, checkpointing=checkpointing))


# ---- kept for the backward pass -----------------------------------------------------------------


def _kept(config: ModelConfig, layout: Layout, device: Device, checkpointing: bool) -> tuple[float, float]:
    """Bytes per token that are kept at the most, and bytes of weights rounded to bf16, which autocast keeps too."""
    first, seconds = kept_by_attention(config, device), [kept_by_dense(config, device)] * config.n_dense_layers
    seconds += [kept_by_moe(config, device, dealt=layout.expert_parallel > 0)] * config.n_moe_layers
    halves = _halves(parameters(config), layout) if device.half else [0]
    end = kept_at_the_end(config, device)
    if not checkpointing:
        return sum(first + second for second in seconds) + end, sum(halves)
    inputs = config.n_layers * FP32 * config.dim
    return inputs + first + max(seconds) - FP32 * config.dim + end, max(halves)


def kept_by_norm(width: int, device: Device, *, mixed: bool = False) -> int:
    """Of an RMSNorm: its input and 1 / rms, in fp32; without a fused kernel the normalised input too.

    ``mixed``: the input is in half precision and the weight is not, which CUDA's fused kernel does not take.
    """
    fused = device.cuda and not (mixed and device.half)
    return FP32 * (width * (1 if fused else 2) + 1)


def kept_for_products(width: int, device: Device) -> int:
    """The input of two products: autocast rounds it for each of them."""
    return width * (2 * 2 if device.half else FP32)


def kept_by_attention(config: ModelConfig, device: Device) -> int:
    """Bytes per token of a block's first half."""
    heads, value, number = config.n_heads, config.v_head_dim, device.product
    multiple = 8 if device.cuda else 1
    width = -(-max(config.qk_head_dim, value) // multiple) * multiple  # see ops.attention
    kept = kept_by_norm(config.dim, device) + kept_for_products(config.dim, device)
    for rank in filter(None, (config.q_lora_rank, config.kv_lora_rank)):
        kept += kept_by_norm(rank, device, mixed=True) + rank * number
    if not device.half:
        kept += config.qk_rope_head_dim * FP32  # lies behind the latent, which the norm keeps
    kept += 4 * heads * width * number  # queries, keys, values, the output
    if width > config.qk_head_dim or width > value:
        kept += heads * value * number  # the output, brought into the order of the input, without padding
    if width == value and not device.cuda:
        kept += heads * config.qk_nope_head_dim * number  # values are a view of what has keys too
    return kept + heads * FP32  # log-sum-exp


def kept_by_dense(config: ModelConfig, device: Device) -> int:
    """Bytes per token of a block's second half with one MLP."""
    kept = kept_by_norm(config.dim, device) + kept_for_products(config.dim, device)
    return kept + 3 * config.inter_dim * device.product


def kept_by_moe(config: ModelConfig, device: Device, *, dealt: bool) -> int:
    """Bytes per token of a block's second half with experts, if all of them have as much to do."""
    dim, chosen, number = config.dim, config.n_activated_experts, device.product
    kept = kept_by_norm(dim, device) + dim * FP32  # the router's input
    kept += config.n_routed_experts * FP32 + chosen * INT64  # scores, choice
    if config.norm_topk_prob:
        kept += (chosen + 1) * FP32
    kept += (4 if dealt else 2) * chosen * INT64  # orders of rows
    rows = dim * number if dealt else kept_for_products(dim, device)  # rounded once, before they travel
    kept += chosen * (rows + (3 * config.moe_inter_dim + dim + 1) * number)
    if shared := config.n_shared_experts * config.moe_inter_dim:
        kept += (kept_for_products(dim, device) if device.half else 0) + 3 * shared * number
    return kept + (FP32 if config.aux_loss_coeff else 0)


def kept_at_the_end(config: ModelConfig, device: Device) -> int:
    """Bytes per token outside the blocks: ids, the last norm, the gradient of its output."""
    return INT64 + kept_by_norm(config.dim, device) + config.dim * device.product


def _halves(matrices: Sequence[Matrix], layout: Layout) -> list[int]:
    """Bytes of each block's weights in bf16; the router computes in fp32."""
    found: dict[int, int] = {}
    for m in matrices:
        if m.block is not None and m.role != "norm" and "router" not in m.name:
            here = m.numel // layout.expert_parallel if is_dealt(m, layout) else m.numel
            found[m.block] = found.get(m.block, 0) + 2 * here
    return list(found.values())


# ---- what comes and goes ------------------------------------------------------------------------


def _root(matrices: Sequence[Matrix], layout: Layout) -> int:
    """Embedding, last norm and head, gathered all through a pass, and the whole gradient of the head."""
    if layout.mode != "fsdp":
        return 0
    root = sum(gathered(m, layout) for m in matrices if m.block is None)
    return FP32 * (root + next(gathered(m, layout) for m in matrices if m.role == "head"))


def _blocks(matrices: Sequence[Matrix], layout: Layout) -> int:
    """Elements at the height of the backward pass, for the largest block.

    Four times all of it: weights, the next block's on their way, gradients, those of the block before on theirs. With
    replicas three times its shard: what is summed over them.
    """
    found: dict[int, tuple[int, int]] = {}
    for m in matrices:
        if m.block is not None:
            whole, part = found.get(m.block, (0, 0))
            found[m.block] = whole + gathered(m, layout), part + local(m, layout)
    return max(4 * whole + (3 * part if layout.replicas > 1 else 0) for whole, part in found.values())


def _logits(config: ModelConfig, tokens: int, device: Device) -> float:
    """Of ``ops.loss``: a chunk of logits, the gradient of the head in fp32, what is added to it and their sum."""
    vocab, dim = config.vocab_size, config.dim
    chunk = min(LOGIT_ROWS, tokens) * vocab * (FP32 + 2 if device.half else FP32)
    added = dim * (vocab if device.cuda else min(vocab, CPU_STRIP)) * (device.product + FP32)
    return chunk + FP32 * vocab * dim + added


def _workspace(share: Shares, layout: Layout, device: Device) -> float:
    """Bytes of Newton-Schulz on the rank that has most: updates, whole matrices, and the most of what is made of them.

    That is a batch of iterations (three matrices, two squares), rows on their way, or the results: this rank's, those
    of all in its rows, and on top what is exchanged.
    """
    number, (short, long) = device.newton_schulz, share.sides
    by_shape = device.cuda or short * long <= CPU_BATCHED
    together = share.batch if by_shape else share.largest
    batch = number * together * (3 + 2 * short / long)
    if layout.mode == "one":
        return FP32 * together + batch
    rows = share.local / layout.replicas + share.owned if share.sent else 0  # on their way to owners, or back
    gathered_shares = max(share.longest, default=0) * (layout.replicas + 2)
    results = (share.owned or share.batch) + share.local + max(rows, gathered_shares)
    return FP32 * (share.local + share.owned) + max(batch, FP32 * rows, number * results)
