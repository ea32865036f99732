"""``python -m benchmarks.bench``, from the repository's root: speed and memory beside other programs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from benchmarks.bench import parts_decoding, parts_growth, parts_training
from benchmarks.bench.arguments import BenchArguments, add_bench_arguments, bench_arguments
from benchmarks.bench.bench import Bench
from benchmarks.bench.picture import draw
from benchmarks.bench.results import Results, about
from nanokimi.console import complain, log
from nanokimi.device import resolve_device
from nanokimi.errors import RunError, UserError
from nanokimi.files import disk_errors_explained, require_writable

PARTS: dict[str, Callable[[Bench], None]] = {
    "roofs": parts_training.roofs,
    "training": parts_training.training,
    "optimizer": parts_training.optimizer,
    "memory": parts_training.memory,
    "prefill": parts_decoding.inference,
    "decoding": parts_decoding.inference,
    "growth": parts_growth.growth,
    "formats": parts_decoding.formats,
}


def build_parser() -> argparse.ArgumentParser:
    """The flags of the bench."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__, allow_abbrev=False)
    add_bench_arguments(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs the bench; returns its exit code: 0, 1 at run time, 2 for a mistake in the input, 130 after Ctrl-C."""
    args = build_parser().parse_args(arguments)
    try:
        run_bench(bench_arguments(args))
    except (UserError, RunError) as error:
        complain(f"bench: {error}")
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        complain("bench: interrupted")
        return 130
    return 0


def run_bench(args: BenchArguments) -> None:
    """Measures, prints tables, and writes the file and the picture beside it.

    An interrupted run leaves in both what it measured so far.

    Raises:
        UserError: the device is not there, or the output cannot be written.
        RunError: the disk is full.
    """
    device = resolve_device(args.device)
    require_writable(args.path, example="bench.json")
    asked = asdict(args) | {"batch_size": args.rows, "context": args.context, "device": str(device)}
    here = about()
    results = Results(args.path, here | asked | {"threads": args.threads or here["threads"]})
    bench = Bench(args, results, device)
    try:
        results.about |= bench.ask("the machine", bench.roofs, "about") or {}
        for measure in dict.fromkeys(PARTS[name] for name in args.parts):
            measure(bench)
        results.complete = True
    finally:
        bench.close()
        results.write()
        picture = args.path.with_suffix(".png")
        with disk_errors_explained("picture", picture):
            pictures = draw(results.content(), picture)
        files = ", ".join([str(args.path), *(drawn.name for drawn in pictures)])
        log(files + ("" if results.complete else ": incomplete"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
