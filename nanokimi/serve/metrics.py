"""Counters for Prometheus, in its text format 0.0.4. Only the event loop writes and reads them: no lock is needed."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Histogram:
    """How many of the observed seconds fell under each of ``bounds``."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Counts ``value``, ``times`` over."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def samples(self) -> dict[str, float]:
        """Its values by what follows its name; a bucket counts everything up to its bound."""
        labels = [f'_bucket{{le="{bound}"}}' for bound in (*self.bounds, "+Inf")]
        buckets = dict(zip(labels, accumulate(self.counts), strict=True))
        return {**buckets, "_sum": self.sum, "_count": sum(self.counts)}


class Metrics:
    """Everything that is counted from the start of the server on."""

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, int]] = Counter()  # how many there were, by route and status
        self.prompt_tokens = self.generated_tokens = 0  # of accepted requests
        self.queue_refusals = 0  # requests that found the queue full
        self.first_token = Histogram(FIRST_TOKEN_BOUNDS)  # seconds from a request's arrival to a choice's first text
        self.per_token = Histogram(TOKEN_BOUNDS)  # seconds between a choice's tokens after that

    def count_tokens(self, tokens: int, seconds: float, *, first: bool) -> None:
        """Counts ``tokens`` of one choice that came together, ``seconds`` after those before them."""
        self.generated_tokens += tokens
        if first:
            self.first_token.add(seconds)
        else:
            self.per_token.add(seconds / tokens, tokens)

    def text(self, gauges: Mapping[str, tuple[float, str]]) -> str:
        """All metrics as text; ``gauges`` are present values by name, each with a line that says what it is."""
        by_route = {f'{{route="{route}",status="{status}"}}': n for (route, status), n in sorted(self.answers.items())}
        first, later = self.first_token.samples(), self.per_token.samples()
        about_first = "Seconds from a request's arrival to a choice's first text."
        metrics: list[tuple[str, str, str, Mapping[str, float]]] = [
            ("requests_total", "counter", "Answers by route and status.", by_route),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", {"": self.prompt_tokens}),
            ("generated_tokens_total", "counter", "Tokens written.", {"": self.generated_tokens}),
            ("queue_refusals_total", "counter", "Requests that found the queue full.", {"": self.queue_refusals}),
            *((name, "gauge", about, {"": value}) for name, (value, about) in gauges.items()),
            ("time_to_first_token_seconds", "histogram", about_first, first),
            ("time_per_token_seconds", "histogram", "Seconds between a choice's tokens, after the first.", later),
        ]
        lines = []
        for name, kind, about, samples in metrics:
            lines += [f"# HELP nanokimi_{name} {about}", f"# TYPE nanokimi_{name} {kind}"]
            lines += [f"nanokimi_{name}{suffix} {value}" for suffix, value in samples.items()]
        return "\n".join(lines) + "\n"
