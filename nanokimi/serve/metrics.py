"""Counters for Prometheus, in its text format 0.0.4. Only the event loop writes and reads them: no lock is needed."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

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

    def lines(self, name: str, about: str) -> Iterator[str]:
        """Its exposition."""
        yield from _head(name, "histogram", about)
        total = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {total}"


class Metrics:
    """All that is counted from the start of the server on.

    Attributes:
        requests: answers by route and status.
        prompt_tokens, generated_tokens: of accepted requests.
        queue_refusals: requests that found the queue full.
        first_token: seconds from a request's arrival to a choice's first text.
        per_token: seconds between a choice's tokens after that.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.queue_refusals = 0
        self.first_token = Histogram(FIRST_TOKEN_BOUNDS)
        self.per_token = Histogram(TOKEN_BOUNDS)

    def take(self, tokens: int, seconds: float, *, first: bool) -> None:
        """Counts ``tokens`` of one choice that came together, ``seconds`` after what came before."""
        self.generated_tokens += tokens
        if first:
            self.first_token.add(seconds)
        else:
            self.per_token.add(seconds / tokens, tokens)

    def text(self, gauges: Mapping[str, tuple[float, str]]) -> str:
        """The exposition; ``gauges`` are present values by name, each with a line that says what it is."""
        lines = _head("nanokimi_requests_total", "counter", "Answers by route and status.")
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'nanokimi_requests_total{{route="{route}",status="{status}"}} {count}')
        for name, value, about in (
            ("prompt_tokens", self.prompt_tokens, "Tokens of prompts."),
            ("generated_tokens", self.generated_tokens, "Tokens written."),
            ("queue_refusals", self.queue_refusals, "Requests that found the queue full."),
        ):
            lines += [*_head(f"nanokimi_{name}_total", "counter", about), f"nanokimi_{name}_total {value}"]
        for name, (present, about) in gauges.items():
            lines += [*_head(f"nanokimi_{name}", "gauge", about), f"nanokimi_{name} {present}"]
        about = "Seconds from a request's arrival to a choice's first text."
        lines += self.first_token.lines("nanokimi_time_to_first_token_seconds", about)
        about = "Seconds between a choice's tokens, after the first."
        lines += self.per_token.lines("nanokimi_time_per_token_seconds", about)
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
