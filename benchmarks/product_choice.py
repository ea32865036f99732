"""Whether what a run would choose on this machine is the faster: the type of Newton-Schulz, the library of a step.

``python -m benchmarks.product_choice`` writes benchmarks/results/product-choice.json in a few minutes: on the matrices
of a preset Newton-Schulz in bf16 against fp32, and forward and backward pass of two sequences by oneDNN against MKL;
in alternation, in medians. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch

from benchmarks.bench.results import about
from nanokimi.config import ModelConfig
from nanokimi.model.transformer import Transformer
from nanokimi.ops.measured import GAIN, LARGEST, Choice, measured_choice
from nanokimi.ops.newton_schulz import newton_schulz
from nanokimi.ops.products import Library, multiply_fp32_by
from nanokimi.optim.muonclip import MUON_ROLES, largest_matrix

RESULT = Path(__file__).parent / "results" / "product-choice.json"
SEQUENCES, TOKENS = 2, 1024  # of a step


def alternating(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, one after the other in every round, after one of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - started)
    return {name: median(seconds) for name, seconds in times.items()}


def newton_schulz_seconds(model: Transformer, rounds: int) -> dict[str, float]:
    """Seconds of Newton-Schulz of all matrices of ``model`` one by one, by type; a matrix of each shape is timed."""
    matrices = [p for role, p in model.param_roles() if role in MUON_ROLES]
    shapes = Counter(tuple(p.shape[-2:]) for p in matrices for _ in range(p[..., 0, 0].numel()))
    total = {"bfloat16": 0.0, "float32": 0.0}
    for shape, count in shapes.items():
        matrix = torch.randn(shape)
        calls = {name: partial(newton_schulz, matrix, dtype=getattr(torch, name)) for name in total}
        seconds = alternating(calls, rounds)
        print(f"Newton-Schulz {shape}, {count} times:", in_words(seconds), flush=True)
        total = {name: total[name] + count * seconds[name] for name in total}
    return total


def step_seconds(model: Transformer, rounds: int) -> dict[str, float]:
    """Seconds of a forward and a backward pass by library."""
    length = min(TOKENS, model.config.max_seq_length)
    tokens = torch.randint(model.config.vocab_size, (SEQUENCES, length))

    def step(library: Library) -> None:
        multiply_fp32_by(library)
        sum(model(tokens, tokens)).backward()
        model.zero_grad(set_to_none=True)

    return alternating({library: partial(step, library) for library in get_args(Library)}, rounds)


def in_words(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value * 1000:.1f} ms" for name, value in seconds.items())


def judged(seconds: dict[str, float], chosen: str) -> dict[str, Any]:
    """Medians and whether ``chosen`` is the faster, or no slower than by the gain below which a default is kept."""
    (first, a), (second, b) = seconds.items()
    best = min(a, b)
    return {
        "seconds": seconds,
        "ratio": {f"{first} / {second}": a / b},
        "chosen": chosen,
        "chosen_is_the_faster": seconds[chosen] == best,
        "within_the_threshold": seconds[chosen] <= GAIN * best,
    }


def measure(preset: str, rounds: int) -> dict[str, Any]:
    model = Transformer(ModelConfig.preset(preset))
    rows, cols = (min(side, LARGEST) for side in largest_matrix(model))
    began = time.perf_counter()
    choice: Choice = measured_choice(rows, cols)
    took = time.perf_counter() - began
    print(f"chosen: {choice} ({choice.evidence}), in {took:.2f} s", flush=True)
    multiply_fp32_by(choice.library)
    by_type = newton_schulz_seconds(model, rounds)
    return {
        **about(),
        "preset": preset,
        "choice": {**choice._asdict(), "seconds": took},
        "newton_schulz": judged(by_type, choice.dtype),
        "step": judged(step_seconds(model, rounds), choice.library),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="nano-243m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    result = measure(args.preset, args.rounds)
    for name in ("newton_schulz", "step"):
        found = result[name]
        verdict = "is the faster" if found["chosen_is_the_faster"] else "is NOT the faster"
        print(f"{name}: {in_words(found['seconds'])}; {found['chosen']} {verdict}", found["ratio"])
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
