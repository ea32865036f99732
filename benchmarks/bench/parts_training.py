"""The parts about training: the machine's roofs, the step and what it consists of, the optimizers, peak memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.bench.bench import Bench
from benchmarks.bench.results import compared
from benchmarks.bench.roofline import training_flops
from benchmarks.bench.rounds import Candidate, LeftOut, Worker

TAU = 100.0
MUON = "torch.optim.Muon + AdamW"
EXTRAPOLATED = "one matrix of each distinct shape timed once, times their number; AdamW whole"


def roofs(bench: Bench) -> None:
    """Matrix products and passes over memory."""
    for dtype in ("fp32", "bf16"):
        names = (bench.ask(f"products in {dtype}", bench.roofs, "products", dtype=dtype) or {}).get("names", [])
        candidates = [Candidate(n, bench.roofs, "product", {"dtype": dtype, "name": n}) for n in names]
        _keep_rates(bench, f"matrix product, {dtype}", candidates, "FLOP")
    passes = [Candidate(name, bench.roofs, "memory", {"name": name}) for name in ("copy", "sum", "dot")]
    _keep_rates(bench, "pass over memory (copy: bytes read and written)", passes, "B")


def _keep_rates(bench: Bench, title: str, candidates: list[Candidate], unit: str) -> None:
    """Rows without ratios: sizes differ, rates are what counts."""
    measured = bench.run_rounds(title, candidates)
    rows = compared(
        title,
        measured.values(),
        ours="",
        work=measured.first("work"),
        work_unit=unit,
        missing=measured.missing,
    )
    bench.keep("roofs", rows)


def training(bench: Bench) -> None:
    """Forward and backward against transformers; then the whole step with QK-Clip on and off."""
    args = bench.args
    shape = {"preset": args.preset, "batch_size": args.rows, "context": args.context}
    tokens = args.rows * args.context
    workloads: dict[str, tuple[str, Mapping[str, Any]]] = {
        "nanokimi, compiled": ("network", {**shape, "compiled": "on"}),
        "nanokimi, eager": ("network", {**shape, "compiled": "off"}),
        "transformers": ("reference", shape),
    }
    if bench.cuda:
        workloads["transformers, bf16 weights"] = ("reference", {**shape, "weights": "bf16"})
    with bench.workers(workloads) as workers:
        found = bench.compare(
            "training",
            f"forward and backward, {args.rows} x {args.context} tokens",
            work=tokens,
            candidates=[Candidate(name, worker, "passes") for name, worker in workers.items()],
            roof=Candidate("roof", bench.roofs, "matrix_roof", {"dtype": "bf16" if bench.cuda else "fp32"}),
            needs=training_flops(args.config, bench.active_parameters, args.rows, args.context),
        )
        ours = [row for row in found["rows"] if row["name"].startswith("nanokimi")]
        if ours:
            name = min(ours, key=lambda row: float(row["median"]))["name"]
            whole_step(bench, name, workers[name])


def whole_step(bench: Bench, name: str, worker: Worker) -> None:
    """One process, one model, QK-Clip switched on and off by turns, since a hundredth shows in no other way."""
    tokens = bench.args.rows * bench.args.context
    candidates = [
        Candidate("QK-Clip off", worker, "whole", {"tau": 0.0}),
        Candidate("QK-Clip on", worker, "whole", {"tau": TAU}),
        Candidate("QK-Clip alone", worker, "clip"),
        Candidate("next batch of the loader", worker, "data"),
    ]
    bench.compare(
        "training",
        f"whole step, {name}",
        candidates,
        rounds=2 * bench.args.repeats,
        work=dict.fromkeys(("QK-Clip off", "QK-Clip on"), tokens),
    )


def optimizer(bench: Bench) -> None:
    """One update of all weights."""
    preset = bench.args.preset
    kinds = {
        "MuonClip": "muonclip",
        MUON: "muon",
        "AdamW, fused": "adamw_fused",
        "AdamW, foreach": "adamw_foreach",
    }
    with bench.workers({name: ("optimizer", {"preset": preset, "kind": kind}) for name, kind in kinds.items()}) as made:
        for worker in made.values():
            try:
                worker.load()
            except LeftOut:
                continue  # the rounds tell why
        found = bench.ask(f"{MUON}, one matrix", made[MUON], "is_slow")
        slow = bool(found and found["slow"])
        candidates = [
            Candidate(name, worker, "extrapolate", once=True)
            if slow and name == MUON
            else Candidate(name, worker, "step")
            for name, worker in made.items()
        ]
        notes = {MUON: EXTRAPOLATED} if slow else {}
        bench.compare("optimizer", "optimizer step", candidates, notes=notes)


def memory(bench: Bench) -> None:
    """The peak of a process that trains; each has the machine to itself."""
    args = bench.args
    shape = {"preset": args.preset, "batch_size": args.rows, "context": args.context}
    theirs = f"transformers, {MUON}"
    kinds: dict[str, Mapping[str, Any]] = {
        "nanokimi, compiled": {"kind": "nanokimi", "compiled": "on"},
        "nanokimi, eager": {"kind": "nanokimi", "compiled": "off"},
        "nanokimi, eager, activation checkpointing": {"kind": "nanokimi", "checkpointing": True},
        theirs: {"kind": "transformers"},
    }
    peaks: dict[str, list[float]] = {}
    above: dict[str, list[float]] = {}
    missing, notes = {}, {}
    for name, settings in kinds.items():
        with bench.workers({name: ("memory", {**shape, **settings})}) as workers:
            bench.progress(f"peak memory, {name}")
            try:
                found = workers[name].ask("measure")
            except LeftOut as reason:
                missing[name] = str(reason)
                continue
        peaks[name], above[name] = [found["bytes"]], [found["bytes"] - found["imports"]]
        if found["partial"]:
            notes[name] = "all of the state, Muon's own step for one matrix of the largest shape"
    what = "allocated on the device" if bench.cuda else "resident"
    for title, values in ((f"peak memory of a training step, {what}", peaks), ("the same above the imports", above)):
        ours = next(iter(values), "")
        bench.keep("memory", compared(title, values, ours=ours, unit="B", notes=notes, missing=missing))
