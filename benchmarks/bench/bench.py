"""What every part of the bench works with: its arguments, the results so far, workers, and rounds as rows."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from benchmarks.bench.arguments import BenchArguments
from benchmarks.bench.report import comparison_lines, curve_lines
from benchmarks.bench.results import Comparison, Results, compared, curve
from benchmarks.bench.rounds import Candidate, LeftOut, Rounds, Worker, run_rounds
from nanokimi.config import ModelConfig
from nanokimi.console import log, show
from nanokimi.model.transformer import meta_model


@dataclass
class Bench:
    """One run.

    Attributes:
        device: of all candidates.
    """

    args: BenchArguments
    results: Results
    device: torch.device
    began: float = field(default_factory=time.monotonic)

    @property
    def cuda(self) -> bool:
        """Whether candidates run on one."""
        return self.device.type == "cuda"

    @property
    def warm_up(self) -> int:
        """Rounds that do not count."""
        return 3 if self.cuda else 1

    @cached_property
    def roofs(self) -> Worker:
        """The machine's roofs, one worker for all parts."""
        return self.worker("roofs", quick=self.args.preset == "debug")

    def close(self) -> None:
        """Ends what the parts share."""
        if "roofs" in self.__dict__:
            self.roofs.close()

    @cached_property
    def active_parameters(self) -> int:
        """Those of the preset that work on one token."""
        return active_parameters(self.args.config)

    def worker(self, workload: str, **settings: Any) -> Worker:
        """A workload in a process of its own, on the device."""
        settings = {**settings, "device": str(self.device), "threads": self.args.threads}
        return Worker(workload, settings, self.args.environment)

    @contextmanager
    def workers(self, workloads: Mapping[str, tuple[str, Mapping[str, Any]]]) -> Iterator[dict[str, Worker]]:
        """Several, by any name: (workload, settings); all end with the block."""
        started: dict[str, Worker] = {}
        try:
            for name, (workload, settings) in workloads.items():
                started[name] = self.worker(workload, **settings)
            yield started
        finally:
            for worker in started.values():
                worker.close()

    def progress(self, text: str, *, lasting: bool = True) -> None:
        """Tells what is measured now: on a terminal in one line, elsewhere only what takes a while."""
        line = f"[{time.monotonic() - self.began:4.0f} s] {text}"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        elif lasting:
            log(line)

    def run_rounds(self, title: str, candidates: Sequence[Candidate], rounds: int = 0) -> Rounds:
        """Measures the candidates in rounds, of which the user reads as they go."""
        self.progress(title)
        return run_rounds(
            candidates,
            rounds or self.args.repeats,
            warm_up=self.warm_up,
            report=lambda text: self.progress(f"{title}: {text}", lasting=False),
        )

    def compare(
        self,
        part: str,
        title: str,
        candidates: Sequence[Candidate],
        *,
        roof: Candidate | None = None,
        needs: Mapping[str, float] | float = 0.0,
        work: Mapping[str, float] | float = 0.0,
        rounds: int = 0,
        notes: Mapping[str, str] | None = None,
    ) -> Comparison:
        """Measures the candidates in rounds and keeps them as rows of the results.

        Args:
            candidates: ours first.
            roof: measured in the same rounds; its ``work`` per second is the roof.
            needs: FLOPs or bytes that a candidate cannot do without in one ask.
            work: tokens of one ask, of all candidates or by name.
        """
        measured = self.run_rounds(title, [*candidates, *([roof] if roof else [])], rounds)
        values = measured.values()
        rate = 0.0
        if roof is not None and roof.name in values:
            rate = statistics.median(a["work"] / a["seconds"] for a in measured.answers[roof.name])
            del values[roof.name]
        work = work if isinstance(work, Mapping) else dict.fromkeys(values, work) if work else {}
        roofs = {name: (needs[name] if isinstance(needs, Mapping) else needs) / rate for name in values if rate}
        found = compared(
            title,
            values,
            ours=next(iter(values), ""),
            work=work,
            roofs=roofs,
            notes=notes,
            missing=measured.missing,
        )
        if rate:
            found["roof_rate"] = rate
        self.keep(part, found)
        return found

    def keep(self, part: str, comparison: Comparison) -> None:
        """Into the file, and onto the terminal."""
        self.results.add(part, comparison=comparison)
        self._clear_line()
        show("\n".join(comparison_lines(comparison)) + "\n")

    def keep_curve(self, part: str, title: str, axis: str, points: Sequence[Mapping[str, float]], **more: Any) -> None:
        """The same for growth."""
        if not points:
            return
        found = curve(title, axis, points, **more)
        self.results.add(part, curve=found)
        self._clear_line()
        show("\n".join(curve_lines(found)) + "\n")

    def _clear_line(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def ask(self, name: str, worker: Worker, do: str, **arguments: Any) -> dict[str, Any] | None:
        """Asks a worker once, outside of rounds; None, and a line that says why, where it cannot answer."""
        self.progress(name, lasting=False)
        try:
            return worker.ask(do, **arguments)
        except LeftOut as reason:
            self._clear_line()
            log(f"{name} is left out: {reason}")
            return None


def active_parameters(config: ModelConfig) -> int:
    """Those that work on one token."""
    return meta_model(config).num_parameters(active=True)
