"""The process a candidate lives in: one subject, loaded once, asked in turns.

Started as ``python -m benchmarks.bench.worker SUBJECT SETTINGS``. It answers each line of JSON on stdin with one on
stdout, the first of its own accord, once the subject is loaded.
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

SUBJECTS = {
    "roofs": "roofs:Roofs",
    "network": "training:Network",
    "reference": "training:Reference",
    "optimizer": "optimizers:Optimizer",
    "memory": "memory:Memory",
    "decoder": "decoding:Ours",
    "generate": "decoding:Transformers",
    "gguf": "llamacpp:Files",
    "llamacpp": "llamacpp:Engine",
    "growth": "growth:Growth",
    "formats": "formats:Formats",
}


def main(name: str, settings: str) -> None:
    """Serves until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    subject: Any = None

    def load() -> dict[str, Any]:
        nonlocal subject
        module, _, kind = SUBJECTS[name].partition(":")
        subject = getattr(import_module(f"benchmarks.bench.subjects.{module}"), kind)(**json.loads(settings))
        return {}

    _answer(answers, load)
    for line in sys.stdin:
        request = json.loads(line)
        method = getattr(subject, request.pop("do"))
        _answer(answers, partial(method, **request))


def _answer(answers: Any, work: Callable[[], dict[str, Any]]) -> None:
    """One line: what ``work`` found, or why it could not."""
    try:
        found = work()
    except Exception as error:  # whatever a peer raises costs the run this candidate and no more
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    answers.write(json.dumps(found) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
