"""Estimates how many bytes training takes on a rank, component by component, from a model on the meta device.

What lies there from step to step is counted. What comes and goes is estimated from what each operation keeps for the
backward pass: without torch.compile, which keeps less, and with as many tokens for each expert as for any other. The
largest preset takes seconds and no memory. Formulas and letters: docs/scaling.md, "What is counted".
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from nanokimi.config import ModelConfig
from nanokimi.parallel.layout import ONE, Layout, rows_of

if TYPE_CHECKING:
    from nanokimi.model.transformer import Transformer

FP32, INT64 = 4, 8
MUON_ROLES = ("query_key", "matrix", "experts")
LOGIT_ROWS = 512  # rows of logits that ops.loss makes at once; on a CPU so many entries of the vocabulary:
CPU_STRIP = 4096
CPU_BATCHED = 64 * 1024  # elements of a matrix up to which a CPU orthogonalises all of one shape together
STATIC = ("weights", "gradients", "momentum", "adamw", "tables")  # there from step to step
IN_PASSES = ("activations", "half_weights", "root")  # there all through forward and backward


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


# ---- parameters on the ranks --------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model, and how a layout cuts it.

    Attributes:
        name, shape: in the model, ``[rows, ...]``.
        role: as ``Transformer.param_roles`` names it.
        block: number of its layer; None for the root (embedding, last norm, head).
        dealt: ranks over which the experts of this stack are dealt out; 0 where they are not.
        cut: ranks over which FSDP cuts its rows, or the experts that are dealt to one rank.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    block: int | None
    dealt: int
    cut: int

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def local(self) -> int:
        """Elements on the rank that has most; FSDP pads those of the others."""
        return -(-self.shape[0] // max(1, self.dealt) // self.cut) * math.prod(self.shape[1:])

    @property
    def gathered(self) -> int:
        """Elements, padding among them, that a rank holds while it computes with the parameter."""
        return self.local * self.cut

    def rows_held(self) -> list[int]:
        """The rows that each shard rank holds, as ``parallel.fsdp`` cuts them."""
        ranks = max(1, self.dealt)
        cuts = (rows_of(self.shape[0] // ranks, self.cut, part) for part in range(self.cut))
        return [held.stop - held.start for held in cuts for _ in range(ranks)]


@lru_cache
def meta_model(config: ModelConfig) -> Transformer:
    """``Transformer(config)`` without memory for its weights."""
    import torch  # here: ``nanokimi --help`` imports this module

    from nanokimi.model.transformer import Transformer

    with torch.device("meta"):
        return Transformer(config)


@lru_cache
def parameters(config: ModelConfig, layout: Layout = ONE) -> tuple[Parameter, ...]:
    """Every parameter of the model, in the order of ``named_parameters``."""
    model = meta_model(config)
    roles = {id(parameter): role for role, parameter in model.param_roles()}
    found = []
    for name, parameter in model.named_parameters():
        role = roles[id(parameter)]
        block = int(name.split(".")[1]) if name.startswith("layers.") else None
        dealt = layout.expert_parallel if role == "experts" else 0
        found.append(Parameter(name, tuple(parameter.shape), role, block, dealt, layout.shards // max(1, dealt)))
    return tuple(found)


# ---- Newton-Schulz ------------------------------------------------------------------------------


@dataclass(frozen=True)
class MuonWork:
    """Newton-Schulz of the matrices of one role, dealt out over the ranks as ``parallel.distributed_muon`` does.

    Attributes:
        flops: of each rank, replica after replica.
        owned: elements of whole matrices that are sent to the rank that owns most.
        batch: elements that a rank multiplies in one batch at most, all of one shape; ``largest`` of one parameter.
        sides: short and long side of a matrix of that batch.
        longest: elements of the longest share of a replica, on each shard rank: the others are padded to it.
        sent: elements of all matrices that owners are sent; 0 where no rank holds only rows of them.
        local: elements of updates on a rank.
    """

    flops: list[int]
    owned: int
    batch: int
    largest: int
    sides: tuple[int, int]
    longest: list[int]
    sent: int
    local: int


@lru_cache
def muon_work(config: ModelConfig, layout: Layout) -> tuple[MuonWork, ...]:
    """The work of each of Muon's roles that the model has."""
    by_role = {role: [m for m in parameters(config, layout) if m.role == role] for role in MUON_ROLES}
    return tuple((_stacks if role == "experts" else _matrices)(m, layout) for role, m in by_role.items() if m)


