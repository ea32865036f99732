"""Estimates how many bytes training takes on a rank, component by component, from a model on the meta device.

What lies there from step to step is counted. What comes and goes is estimated from what each operation keeps for the
backward pass: without torch.compile, which keeps less, and with as many tokens for each expert as for any other. The
largest preset takes seconds and no memory. Formulas and letters: docs/scaling.md, "What is counted".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from nanokimi.config import ModelConfig
from nanokimi.parallel.layout import ONE, Layout

if TYPE_CHECKING:
    import torch  # elsewhere inside functions: ``nanokimi --help`` imports this module

FP32, INT64 = 4, 8
# Components of ``memory``: those that lie there from step to step, and those that are there during all of a pass.
STATIC = ("weights", "gradients", "momentum (Muon)", "two moments (AdamW)", "rotary tables")
IN_CHECKPOINTS = ("weights", "momentum (Muon)", "two moments (AdamW)")
IN_PASSES = ("kept for the backward pass", "weights in bf16, kept too", "embedding and head, gathered")


class Device(NamedTuple):
    """How a device computes."""

    half: bool = True  # bf16 autocast
    cuda: bool = True  # kernels of CUDA, else those of a CPU

    @property
    def product(self) -> int:
        """Bytes of a number that a matrix product makes."""
        return 2 if self.half else FP32

    @property
    def operand(self) -> int:
        """Bytes of a number that goes into two products: autocast rounds it for each of them."""
        return 2 * 2 if self.half else FP32

    @property
    def newton_schulz(self) -> int:
        """Bytes of a number in Newton-Schulz."""
        return 2 if self.cuda else FP32


GPU, CPU = Device(), Device(half=False, cuda=False)


class Job(NamedTuple):
    """What is planned: training of a model on the ranks of a layout."""

    config: ModelConfig
    layout: Layout
    sequences: int  # of one forward pass on one rank, max_seq_length tokens each
    passes: int = 1  # of one rank in a step
    device: Device = GPU
    checkpointing: bool = False  # --activation_checkpointing

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass on one rank."""
        return self.sequences * self.config.max_seq_length


class Parameter(NamedTuple):
    """A parameter of the model, and how a layout cuts it."""

    name: str
    shape: torch.Size  # of the whole, [rows, ...]
    role: str  # its "param role"
    block: int | None  # number of its layer; None for the embedding, the last norm and the head
    expert_ranks: int  # ranks that these experts are distributed over; 0 where they are not
    held: list[int]  # how many rows each shard rank holds
    local: int  # elements on the rank that has most; FSDP pads those of the others
    gathered: int  # elements, padding among them, that a rank holds while it computes with the parameter


