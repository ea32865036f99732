"""``nanokimi plan``: what training would take on so many devices, and which layout suits them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanokimi.config import ModelConfig, TrainConfig, from_dict
from nanokimi.errors import UserError
from nanokimi.insight.planner import (
    Device,
    Job,
    Layout,
    Machine,
    StepTime,
    active_parameters,
    parameters,
    peak,
    share_of_step,
    step_time,
    transfers,
)

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
BESIDE = {"pass": "passes", "last": "last backward", "wait": "nothing"}


@dataclass(frozen=True)
class Question:
    """What a plan is asked for.

    Attributes:
        train, model: the run.
        ranks: devices in all.
        device_memory: bytes of each.
        machine: how fast they are.
    """

    train: TrainConfig
    model: ModelConfig
    ranks: int
    device_memory: float
    machine: Machine

    def job(self, layout: Layout) -> Job:
        """A step on ``layout``."""
        parts = share_of_step(self.train.batch_size, self.train.gradient_accumulation, self.ranks)
        device = Device(half=self.train.mixed_precision != "off")
        return Job(self.model, layout, parts, device, self.train.activation_checkpointing)

    @property
    def tokens(self) -> int:
        """Of a step, on all ranks."""
        return self.train.batch_size * self.train.gradient_accumulation * self.model.max_seq_length


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that ``question_of`` reads beside those of the configs."""
    machine, add = Machine(), parser.add_argument
    node, memory = machine.ranks_per_node, 80.0
    add("--ranks", type=int, default=8, metavar="N", help="devices in all (default: %(default)s)")
    add("--ranks_per_node", "--ranks-per-node", type=int, default=node, metavar="N", help="(default: %(default)s)")
    add("--device_memory", "--device-memory", type=float, default=memory, metavar="GB", help="(default: %(default)s)")
    add(
        "--peak_tflops", "--peak-tflops", type=float, default=machine.peak_flops / TERA, metavar="N",
        help="peak of a device, dense (default: %(default)s, bf16 of an H100)",
    )  # fmt: skip
    add(
        "--efficiency", type=float, default=machine.efficiency, metavar="SHARE",
        help="share of the peak that matrix products reach: an assumption (default: %(default)s)",
    )  # fmt: skip
    for flag, value, where in (("bandwidth", machine.bandwidth, "inside a"), ("network", machine.network, "between")):
        about = f"that a device sends in a second {where} node{'s' if where == 'between' else ''}"
        add(f"--{flag}", type=float, default=value / GB, metavar="GB", help=f"{about} (default: %(default)s)")