def _matrices(matrices: Sequence[Parameter], layout: Layout) -> MuonWork:
    """Whole matrices, the dearest first."""
    ordered = sorted(matrices, key=lambda m: -_flops(m))
    owned = [[ordered[i] for i in mine] for mine in _deal(map(_flops, ordered), layout.ranks)]
    flops = [sum(map(_flops, mine)) for mine in owned]
    most = owned[flops.index(max(flops))]
    shapes = Counter(tuple(sorted(m.shape)) for m in most)
    (short, long), count = max(shapes.items(), key=lambda item: math.prod(item[0]) * item[1])
    travels = layout.shards > 1
    return MuonWork(
        flops=flops,
        owned=max(sum(m.numel for m in mine) for mine in owned) if travels else 0,
        batch=short * long * count,
        largest=max(m.numel for m in most),
        sides=(short, long),
        longest=_longest(owned, layout) if layout.replicas > 1 else [],
        sent=sum(m.numel for m in matrices) if travels else 0,
        local=sum(m.local for m in matrices),
    )


def _longest(owned: Sequence[Sequence[Parameter]], layout: Layout) -> list[int]:
    """Of what each replica owns, the elements that lie on a shard rank; of the replica that has most there."""
    replicas = [owned[first : first + layout.shards] for first in range(0, layout.ranks, layout.shards)]
    counts = [Counter(m.shape for mine in replica for m in mine) for replica in replicas]  # there are few shapes
    held = {m.shape: m.rows_held() for mine in owned for m in {m.shape: m for m in mine}.values()}
    return [
        max(sum(count * held[shape][shard] * shape[1] for shape, count in shapes.items()) for shapes in counts)
        for shard in range(layout.shards)
    ]


