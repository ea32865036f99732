"""The server under load: throughput by clients, many clients who come and leave, time to the first token.

    python -m benchmarks.serving                          # all of it; writes benchmarks/results/serving-DATE.json
    python -m benchmarks.serving soak --seconds 120       # measures that part anew, the file keeps the others
    python -m benchmarks.serving throughput --checkpoint runs/demo/checkpoints/best.pt

Without --checkpoint `tiny` has random weights and a tokenizer trained on some of Python's own library. `first_token`
takes `nano-243m` with random weights. Every part starts `nanokimi serve` as a process of its own, and is the only
thing that should run on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import uvicorn

from benchmarks.bench.results import ROOT, about
from benchmarks.crowd import Client, Crowd, completion
from nanokimi import checkpoint
from nanokimi.cli import build_parser
from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from nanokimi.inference.decoder import Decoder
from nanokimi.inference.decoding import new_decoder
from nanokimi.model.transformer import Transformer
from nanokimi.serve.arguments import ServeOptions, options_of
from nanokimi.serve.metrics import Metrics
from nanokimi.serve.server import bind, new_app, prepare
from nanokimi.serve.worker import Worker

log = partial(print, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="(default: all)")
    parser.add_argument("--checkpoint", default="", help="a `tiny` model for throughput and soak")
    parser.add_argument("--seconds", type=float, default=120, help="of the soak")
    parser.add_argument("--clients", type=int, default=64, help="in the soak")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", default=time.strftime("benchmarks/results/serving-%Y-%m-%d.json"))
    args = parser.parse_args()
    path, here = ROOT / args.output, about()
    for part in args.parts or PARTS:
        log(f"== {part}")
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[part](Path(folder), args)
        earlier = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(earlier | {part: here | found}, indent=1) + "\n")
        log(json.dumps(found, indent=1))


# ---- parts --------------------------------------------------------------------------------------


def throughput(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of 1, 4 and 16 streaming clients, in turns."""
    sizes, tokens = (1, 4, 16), 100  # the default of max_tokens
    with serving(tiny(folder, args.checkpoint)) as server:
        speeds: dict[int, list[float]] = {size: [] for size in sizes}
        for turn in range(args.rounds + 1):
            for size in sizes:
                speed = asyncio.run(tokens_per_second(server.port, size, tokens=tokens))
                if turn:  # the first one warms up
                    speeds[size].append(speed)
    ratios = {size: [many / one for many, one in zip(speeds[size], speeds[1], strict=True)] for size in sizes}
    return {
        "rounds": args.rounds,
        "tokens": tokens,
        "checkpoint": bool(args.checkpoint),
        "tokens_per_second": {size: statistics.median(values) for size, values in speeds.items()},
        "all": speeds,
        "ratio_to_one": {size: statistics.median(values) for size, values in ratios.items()},
        "ratios": ratios,
    }


async def tokens_per_second(port: int, clients: int, *, tokens: int, seconds: float = 2.0) -> float:
    """So many clients at once, each sending one request after another; what the server counts in the middle of it."""
    seeds = count()

    async def one() -> None:
        async with Client(port) as client:
            while True:
                await client.stream(completion("def main(", max_tokens=tokens, seed=next(seeds)))

    crowd = [asyncio.create_task(one()) for _ in range(clients)]
    await asyncio.sleep(0.5)
    started, before = time.perf_counter(), await generated(port)
    await asyncio.sleep(seconds)
    speed = (await generated(port) - before) / (time.perf_counter() - started)
    for task in crowd:
        task.cancel()
    await asyncio.wait(crowd)
    return speed


async def generated(port: int) -> int:
    """Tokens that the server has written so far."""
    async with Client(port) as client:
        text = await client.text("/metrics")
    return int(re.findall(r"^nanokimi_generated_tokens_total (\d+)$", text, re.MULTILINE)[0])