def question_of(args: argparse.Namespace, train: Mapping[str, Any], model: Mapping[str, Any]) -> Question:
    """What the flags ask for; UserError for a value that cannot be."""
    for name in ("ranks", "ranks_per_node"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    for name in ("device_memory", "peak_tflops", "efficiency", "bandwidth", "network"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} must be positive and finite, got {getattr(args, name):g}")
    if args.efficiency > 1:
        raise UserError(f"--efficiency is a share of the peak, 1 or less, got {args.efficiency:g}")
    config = from_dict(TrainConfig, train)
    machine = Machine(
        args.peak_tflops * TERA, args.efficiency, args.bandwidth * GB, args.network * GB, args.ranks_per_node
    )
    model_config = ModelConfig.preset(config.preset, **model)
    if model_config.attention != "mla":
        raise UserError(f"--set attention={model_config.attention}: the plan's formulas are those of mla: leave it out")
    if config.optimizer not in ("muonclip", "muon"):
        raise UserError(f"--optimizer {config.optimizer}: the plan's formulas are those of muonclip: leave it out")
    return Question(config, model_config, args.ranks, args.device_memory * GB, machine)


def plan_lines(question: Question) -> Iterator[str]:
    """The lines of the report: of the layout that was asked for, or of all that are worth a look.

    Raises:
        UserError: the step, the experts or the ranks do not divide.
    """
    train, ranks = question.train, question.ranks
    yield from _head(question)
    if train.parallel != "auto" or train.replicate > 1 or train.expert_parallel:
        mode = "fsdp" if train.parallel == "auto" else train.parallel
        yield from _one(question, question.job(Layout(mode, ranks, train.replicate, train.expert_parallel)))
    elif ranks == 1:
        yield from _one(question, question.job(Layout("one")))
    else:
        yield from _comparison(question)
    yield from _foot(question)


def _head(question: Question) -> Iterator[str]:
    model, train, parts = question.model, question.train, question.job(Layout("one")).parts
    total = sum(m.numel for m in parameters(model))
    yield f"{train.preset}: {total:,} parameters, {active_parameters(model):,} active; context {model.max_seq_length:,}"
    yield (
        f"A step: {train.batch_size * train.gradient_accumulation:,} sequences, {question.tokens:,} tokens; each rank "
        f"(of {question.ranks:,}) takes {parts.passes:,} x {parts.batch_size:,}"
    )


def _foot(question: Question) -> Iterator[str]:
    machine = question.machine
    yield ""
    yield "Counted: parameters, FLOPs, payloads. Estimated: memory that comes and goes, all times (docs/scaling.md)."
    yield (
        f"Assumed: products reach {machine.efficiency:.0%} of {machine.peak_flops / TERA:,.0f} TFLOP/s, experts have "
        "equally much to do,"
    )
    yield (
        f"a device sends {machine.bandwidth / GB:,.0f} GB/s inside a node of {machine.ranks_per_node} and "
        f"{machine.network / GB:,.0f} GB/s to others."
    )


# ---- one layout ---------------------------------------------------------------------------------


def flags(layout: Layout) -> str:
    """What ``nanokimi train`` has to be told for this layout."""
    words = {"one": "one process"}.get(layout.mode, f"--parallel {layout.mode}")
    words += f" --replicate {layout.replicate}" if layout.replicate > 1 else ""
    return words + (f" --expert_parallel {layout.expert_parallel}" if layout.expert_parallel else "")


def _one(question: Question, job: Job) -> Iterator[str]:
    layout = job.layout
    yield f"{flags(layout)}: {layout.replicas:,} x {layout.shards:,} shards"
    yield from _memory(question, job)
    yield from _traffic(question, job)
    yield from _time(question, step_time(job, question.machine))


def _memory(question: Question, job: Job) -> Iterator[str]:
    """Each component with and without activation checkpointing, and what is there at one time."""
    both = [replace(job, checkpointing=again).memory() for again in (False, True)]
    rows: list[tuple[str, ...]] = [("Memory of a device, GB", "default", "--activation_checkpointing")]
    rows += [(about, *(_gb(parts[name]) for parts in both)) for name, about in COMPONENTS.items()]
    most = [peak(parts) for parts in both]
    rows.append(("at one time, at most", *map(_gb, most)))
    fits = ("fits" if need <= question.device_memory else "does not fit" for need in most)
    rows.append((f"of --device_memory {question.device_memory / GB:g}", *fits))
    yield from ("", *_aligned(rows))


def _traffic(question: Question, job: Job) -> Iterator[str]:
    found = transfers(job)
    if not found:
        return
    rows = [("Traffic of a rank in a step", "by", "ranks", "payload, GB", "sent, GB", "seconds", "beside")]
    for t in found:
        seconds = f"{question.machine.seconds(t):.3f}"
        rows.append((t.what, t.collective, f"{t.group:,}", _gb(t.payload), _gb(t.wire), seconds, BESIDE[t.when]))
    sums = _gb(sum(t.payload for t in found)), _gb(sum(t.wire for t in found))
    rows.append(("in all", "", "", *sums, f"{sum(map(question.machine.seconds, found)):.3f}", ""))
    yield from ("", *_aligned(rows))


def _time(question: Question, time: StepTime) -> Iterator[str]:
    rate = question.machine.peak_flops * question.machine.efficiency
    rows = [("Computing of a rank in a step", "TFLOP", "seconds")]
    parts = {
        "forward": time.model_flops / 3,
        "backward": time.model_flops * 2 / 3,
        "forward again (checkpointing)": time.again,
        "Newton-Schulz, the busiest rank": time.muon,
    }
    rows += [(about, f"{flops / TERA:,.2f}", f"{flops / rate:.3f}") for about, flops in parts.items() if flops]
    yield from ("", *_aligned(rows))
    yield ""
    yield (
        f"A step takes about {time.seconds:,.3f} s: {time.computing:,.3f} s computing, {time.exposed:,.3f} s waiting "
        f"for traffic; {time.hidden:,.3f} s of traffic are hidden."
    )
    yield f"{question.tokens / time.seconds:,.0f} tokens/s in all; MFU {time.utilisation:.1%}"


# ---- several ------------------------------------------------------------------------------------


def families(model: ModelConfig, ranks: int, ranks_per_node: int) -> list[list[Layout]]:
    """Layouts that are worth a look; of those in one list the best one is shown.

    Replicas, shards, a replica per node; then experts dealt out over the ranks of a node, and of 2, 4, ... of them,
    with 1, 2, 4, ... replicas.
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


def _comparison(question: Question) -> Iterator[str]:
    best: list[tuple[bool, float, float, Job, StepTime]] = []
    for family in families(question.model, question.ranks, question.machine.ranks_per_node):
        rows = []
        for job in map(question.job, family):
            need, time = peak(job.memory()), step_time(job, question.machine)
            fits = need <= question.device_memory
            rows.append((not fits, time.seconds if fits else need, need, job, time))
        best.append(min(rows, key=lambda row: row[:2]))
    quickest = min(best, key=lambda row: row[:2])
    table: list[tuple[str, ...]] = [("Layout", "memory, GB", "fits", "sent, GB", "step, s", "MFU", "")]
    for row in best:
        too_large, _, need, job, time = row
        mark = "<- the quickest that fits" if row is quickest and not too_large else ""
        sent = _gb(sum(t.wire for t in transfers(job)))
        answer = "no" if too_large else "yes"
        table.append(
            (flags(job.layout), _gb(need), answer, sent, f"{time.seconds:,.3f}", f"{time.utilisation:.1%}", mark)
        )
    yield from ("", *_aligned(table))
    yield ""
    yield _advice(question, quickest[3], fits=not quickest[0])


def _advice(question: Question, job: Job, *, fits: bool) -> str:
    if fits:
        return f"Part by part: the same command with {flags(job.layout)}"
    more = "" if job.checkpointing else "--activation_checkpointing, "
    return (
        f"Nothing fits into --device_memory {question.device_memory / GB:g}: try {more}more --ranks, a smaller "
        "--batch_size (with more --gradient_accumulation) or --set max_seq_length=..."
    )


def _gb(size: float) -> str:
    return f"{size / GB:,.1f}" if size >= 10 * GB else f"{size / GB:.3f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines of columns as wide as their widest cell; words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = [
        all(c[:1].isdigit() or not c for c in column[1:-1]) and i > 0
        for i, column in enumerate(zip(*rows, strict=True))
    ]
    for row in rows:
        cells = (f"{c:>{w}}" if n else f"{c:<{w}}" for c, w, n in zip(row, widths, numbers, strict=True))
        yield "  ".join(cells).rstrip()
