"""What several processes cost, and what they cost who has one.

    python -m benchmarks.ranks one_process ../earlier             # a step of this checkout and of another, by turns
    python -m benchmarks.ranks layouts --nproc_per_node 2         # a step in every layout, by turns; on CUDA by NCCL

Both write benchmarks/results/ranks-PART-DATE.json. The text is the standard library (``nanokimi prepare stdlib``).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bench.results import ROOT, about

TEXT = ROOT / "data" / "train.txt"
WARM_UP = 5  # steps that do not count

LAYOUTS = {
    "ddp": ["--parallel", "ddp"],
    "fsdp": ["--parallel", "fsdp"],
    "hybrid": ["--parallel", "fsdp", "--replicate", "RANKS"],
    "experts": ["--parallel", "fsdp", "--expert_parallel", "RANKS"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("one_process")
    one.add_argument("against", type=Path, help="another checkout")
    one.add_argument("--presets", default="debug,tiny")
    layouts = parts.add_parser("layouts")
    layouts.add_argument("--nproc_per_node", type=int, default=2)
    layouts.add_argument("--preset", default="tiny")
    layouts.add_argument("--device", default="auto")
    for part in (one, layouts):
        part.add_argument("--rounds", type=int, default=9)
        part.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    said = about()
    found = one_process(args) if args.part == "one_process" else by_layout(args)
    path = ROOT / "benchmarks" / "results" / f"ranks-{args.part}-{time.strftime('%Y-%m-%d')}.json"
    settings = {name: str(value) for name, value in vars(args).items() if name != "against"}
    path.write_text(json.dumps({"about": said, "settings": settings, **found}, indent=1) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


def one_process(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step in each round, and the ratio of this checkout's to the other's."""
    found: dict[str, Any] = {}
    for preset in args.presets.split(","):
        rounds = []
        for number in range(args.rounds):
            checkouts = {"here": ROOT, "there": args.against.resolve()}
            order = list(checkouts) if number % 2 else list(reversed(checkouts))
            rounds.append({name: step_of(checkouts[name], preset, args.steps) for name in order})
            print(preset, {name: f"{1e3 * step['seconds']:.2f} ms" for name, step in rounds[-1].items()}, flush=True)
        ratios = sorted(r["here"]["seconds"] / r["there"]["seconds"] for r in rounds)
        print(f"{preset}: {statistics.median(ratios):.3f} times ({ratios[0]:.3f} to {ratios[-1]:.3f})")
        found[preset] = {"ratio": statistics.median(ratios), "ratios": ratios, "rounds": rounds}
    return found


def step_of(checkout: Path, preset: str, steps: int) -> dict[str, float]:
    """The median step of a run of ``checkout`` on one process, and the loss that the run ended with."""
    flags = ["--preset", preset, "--device", "cpu", "--batch_size", "4", "--gradient_accumulation", "2"]
    history = history_of([], [*flags, "--compile", "off"], steps, {"PYTHONPATH": str(checkout)}, checkout)
    return {"seconds": median_step(history), "loss": history["train_ce_loss"][-1]}


def by_layout(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step in each round, for one process with all cores and for each layout."""
    ranks = str(args.nproc_per_node)
    flags = {name: [ranks if flag == "RANKS" else flag for flag in more] for name, more in LAYOUTS.items()}
    rounds = []
    for number in range(args.rounds):
        names = ["one", *flags]
        order = names if number % 2 else list(reversed(names))
        rounds.append({name: seconds_of(args, flags.get(name)) for name in order})
        print({name: f"{1e3 * rounds[-1][name]:.1f} ms" for name in names}, flush=True)
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    ratios = {name: statistics.median(r[name] / r["one"] for r in rounds) for name in rounds[0]}
    print({name: f"{1e3 * medians[name]:.1f} ms, {ratios[name]:.2f} times one process" for name in medians})
    return {"medians": medians, "ratios": ratios, "rounds": rounds}


def seconds_of(args: argparse.Namespace, flags: list[str] | None) -> float:
    """The median step of a run with a layout, or of one process where ``flags`` is None."""
    cores = os.cpu_count() or 1
    threads = cores if flags is None else max(1, cores // args.nproc_per_node)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.nproc_per_node)]
    size = ["--batch_size", "8", "--gradient_accumulation", str(args.nproc_per_node)]
    more = ["--preset", args.preset, "--device", args.device, *size, *(flags or [])]
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    return median_step(history_of(torchrun if flags is not None else [], more, args.steps, environment, ROOT))


def history_of(
    launcher: list[str], flags: list[str], steps: int, environment: dict[str, str], checkout: Path
) -> dict[str, Any]:
    """The metrics that a run of the checkout's ``train.py`` wrote: ``steps`` steps after five that warm up."""
    with tempfile.TemporaryDirectory() as folder:
        script = [*launcher, str(checkout / "train.py"), "--data_path", str(TEXT), "--output_dir", folder]
        rest = ["--set", "tokenizer_name=byte", "--eval_interval", "0", "--save_interval", "0"]
        command = [sys.executable, *script, *rest, "--max_steps", str(WARM_UP + steps), *flags]
        subprocess.run(command, env=os.environ | environment, cwd=folder, capture_output=True, check=True)
        history: dict[str, Any] = json.loads((Path(folder) / "logs" / "training_metrics.json").read_text())
    return history


def median_step(history: dict[str, Any]) -> float:
    """Seconds of a step, by the speed that the run recorded."""
    tokens = [after - before for before, after in zip([0, *history["tokens"]], history["tokens"], strict=False)]
    seconds = [n / speed for n, speed in zip(tokens, history["tokens_per_second"], strict=True)]
    return statistics.median(seconds[WARM_UP:])


if __name__ == "__main__":
    main()