def soak(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Many clients for minutes, a third of whom leave in mid-stream."""
    with serving(tiny(folder, args.checkpoint), "--max_queue", "256") as server:
        crowd = Crowd(server.port, clients=args.clients, seed=1)
        memory: list[int] = []

        async def run() -> None:
            watching = asyncio.create_task(watch())
            await crowd.run(args.seconds)
            watching.cancel()

        async def watch() -> None:
            while True:
                await asyncio.sleep(args.seconds / 24)
                memory.append(resident(server.process.pid))
                log(f"{memory[-1] >> 20} MiB, {asdict(crowd.tally)}")

        asyncio.run(run())
        health = asyncio.run(settled(server.port))
        middle, end = memory[len(memory) // 2], memory[-1]
    return {
        "clients": args.clients,
        "seconds": args.seconds,
        **asdict(crowd.tally),
        "tokens_per_second": crowd.tally.tokens / args.seconds,
        "health_afterwards": health,
        "memory_mib": [size >> 20 for size in memory],
        "memory_growth_in_the_second_half": end / middle - 1,
    }


async def settled(port: int) -> dict[str, Any]:
    """What /health says once the last cancellations have been noticed."""
    await asyncio.sleep(1)
    async with Client(port) as client:
        health: dict[str, Any] = json.loads(await client.text("/health"))
    return health


def first_token(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Time to the first token of 900 prompt tokens through the server, against the bare prefill, in turns.

    Both in one process and in the same thread of it: where weights come to lie in memory makes a tenth, too.
    """
    path = save(folder / "nano.pt", random_model("nano-243m", vocab_size=49152), load_tokenizer("byte"))
    options = options_of(build_parser().parse_args(["serve", str(path), "--port", "0", "--slots", "4"]))
    return asyncio.run(_first_token(options, args.rounds))


async def _first_token(options: ServeOptions, rounds: int) -> dict[str, Any]:
    listener, metrics = bind("127.0.0.1", 0, 60), Metrics()
    worker = Worker(max_queue=options.max_queue, max_seconds=options.max_seconds, metrics=metrics)
    served = worker.ask(lambda: prepare(options, worker)).result()
    app = new_app(served, worker, options.rules, metrics, max_body=options.max_body)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.1)
    decoder = await worker.call(lambda: new_decoder(served.model))
    pairs = []
    for turn in range(rounds + 1):
        prompt = torch.randint(0, 256, (900,), generator=torch.Generator().manual_seed(turn)).tolist()
        bare = await worker.call(lambda prompt=prompt: prefill_seconds(decoder, prompt))  # type: ignore[misc]
        async with Client(listener.getsockname()[1]) as client:
            answer = await client.stream(completion(prompt, max_tokens=2, temperature=0))
        pairs.append((answer.first_seconds, bare))
    server.should_exit = True
    await running
    worker.stop()
    ratios = [first / bare for first, bare in pairs[1:]]
    return {
        "rounds": rounds,
        "bare_seconds": statistics.median(bare for _, bare in pairs[1:]),
        "first_token_seconds": statistics.median(first for first, _ in pairs[1:]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def prefill_seconds(decoder: Decoder, prompt: list[int]) -> float:
    decoder.reset(0)
    started = time.perf_counter()
    int(decoder.prefill(0, prompt).argmax())  # a device is waited for
    return time.perf_counter() - started


# ---- models and servers -------------------------------------------------------------------------


def tiny(folder: Path, path: str) -> Path:
    """A checkpoint of `tiny`."""
    if path:
        return Path(path)
    sources = sorted(Path(argparse.__file__).parent.glob("*.py"))[:60]
    texts = [source.read_text(encoding="utf-8") for source in sources]
    return save(folder / "tiny.pt", random_model("tiny", vocab_size=4096), train_bpe(texts, 4096))


def random_model(preset: str, *, vocab_size: int) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig.preset(preset, vocab_size=vocab_size))


def save(path: Path, model: Transformer, tokenizer: Tokenizer) -> Path:
    parts = {"model_config": asdict(model.config), "model": model.state_dict(), "tokenizer": tokenizer.to_state()}
    checkpoint.save(path, parts)
    return path


class Server:
    """A running ``nanokimi serve``."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port


@contextmanager
def serving(path: Path, *flags: str) -> Iterator[Server]:
    command = [
        sys.executable,
        "-c",
        "from nanokimi.cli import entry; entry()",
        "serve",
        str(path),
        "--port",
        "0",
        *flags,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Server(process, int(process.stdout.readline().rpartition(":")[2]))
    finally:
        process.terminate()
        process.wait()


def resident(pid: int) -> int:
    """Bytes of memory that a process has now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


PARTS = {"throughput": throughput, "soak": soak, "first_token": first_token}

if __name__ == "__main__":
    main()
