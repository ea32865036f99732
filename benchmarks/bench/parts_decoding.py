"""The parts about inference: prefill, decoding at several contexts and batches, what weights in fewer bits cost."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.bench.bench import Bench
from benchmarks.bench.results import Comparison, compared
from benchmarks.bench.roofline import prefill_flops, token_bytes
from benchmarks.bench.rounds import Candidate, Worker
from nanokimi.console import log

TOKENS = 16  # decoded by a candidate in one round
BATCHES = {"cpu": (1, 2, 4, 8, 16), "cuda": (1, 8, 32, 128)}
LONG = 512  # after a context of this or more, of llama.cpp's two settings only the faster one stays
LONGEST_PREFILL = 1024
GGUF_TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "q8_0"}
SETTINGS = {"": False, ", its defaults": True}  # of llama.cpp: fp32 cache without flash attention; as it comes

Workloads = dict[str, tuple[str, Mapping[str, Any]]]


def inference(bench: Bench) -> None:
    """Parts ``prefill`` and ``decoding``: one weight format after the other, each candidate loaded once for both."""
    formats_here = ("bf16", "fp32") if bench.cuda else tuple(GGUF_TYPES)
    wanted = bench.args.parts
    with tempfile.TemporaryDirectory() as folder:
        for weights in formats_here if "decoding" in wanted else formats_here[:1]:
            files = _gguf(bench, Path(folder), weights)
            with bench.workers(_engines(bench, weights, _room(bench), files)) as workers:
                _note_llamacpp(bench, workers)
                if "prefill" in wanted and weights == formats_here[0]:
                    prefill(bench, weights, workers)
                if "decoding" in wanted:
                    decoding(bench, weights, workers)
            for file in files.values():
                Path(file).unlink()
    if "decoding" in wanted:
        batches(bench)


def _room(bench: Bench) -> int:
    """Tokens that a sequence has room for: the largest context and half of what is decoded around it."""
    return max(bench.args.contexts) + _decoded(bench) + TOKENS


def _decoded(bench: Bench) -> int:
    """Tokens decoded in all rounds, and room for the one more that llama.cpp takes in each."""
    return (TOKENS + 1) * (bench.args.repeats + 3)


def _engines(bench: Bench, weights: str, length: int, files: Mapping[str, str]) -> Workloads:
    """All candidates of one weight format; ours first."""
    shape = {"preset": bench.args.preset, "length": length}
    ours = {**shape, "slots": 1, "weights": weights}
    fast = "graph" if bench.cuda else "native"
    found: Workloads = {f"nanokimi {weights}, {fast}": ("decoder", {**ours, "kind": fast})}
    if weights == "fp32" or bench.cuda:
        found[f"nanokimi {weights}, eager"] = ("decoder", {**ours, "kind": "eager"})
        found[f"transformers {weights}"] = ("generate", {**shape, "weights": weights})
    for name, file in files.items():
        for setting, defaults in SETTINGS.items():
            found[f"llama.cpp {name}{setting}"] = ("llamacpp", {**shape, "path": file, "defaults": defaults})
    return found


def _gguf(bench: Bench, folder: Path, weights: str) -> dict[str, str]:
    """The GGUF file of one format by its type; none on CUDA, for which there is no build here."""
    if bench.cuda:
        return {}
    dtype, length = GGUF_TYPES[weights], _room(bench)
    with bench.workers({"files": ("gguf", {"preset": bench.args.preset, "length": length})}) as workers:
        path = str(folder / f"{dtype}.gguf")
        about = f"llama.cpp {dtype}, writing its file"
        written = bench.ask(about, workers["files"], "write", path=path, dtype=dtype)
    return {dtype: path} if written is not None else {}


def _note_llamacpp(bench: Bench, workers: Mapping[str, Worker]) -> None:
    """Once: its version and the instruction sets of its build, which no setting changes."""
    for name, worker in workers.items():
        if name.startswith("llama.cpp") and "llama.cpp" not in bench.results.about:
            bench.results.about["llama.cpp"] = bench.ask(name, worker, "about")


def decoding(bench: Bench, weights: str, workers: dict[str, Worker]) -> None:
    """A token at batch 1, at each context, which lies in the middle of what all rounds decode."""
    names = list(workers)
    for context in bench.args.contexts:
        count = min(TOKENS, max(1, context // (bench.args.repeats + 1)))
        start = max(1, context - count * (bench.args.repeats + 2 * bench.warm_up) // 2)
        names = [name for name in names if _fill(bench, name, workers[name], context=start)]
        needs = token_bytes(bench.args.config, bench.active_parameters, context, weights)
        found = bench.compare(
            "decoding",
            f"decoding a token, {weights}, context {context}",
            work=1,
            candidates=[Candidate(name, workers[name], "decode", {"count": count}) for name in names],
            roof=Candidate("roof", bench.roofs, "read_roof"),
            needs=needs,
        )
        names = [row["name"] for row in found["rows"]]
        if context >= LONG:
            names = [name for name in names if name not in _slower_settings(found)]


def _fill(bench: Bench, name: str, worker: Worker, **arguments: Any) -> bool:
    return bench.ask(f"{name}, prefill", worker, "fill", **arguments) is not None


def _slower_settings(found: Comparison) -> list[str]:
    """Of llama.cpp's settings in one comparison, all but the fastest."""
    taken = {row["name"]: row["median"] for row in found["rows"] if row["name"].startswith("llama.cpp")}
    return sorted(taken, key=lambda name: taken[name])[1:]


