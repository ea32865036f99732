"""``nanokimi plan``: memory, traffic, FLOPs and time of a training step on so many devices, and the layout to choose.

Plain arithmetic on the shapes of a model on the meta device. Formulas, letters and assumptions: docs/scaling.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanokimi.config import ModelConfig, TrainConfig, from_dict
from nanokimi.console import aligned
from nanokimi.errors import UserError
from nanokimi.parallel.layout import ONE, Layout, StepParts, share_of_step
from nanokimi.parallel.memory_estimate import FP32, GPU, Device, memory, meta_model, muon_work, parameters, peak

GB, TERA = 1e9, 1e12
COMPONENTS = {
    "weights": "weights",
    "gradients": "gradients",
    "momentum": "momentum (Muon)",
    "adamw": "two moments (AdamW)",
    "tables": "rotary tables",
    "activations": "kept for the backward pass",
    "half_weights": "weights in bf16, kept too",
    "root": "embedding and head, gathered",
    "blocks": "blocks on their way",
    "logits": "a chunk of logits",
    "newton_schulz": "Newton-Schulz",
}


@dataclass(frozen=True)
class Job:
    """A step of a model on a layout; UserError where its experts cannot be dealt out so."""

    config: ModelConfig
    layout: Layout
    parts: StepParts
    device: Device = GPU
    checkpointing: bool = False  # --activation_checkpointing

    def __post_init__(self) -> None:
        self.layout.check_experts(self.config.n_routed_experts)

    def memory(self) -> dict[str, float]:
        """Bytes of a rank by component."""
        sequences = self.parts.batch_size
        return memory(self.config, self.layout, sequences, device=self.device, checkpointing=self.checkpointing)


# ---- traffic ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transfer:
    """What one rank takes part in during a step, by one collective.

    Attributes:
        payload: bytes, the mean over the ranks: of ``all_gather`` the gathered buffer, else the buffer that goes in.
        group: ranks that exchange it, ``stride`` apart.
        overlap: what it runs beside: ``passes`` forward and backward, the ``last backward`` pass, or ``nothing``.
    """

    what: str
    collective: str
    payload: float
    group: int
    stride: int
    overlap: str

    @property
    def sent(self) -> float:
        """Bytes that each rank sends by the ring algorithms (Thakur et al., 2005)."""
        rounds = 2 if self.collective == "all_reduce" else 1
        return self.payload * rounds * (self.group - 1) / self.group


def transfers(job: Job) -> list[Transfer]:
    """Everything that is exchanged in a step, but for a few numbers on the host."""
    config, layout = job.config, job.layout
    # Largest logits; losses, labels, loads of experts, and where weights are cut the gradient norm: 8 bytes each.
    numbers = 3 + config.n_moe_layers * config.n_routed_experts + (layout.mode == "fsdp")
    statistics = FP32 * config.n_layers * config.n_heads + 8 * numbers
    found = [Transfer("statistics", "all_reduce", statistics, layout.ranks, 1, "nothing")]
    if layout.mode == "fsdp":
        found += _of_shards(job, experts=False) + _of_shards(job, experts=True)
    else:
        gradients = FP32 * meta_model(config).num_parameters()
        found.append(Transfer("gradients", "all_reduce", gradients, layout.ranks, 1, "last backward"))
    if layout.expert_parallel:
        found += _of_tokens(job)
    work, number = muon_work(config, layout), job.device.newton_schulz
    sent = (FP32 + number) * (sum(one.sent for one in work) / layout.ranks)
    shared = number * layout.replicas * (sum(sum(one.longest) for one in work) / layout.shards)
    found += [
        Transfer("updates to their owners and back", "all_to_all", sent, layout.shards, 1, "nothing"),
        Transfer("updates between replicas", "all_gather", shared, layout.replicas, layout.shards, "nothing"),
    ]
    return [transfer for transfer in found if transfer.group > 1 and transfer.payload]


def _of_shards(job: Job, *, experts: bool) -> list[Transfer]:
    """Blocks are gathered forward and backward, the root once; gradients go to their shards in every pass.

    ``experts``: of the stacks of experts that are dealt out, else of everything else.
    """
    layout, passes = job.layout, job.parts.passes
    stride = layout.expert_parallel if experts else 1
    group = layout.shards // max(1, stride)
    mine = [m for m in parameters(job.config, layout) if bool(m.dealt) == experts]
    whole = FP32 * passes * sum(m.gathered for m in mine)
    twice = whole + FP32 * passes * sum(m.gathered for m in mine if m.block is not None)
    local = FP32 * sum(m.local for m in mine)
    what = " of experts" if experts else ""
    return [
        Transfer(f"weights{what}", "all_gather", twice, group, stride, "passes"),
        Transfer(f"gradients{what}", "reduce_scatter", whole, group, stride, "passes"),
        Transfer(
            f"gradients{what} between replicas", "all_reduce", local, layout.replicas, layout.shards, "last backward"
        ),
    ]


def _of_tokens(job: Job) -> list[Transfer]:
    """Rows to their experts and back, the gradients the other way."""
    config, group = job.config, job.layout.expert_parallel
    times = config.n_moe_layers * job.parts.passes
    rows = times * job.parts.batch_size * config.max_seq_length * config.n_activated_experts * config.dim
    forward = 2 if job.checkpointing else 1
    counts = 4 * times * forward * config.n_routed_experts  # int32
    each = rows * job.device.product * (forward + 1)
    return [
        Transfer("tokens to their experts", "all_to_all", each + counts, group, 1, "nothing"),
        Transfer("tokens back", "all_to_all", each, group, 1, "nothing"),
    ]


# ---- FLOPs and time -----------------------------------------------------------------------------


def working_weights(config: ModelConfig, active_parameters: int) -> int:
    """Active weights without the input embedding, of which a token reads one row."""
    return active_parameters - config.vocab_size * config.dim


def forward_flops(config: ModelConfig, active_parameters: int, batch_size: int, length: int) -> int:
    """FLOPs of a forward pass: 2 per working weight and token, and attention.

    Attention is causal and in its expanded form: each of the ``length (length + 1) / 2`` pairs of a query and a key
    costs a head ``qk_head_dim + v_head_dim`` multiply-adds.
    """
    pairs = batch_size * length * (length + 1) // 2
    attention = 2 * config.n_layers * config.n_heads * (config.qk_head_dim + config.v_head_dim) * pairs
    return 2 * working_weights(config, active_parameters) * batch_size * length + attention


@dataclass(frozen=True)
class Machine:
    """The devices.

    Attributes:
        peak_flops: dense, of the numbers that products are in, per second and device.
        efficiency: share of them that products reach, an assumption.
        bandwidth: bytes per second that a device sends inside a node, ``network`` between nodes.
        ranks_per_node: devices side by side.
        memory: bytes of each.
    """

    peak_flops: float = 989e12
    efficiency: float = 0.5
    bandwidth: float = 450e9
    network: float = 50e9
    ranks_per_node: int = 8
    memory: float = 80e9

    def seconds(self, transfer: Transfer) -> float:
        """Of a transfer on its own: a ring enters a node by all devices of its group there; all-to-all by one's own."""
        near = min(transfer.group, max(1, self.ranks_per_node // transfer.stride))
        if near == transfer.group:
            return transfer.sent / self.bandwidth
        if transfer.collective != "all_to_all":
            return transfer.sent / min(self.bandwidth, self.network * near)
        inside, outside = near - 1, transfer.group - near
        return transfer.payload / transfer.group * max(inside / self.bandwidth, outside / self.network)


@dataclass(frozen=True)
class StepTime:
    """Seconds and FLOPs of a step, on the rank that has most to do.

    Attributes:
        model_flops: forward, and twice that backward (Kaplan et al., 2020, section 2.1).
        again: FLOPs that activation checkpointing computes twice; ``muon`` those of Newton-Schulz.
        computing: seconds of all these FLOPs.
        overlapped: seconds of traffic beside the passes; ``exposed`` of traffic that computing waits for.
        seconds: of the step.
        utilisation: MFU, the share of the peak that forward and backward alone make up (Chowdhery et al., 2022).
    """

    model_flops: float
    again: float
    muon: float
    computing: float
    overlapped: float
    exposed: float
    seconds: float
    utilisation: float


def step_time(job: Job, machine: Machine) -> StepTime:
    """A step whose gathering and scattering run beside computing, as far as that lasts; all else waits for itself."""
    config, parts = job.config, job.parts
    shape = (parts.batch_size * parts.passes, config.max_seq_length)
    forward = forward_flops(config, meta_model(config).num_parameters(active=True), *shape)
    model, head = 3 * forward, 2 * config.vocab_size * config.dim * math.prod(shape)
    again = forward - head if job.checkpointing else 0
    muon = max(map(sum, zip(*(work.flops for work in muon_work(config, job.layout)), strict=True)))
    rate = machine.peak_flops * machine.efficiency
    passing, backward = (model + again) / rate, (model - forward + again) / rate / parts.passes
    traffic = {"passes": 0.0, "last backward": 0.0, "nothing": 0.0}
    for transfer in transfers(job):
        traffic[transfer.overlap] += machine.seconds(transfer)
    exposed = traffic["nothing"] + max(0.0, traffic["passes"] - passing) + max(0.0, traffic["last backward"] - backward)
    computing = passing + muon / rate
    seconds = computing + exposed
    overlapped = sum(traffic.values()) - exposed
    return StepTime(model, again, muon, computing, overlapped, exposed, seconds, model / seconds / machine.peak_flops)


# ---- the command --------------------------------------------------------------------------------


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that ``plan_lines`` reads beside those of the configs."""
    machine = Machine()
    for flag, metavar, default, about in (
        ("ranks", "N", 8, "devices in all "),
        ("ranks_per_node", "N", machine.ranks_per_node, ""),
        ("device_memory", "GB", machine.memory / GB, ""),
        ("peak_tflops", "N", machine.peak_flops / TERA, "peak of a device, dense "),
        ("efficiency", "SHARE", machine.efficiency, "share of the peak that matrix products reach: an assumption "),
        ("bandwidth", "GB", machine.bandwidth / GB, "that a device sends in a second inside a node "),
        ("network", "GB", machine.network / GB, "that a device sends in a second between nodes "),
    ):
        spellings = dict.fromkeys((f"--{flag}", f"--{flag.replace('_', '-')}"))
        about += "(default: %(default)s" + (", bf16 of an H100)" if flag == "peak_tflops" else ")")
        parser.add_argument(*spellings, type=type(default), default=default, metavar=metavar, help=about)


def plan_lines(args: argparse.Namespace, train: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the report: of the layout that was asked for, or of all that are worth a look.

    ``train`` and ``model`` are settings by field name.

    Raises:
        UserError: a value is out of range; the step, the experts or the ranks do not divide.
    """
    machine, settings = _machine(args), from_dict(TrainConfig, train)
    config = ModelConfig.preset(settings.preset, **model)
    if config.attention != "mla":
        raise UserError(f"--set attention={config.attention}: the plan's formulas are those of mla: leave it out")
    if settings.optimizer not in ("muonclip", "muon"):
        raise UserError(f"--optimizer {settings.optimizer}: the plan's formulas are those of muonclip: leave it out")
    parts = share_of_step(settings.batch_size, settings.gradient_accumulation, args.ranks)
    device = Device(half=settings.mixed_precision != "off")
    job, whole = Job(config, ONE, parts, device, settings.activation_checkpointing), meta_model(config)
    counts = f"{whole.num_parameters():,} parameters, {whole.num_parameters(active=True):,} active"
    sequences = settings.batch_size * settings.gradient_accumulation
    yield f"{settings.preset}: {counts}; context {config.max_seq_length:,}"
    yield (
        f"A step: {sequences:,} sequences, {sequences * config.max_seq_length:,} tokens; each rank "
        f"(of {args.ranks:,}) takes {parts.passes:,} x {parts.batch_size:,}"
    )
    if settings.parallel != "auto" or settings.replicate > 1 or settings.expert_parallel:
        mode = "fsdp" if settings.parallel == "auto" else settings.parallel
        layout = Layout(mode, args.ranks, settings.replicate, settings.expert_parallel)
        yield from _one_layout(replace(job, layout=layout), machine)
    else:
        yield from _one_layout(job, machine) if args.ranks == 1 else _comparison(job, args.ranks, machine)
    yield ""
    yield "Counted: parameters, FLOPs, payloads. Estimated: memory that comes and goes, all times (docs/scaling.md)."
    rate, near, far = machine.peak_flops / TERA, machine.bandwidth / GB, machine.network / GB
    yield f"Assumed: products reach {machine.efficiency:.0%} of {rate:,.0f} TFLOP/s, experts have equally much to do,"
    yield f"a device sends {near:,.0f} GB/s inside a node of {machine.ranks_per_node} and {far:,.0f} GB/s to others."


def _machine(args: argparse.Namespace) -> Machine:
    for name in ("ranks", "ranks_per_node"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    for name in ("device_memory", "peak_tflops", "efficiency", "bandwidth", "network"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} must be positive and finite, got {getattr(args, name):g}")
    if args.efficiency > 1:
        raise UserError(f"--efficiency is a share of the peak, 1 or less, got {args.efficiency:g}")
    bandwidth, network, size = args.bandwidth * GB, args.network * GB, args.device_memory * GB
    return Machine(args.peak_tflops * TERA, args.efficiency, bandwidth, network, args.ranks_per_node, size)


def _one_layout(job: Job, machine: Machine) -> Iterator[str]:
    layout, found, time = job.layout, transfers(job), step_time(job, machine)
    yield f"{flags(layout)}: {layout.replicas:,} x {layout.shards:,} shards"
    both = [replace(job, checkpointing=again).memory() for again in (False, True)]
    rows: list[tuple[str, ...]] = [("Memory of a device, GB", "default", "--activation_checkpointing")]
    rows += [(about, *(_gb(parts[name]) for parts in both)) for name, about in COMPONENTS.items()]
    rows.append(("at one time, at most", *(_gb(peak(parts)) for parts in both)))
    fits = ("fits" if peak(parts) <= machine.memory else "does not fit" for parts in both)
    rows.append((f"of --device_memory {machine.memory / GB:g}", *fits))
    yield from ("", *aligned(rows, "<>>"))
    if found:
        rows = [("Traffic of a rank in a step", "by", "ranks", "payload, GB", "sent, GB", "seconds", "beside")]
        for t in found:
            figures = (f"{t.group:,}", _gb(t.payload), _gb(t.sent), f"{machine.seconds(t):.3f}")
            rows.append((t.what, t.collective, *figures, t.overlap))
        sums = (_gb(sum(t.payload for t in found)), _gb(sum(t.sent for t in found)))
        rows.append(("in all", "", "", *sums, f"{sum(map(machine.seconds, found)):.3f}", ""))
        yield from ("", *aligned(rows, "<<>>>><"))
    products = {"forward": time.model_flops / 3, "backward": time.model_flops * 2 / 3}
    products |= {"forward again (checkpointing)": time.again, "Newton-Schulz, the busiest rank": time.muon}
    rate = machine.peak_flops * machine.efficiency
    rows = [("Computing of a rank in a step", "TFLOP", "seconds")]
    rows += [(about, f"{flops / TERA:,.2f}", f"{flops / rate:.3f}") for about, flops in products.items() if flops]
    yield from ("", *aligned(rows, "<>>"), "")
    yield (
        f"A step takes about {time.seconds:,.3f} s: {time.computing:,.3f} s computing, {time.exposed:,.3f} s waiting "
        f"for traffic; {time.overlapped:,.3f} s of traffic are hidden."
    )
    tokens = job.parts.batch_size * job.parts.passes * layout.ranks * job.config.max_seq_length
    yield f"{tokens / time.seconds:,.0f} tokens/s in all; MFU {time.utilisation:.1%}"


def _comparison(job: Job, ranks: int, machine: Machine) -> Iterator[str]:
    """The best layout of each family, the quickest of those that fit marked."""
    best = []
    for family in families(job.config, ranks, machine.ranks_per_node):
        rows = []
        for one in (replace(job, layout=layout) for layout in family):
            need, time = peak(one.memory()), step_time(one, machine)
            too_large = need > machine.memory
            rows.append((too_large, need if too_large else time.seconds, need, one, time))
        best.append(min(rows, key=lambda row: row[:2]))
    quickest = min(best, key=lambda row: row[:2])
    table: list[tuple[str, ...]] = [("Layout", "memory, GB", "fits", "sent, GB", "step, s", "MFU", "")]
    for row in best:
        too_large, _, need, one, time = row
        sent, fits = _gb(sum(t.sent for t in transfers(one))), "no" if too_large else "yes"
        mark = "<- the quickest that fits" if row is quickest and not too_large else ""
        figures = (f"{time.seconds:,.3f}", f"{time.utilisation:.1%}")
        table.append((flags(one.layout), _gb(need), fits, sent, *figures, mark))
    yield from ("", *aligned(table, "<><>>><"), "")
    if not quickest[0]:
        yield f"Part by part: the same command with {flags(quickest[3].layout)}"
    else:
        more = "" if job.checkpointing else "--activation_checkpointing, "
        yield (
            f"Nothing fits into --device_memory {machine.memory / GB:g}: try {more}more --ranks, a smaller "
            "--batch_size (with more --gradient_accumulation) or --set max_seq_length=..."
        )


def families(model: ModelConfig, ranks: int, ranks_per_node: int) -> list[list[Layout]]:
    """Layouts that are worth a look; of those in one list the best one is shown.

    Replicas, shards, a replica per node; then experts dealt out over 1, 2, 4, ... nodes, with 1, 2, 4, ... replicas.
    """
    found = [[Layout("ddp", ranks)], [Layout("fsdp", ranks)]]
    if ranks > ranks_per_node and ranks % ranks_per_node == 0:
        found.append([Layout("fsdp", ranks, ranks // ranks_per_node)])
    common = math.gcd(model.n_routed_experts, ranks) if model.n_moe_layers else 1
    dealt = next(n for n in range(min(ranks_per_node, common), common + 1) if common % n == 0)
    while dealt > 1 and common % dealt == 0:
        replicas = (2**n for n in range(ranks.bit_length()))
        found.append([Layout("fsdp", ranks, r, dealt) for r in replicas if ranks % (r * dealt) == 0])
        dealt *= 2
    return found


def flags(layout: Layout) -> str:
    """What ``nanokimi train`` has to be told for this layout."""
    words = "one process" if layout.mode == "one" else f"--parallel {layout.mode}"
    words += f" --replicate {layout.replicate}" if layout.replicate > 1 else ""
    return words + (f" --expert_parallel {layout.expert_parallel}" if layout.expert_parallel else "")


def _gb(size: float) -> str:
    return f"{size / GB:,.1f}" if size >= 10 * GB else f"{size / GB:.3f}"
