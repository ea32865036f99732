"""``nanokimi plan``: memory, traffic, FLOPs and time of a training step on so many devices, and the layout to choose.

Plain arithmetic on the shapes of a model on the meta device. Formulas, letters and assumptions: docs/scaling.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nanokimi.config import ModelConfig, TrainConfig, from_dict
from nanokimi.console import aligned
from nanokimi.errors import UserError
from nanokimi.parallel.layout import ONE, Layout, share_of_step
from nanokimi.parallel.memory_estimate import FP32, IN_CHECKPOINTS, Device, Job, memory, muon_work, parameters, peak

GB, TERA = 1e9, 1e12


class Transfer(NamedTuple):
    """What one rank takes part in during a step, by one collective."""

    what: str
    collective: str
    payload: float  # bytes, the mean over the ranks: of all_gather the gathered buffer, else the buffer that goes in
    group: int  # ranks that exchange it,
    stride: int = 1  # so far apart
    overlap: str = "nothing"  # what it runs beside: "passes" forward and backward, or the "last backward" pass

    @property
    def sent(self) -> float:
        """Bytes that each rank sends by the ring algorithms (Thakur et al., 2005)."""
        rounds = 2 if self.collective == "all_reduce" else 1
        return self.payload * rounds * (self.group - 1) / self.group


def transfers(job: Job) -> list[Transfer]:
    """Everything that is exchanged in a step, but for a few numbers on the host."""
    config, layout, device = job.config, job.layout, job.device
    # Largest logits; losses, labels, loads of experts, and where weights are cut the gradient norm: 8 bytes each.
    numbers = 3 + config.n_moe_layers * config.n_routed_experts + (layout.mode == "fsdp")
    statistics = FP32 * config.n_layers * config.n_heads + 8 * numbers
    found = [Transfer("statistics", "all_reduce", statistics, layout.ranks)]
    if layout.mode == "fsdp":
        found += _of_shards(job, experts=False)
        found += _of_shards(job, experts=True) if layout.expert_parallel else []
    else:
        gradients = FP32 * sum(m.local for m in parameters(config, layout))
        found.append(Transfer("gradients", "all_reduce", gradients, layout.ranks, overlap="last backward"))
    if layout.expert_parallel:  # rows to their experts and back, the gradients the other way
        times, forward = config.n_moe_layers * job.passes, 2 if job.checkpointing else 1
        rows = times * job.tokens * config.n_activated_experts * config.dim * device.product * (forward + 1)
        counts = 4 * times * forward * config.n_routed_experts  # int32
        found.append(Transfer("tokens to their experts", "all_to_all", rows + counts, layout.expert_parallel))
        found.append(Transfer("tokens back", "all_to_all", rows, layout.expert_parallel))
    work, number = muon_work(config, layout, device), device.newton_schulz
    sent = (FP32 + number) * (sum(of_role.sent for of_role in work) / layout.ranks)
    shared = number * layout.replicas * (sum(sum(of_role.longest) for of_role in work) / layout.shards)
    found.append(Transfer("updates to their owners and back", "all_to_all", sent, layout.shards))
    found.append(Transfer("updates between replicas", "all_gather", shared, layout.replicas, layout.shards))
    return [transfer for transfer in found if transfer.group > 1 and transfer.payload]


def _of_shards(job: Job, *, experts: bool) -> list[Transfer]:
    """Of experts that are distributed, or of all else: blocks are gathered forward and backward, the root once."""
    layout, what = job.layout, " of experts" if experts else ""
    stride = layout.expert_parallel if experts else 1
    group = layout.shards // stride
    mine = [m for m in parameters(job.config, layout) if (m.expert_ranks > 0) == experts]
    whole = FP32 * job.passes * sum(m.gathered for m in mine)
    blocks = FP32 * job.passes * sum(m.gathered for m in mine if m.block is not None)
    local, between = FP32 * sum(m.local for m in mine), f"gradients{what} between replicas"
    return [
        Transfer(f"weights{what}", "all_gather", whole + blocks, group, stride, "passes"),
        Transfer(f"gradients{what}", "reduce_scatter", whole, group, stride, "passes"),
        Transfer(between, "all_reduce", local, layout.replicas, layout.shards, "last backward"),
    ]


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


class Machine(NamedTuple):
    """The devices. The flags of ``nanokimi plan`` have the same names."""

    ranks_per_node: int = 8
    device_memory: float = 80.0  # GB
    peak_tflops: float = 989.0  # dense, of the numbers that products are in
    efficiency: float = 0.5  # share of the peak that products reach: an assumption
    bandwidth: float = 450.0  # GB that a device sends in a second inside a node,
    network: float = 50.0  # and between nodes

    @property
    def flops_per_second(self) -> float:
        """FLOPs of products that a device does in a second."""
        return self.peak_tflops * TERA * self.efficiency

    def seconds(self, transfer: Transfer) -> float:
        """Of a transfer on its own: a ring enters a node by all devices of its group there; all-to-all by one's own."""
        bandwidth, network = self.bandwidth * GB, self.network * GB
        near = min(transfer.group, max(1, self.ranks_per_node // transfer.stride))
        if near == transfer.group:
            return transfer.sent / bandwidth
        if transfer.collective != "all_to_all":
            return transfer.sent / min(bandwidth, network * near)
        inside, outside = near - 1, transfer.group - near
        return transfer.payload / transfer.group * max(inside / bandwidth, outside / network)


class StepTime(NamedTuple):
    """A step on the rank that has most to do: FLOPs, then seconds."""

    model_flops: float  # forward, and twice that backward (Kaplan et al., 2020, section 2.1)
    again: float  # what activation checkpointing computes twice
    muon: float  # Newton-Schulz
    computing: float  # seconds of all these
    overlapped: float  # of traffic beside the passes
    exposed: float  # of traffic that computing waits for
    seconds: float  # of the step
    utilisation: float  # MFU, the share of the peak that the model's FLOPs make up (Chowdhery et al., 2022)


def step_time(job: Job, machine: Machine) -> StepTime:
    """A step whose gathering and scattering run beside computing, as far as that lasts; all else waits for itself."""
    from nanokimi.model.transformer import meta_model

    config, rate = job.config, machine.flops_per_second
    shape = (job.sequences * job.passes, config.max_seq_length)
    forward = forward_flops(config, meta_model(config).num_parameters(active=True), *shape)
    model, head = 3 * forward, 2 * config.vocab_size * config.dim * math.prod(shape)
    again = forward - head if job.checkpointing else 0
    muon = max(map(sum, zip(*(work.flops for work in muon_work(config, job.layout, job.device)), strict=True)))
    passing, backward = (model + again) / rate, (model - forward + again) / rate / job.passes
    traffic = {"passes": 0.0, "last backward": 0.0, "nothing": 0.0}
    for transfer in transfers(job):
        traffic[transfer.overlap] += machine.seconds(transfer)
    exposed = traffic["nothing"] + max(0.0, traffic["passes"] - passing) + max(0.0, traffic["last backward"] - backward)
    computing = passing + muon / rate
    seconds, overlapped = computing + exposed, sum(traffic.values()) - exposed
    utilisation = model / seconds / (machine.peak_tflops * TERA)
    return StepTime(model, again, muon, computing, overlapped, exposed, seconds, utilisation)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that ``plan_lines`` reads beside those of the configs."""
    machine = Machine()
    for flag, metavar, default, about in (
        ("ranks", "N", 8, "devices in all "),
        ("ranks_per_node", "N", machine.ranks_per_node, ""),
        ("device_memory", "GB", machine.device_memory, ""),
        ("peak_tflops", "N", machine.peak_tflops, "peak of a device, dense "),
        ("efficiency", "SHARE", machine.efficiency, "share of the peak that matrix products reach: an assumption "),
        ("bandwidth", "GB", machine.bandwidth, "that a device sends in a second inside a node "),
        ("network", "GB", machine.network, "that a device sends in a second between nodes "),
    ):
        about += "(default: %(default)s" + (", bf16 of an H100)" if flag == "peak_tflops" else ")")
        parser.add_argument(f"--{flag}", type=type(default), default=default, metavar=metavar, help=about)


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
    job = Job(config, ONE, *parts, device=device, checkpointing=settings.activation_checkpointing)

    from nanokimi.model.transformer import meta_model

    whole, sequences = meta_model(config), settings.batch_size * settings.gradient_accumulation
    counts = f"{whole.num_parameters():,} parameters, {whole.num_parameters(active=True):,} active"
    yield f"{settings.preset}: {counts}; context {config.max_seq_length:,}"
    yield (
        f"A step: {sequences:,} sequences, {sequences * config.max_seq_length:,} tokens; each rank "
        f"(of {args.ranks:,}) takes {parts.passes:,} x {parts.batch_size:,}"
    )
    if settings.parallel != "auto" or settings.replicate > 1 or settings.expert_parallel:
        mode = "fsdp" if settings.parallel == "auto" else settings.parallel
        layout = Layout(mode, args.ranks, settings.replicate, settings.expert_parallel)
        layout.check_experts(config.n_routed_experts)
        yield from _one_layout(job._replace(layout=layout), machine)
    else:
        yield from _one_layout(job, machine) if args.ranks == 1 else _comparison(job, args.ranks, machine)
    yield ""
    yield "Counted: parameters, FLOPs, payloads. Estimated: memory that comes and goes, all times (docs/scaling.md)."
    reached = f"{machine.efficiency:.0%} of {machine.peak_tflops:,.0f} TFLOP/s"
    inside = f"{machine.bandwidth:,.0f} GB/s inside a node of {machine.ranks_per_node}"
    yield f"Assumed: products reach {reached}, experts have equally much to do,"
    yield f"a device sends {inside} and {machine.network:,.0f} GB/s to others."


def _machine(args: argparse.Namespace) -> Machine:
    for name in ("ranks", *Machine._fields):
        value = getattr(args, name)
        if isinstance(value, int) and value < 1:
            raise UserError(f"--{name} must be 1 or more, got {value}")
        if not 0 < value < math.inf:
            raise UserError(f"--{name} must be positive and finite, got {value:g}")
    if args.efficiency > 1:
        raise UserError(f"--efficiency is a share of the peak, 1 or less, got {args.efficiency:g}")
    return Machine(**{name: getattr(args, name) for name in Machine._fields})


def _one_layout(job: Job, machine: Machine) -> Iterator[str]:
    layout, found, time = job.layout, transfers(job), step_time(job, machine)
    yield f"{flags(layout)}: {layout.replicas:,} x {layout.shards:,} shards"
    both = [memory(job._replace(checkpointing=again)) for again in (False, True)]
    rows: list[tuple[str, ...]] = [("Memory of a device, GB", "default", "--activation_checkpointing")]
    rows += [(name, *(_gb(parts[name]) for parts in both)) for name in both[0]]
    rows.append(("at one time, at most", *(_gb(peak(parts)) for parts in both)))
    fits = ("fits" if peak(parts) <= machine.device_memory * GB else "does not fit" for parts in both)
    rows.append((f"of --device_memory {machine.device_memory:g}", *fits))
    yield from ("", *aligned(rows, "<>>"))
    yield _about_copies(job, both[0])
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
    rows = [("Computing of a rank in a step", "TFLOP", "seconds")]
    for name, flops in products.items():
        if flops:
            rows.append((name, f"{flops / TERA:,.2f}", f"{flops / machine.flops_per_second:.3f}"))
    yield from ("", *aligned(rows, "<>>"), "")
    yield (
        f"A step takes about {time.seconds:,.3f} s: {time.computing:,.3f} s computing, {time.exposed:,.3f} s waiting "
        f"for traffic; {time.overlapped:,.3f} s of traffic are hidden."
    )
    tokens = job.tokens * job.passes * layout.ranks
    yield f"{tokens / time.seconds:,.0f} tokens/s in all; MFU {time.utilisation:.1%}"


def _about_copies(job: Job, parts: Mapping[str, float]) -> str:
    own = sum(parts.get(name, 0) for name in IN_CHECKPOINTS)
    if job.layout.mode != "fsdp":
        return f"--async_checkpoints takes {_gb(own)} GB of the main rank's host memory more."
    whole = FP32 * sum(math.prod(parameter.shape) for parameter in parameters(job.config))
    each, main = _gb(own), _gb(own + whole)
    return f"--async_checkpoints takes {each} GB of each rank's host memory more, {main} GB of the main one's."


def _comparison(job: Job, ranks: int, machine: Machine) -> Iterator[str]:
    """The best layout of each family, the quickest of those that fit marked."""

    def cost(job: Job) -> tuple[bool, float]:
        """Whether it is too large; seconds of what fits, bytes of what does not."""
        need = peak(memory(job))
        too_large = need > machine.device_memory * GB
        return too_large, need if too_large else step_time(job, machine).seconds

    found = families(job.config, ranks, machine.ranks_per_node)
    best = [min((job._replace(layout=layout) for layout in family), key=cost) for family in found]
    quickest = min(best, key=cost)
    nothing_fits, _ = cost(quickest)
    table: list[tuple[str, ...]] = [("Layout", "memory, GB", "fits", "sent, GB", "step, s", "MFU", "")]
    for one in best:
        time, sent = step_time(one, machine), sum(t.sent for t in transfers(one))
        figures = (_gb(peak(memory(one))), "no" if cost(one)[0] else "yes", _gb(sent), f"{time.seconds:,.3f}")
        mark = "<- the quickest that fits" if one is quickest and not nothing_fits else ""
        table.append((flags(one.layout), *figures, f"{time.utilisation:.1%}", mark))
    yield from ("", *aligned(table, "<><>>><"), "")
    if not nothing_fits:
        yield f"Part by part: the same command with {flags(quickest.layout)}"
        return
    more = "" if job.checkpointing else "--activation_checkpointing, "
    yield (
        f"Nothing fits into --device_memory {machine.device_memory:g}: try {more}more --ranks, a smaller "
        "--batch_size (with more --gradient_accumulation) or --set max_seq_length=..."
    )


def families(model: ModelConfig, ranks: int, ranks_per_node: int) -> list[list[Layout]]:
    """Layouts that are worth a look; of those in one list the best one is shown.

    Replicas, shards, a replica per node; then experts distributed over 1, 2, 4, ... nodes, with 1, 2, 4, ... replicas.
    """
    found = [[Layout("ddp", ranks)], [Layout("fsdp", ranks)]]
    if ranks > ranks_per_node and ranks % ranks_per_node == 0:
        found.append([Layout("fsdp", ranks, ranks // ranks_per_node)])
    common = math.gcd(model.n_routed_experts, ranks) if model.n_moe_layers else 1
    expert_ranks = next(n for n in range(min(ranks_per_node, common), common + 1) if common % n == 0)
    while expert_ranks > 1 and common % expert_ranks == 0:
        replicas = (2**n for n in range(ranks.bit_length()))
        found.append([Layout("fsdp", ranks, r, expert_ranks) for r in replicas if ranks % (r * expert_ranks) == 0])
        expert_ranks *= 2
    return found


def flags(layout: Layout) -> str:
    """What ``nanokimi train`` has to be told for this layout."""
    words = "one process" if layout.mode == "one" else f"--parallel {layout.mode}"
    words += f" --replicate {layout.replicate}" if layout.replicate > 1 else ""
    return words + (f" --expert_parallel {layout.expert_parallel}" if layout.expert_parallel else "")


def _gb(size: float) -> str:
    return f"{size / GB:,.1f}" if size >= 10 * GB else f"{size / GB:.3f}"
