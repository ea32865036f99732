"""The process a candidate lives in: one workload, loaded once, asked once a round.

Started as ``python -m benchmarks.bench.worker WORKLOAD SETTINGS``. It answers each line of JSON on stdin with one on
stdout, the first of its own accord, once the workload is loaded.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

WORKLOADS = {
    "roofs": "roofs:Roofs",
    "network": "training:Network",
    "reference": "training:Reference",
    "optimizer": "training:Optimizer",
    "memory": "training:Memory",
    "decoder": "decoding:Ours",
    "generate": "decoding:Transformers",
    "gguf": "decoding:GgufFiles",
    "llamacpp": "decoding:LlamaCppDecoder",
    "growth": "training:Growth",
    "formats": "decoding:Formats",
}


def main(name: str, settings: str) -> None:
    """Serves until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    workload: Any = None

    def load() -> dict[str, Any]:
        nonlocal workload
        module, _, kind = WORKLOADS[name].partition(":")
        make = getattr(import_module(f"benchmarks.bench.workloads.{module}"), kind)
        workload = make(**json.loads(settings))
        return {}

    _answer(answers, load)
    for line in sys.stdin:
        arguments = json.loads(line)
        method = getattr(workload, arguments.pop("do"))
        _answer(answers, partial(method, **arguments))


def _answer(answers: Any, work: Callable[[], dict[str, Any]]) -> None:
    """One line: what ``work`` found, or why it could not."""
    try:
        found = work()
    except Exception as error:  # an error of one candidate leaves the others in the run
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    answers.write(json.dumps(found) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
