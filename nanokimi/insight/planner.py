"""What training takes before anyone rents a device: memory, traffic and FLOPs of a step, and the time they add up to.

Plain arithmetic on shapes, which a model on the meta device has: the largest preset takes seconds and no memory.
Letters as in ``plan_layouts`` and ``model.layers``; formulas and assumptions in docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanokimi.config import ModelConfig
from nanokimi.flops import forward_flops, training_flops
from nanokimi.insight.plan_layouts import Matrix, gathered, is_dealt, local, parameters
from nanokimi.insight.plan_memory import CPU, GPU, Device, memory, peak, replica_bytes
from nanokimi.insight.plan_shares import busiest, shares
from nanokimi.parallel.layout import Layout, StepParts, share_of_step

__all__ = [
    "CPU", "GPU", "Device", "Job", "Layout", "Machine", "Matrix", "StepTime", "Transfer", "active_parameters", "memory",
    "parameters", "peak", "replica_bytes", "share_of_step", "step_time", "traffic", "transfers",
]  # fmt: skip

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")


def active_parameters(config: ModelConfig) -> int:
    """As ``Transformer.num_parameters(active=True)``: all but the routed experts that a token does not visit."""
    idle = config.n_routed_experts - config.n_activated_experts
    return sum(m.numel - (m.numel // m.shape[0] * idle if m.role == "experts" else 0) for m in parameters(config))


# ---- traffic ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transfer:
    """What one rank takes part in during a step, by one kind of collective.

    Attributes:
        what: in words.
        collective: one of COLLECTIVES.
        payload: bytes, the mean over the ranks: of ``all_gather`` the gathered buffer, of the others the buffer that
            goes in.
        group: ranks that exchange it, ``stride`` apart.
        when: what it overlaps with: ``pass`` forward and backward, ``last`` the last backward pass, ``wait`` nothing.
    """

    what: str
    collective: str
    payload: float
    group: int
    stride: int
    when: str

    @property
    def wire(self) -> float:
        """Bytes that each rank sends by the ring algorithms (Thakur et al., 2005)."""
        rounds = 2 if self.collective == "all_reduce" else 1
        return self.payload * rounds * (self.group - 1) / self.group


@dataclass(frozen=True)
class Job:
    """A step of a model on a layout.

    Attributes:
        parts: passes of a rank in a step, and the sequences of each.
        checkpointing: ``--activation_checkpointing``.

    Raises:
        UserError: the experts cannot be dealt out so.
    """

    config: ModelConfig
    layout: Layout
    parts: StepParts
    device: Device = GPU
    checkpointing: bool = False

    def __post_init__(self) -> None:
        self.layout.check_experts(self.config.n_routed_experts)

    @property
    def tokens(self) -> int:
        """Of one pass of a rank."""
        return self.parts.batch_size * self.config.max_seq_length

    def memory(self) -> dict[str, float]:
        """See ``memory``."""
        return memory(
            self.config, self.layout, self.parts.batch_size, device=self.device, checkpointing=self.checkpointing
        )


def transfers(job: Job, *, weight_bytes: int = 4, activation_bytes: int = 0, ns_bytes: int = 0) -> list[Transfer]:
    """Everything that is exchanged in a step, but for a few numbers on the host.

    Args:
        weight_bytes: of a weight or gradient.
        activation_bytes: of a number that a matrix product makes; 0 takes the device's.
        ns_bytes: of a number in Newton-Schulz; 0 takes the device's.
    """
    layout, matrices = job.layout, parameters(job.config)
    activation_bytes = activation_bytes or job.device.product
    ns_bytes = ns_bytes or job.device.newton_schulz
    found = _statistics(job, weight_bytes)
    if layout.mode == "fsdp":
        found += _of_shards(job, matrices, weight_bytes)
    elif layout.ranks > 1:
        every = weight_bytes * sum(m.numel for m in matrices)
        found.append(Transfer("gradients", "all_reduce", every, layout.ranks, 1, "last"))
    if layout.expert_parallel:
        found += _of_tokens(job, activation_bytes)
    found += _of_newton_schulz(job, weight_bytes, ns_bytes)
    return [transfer for transfer in found if transfer.group > 1 and transfer.payload]


def _of_shards(job: Job, matrices: Sequence[Matrix], number: int) -> list[Transfer]:
    """Blocks are gathered forward and backward, the root once; gradients go to their shards in every pass."""
    layout, passes = job.layout, job.parts.passes
    found = []
    for experts in (False, True):
        group, stride = layout.shards, 1
        if experts:
            group, stride = layout.shards // max(1, layout.expert_parallel), layout.expert_parallel
        mine = [m for m in matrices if is_dealt(m, layout) == experts]
        twice = sum(gathered(m, layout) * (1 if m.block is None else 2) for m in mine)
        whole = sum(gathered(m, layout) for m in mine)
        shard = sum(local(m, layout) for m in mine)
        what = " of experts" if experts else ""
        found += [
            Transfer(f"weights{what}", "all_gather", number * passes * twice, group, stride, "pass"),
            Transfer(f"gradients{what}", "reduce_scatter", number * passes * whole, group, stride, "pass"),
        ]
        between = f"gradients{what} between replicas"
        found.append(Transfer(between, "all_reduce", number * shard, layout.replicas, layout.shards, "last"))
    return found


def _of_tokens(job: Job, number: int) -> list[Transfer]:
    """Rows to their experts and back, the gradients the other way."""
    config, group = job.config, job.layout.expert_parallel
    times = config.n_moe_layers * job.parts.passes
    rows = times * job.tokens * config.n_activated_experts * config.dim
    forward = 2 if job.checkpointing else 1
    counts = 4 * times * forward * config.n_routed_experts  # int32
    each = rows * number * (forward + 1)
    return [
        Transfer("tokens to their experts", "all_to_all", each + counts, group, 1, "wait"),
        Transfer("tokens back", "all_to_all", each, group, 1, "wait"),
    ]


def _of_newton_schulz(job: Job, number: int, ns_bytes: int) -> list[Transfer]:
    """Rows to the owners of their matrices and back; then each replica's share to the others, padded."""
    layout, found = job.layout, shares(job.config, job.layout)
    sent = sum(share.sent for share in found) / layout.ranks
    longest = sum(sum(share.longest) for share in found) / layout.shards
    every = ns_bytes * layout.replicas * longest
    return [
        Transfer(
            "updates to their owners and back", "all_to_all", (number + ns_bytes) * sent, layout.shards, 1, "wait"
        ),
        Transfer("updates between replicas", "all_gather", every, layout.replicas, layout.shards, "wait"),
    ]


