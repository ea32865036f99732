"""Whether the precision that Newton-Schulz takes on this machine is the faster one, on the matrices of a preset.

``python -m benchmarks.product_choice`` writes benchmarks/results/product-choice.json. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median

import torch

from nanokimi.config import ModelConfig
from nanokimi.model.transformer import meta_model
from nanokimi.ops.measured import GAIN, default_choice, measured_gain
from nanokimi.ops.newton_schulz import newton_schulz, newton_schulz_flops
from nanokimi.ops.products import product
from nanokimi.optim.muonclip import MUON_ROLES

RESULT = Path(__file__).parent / "results" / "product-choice.json"
TOKENS = 2048  # rows of the products of a training step: 2 x 1024


def alternating(calls: dict[str, object], rounds: int) -> dict[str, float]:
    """Median seconds of each call, one after the other in every round, after one of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()  # type: ignore[operator]
            if number:
                times[name].append(time.perf_counter() - started)
    return {name: median(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="nano-243m")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = meta_model(ModelConfig.preset(args.preset))
    shapes = sorted({tuple(p.shape[-2:]) for role, p in model.param_roles() if role in MUON_ROLES})
    rows = []
    for shape in shapes:
        matrix, x = torch.randn(shape), torch.randn(TOKENS, shape[1])
        steps = {str(d): lambda d=d, m=matrix: newton_schulz(m, dtype=d) for d in (torch.float32, torch.bfloat16)}
        products = {"oneDNN": lambda m=matrix, x=x: product(x, m.mT), "torch": lambda m=matrix, x=x: x @ m.mT}
        seconds = {**alternating(steps, args.rounds), **alternating(products, args.rounds)}
        rows.append({"shape": shape, "seconds": seconds})
        print(shape, {name: f"{value * 1000:.1f} ms" for name, value in seconds.items()}, flush=True)
    largest = max(shapes, key=lambda shape: newton_schulz_flops(*shape))
    gain = measured_gain(*(min(side, 1024) for side in largest))
    default = default_choice(torch.device("cpu")).dtype
    result = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "chosen": "float32" if default == "float32" or gain >= GAIN else default,
        "gain_of_float32": gain,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
