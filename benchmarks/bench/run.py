"""``python -m benchmarks.bench``: all parts, one after the other, in one file that is whole after every comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from benchmarks.bench import parts_decoding, parts_growth, parts_training
from benchmarks.bench.about import about
from benchmarks.bench.bench import Bench
from benchmarks.bench.picture import draw
from benchmarks.bench.results import Results
from benchmarks.bench.settings import Request
from nanokimi.console import log
from nanokimi.device import resolve_device
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


def run_bench(request: Request) -> int:
    """Measures, prints tables, writes the file and the picture beside it; returns 0.

    Interrupted, what was measured so far is in both.

    Raises:
        UserError: the device is not there, or the output cannot be written.
        RunError: the disk is full.
    """
    device = resolve_device(request.device)
    require_writable(request.path, example="bench.json")
    asked = asdict(request) | {"batch_size": request.rows, "context": request.context, "device": str(device)}
    here = about()
    results = Results(request.path, here | asked | {"threads": request.threads or here["threads"]})
    bench = Bench(request, results, device)
    try:
        results.about |= bench.ask("the machine", bench.roofs, "about") or {}
        for measure in dict.fromkeys(PARTS[name] for name in request.parts):
            measure(bench)
        results.complete = True
    finally:
        bench.close()
        results.write()
        picture = request.path.with_suffix(".png")
        with disk_errors_explained("picture", picture):
            pictures = draw(results.content(), picture)
        files = ", ".join([str(request.path), *(drawn.name for drawn in pictures)])
        log(files + ("" if results.complete else ": incomplete"))
    return 0
