"""Counters for Prometheus, in its text format 0.0.4. Only the event loop writes and reads them: no lock is needed."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Histogram:
    """How many of the observed seconds fell under each of ``bounds``."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Counts ``value``, ``times`` over."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def samples(self) -> dict[str, float]:
        """Its values by what follows its name; a bucket counts everything up to its bound."""
        labels = [f'_bucket{{le="{bound}"}}' for bound in (*self.bounds, "+Inf")]
        totals = [sum(self.counts[: i + 1]) for i in range(len(self.counts))]
        return {**dict(zip(labels, totals, strict=True)), "_sum": self.sum, "_count": totals[-1]}


class Metrics:
    """Everything that is counted from the start of the server on.

    Attributes:
        answers: how many there were, by route and status.
        prompt_tokens, generated_tokens: of accepted requests.
        queue_refusals: requests that found the queue full.
        first_token: seconds from a request's arrival to a choice's first text.
        per_token: seconds between a choice's tokens after that.
    """

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, int]] = Counter()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.queue_refusals = 0
        self.first_token = Histogram(FIRST_TOKEN_BOUNDS)
        self.per_token = Histogram(TOKEN_BOUNDS)

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
        text = _metric("requests_total", "counter", "Answers by route and status.", by_route)
        for name, count, about in (
            ("prompt_tokens", self.prompt_tokens, "Tokens of prompts."),
            ("generated_tokens", self.generated_tokens, "Tokens written."),
            ("queue_refusals", self.queue_refusals, "Requests that found the queue full."),
        ):
            text += _metric(f"{name}_total", "counter", about, {"": count})
        for name, (value, about) in gauges.items():
            text += _metric(name, "gauge", about, {"": value})
        about = "Seconds from a request's arrival to a choice's first text."
        text += _metric("time_to_first_token_seconds", "histogram", about, self.first_token.samples())
        about = "Seconds between a choice's tokens, after the first."
        return text + _metric("time_per_token_seconds", "histogram", about, self.per_token.samples())


def _metric(name: str, kind: str, about: str, samples: Mapping[str, float]) -> str:
    lines = [f"# HELP nanokimi_{name} {about}", f"# TYPE nanokimi_{name} {kind}"]
    lines += [f"nanokimi_{name}{suffix} {value}" for suffix, value in samples.items()]
    return "\n".join(lines) + "\n"