@cache
def parameters(config: ModelConfig, layout: Layout = ONE) -> tuple[Parameter, ...]:
    """Every parameter of the model, in the order of ``named_parameters``."""
    from nanokimi.model.transformer import meta_model

    model = meta_model(config)
    roles = {id(parameter): role for role, parameter in model.param_roles()}
    found = []
    for name, parameter in model.named_parameters():
        role, shape = roles[id(parameter)], parameter.shape
        block = int(name.split(".")[1]) if name.startswith("layers.") else None
        expert_ranks = layout.expert_parallel if role == "experts" else 0
        held = _rows_held(layout, shape[0], role == "experts")
        local = max(held) * math.prod(shape[1:])
        gathered = local * (layout.shards // max(1, expert_ranks))
        found.append(Parameter(name, shape, role, block, expert_ranks, held, local, gathered))
    return tuple(found)


@cache  # the same few numbers of rows come again and again
def _rows_held(layout: Layout, rows: int, experts: bool) -> list[int]:
    cuts = (layout.shard_rows(rows, shard, distributed=experts) for shard in range(layout.shards))
    return [held.stop - held.start for held in cuts]


class MuonWork(NamedTuple):
    """Newton-Schulz of the matrices of one role, as ``parallel.distributed_muon`` assigns them to the ranks."""

    flops: list[int]  # of each rank, replica after replica
    sent: int  # elements of all matrices that travel to owners; 0 where no rank holds only rows of them
    longest: list[int]  # on each shard rank, elements of the longest share of a replica: the others are padded to it
    workspace: float  # bytes on the rank that has most


@cache
def muon_work(config: ModelConfig, layout: Layout, device: Device) -> list[MuonWork]:
    """The work of each of Muon's roles that the model has."""
    from nanokimi.optim.muonclip import MUON_ROLES

    by_role = [[m for m in parameters(config, layout) if m.role == role] for role in MUON_ROLES]
    return [_work_of(matrices, layout, device) for matrices in by_role if matrices]


def _work_of(matrices: Sequence[Parameter], layout: Layout, device: Device) -> MuonWork:
    """In the workspace are updates, whole matrices, and the most of what is made of them.

    That is a batch of iterations (three matrices, two squares), rows on their way, or the results: this rank's, those
    of all in its rows, and on top what is exchanged.
    """
    from nanokimi.ops.newton_schulz import CPU_BATCHED_NUMEL, newton_schulz_flops

    ranks, shares = _assigned(matrices, layout)
    longest = [max(on_shard) for on_shard in zip(*shares, strict=True)] if layout.replicas > 1 else []
    flops = [sum(newton_schulz_flops(*sides) * n for sides, n in mine.items()) for mine in ranks]
    busiest = ranks[flops.index(max(flops))]
    (short, long), n = max(busiest.items(), key=lambda item: math.prod(item[0]) * item[1])
    batch = together = short * long * n
    stacked = len(matrices[0].shape) == 3
    if not device.cuda and short * long > CPU_BATCHED_NUMEL:  # one parameter at a time, or one part of a stack
        together = max(map(math.prod, busiest)) * (-(-max(matrices[0].held) // layout.replicas) if stacked else 1)
    number, local = device.newton_schulz, sum(m.local for m in matrices)
    iterations = number * together * (3 + 2 * short / long)
    if layout.mode == "one":
        return MuonWork(flops, 0, longest, FP32 * together + iterations)
    sent = owned = 0
    rows = 0.0  # on their way to owners, or back
    if layout.shards > 1 and not stacked:
        sent = sum(math.prod(m.shape) for m in matrices)
        owned = max(sum(math.prod(sides) * n for sides, n in mine.items()) for mine in ranks)
        rows = local / layout.replicas + owned
    results = (owned or batch) + local + max(rows, max(longest, default=0) * (layout.replicas + 2))
    workspace = FP32 * (local + owned) + max(iterations, FP32 * rows, number * results)
    return MuonWork(flops, sent, longest, workspace)


Sides = Counter[tuple[int, int]]  # how many matrices have these sides, the short one first


def _assigned(matrices: Sequence[Parameter], layout: Layout) -> tuple[list[Sides], list[list[int]]]:
    """The matrices that each rank orthogonalises; and of those of a replica the elements on each shard rank."""
    from nanokimi.parallel.distributed_muon import assign

    shapes, held = [m.shape for m in matrices], matrices[0].held
    kinds = kind_of = list(range(layout.shards))
    if len(shapes[0]) == 3:  # shards with equally many experts divide them alike: one shard of each kind is enough
        kinds = sorted(set(held))
        kind_of = [kinds.index(experts) for experts in held]
    some = Layout("fsdp", layout.replicas * len(kinds), layout.replicas)
    work = [[Sides() for _ in kinds] for _ in range(layout.replicas)]
    shares = [[0] * layout.shards for _ in range(layout.replicas)]
    for number, part, replica, kind in assign(shapes, [[slice(0, n) for n in kinds]] * len(shapes), some):
        *_, height, width = shapes[number]
        n = 1 if part is None else part.stop - part.start
        work[replica][kind][min(height, width), max(height, width)] += n
        rows = matrices[number].held if part is None else [n * height if other == kind else 0 for other in kind_of]
        shares[replica] = [before + here * width for before, here in zip(shares[replica], rows, strict=True)]
    return [of_kinds[kind] for of_kinds in work for kind in kind_of], shares


def memory(job: Job) -> dict[str, float]:
    """Bytes on the rank that has most, by component; ``peak`` says how much of it is there at one time."""
    from nanokimi.ops.loss import CPU_STRIP, ROWS_PER_CHUNK
    from nanokimi.optim.muonclip import MUON_ROLES

    config, layout, device, fsdp = job.config, job.layout, job.device, job.layout.mode == "fsdp"
    placed = parameters(config, layout)
    weights = FP32 * sum(m.local for m in placed)
    muon = FP32 * sum(m.local for m in placed if m.role in MUON_ROLES)
    kept, half_weights = _kept(job)
    # All of it, and the whole gradient of the head.
    root = sum(m.gathered * (2 if m.role == "head" else 1) for m in placed if m.block is None)
    # Four times the whole block: weights, the next block's on their way, gradients, those of the block before on
    # theirs. With replicas three times its shard: what is summed over them.
    blocks: Counter[int] = Counter()
    for m in placed:
        if m.block is not None:
            blocks[m.block] += 4 * m.gathered + (3 * m.local if layout.replicas > 1 else 0)
    vocab, rows = config.vocab_size, min(ROWS_PER_CHUNK, job.tokens)
    chunk = rows * vocab * (FP32 + 2 if device.half else FP32)
    # To the gradient of the head that of the chunk is added: that and the sum on CUDA whole, on a CPU a strip of them.
    added = config.dim * (vocab if device.cuda else min(vocab, CPU_STRIP)) * (device.product + FP32)
    return {
        "weights": weights,
        "gradients": weights,
        "momentum (Muon)": muon,
        "two moments (AdamW)": 2 * (weights - muon),
        "rotary tables": FP32 * config.max_seq_length * config.qk_rope_head_dim,
        "kept for the backward pass": job.tokens * kept,
        "weights in bf16, kept too": half_weights,
        "embedding and head, gathered": FP32 * root if fsdp else 0,
        "blocks on their way": FP32 * max(blocks.values()) if fsdp else 0,
        "a chunk of logits": chunk + added + FP32 * vocab * config.dim,
        "Newton-Schulz": max(work.workspace for work in muon_work(config, layout, device)),
    }


def peak(parts: dict[str, float]) -> float:
    """The largest sum of components of ``memory`` that are there at one time: in a pass, or in the update."""
    passes = sum(parts[name] for name in IN_PASSES) + max(parts["blocks on their way"], parts["a chunk of logits"])
    return sum(parts[name] for name in STATIC) + max(passes, parts["Newton-Schulz"])


# ---- what autograd keeps for the backward pass, in bytes per token -------------------------------


def _kept(job: Job) -> tuple[float, float]:
    """What is kept at the most, and bytes of all weights that autocast rounded to bf16, which it keeps too."""
    config, device = job.config, job.device
    attention = _kept_by_attention(config, device)
    dense = _kept_by_norm(config.dim, device) + config.dim * device.operand
    mlps = [dense + 3 * config.inter_dim * device.product] * config.n_dense_layers
    mlps += [_kept_by_moe(config, device, distributed=job.layout.expert_parallel > 0)] * config.n_moe_layers
    end = INT64 + _kept_by_norm(config.dim, device) + config.dim * device.product  # ids, last norm, its gradient
    rounded: Counter[int] = Counter({0: 0})  # by block; the router computes in fp32
    for m in parameters(config, job.layout) if device.half else ():
        if m.block is not None and m.role != "norm" and "router" not in m.name:
            rounded[m.block] += 2 * math.prod(m.shape) // max(1, m.expert_ranks)
    if not job.checkpointing:
        return sum(attention + mlp for mlp in mlps) + end, rounded.total()
    inputs = (config.n_layers - 1) * FP32 * config.dim  # of the other blocks
    return inputs + attention + max(mlps) + end, max(rounded.values())


def _kept_by_norm(width: int, device: Device, *, mixed: bool = False) -> int:
    """Of an RMSNorm: its input and 1 / rms, in fp32; without a fused kernel the normalised input too.

    ``mixed``: the input is in half precision and the weight is not, which CUDA's fused kernel does not take.
    """
    fused = device.cuda and not (mixed and device.half)
    return FP32 * (width * (1 if fused else 2) + 1)


def _kept_by_attention(config: ModelConfig, device: Device) -> int:
    heads, value, number = config.n_heads, config.v_head_dim, device.product
    multiple = 8 if device.cuda else 1
    width = -(-max(config.qk_head_dim, value) // multiple) * multiple  # see ops.attention
    kept = _kept_by_norm(config.dim, device) + config.dim * device.operand
    for rank in filter(None, (config.q_lora_rank, config.kv_lora_rank)):
        kept += _kept_by_norm(rank, device, mixed=True) + rank * number
    if not device.half:
        kept += config.qk_rope_head_dim * FP32  # lies after the latent, which the norm keeps
    kept += 4 * heads * width * number  # queries, keys, values, the output
    if width > config.qk_head_dim or width > value:
        kept += heads * value * number  # the output, brought into the order of the input, without padding
    if width == value and not device.cuda:
        kept += heads * config.qk_nope_head_dim * number  # values are a view of what has keys too
    return kept + heads * FP32  # log-sum-exp


def _kept_by_moe(config: ModelConfig, device: Device, *, distributed: bool) -> int:
    """All experts have as much to do."""
    dim, chosen, number = config.dim, config.n_activated_experts, device.product
    kept = _kept_by_norm(dim, device) + dim * FP32  # the router's input
    kept += config.n_routed_experts * FP32 + chosen * INT64  # scores, choice
    if config.norm_topk_prob:
        kept += (chosen + 1) * FP32
    kept += (4 if distributed else 2) * chosen * INT64  # orders of rows
    rows = dim * number if distributed else dim * device.operand  # rounded once, before they travel
    kept += chosen * (rows + (3 * config.moe_inter_dim + dim + 1) * number)
    if shared := config.n_shared_experts * config.moe_inter_dim:
        kept += (dim * device.operand if device.half else 0) + 3 * shared * number
    return kept + (FP32 if config.aux_loss_coeff else 0)