def prefill(bench: Bench, weights: str, workers: dict[str, Worker]) -> None:
    """A prompt read into an empty cache."""
    for context in [n for n in bench.args.contexts if n <= LONGEST_PREFILL] or bench.args.contexts[:1]:
        bench.compare(
            "prefill",
            f"prefill of {context} tokens, {weights}",
            work=context,
            candidates=[Candidate(name, worker, "fill", {"context": context}) for name, worker in workers.items()],
            roof=Candidate("roof", bench.roofs, "matrix_roof", {"dtype": weights}),
            needs=prefill_flops(bench.args.config, bench.active_parameters, context),
        )


def batches(bench: Bench) -> None:
    """Several sequences decoded together; one step gives a token to each."""
    sizes = BATCHES["cuda" if bench.cuda else "cpu"]
    context = bench.args.contexts[0]
    count = min(TOKENS // 2, context)
    length = context + _decoded(bench)
    kind = "graph" if bench.cuda else "native"
    shape = {"preset": bench.args.preset, "length": length}
    workloads: Workloads = {
        f"nanokimi {weights}, {kind}": ("decoder", {**shape, "slots": max(sizes), "weights": weights, "kind": kind})
        for weights in ("fp32", "bf16")
    }
    weights = "bf16" if bench.cuda else "fp32"
    workloads[f"transformers {weights}"] = ("generate", {**shape, "weights": weights})
    points: dict[str, list[dict[str, float]]] = {name: [] for name in workloads}
    with bench.workers(workloads) as workers:
        names = list(workers)
        for size in sizes:
            names = [name for name in names if _fill(bench, name, workers[name], context=context, rows=size)]
            found = bench.compare(
                "batches",
                f"decoding step of {size} sequences, context {context}",
                [Candidate(name, workers[name], "decode", {"count": count}) for name in names],
                work=size,
            )
            names = [row["name"] for row in found["rows"]]
            for row in found["rows"]:
                points[row["name"]].append({"x": size, "seconds": row["median"]})
    for name, found_points in points.items():
        bench.keep_curve("batches", f"decoding step against batch, {name}", "batch", found_points)


def formats(bench: Bench) -> None:
    """Bits per byte of a trained model with its matrices rounded to each format."""
    if not bench.args.checkpoint:
        log("formats is left out: no --checkpoint is named")
        return
    values: dict[str, list[float]] = {}
    path = str(Path(bench.args.checkpoint).absolute())
    with bench.workers({"formats": ("formats", {"path": path})}) as workers:
        for weights in GGUF_TYPES:
            found = bench.ask(f"bits per byte, {weights}", workers["formats"], "score", weights=weights, max_tokens=0)
            if found is not None:
                values[weights] = [found["bits_per_byte"]]
    exact = values.get("fp32", [math.nan])[0]
    notes = {name: f"{value[0] - exact:+.6f}" for name, value in values.items() if name != "fp32"}
    title = f"bits per byte of held-out text, {bench.args.checkpoint}"
    bench.keep("formats", compared(title, values, ours="fp32", unit="bits/byte", notes=notes))