def _statistics(job: Job, number: int) -> list[Transfer]:
    """Largest logits; losses, labels, loads of experts, and where weights are cut the gradient norm: 8 bytes each."""
    config = job.config
    reduced = number * config.n_layers * config.n_heads + 8 * (3 + config.n_moe_layers * config.n_routed_experts)
    norm = 8 if job.layout.mode == "fsdp" else 0
    return [Transfer("statistics", "all_reduce", reduced + norm, job.layout.ranks, 1, "wait")]


def traffic(
    config: ModelConfig,
    layout: Layout,
    sequences_per_pass: int,
    passes: int,
    *,
    weight_bytes: int = 4,
    activation_bytes: int = 2,
    ns_bytes: int = 2,
    checkpointing: bool = False,
) -> dict[str, float]:
    """Payload of a rank in a step by collective, in bytes; see ``Transfer``."""
    job = Job(config, layout, StepParts(sequences_per_pass, passes), checkpointing=checkpointing)
    found = transfers(job, weight_bytes=weight_bytes, activation_bytes=activation_bytes, ns_bytes=ns_bytes)
    return {kind: sum(t.payload for t in found if t.collective == kind) for kind in COLLECTIVES}


# ---- time ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """The devices.

    Attributes:
        peak_flops: dense, of the numbers that products are in, per second and device.
        efficiency: share of them that products reach, an assumption.
        bandwidth: bytes per second that a device sends inside a node, ``network`` between nodes.
        ranks_per_node: devices side by side.
    """

    peak_flops: float = 989e12
    efficiency: float = 0.5
    bandwidth: float = 450e9
    network: float = 50e9
    ranks_per_node: int = 8

    def seconds(self, transfer: Transfer) -> float:
        """Of a transfer on its own: a ring enters a node by all devices of its group there; all-to-all by one's own."""
        near = min(transfer.group, max(1, self.ranks_per_node // transfer.stride))
        if near == transfer.group:
            return transfer.wire / self.bandwidth
        if transfer.collective != "all_to_all":
            return transfer.wire / min(self.bandwidth, self.network * near)
        inside, outside = near - 1, transfer.group - near
        return transfer.payload / transfer.group * max(inside / self.bandwidth, outside / self.network)


@dataclass(frozen=True)
class StepTime:
    """Seconds and FLOPs of a step, on the rank that has most to do.

    Attributes:
        model_flops: forward and backward.
        again: FLOPs that activation checkpointing computes twice; ``muon`` those of Newton-Schulz.
        computing: seconds of these.
        hidden: seconds of traffic that passes overlap with; ``exposed`` of all that computing waits for.
        seconds: of the step.
        utilisation: MFU, the share of the peak that forward and backward alone make up (Chowdhery et al., 2022).
    """

    model_flops: float
    again: float
    muon: float
    computing: float
    hidden: float
    exposed: float
    seconds: float
    utilisation: float


def step_time(job: Job, machine: Machine) -> StepTime:
    """A step whose gathering and scattering run beside computing, as far as that lasts; all else waits for itself."""
    config, parts = job.config, job.parts
    active, sequences = active_parameters(config), parts.batch_size * parts.passes
    model = training_flops(config, active, sequences, config.max_seq_length)
    head = 2 * config.vocab_size * config.dim * sequences * config.max_seq_length
    forward = forward_flops(config, active, sequences, config.max_seq_length)
    again = forward - head if job.checkpointing else 0
    muon = busiest(config, job.layout)
    rate = machine.peak_flops * machine.efficiency
    passing, backward = (model + again) / rate, (model - forward + again) / rate / parts.passes
    by_time = {"pass": 0.0, "last": 0.0, "wait": 0.0}
    for transfer in transfers(job):
        by_time[transfer.when] += machine.seconds(transfer)
    left = by_time["wait"] + max(0.0, by_time["pass"] - passing) + max(0.0, by_time["last"] - backward)
    computing = passing + muon / rate
    seconds = computing + left
    hidden = sum(by_time.values()) - left
    return StepTime(model, again, muon, computing, hidden, left, seconds, model / seconds / machine.peak_flops)
