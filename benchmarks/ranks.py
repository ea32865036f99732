"""What several processes cost, and what they cost who has one.

    python benchmarks/ranks.py one_process ../earlier             # a step of this checkout and of another, by turns
    python benchmarks/ranks.py layouts --nproc_per_node 2         # a step in every layout, by turns; on CUDA by NCCL

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

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "data" / "train.txt"

# Runs in either checkout, so with nothing that an earlier one did not have.
STEPS = """
import json, statistics, sys, time
import torch
from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.data.sources import open_corpus
from nanokimi.training.trainer import Trainer

text, folder, preset, steps = sys.argv[1:]
config = TrainConfig(preset=preset, data_path=text, output_dir=folder, batch_size=4, gradient_accumulation=2,
                     eval_interval=0, compile="off", max_steps=10_000)
corpus = open_corpus(config, "byte", say=lambda line: None)
trainer = Trainer(config, ModelConfig.preset(preset, tokenizer_name="byte", vocab_size=257), corpus,
                  torch.device("cpu"))
batches, seconds = iter(trainer.batches), []
for number in range(5 + int(steps)):
    began = time.perf_counter()
    values = trainer._train_step(batches)
    seconds.append(time.perf_counter() - began)
print(json.dumps({"seconds": statistics.median(seconds[5:]), "loss": values["train_ce_loss"]}))
"""

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
    from benchmarks.bench.about import about

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
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", STEPS, str(TEXT), folder, preset, str(steps)]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(checkout)}, cwd=folder, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
    result: dict[str, float] = json.loads(done.stdout)
    return result


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
    """The median step of a run, without its first five; from the metrics that it wrote."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.nproc_per_node)]
    cores = os.cpu_count() or 1
    threads = cores if flags is None else max(1, cores // args.nproc_per_node)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, *(torchrun if flags is not None else []), str(ROOT / "train.py"), "--preset", args.preset,
            "--data_path", str(TEXT), "--output_dir", folder, "--set", "tokenizer_name=byte", "--device", args.device,
            "--batch_size", "8", "--gradient_accumulation", str(args.nproc_per_node), "--eval_interval", "0",
            "--save_interval", "0", "--max_steps", str(5 + args.steps), *(flags or []),
        ]  # fmt: skip
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, check=True)
        history = json.loads((Path(folder) / "logs" / "training_metrics.json").read_text())
    tokens = [after - before for before, after in zip([0, *history["tokens"]], history["tokens"], strict=False)]
    seconds = [n / speed for n, speed in zip(tokens, history["tokens_per_second"], strict=True)]
    return statistics.median(seconds[5:])


if __name__ == "__main__":
    main()
