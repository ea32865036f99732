"""Whether one checkout is slower than another: both are measured in one run, by turns, on the CPU.

    python -m benchmarks.side_by_side ../earlier .                                   # nano-243m and tiny, 15 rounds
    python -m benchmarks.side_by_side ../earlier . --presets tiny --only step,decode --output side_by_side.json

For each preset: forward and backward pass, whole training step, optimizer step, prefill and decoding with the eager and
the native decoder. Each checkout answers from a process of its own, the worker of its own bench. A round asks both,
every other round backwards, and its ratio is new over old. A figure is "slower" when the 95 % interval of the median
ratio lies above 1.03, and "unclear" when it reaches above 1.03: take more rounds. The exit status is
1 if a figure is slower, else 2 if one could not be measured (NANOKIMI_BENCH_ERRORS=1 says more).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench.report import amount
from benchmarks.bench.results import about
from benchmarks.bench.rounds import LeftOut, Worker

PARTS = ("step", "optimizer", "prefill", "decode")
SHAPES = {"nano-243m": (1, 512), "tiny": (8, 256)}  # sequences of a training step; tokens of each, and of a prompt
DECODERS = ("eager", "native")
WORKERS = ("benchmarks.bench.worker", "nanokimi.bench.worker")
TOKENS = 16  # decoded in one call
TAU = 100.0  # of QK-Clip

WARM_UP_CALLS = 3  # at most, of each checkout
TURN_SECONDS = 1.0  # calls that are shorter are repeated for this long in each turn
MOST_CALLS = 30  # in a turn
PAIRS = 3  # of processes, one after the other: where its memory lies makes a process a percent or two faster or slower
TOLERATED = 1.03
RESAMPLES, SEED = 10_000, 0


@dataclass(frozen=True)
class Figure:
    """Something to time: the answer ``seconds`` of a workload's method ``do``.

    Attributes:
        part: one of PARTS.
        prompt: tokens that the decoder reads before each turn, untimed; 0: it reads none.
    """

    part: str
    name: str
    do: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    prompt: int = 0


@dataclass(frozen=True)
class Workload:
    """What a worker loads, and the figures that are taken from it."""

    name: str
    settings: Mapping[str, Any]
    figures: Sequence[Figure]


def main() -> int:
    args = parse_arguments()
    checkouts = {"old": args.old.resolve(), "new": args.new.resolve()}
    for path in checkouts.values():
        check_import(path)
    found: dict[str, Any] = {"about": about_run(checkouts, args.rounds), "figures": []}
    for preset in args.presets:
        for workload in workloads_of(preset, args.only):
            for figure in measured(workload, checkouts, args.rounds):
                found["figures"].append({"preset": preset, **figure})
                if args.output:
                    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(*table(found["figures"]), sep="\n")
    verdicts = {figure["verdict"] for figure in found["figures"]}
    return 1 if "slower" in verdicts else 2 if "not measured" in verdicts else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout of the project")
    parser.add_argument("new", type=Path, help="another one, which must not be slower")
    parser.add_argument("--presets", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15, help="%(default)s; fewer than 6 show little")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,...", help="what to measure (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where all figures are kept")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := [part for part in args.only if part not in PARTS]:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(PARTS)}")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be 1 or more")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)  # now rather than after the first figure
    return args


def worker_module(checkout: Path) -> str:
    """The worker of a checkout's bench, which was a part of ``nanokimi`` until commit 1013d9d."""
    for module in WORKERS:
        if (checkout / f"{module.replace('.', '/')}.py").exists():
            return module
    raise SystemExit(f"{checkout}: no checkout of this project: it has none of {', '.join(WORKERS)}")


def check_import(checkout: Path) -> None:
    """Makes sure that a process started as workers are runs the code of ``checkout``."""
    script = f"import nanokimi, {worker_module(checkout)}; print(nanokimi.__file__)"
    command, environment = [sys.executable, "-c", script], os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    if Path(done.stdout.strip()).resolve() != checkout / "nanokimi" / "__init__.py":
        raise SystemExit(f"{checkout}: a worker would import {done.stdout.strip()}")


