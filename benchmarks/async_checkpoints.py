"""How long training stands still for a checkpoint, written at once or while training goes on, and what it costs in all.

    python -m benchmarks.async_checkpoints --preset nano-243m     # writes benchmarks/results/async-checkpoints.json

Rounds of both kinds alternate. A round is one save and the steps after it, until the checkpoint is on the disk in both
kinds: ``blocked`` is how long the call of the save took; ``lost`` is what the round took beyond its steps at their
undisturbed pace (the median of as many steps without a save), slowed steps included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.bench.results import ROOT, about
from nanokimi.checkpoint.run import Checkpoints
from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.console import log
from nanokimi.data.batch import Batch
from nanokimi.data.prepare import prepare_stdlib
from nanokimi.data.sources import open_corpus
from nanokimi.device import resolve_device
from nanokimi.memory import keep_freed_memory
from nanokimi.training.trainer import Trainer

RESULTS = ROOT / "benchmarks" / "results" / "async-checkpoints.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano-243m")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="of each kind, after one of each that is not counted")
    parser.add_argument("--steps", type=int, default=4, help="steps in a round; more are taken until the file is there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT) as work:
        found = measured(made_trainer(options, Path(work)), Path(work), options.rounds, options.steps)
    record = about() | {"preset": options.preset, "context": options.context, **found}
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found["medians"], indent=1), file=sys.stderr)


def made_trainer(options: argparse.Namespace, work: Path) -> Trainer:
    prepare_stdlib(work / "text.txt")
    settings = {"data_path": str(work / "text.txt"), "output_dir": str(work), "gradient_accumulation": 1}
    config = TrainConfig(batch_size=1, warmup_steps=0, schedule="constant", eval_interval=0, compile="off", **settings)
    corpus = open_corpus(config, "byte", log=log)
    model = ModelConfig.preset(options.preset, max_seq_length=options.context)
    keep_freed_memory()
    return Trainer(config, model, corpus, resolve_device(config.device))


def measured(trainer: Trainer, work: Path, rounds: int, steps: int) -> dict[str, Any]:
    batches = iter(trainer.batches)
    kinds = {name: Checkpoints(work / name, asynchronous=name == "async") for name in ("sync", "async")}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    plain = [seconds_of_step(trainer, batches) for _ in range(steps + 2)][2:]
    for _ in range(rounds + 1):
        for name, checkpoints in kinds.items():
            taken[name].append(one_round(trainer, checkpoints, batches, steps))
            plain += [seconds_of_step(trainer, batches) for _ in range(steps)]
    pace = statistics.median(plain)
    counted = {name: found[1:] for name, found in taken.items()}
    medians: dict[str, float] = {"step": pace}
    for name, found in counted.items():
        for row in found:
            row["lost"] = row["seconds"] - row["steps"] * pace
        medians |= {f"{name} {key}": statistics.median(row[key] for row in found) for key in ("blocked", "lost")}
        medians[f"{name} blocked, first"] = taken[name][0]["blocked"]
    medians["async blocked / sync blocked"] = medians["async blocked"] / medians["sync blocked"]
    medians["async lost / sync lost"] = medians["async lost"] / medians["sync lost"]
    size = (work / "sync" / "latest.pt").stat().st_size
    return {"medians": medians, "checkpoint_bytes": size, "rounds": counted, "plain_steps": plain}


def one_round(trainer: Trainer, checkpoints: Checkpoints, batches: Iterator[Batch], steps: int) -> dict[str, float]:
    began, done = time.perf_counter(), 0
    trainer.checkpoints = checkpoints
    trainer.save()
    blocked = time.perf_counter() - began
    while done < steps or checkpoints.busy:
        trainer._train_step(batches)
        done += 1
    checkpoints.finish()
    return {"blocked": blocked, "seconds": time.perf_counter() - began, "steps": done}


def seconds_of_step(trainer: Trainer, batches: Iterator[Batch]) -> float:
    began = time.perf_counter()
    trainer._train_step(batches)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