def _stacks(stacks: Sequence[Parameter], layout: Layout) -> MuonWork:
    """Experts stay where they are: those on a shard rank are dealt to its replicas, stack by stack, in even parts."""
    held = stacks[0].rows_held()
    loads: dict[int, list[int]] = {}
    for count in set(held):
        parts = min(count, layout.replicas)
        sizes = [count * (n + 1) // parts - count * n // parts for n in range(parts)] * len(stacks)
        loads[count] = [sum(sizes[i] for i in mine) for mine in _deal(sizes, layout.replicas)]
    short, long = sorted(stacks[0].shape[1:])
    size = short * long
    return MuonWork(
        flops=[loads[count][replica] * _flops(stacks[0]) for replica in range(layout.replicas) for count in held],
        owned=0,
        batch=max(map(max, loads.values())) * size,
        largest=-(-max(held) // layout.replicas) * size,
        sides=(short, long),
        longest=[max(loads[count]) * size for count in held] if layout.replicas > 1 else [],
        sent=0,
        local=sum(m.local for m in stacks),
    )


def _deal(costs: Iterable[int], workers: int) -> list[list[int]]:
    """Numbers of the jobs that each worker gets, when every job goes to the worker that has the least to do."""
    waiting = [(0, worker) for worker in range(workers)]
    dealt: list[list[int]] = [[] for _ in waiting]
    for number, cost in enumerate(costs):
        load, worker = waiting[0]
        dealt[worker].append(number)
        heapq.heapreplace(waiting, (load + cost, worker))
    return dealt


def _flops(parameter: Parameter) -> int:
    """Of Newton-Schulz on one matrix."""
    from nanokimi.ops.newton_schulz import newton_schulz_flops

    return newton_schulz_flops(*parameter.shape[-2:])


# ---- memory -------------------------------------------------------------------------------------


def memory(
    config: ModelConfig, layout: Layout, sequences: int, *, device: Device = GPU, checkpointing: bool = False
) -> dict[str, float]:
    """Bytes on the rank that has most, by component; ``peak`` says how much of it is there at one time.

    Args:
        sequences: of one forward pass on one rank, ``max_seq_length`` tokens each.
        checkpointing: ``--activation_checkpointing``.
    """
    placed = parameters(config, layout)
    tokens = sequences * config.max_seq_length
    weights = FP32 * sum(m.local for m in placed)
    muon = FP32 * sum(m.local for m in placed if m.role in MUON_ROLES)
    kept, half_weights = _kept(config, layout, device, checkpointing)
    fsdp = layout.mode == "fsdp"
    root = sum(m.gathered for m in placed if m.block is None) + sum(m.gathered for m in placed if m.role == "head")
    return {
        "weights": weights,
        "gradients": weights,
        "momentum": muon,
        "adamw": 2 * (weights - muon),
        "tables": FP32 * config.max_seq_length * config.qk_rope_head_dim,
        "activations": tokens * kept,
        "half_weights": half_weights,
        "root": FP32 * root if fsdp else 0,  # all gathered, and the whole gradient of the head
        "blocks": FP32 * _largest_block(placed, layout) if fsdp else 0,
        "logits": _logits(config, tokens, device),
        "newton_schulz": max(_workspace(work, layout, device) for work in muon_work(config, layout)),
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


def _largest_block(placed: Sequence[Parameter], layout: Layout) -> int:
    """Elements at the height of the backward pass.

    Four times the whole block: weights, the next block's on their way, gradients, those of the block before on theirs.
    With replicas three times its shard: what is summed over them.
    """
    blocks: dict[int, int] = {}
    for m in placed:
        if m.block is not None:
            blocks[m.block] = blocks.get(m.block, 0) + 4 * m.gathered + (3 * m.local if layout.replicas > 1 else 0)
    return max(blocks.values())


def _logits(config: ModelConfig, tokens: int, device: Device) -> float:
    """Of ``ops.loss``: a chunk of logits, the gradient of the head in fp32, what is added to it and their sum."""
    vocab, dim = config.vocab_size, config.dim
    chunk = min(LOGIT_ROWS, tokens) * vocab * (FP32 + 2 if device.half else FP32)
    added = dim * (vocab if device.cuda else min(vocab, CPU_STRIP)) * (device.product + FP32)
    return chunk + FP32 * vocab * dim + added


def _workspace(work: MuonWork, layout: Layout, device: Device) -> float:
    """Newton-Schulz on the rank that has most: updates, whole matrices, and the most of what is made of them.

    That is a batch of iterations (three matrices, two squares), rows on their way, or the results: this rank's, those
    of all in its rows, and on top what is exchanged.
    """
    number, (short, long) = device.newton_schulz, work.sides
    together = work.batch if device.cuda or short * long <= CPU_BATCHED else work.largest
    batch = number * together * (3 + 2 * short / long)
    if layout.mode == "one":
        return FP32 * together + batch
    rows = work.local / layout.replicas + work.owned if work.sent else 0  # on their way to owners, or back
    exchanged = max(work.longest, default=0) * (layout.replicas + 2)
    results = (work.owned or work.batch) + work.local + max(rows, exchanged)
    return FP32 * (work.local + work.owned) + max(batch, FP32 * rows, number * results)


# ---- what autograd keeps for the backward pass, in bytes per token -------------------------------


def _kept(config: ModelConfig, layout: Layout, device: Device, checkpointing: bool) -> tuple[float, float]:
    """What is kept at the most, and bytes of all weights that autocast rounded to bf16, which it keeps too."""
    attention = _kept_by_attention(config, device)
    dense = _kept_by_norm(config.dim, device) + _kept_for_products(config.dim, device)
    mlps = [dense + 3 * config.inter_dim * device.product] * config.n_dense_layers
    mlps += [_kept_by_moe(config, device, dealt=layout.expert_parallel > 0)] * config.n_moe_layers
    end = INT64 + _kept_by_norm(config.dim, device) + config.dim * device.product  # ids, last norm, its gradient
    rounded: Counter[int] = Counter({0: 0})  # by block; the router computes in fp32
    for m in parameters(config, layout) if device.half else ():
        if m.block is not None and m.role != "norm" and "router" not in m.name:
            rounded[m.block] += 2 * m.numel // max(1, m.dealt)
    if not checkpointing:
        return sum(attention + mlp for mlp in mlps) + end, rounded.total()
    inputs = config.n_layers * FP32 * config.dim
    return inputs + attention + max(mlps) - FP32 * config.dim + end, max(rounded.values())


def _kept_by_norm(width: int, device: Device, *, mixed: bool = False) -> int:
    """Of an RMSNorm: its input and 1 / rms, in fp32; without a fused kernel the normalised input too.

    ``mixed``: the input is in half precision and the weight is not, which CUDA's fused kernel does not take.
    """
    fused = device.cuda and not (mixed and device.half)
    return FP32 * (width * (1 if fused else 2) + 1)


def _kept_for_products(width: int, device: Device) -> int:
    """The input of two products: autocast rounds it for each of them."""
    return width * (2 * 2 if device.half else FP32)


def _kept_by_attention(config: ModelConfig, device: Device) -> int:
    heads, value, number = config.n_heads, config.v_head_dim, device.product
    multiple = 8 if device.cuda else 1
    width = -(-max(config.qk_head_dim, value) // multiple) * multiple  # see ops.attention
    kept = _kept_by_norm(config.dim, device) + _kept_for_products(config.dim, device)
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


def _kept_by_moe(config: ModelConfig, device: Device, *, dealt: bool) -> int:
    """All experts have as much to do; ``dealt``: they are dealt out over ranks."""
    dim, chosen, number = config.dim, config.n_activated_experts, device.product
    kept = _kept_by_norm(dim, device) + dim * FP32  # the router's input
    kept += config.n_routed_experts * FP32 + chosen * INT64  # scores, choice
    if config.norm_topk_prob:
        kept += (chosen + 1) * FP32
    kept += (4 if dealt else 2) * chosen * INT64  # orders of rows
    rows = dim * number if dealt else _kept_for_products(dim, device)  # rounded once, before they travel
    kept += chosen * (rows + (3 * config.moe_inter_dim + dim + 1) * number)
    if shared := config.n_shared_experts * config.moe_inter_dim:
        kept += (_kept_for_products(dim, device) if device.half else 0) + 3 * shared * number
    return kept + (FP32 if config.aux_loss_coeff else 0)
