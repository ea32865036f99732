"""Speed and memory of the data package: `prepare`, reading tokens, waiting for data, one line of gigabytes.

    python -m benchmarks.data                        # all of it; writes benchmarks/results/data-DATE.json
    python -m benchmarks.data prepare --repeats 3    # measures that part anew, the file keeps the others
    python -m benchmarks.data memory --megabytes 64

Candidates take turns, each in a process of its own; the medians are compared.
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
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench.results import ROOT, about
from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.data.batch import Batch
from nanokimi.data.loader import LoaderOptions
from nanokimi.data.prepare import prepare_stdlib, prepare_tokens
from nanokimi.data.sources import open_corpus, train_tokenizer_on
from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.training.trainer import Trainer

log = partial(print, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="(default: all)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="of training, for the share spent waiting")
    parser.add_argument("--megabytes", type=int, default=2000, help="size of the long line")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child](Path(args.folder), args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_texts(Path(folder))
        settings = {name: getattr(args, name) for name in ("repeats", "steps", "megabytes")}
        results = {part: about() | settings | PARTS[part](Path(folder), args) for part in args.parts or PARTS}
    path = ROOT / "benchmarks" / "results" / time.strftime("data-%Y-%m-%d.json")
    earlier = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(earlier | results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def make_texts(folder: Path) -> None:
    """The standard library as text, and a tokenizer of it."""
    log(prepare_stdlib(folder / "train.txt"))
    log(train_tokenizer_on(folder / "train.txt", 8192, folder / "tokenizer.json"))


def child(name: str, folder: Path, args: argparse.Namespace, **environment: str) -> dict[str, float]:
    """What a fresh process measured."""
    command = [sys.executable, "-m", "benchmarks.data", "--child", name, "--folder", str(folder)]
    for flag in ("steps", "megabytes"):
        command += [f"--{flag}", str(getattr(args, flag))]
    done = subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    log(name, found)
    return found


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


# ---- prepare against a plain loop ---------------------------------------------------------------


def measure_prepare(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """MB/s from text to token file: `nanokimi prepare tokens` on all cores, and the obvious loop on one."""
    one_core = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    rounds = []
    for _ in range(args.repeats):
        ours = child("prepare", folder, args)["mb_per_second"]
        loop = child("plain_loop", folder, args, **one_core)["mb_per_second"]
        rounds.append({"prepare, MB/s": ours, "plain loop, MB/s": loop, "ratio": ours / loop})
    return {**medians(rounds), "rounds": rounds}


def prepare(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as output:
        began = time.perf_counter()
        prepare_tokens(
            {"data_path": str(folder / "train.txt")},
            {"tokenizer_name": str(folder / "tokenizer.json")},
            Path(output),
            shard_tokens=100_000_000,
            log=log,
        )
        return {"mb_per_second": megabytes(folder) / (time.perf_counter() - began)}


def plain_loop(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    began = time.perf_counter()
    with (folder / "plain.bin").open("wb") as file:
        for document in (folder / "train.txt").read_text(encoding="utf-8").split("<|endoftext|>\n"):
            file.write(np.array([*tokenizer.encode(document).ids, end], np.uint16).tobytes())
    return {"mb_per_second": megabytes(folder) / (time.perf_counter() - began)}


def megabytes(folder: Path) -> float:
    return (folder / "train.txt").stat().st_size / 1e6


# ---- reading tokens -----------------------------------------------------------------------------


def measure_tokenbin(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second that a training loop can take from token files."""
    prepare_tokens(
        {"data_path": str(folder / "train.txt")},
        {"tokenizer_name": str(folder / "tokenizer.json")},
        folder / "tokens",
        shard_tokens=1_000_000,
        log=log,
    )
    return medians([child("read_tokens", folder, args) for _ in range(args.repeats)])