def about_run(checkouts: Mapping[str, Path], rounds: int) -> dict[str, Any]:
    """Date, machine and versions; of each checkout its commit, and whether tracked files differ from it."""
    found = {name: value for name, value in about().items() if name != "commit"} | {"rounds": rounds}
    for name, path in checkouts.items():
        git = ["git", "--no-optional-locks", "-C", str(path)]
        commit, changes = (
            subprocess.run([*git, *command], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
        found[name] = {"commit": commit, "dirty": bool(changes)}
    return found


def workloads_of(preset: str, parts: Sequence[str]) -> list[Workload]:
    """All workloads of a preset of which a figure is wanted."""
    rows, length = SHAPES[preset]
    shared = {"preset": preset, "device": "cpu", "threads": 0}
    network = {**shared, "batch_size": rows, "context": length, "compiled": "off"}
    passes = Figure("step", f"forward and backward, {rows} x {length}", "passes")
    whole = Figure("step", f"whole training step, {rows} x {length}", "whole", {"tau": TAU})
    workloads = [
        Workload("network", network, [passes, whole]),
        Workload("optimizer", {**shared, "kind": "muonclip"}, [Figure("optimizer", "optimizer step", "step")]),
    ]
    for kind in DECODERS:
        room = length + TOKENS * (WARM_UP_CALLS + MOST_CALLS)
        decoder = {**shared, "length": room, "slots": 1, "weights": "fp32", "kind": kind}
        prefill = Figure("prefill", f"prefill of {length} tokens, {kind}", "fill", {"context": length})
        decode = Figure("decode", f"decoding a token, {kind}", "decode", {"count": TOKENS}, prompt=length)
        workloads.append(Workload("decoder", decoder, [prefill, decode]))
    chosen = [Workload(s.name, s.settings, [f for f in s.figures if f.part in parts]) for s in workloads]
    return [workload for workload in chosen if workload.figures]


def measured(workload: Workload, checkouts: Mapping[str, Path], rounds: int) -> Iterator[dict[str, Any]]:
    """The figures of a workload, their rounds shared out among pairs of processes."""
    seconds: dict[str, dict[str, list[float]]] = {f.name: {name: [] for name in checkouts} for f in workload.figures}
    missing: dict[str, str] = {}
    for share in filter(None, map(len, np.array_split(range(rounds), PAIRS))):
        print(f"{workload.settings['preset']}, loading {workload.name}", file=sys.stderr, flush=True)
        with ExitStack() as stack:
            workers = {
                name: stack.enter_context(
                    Worker(workload.name, workload.settings, {}, checkout=path, module=worker_module(path))
                )
                for name, path in checkouts.items()
            }
            failed = why_not_loaded(workers)
            for figure in workload.figures:
                try:
                    if failed:
                        raise LeftOut(failed)
                    take_rounds(figure, workers, share, seconds[figure.name])
                except LeftOut as reason:
                    failed = missing[figure.name] = str(reason)  # whoever ended cannot be asked for the next
    for figure in workload.figures:
        result = {"part": figure.part, "figure": figure.name}
        if figure.name in missing:
            yield result | {"verdict": "not measured", "why": missing[figure.name]}
        else:
            yield result | compared(seconds[figure.name])


def why_not_loaded(workers: Mapping[str, Worker]) -> str:
    """Waits for both; which of them failed, and why, or "". One that failed must not be asked again."""
    for name, worker in workers.items():
        try:
            worker.load()
        except LeftOut as reason:
            return f"{name}: {reason}"
    return ""


def take_rounds(figure: Figure, workers: Mapping[str, Worker], rounds: int, seconds: dict[str, list[float]]) -> None:
    """Warms up, then adds to ``seconds``, by checkout, the median of each turn."""
    slowest = 0.0
    for name in workers:
        taken = [turn(figure, name, workers, 1)[1]]
        while len(taken) < WARM_UP_CALLS and sum(taken) < TURN_SECONDS:
            taken.append(turn(figure, name, workers, 1)[1])
        slowest = max(slowest, min(taken))
    calls = max(1, min(MOST_CALLS, int(TURN_SECONDS / slowest)))
    for _ in range(rounds):
        number = len(seconds["old"])
        for name in workers if number % 2 == 0 else reversed(list(workers)):
            seconds[name].append(turn(figure, name, workers, calls)[0])
        times = ", ".join(f"{name} {amount(found[-1], 's')}" for name, found in seconds.items())
        print(f"{figure.name}, round {number + 1}, median of {calls}: {times}", file=sys.stderr, flush=True)


def turn(figure: Figure, name: str, workers: Mapping[str, Worker], calls: int) -> tuple[float, float]:
    """Median seconds that ``calls`` calls of one checkout answer, and the seconds of one call."""
    try:
        if figure.prompt:
            workers[name].ask("fill", context=figure.prompt)
        found = statistics.median(workers[name].ask(figure.do, **figure.arguments)["seconds"] for _ in range(calls))
    except LeftOut as reason:
        raise LeftOut(f"{name}: {reason}") from None
    return found, found * figure.arguments.get("count", 1)  # a decoder answers the seconds of one token


def compared(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The medians, the median ratio of the rounds with its interval (percentile bootstrap), the verdict."""
    ratios = np.array(seconds["new"]) / np.array(seconds["old"])
    drawn = np.random.default_rng(SEED).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5]).tolist()
    return {
        "verdict": "slower" if low > TOLERATED else "unclear" if high > TOLERATED else "not slower",
        "ratio": float(np.median(ratios)),
        "interval": [low, high],
        "medians": {name: statistics.median(found) for name, found in seconds.items()},
        "seconds": seconds,
    }


def table(figures: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each figure."""
    yield f"{'preset':<10} {'figure':<34} {'old':>9} {'new':>9} {'new/old':>8}  {'95 % interval':<14}  verdict"
    for figure in figures:
        name = f"{figure['preset']:<10} {figure['figure']:<34}"
        if "why" in figure:
            yield f"{name} {figure['verdict']}: {figure['why']}"
        else:
            old, new = (amount(figure["medians"][key], "s") for key in ("old", "new"))
            low, high = figure["interval"]
            yield f"{name} {old:>9} {new:>9} {figure['ratio']:>8.3f}  {low:.3f} to {high:.3f}  {figure['verdict']}"


if __name__ == "__main__":
    sys.exit(main())
