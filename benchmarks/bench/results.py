"""What was measured: comparisons and curves as plain values, their medians and ratios, and the file that holds them."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

from nanokimi.files import atomic_write, disk_errors_explained

Comparison: TypeAlias = dict[str, Any]  # see ``compared``
Curve: TypeAlias = dict[str, Any]  # see ``curve``

CONFIDENCE = 0.95
ROOT = Path(__file__).parents[2]  # of the checkout
PACKAGES = ("torch", "transformers", "xllamacpp")  # whose versions are recorded


def compared(
    title: str,
    values: Mapping[str, Sequence[float]],
    *,
    ours: str,
    unit: str = "s",
    work: Mapping[str, float] | None = None,
    work_unit: str = "tokens",
    roofs: Mapping[str, float] | None = None,
    notes: Mapping[str, str] | None = None,
    missing: Mapping[str, str] | None = None,
) -> Comparison:
    """Candidates side by side, as plain values for JSON.

    Args:
        values: of each candidate, one per round: seconds, or bytes (``unit`` ``B``).
        ours: the candidate that ratios refer to: theirs over ours, so above 1 ours is the better one.
        work: done in one round, in ``work_unit``; gives the rate.
        roofs: the least that the machine could need, in ``unit``; gives the fraction of the roof.
        notes: what else a reader should know of a candidate.
        missing: candidates left out, and why.
    """
    figures = {"rate": work or {}, "roof": roofs or {}, "note": notes or {}}
    rows = [_row(name, taken, values.get(ours), figures) for name, taken in values.items()]
    left_out = [{"name": name, "why": why} for name, why in (missing or {}).items()]
    about = {"title": title, "unit": unit, "rate_unit": f"{work_unit}/s", "ours": ours}
    return {**about, "rows": rows, "missing": left_out}


def _row(
    name: str, taken: Sequence[float], ours: Sequence[float] | None, figures: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """One candidate; ``rate`` and ``roof`` are what is to be divided by its median."""
    median = statistics.median(taken)
    row: dict[str, Any] = {"name": name, "values": list(taken), "median": median}
    if ours is not None:
        row["ratio"] = median / statistics.median(ours)
        row["interval"] = ratio_interval(taken, ours)
    for key, by_name in figures.items():
        if name in by_name:
            row[key] = by_name[name] if key == "note" else by_name[name] / median
    return row


def ratio_interval(theirs: Sequence[float], ours: Sequence[float]) -> list[float] | None:
    """Interval for the median of the ratios of the rounds, which hit both candidates alike.

    Order statistics, no assumption on the noise: the narrowest symmetric pair that covers the median with
    ``CONFIDENCE``, or the extremes where there are too few rounds for that. None without equally many rounds.
    """
    if len(theirs) != len(ours) or len(ours) < 2:
        return None
    ratios = sorted(one / other for one, other in zip(theirs, ours, strict=True))
    n, depth = len(ratios), 0
    while depth + 1 < n / 2 and _outside(n, depth + 1) <= 1 - CONFIDENCE:
        depth += 1
    return [ratios[depth], ratios[n - 1 - depth]]


def _outside(n: int, depth: int) -> float:
    """Chance that the median of the population lies beyond the order statistics ``depth`` and ``n - 1 - depth``."""
    return 2 * sum(math.comb(n, k) for k in range(depth + 1)) / float(2**n)


def curve(title: str, axis: str, points: Sequence[Mapping[str, float]], **more: Any) -> Curve:
    """Growth along ``axis``: points with ``x`` and some of ``seconds`` and ``bytes``; exponents over all of them."""
    slopes = {
        name: exponent([(p["x"], p[name]) for p in points])
        for name in ("seconds", "bytes")
        if len(points) > 1 and all(p.get(name, 0) > 0 for p in points)
    }
    return {"title": title, "axis": axis, "points": [dict(p) for p in points], "slopes": slopes, **more}


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The power of x that y grows with: the slope of a straight line through the logarithms, by least squares."""
    x, y = ([math.log(value) for value in axis] for axis in zip(*points, strict=True))
    return float(statistics.linear_regression(x, y).slope)


@dataclass
class Results:
    """All that one run of the bench found, written anew after every comparison.

    Attributes:
        about: when, where and of what.
        parts: name of the part -> its comparisons and curves.
        complete: whether the run came to its end.
    """

    path: Path
    about: dict[str, Any]
    parts: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    complete: bool = False

    def add(self, part: str, *, comparison: Comparison | None = None, curve: Curve | None = None) -> None:
        """Keeps one finding.

        Raises:
            RunError: the file cannot be written.
        """
        found = self.parts.setdefault(part, {"comparisons": [], "curves": []})
        found["comparisons"] += [comparison] if comparison is not None else []
        found["curves"] += [curve] if curve is not None else []
        self.write()

    def write(self) -> None:
        """Puts all of it into the file; see ``add``."""
        with disk_errors_explained("measurements", self.path), atomic_write(self.path) as file:
            file.write(json.dumps(self.content(), indent=1, allow_nan=False).encode() + b"\n")

    def content(self) -> dict[str, Any]:
        """What the file holds."""
        return {"about": self.about, "complete": self.complete, "parts": self.parts}


def about() -> dict[str, Any]:
    """Date, commit, processor, threads as torch takes them, versions; what is not installed is left out."""
    import torch

    hardware = {"cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit(), **hardware, **versions()}


def commit() -> str:
    """Of the checkout, ``-dirty`` when files differ from it; "" for a package without one."""
    if not (ROOT / ".git").exists():
        return ""
    git = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def processor() -> str:
    """Its name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def versions() -> dict[str, str]:
    """Python's, and those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
