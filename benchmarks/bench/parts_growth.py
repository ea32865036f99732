"""How time and memory grow with the context, the batch and the number of experts."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.bench.bench import Bench
from benchmarks.bench.parts_decoding import TOKENS
from benchmarks.bench.roofline import cache_bytes
from benchmarks.bench.rounds import Candidate, Worker

SMALL = {"debug": "debug"}  # presets that are trained at their own size here; others at that of "tiny"
DOUBLINGS = (1, 2, 4, 8, 16)
BATCH_CONTEXT, EXPERT_BATCH = 256, 4
REPEATS = 3


def growth(bench: Bench) -> None:
    """Training at the widths of a small preset, so that it takes seconds; decoding at the preset's own."""
    preset = SMALL.get(bench.args.preset, "tiny")
    shortest = min(1024, bench.args.config.max_seq_length) if preset == "debug" else 1024
    train_growth(
        bench, preset, "context", [(n * shortest, {"batch_size": 1, "context": n * shortest}) for n in DOUBLINGS]
    )
    context = min(BATCH_CONTEXT, shortest)
    train_growth(bench, preset, "batch", [(n, {"batch_size": n, "context": context}) for n in DOUBLINGS])
    shape = {"batch_size": EXPERT_BATCH, "context": context}
    train_growth(bench, preset, "experts", [(4 * n, {**shape, "n_routed_experts": 4 * n}) for n in DOUBLINGS])
    decode_growth(bench, [n * shortest for n in DOUBLINGS])


def train_growth(bench: Bench, preset: str, axis: str, sizes: list[tuple[int, dict[str, Any]]]) -> None:
    """Forward and backward along one axis, in one process, from small to large."""
    points = []
    with bench.workers({"growth": ("growth", {"preset": preset})}) as workers:
        for x, shape in sizes:
            found = bench.ask(
                f"forward and backward, {axis} {x}", workers["growth"], "passes", repeats=REPEATS, **shape
            )
            if found is not None:
                points.append({"x": x, **found})
    fixed = ", ".join(f"{name} {value}" for name, value in sizes[0][1].items() if sizes[1][1][name] == value)
    bench.keep_curve(
        "growth", f"forward and backward of {preset} against {axis}" + f" ({fixed})" * bool(fixed), axis, points
    )


def decode_growth(bench: Bench, contexts: list[int]) -> None:
    """A token at batch 1 in fp32, beside the time that reading the longer cache explains."""
    repeats = bench.args.repeats
    length = max(contexts) + TOKENS * (repeats + 4)
    kind = "graph" if bench.cuda else "native"
    settings = {"preset": bench.args.preset, "length": length, "slots": 1, "weights": "fp32", "kind": kind}
    points: list[dict[str, float]] = []
    rate = 0.0
    with bench.workers({"decoder": ("decoder", settings)}) as workers:
        for context in contexts:
            found = _decode(bench, workers, context)
            if found is None:
                break
            taken, rate = found
            more = cache_bytes(bench.args.config, context) - cache_bytes(bench.args.config, contexts[0])
            first = points[0]["seconds"] if points else taken
            points.append({"x": context, "seconds": taken, "explained": first + more / rate})
    title = f"decoding a token against context, nanokimi fp32, {kind}"
    bench.keep_curve("growth", title, "context", points, roof_rate=rate)


def _decode(bench: Bench, workers: dict[str, Worker], context: int) -> tuple[float, float] | None:
    """Median seconds of a token around ``context``, and bytes that the machine reads in a second."""
    start = max(1, context - TOKENS * (bench.args.repeats + 2 * bench.warm_up) // 2)
    if bench.ask(f"prefill of {start} tokens", workers["decoder"], "fill", context=start) is None:
        return None
    decoder = Candidate("decoder", workers["decoder"], "decode", {"count": TOKENS})
    roof = Candidate("roof", bench.roofs, "read_roof")
    measured = bench.run_rounds(f"decoding at context {context}", [decoder, roof])
    if measured.missing:
        return None
    reads = [answer["work"] / answer["seconds"] for answer in measured.answers["roof"]]
    return statistics.median(measured.values()["decoder"]), statistics.median(reads)
