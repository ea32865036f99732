"""Candidates in processes of their own, asked in rounds, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.bench.results import ROOT


class LeftOut(Exception):
    """A candidate that cannot be measured here, and why: one line."""


class Worker:
    """A workload in a child process; a context manager. It starts at once and loads while others do.

    Args:
        workload: a name of ``worker.WORKLOADS``.
        settings: its arguments, plain values.
        environment: added to that of this process.
        checkout: whose code it runs; ``module`` is the one of the worker in it.

    Raises:
        LeftOut: from ``ask``: it could not be loaded, or not do what it was asked for.
    """

    def __init__(
        self,
        workload: str,
        settings: Mapping[str, Any],
        environment: Mapping[str, str],
        *,
        checkout: Path = ROOT,
        module: str = "benchmarks.bench.worker",
    ) -> None:
        path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, workload, json.dumps(settings)],
            cwd=checkout,  # the first place where ``-m`` looks for packages
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=_errors(),
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": path} | dict(environment),
            start_new_session=True,
        )
        self._loaded = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self) -> None:
        """Waits until the workload is there."""
        if not self._loaded:
            self._receive()
            self._loaded = True

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Calls the workload's method ``do`` and waits for what it found."""
        self.load()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise LeftOut(self._ended()) from None
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LeftOut(self._ended())
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise LeftOut(found["error"])
        return found

    def _ended(self) -> str:
        code = self._process.wait()
        return f"its process ended with {code}" + (" (out of memory?)" if code == -9 else "")

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def _errors() -> int | None:
    """Where workers complain: nowhere, unless NANOKIMI_BENCH_ERRORS is set; the reason is in their answers."""
    return None if os.environ.get("NANOKIMI_BENCH_ERRORS") else subprocess.DEVNULL


@dataclass(frozen=True)
class Candidate:
    """Something to be timed: what to ask of whom.

    Attributes:
        name: what readers know it by.
        once: so slow that one round without warm-up has to do.
    """

    name: str
    worker: Worker
    do: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    once: bool = False


@dataclass
class Rounds:
    """What the rounds gave: the answers of each candidate that stayed, and why others did not."""

    answers: dict[str, list[dict[str, Any]]]
    missing: dict[str, str]

    def leave_out(self, name: str, reason: LeftOut) -> None:
        """Goes on without a candidate."""
        self.missing[name] = str(reason)
        self.answers.pop(name, None)

    def values(self, key: str = "seconds") -> dict[str, list[float]]:
        """One figure out of every answer that has it."""
        return {name: [a[key] for a in found] for name, found in self.answers.items() if found and key in found[0]}

    def first(self, key: str) -> dict[str, Any]:
        """What does not change from round to round."""
        return {name: found[0][key] for name, found in self.answers.items() if found and key in found[0]}


def run_rounds(
    candidates: Sequence[Candidate], rounds: int, *, warm_up: int = 1, report: Callable[[str], None] = lambda _: None
) -> Rounds:
    """Asks every candidate once a round, every other round backwards; the first ``warm_up`` rounds do not count."""
    measured = Rounds({candidate.name: [] for candidate in candidates}, {})
    for candidate in candidates:
        report(f"{candidate.name}, loading")
        try:
            candidate.worker.load()
        except LeftOut as reason:
            measured.leave_out(candidate.name, reason)
    for number in range(warm_up + rounds):
        for candidate in candidates if number % 2 == 0 else reversed(candidates):
            name = candidate.name
            if name in measured.missing or (candidate.once and number):
                continue
            report(f"{name}, round {number + 1} of {warm_up + rounds}")
            try:
                answer = candidate.worker.ask(candidate.do, **candidate.arguments)
            except LeftOut as reason:
                measured.leave_out(name, reason)
                continue
            if number >= warm_up or candidate.once:
                measured.answers[name].append(answer)
    return measured