def read_tokens(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    corpus = open_corpus(TrainConfig(dataset="tokenbin", data_path=str(folder / "tokens")), "", log=log)
    found = {}
    for length, batch_size, workers in ((1024, 8, 0), (256, 8, 0), (1024, 8, 2)):
        loader = corpus.train.loader(LoaderOptions(length, batch_size, 1, num_workers=workers))
        batches, n = iter(loader), 20_000_000 // (length * batch_size)
        next(batches)
        began = time.perf_counter()
        for batch in islice(batches, n):
            batch.tokens[0, 0].item()
        found[f"context {length}, {workers} workers"] = n * length * batch_size / (time.perf_counter() - began)
    return found


# ---- waiting for data ---------------------------------------------------------------------------


def measure_waiting(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Share of a training step of ``tiny`` that is spent waiting for its batches, for each source and workers."""
    prepare_tokens(
        {"data_path": str(folder / "train.txt")},
        {"tokenizer_name": str(folder / "tokenizer.json")},
        folder / "tokens",
        shard_tokens=100_000_000,
        log=log,
    )
    return child("wait", folder, args)


class Timed:
    """An iterator that counts the seconds its user waits."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Timed:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - began
        return batch


def wait(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    found = {}
    for dataset, workers in (("local", 0), ("tokenbin", 0), ("localstreaming", 0), ("localstreaming", 2)):
        path = folder / ("tokens" if dataset == "tokenbin" else "train.txt")
        config = TrainConfig(
            preset="tiny",
            dataset=dataset,
            data_path=str(path),
            batch_size=8,
            gradient_accumulation=1,
            num_workers=workers,
            eval_interval=0,
            output_dir=str(folder),
        )
        corpus = open_corpus(config, str(folder / "tokenizer.json"), log=log)
        shape = ModelConfig.preset("tiny", vocab_size=corpus.tokenizer.vocab_size)
        trainer = Trainer(config, shape, corpus, torch.device("cpu"))
        batches = Timed(iter(trainer.batches))
        trainer._train_step(batches)  # what happens once, such as filling the shuffle buffer, is told apart
        first, batches.seconds = batches.seconds, 0.0
        began = time.perf_counter()
        for _ in range(args.steps):
            trainer._train_step(batches)
        name = f"{dataset}, {workers} workers"
        found[f"{name}: share"] = batches.seconds / (time.perf_counter() - began)
        found[f"{name}: first batch, seconds"] = first
    return found


# ---- memory -------------------------------------------------------------------------------------


def measure_memory(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory above start-up of streaming one line of ``--megabytes``, of which nothing is left out."""
    found = {}
    for size in sorted({args.megabytes // 100, args.megabytes // 10, args.megabytes} - {0}):
        args.megabytes = size
        found[f"{size} MB"] = child("stream", folder, args)
    return found


def stream(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    path = folder / "line.txt"
    with path.open("wb") as file:
        block = b"".join(b"word%d " % i for i in range(140_000))[:1_000_000]
        for _ in range(args.megabytes):
            file.write(block)
    load_tokenizer("byte").encode("warm")
    started = memory("VmHWM")
    began = time.perf_counter()
    config = TrainConfig(dataset="localstreaming", data_path=str(path))
    loader = open_corpus(config, "byte", log=log).train.loader(LoaderOptions(1024, 8, 1))
    n = int(args.megabytes * 1_000_000 * 0.95) // (1024 * 8)
    for _ in islice(loader, n):
        pass
    path.unlink()
    return {"seconds": time.perf_counter() - began, "peak_mb_above_start": (memory("VmHWM") - started) / 1e6}


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) * 1024


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "prepare": measure_prepare,
    "tokenbin": measure_tokenbin,
    "waiting": measure_waiting,
    "memory": measure_memory,
}
CHILDREN: dict[str, Callable[[Path, argparse.Namespace], dict[str, float]]] = {
    "prepare": prepare,
    "plain_loop": plain_loop,
    "read_tokens": read_tokens,
    "wait": wait,
    "stream": stream,
}

if __name__ == "__main__":
    main()
