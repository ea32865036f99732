"""Whether one checkout is slower than another: both measured in one run, by turns, on the CPU.

    python benchmarks/side_by_side.py ../earlier .                                   # nano-243m and tiny, 15 rounds
    python benchmarks/side_by_side.py ../earlier . --presets tiny --only step,decode --output side_by_side.json

For each preset: forward and backward pass, whole training step, optimizer step, prefill and decoding with the eager and
the native decoder. Each checkout answers from a process of its own (``python -m benchmarks.bench.worker``) with its own
``nanokimi``. A round asks both, every other round backwards, and its ratio is new over old. A figure is "slower" when
the 95 % interval of the median ratio lies above 1.03, and "unclear" when it reaches above 1.03: take more rounds.
The exit status is 1 if a figure is slower, else 2 if one could not be measured (NANOKIMI_BENCH_ERRORS=1 says more).
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

from benchmarks.bench.about import about
from benchmarks.bench.report import amount
from benchmarks.bench.turns import LeftOut, Worker

PARTS = ("step", "optimizer", "prefill", "decode")
SHAPES = {"nano-243m": (1, 512), "tiny": (8, 256)}  # sequences of a training step; tokens of each, and of a prompt
DECODERS = ("eager", "native")
TOKENS = 16  # decoded in one call
TAU = 100.0  # of QK-Clip

WARM_UP_CALLS = 3  # at most, of each checkout
TURN_SECONDS = 1.0  # calls that are shorter are repeated for this long in each turn
MOST_CALLS = 30  # in a turn
PAIRS = 3  # of processes, one after the other: where memory happens to lie sets a process apart by a percent or two
TOLERATED = 1.03
RESAMPLES, SEED = 10_000, 0


@dataclass(frozen=True)
class Figure:
    """Something to time: the answer ``seconds`` of a subject's method ``do``.

    Attributes:
        part: one of PARTS.
        prompt: tokens that the decoder reads before each turn, untimed; 0 reads none.
    """

    part: str
    name: str
    do: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    prompt: int = 0


@dataclass(frozen=True)
class Subject:
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
        for subject in subjects_of(preset, args.only):
            for figure in measured(subject, checkouts, args.rounds):
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


def environment_of(checkout: Path) -> dict[str, str]:
    """Has a worker import the checkout's package, not the installed one nor that of the current folder."""
    return {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}


def check_import(checkout: Path) -> None:
    """Makes sure that workers of ``checkout`` run its code; before Python 3.11 the current folder would win."""
    command = [sys.executable, "-c", "import benchmarks.bench.worker as worker; print(worker.__file__)"]
    environment = os.environ | environment_of(checkout)
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    if Path(printed).resolve() != checkout / "nanokimi" / "bench" / "worker.py":
        raise SystemExit(f"{checkout}: no checkout, or start from another folder: a worker would import {printed}")


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


def subjects_of(preset: str, parts: Sequence[str]) -> list[Subject]:
    """All subjects of a preset of which a figure is wanted."""
    rows, length = SHAPES[preset]
    shared = {"preset": preset, "device": "cpu", "threads": 0}
    network = {**shared, "batch_size": rows, "context": length, "compiled": "off"}
    passes = Figure("step", f"forward and backward, {rows} x {length}", "passes")
    whole = Figure("step", f"whole training step, {rows} x {length}", "whole", {"tau": TAU})
    subjects = [
        Subject("network", network, [passes, whole]),
        Subject("optimizer", {**shared, "kind": "muonclip"}, [Figure("optimizer", "optimizer step", "step")]),
    ]
    for kind in DECODERS:
        room = length + TOKENS * (WARM_UP_CALLS + MOST_CALLS)
        decoder = {**shared, "length": room, "slots": 1, "weights": "fp32", "kind": kind}
        prefill = Figure("prefill", f"prefill of {length} tokens, {kind}", "fill", {"context": length})
        decode = Figure("decode", f"decoding a token, {kind}", "decode", {"count": TOKENS}, prompt=length)
        subjects.append(Subject("decoder", decoder, [prefill, decode]))
    chosen = [Subject(s.name, s.settings, [f for f in s.figures if f.part in parts]) for s in subjects]
    return [subject for subject in chosen if subject.figures]


def measured(subject: Subject, checkouts: Mapping[str, Path], rounds: int) -> Iterator[dict[str, Any]]:
    """The figures of a subject, their rounds shared out among pairs of processes."""
    seconds: dict[str, dict[str, list[float]]] = {f.name: {name: [] for name in checkouts} for f in subject.figures}
    missing: dict[str, str] = {}
    for share in filter(None, map(len, np.array_split(range(rounds), PAIRS))):
        print(f"{subject.settings['preset']}, loading {subject.name}", file=sys.stderr, flush=True)
        with ExitStack() as stack:
            workers = {
                name: stack.enter_context(Worker(subject.name, subject.settings, environment_of(path)))
                for name, path in checkouts.items()
            }
            failed = why_not_loaded(workers)
            for figure in subject.figures:
                try:
                    if failed:
                        raise LeftOut(failed)
                    take_rounds(figure, workers, share, seconds[figure.name])
                except LeftOut as reason:
                    failed = missing[figure.name] = str(reason)  # whoever ended cannot be asked for the next
    for figure in subject.figures:
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
