"""Tables of what was measured, from the plain values that the file holds.

``python -m benchmarks.bench.report FILE.json`` prints those of a recorded run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

UNITS = {"s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")), "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))}
RATES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def report_lines(content: dict[str, Any]) -> Iterator[str]:
    """All of a run, part by part."""
    for part in content["parts"].values():
        for comparison in part["comparisons"]:
            yield from (*comparison_lines(comparison), "")
        for curve in part["curves"]:
            yield from (*curve_lines(curve), "")


def comparison_lines(comparison: dict[str, Any]) -> list[str]:
    """A title, and a line for each candidate."""
    rows = [_row(row, comparison) for row in comparison["rows"]]
    lines = [comparison["title"], *("  " + line for line in _aligned(rows))]
    lines += [f"  {row['name']}: {row['note']}" for row in comparison["rows"] if row.get("note")]
    return lines + [f"  {left['name']} is left out: {left['why']}" for left in comparison["missing"]]


def curve_lines(curve: dict[str, Any]) -> list[str]:
    """A title, a line for each point, and the exponents."""
    rows = []
    for point in curve["points"]:
        cells = [f"{point['x']:,.0f}", amount(point["seconds"], "s")]
        cells.append(amount(point["bytes"], "B") if "bytes" in point else "")
        cells.append(f"explained {amount(point['explained'], 's')}" if "explained" in point else "")
        rows.append(cells)
    slopes = ", ".join(f"{name} ~ {curve['axis']}^{power:.2f}" for name, power in curve["slopes"].items())
    return [curve["title"], *("  " + line for line in _aligned(rows)), f"  {slopes}"]


def amount(value: float, unit: str) -> str:
    """A number with a unit that suits its size."""
    for size, name in UNITS.get(unit, ()):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}" if value < 1000 * size else f"{value / size:,.0f} {name}"
    return f"{value:.4g} {unit}"


def rate(value: float, unit: str) -> str:
    """A number per second."""
    for size, letter in RATES:
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _row(row: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    """Name, median, spread, ratio to ours with its interval, rate, share of the roof."""
    low, high = min(row["values"]), max(row["values"])
    unit = comparison["unit"]
    cells = [row["name"], amount(row["median"], unit)]
    cells.append(f"({amount(low, unit)} to {amount(high, unit)})" if high > low else "")
    ratio = ""
    if "ratio" in row and row["name"] != comparison["ours"]:
        ratio = f"{row['ratio']:.3g} x" if row["ratio"] < 0.9 or row["ratio"] > 1.1 else f"{row['ratio']:.4f} x"
        ratio += " [{:.4g}, {:.4g}]".format(*row["interval"]) if row.get("interval") else ""
    cells.append(ratio)
    cells.append(rate(row["rate"], comparison["rate_unit"]) if "rate" in row else "")
    cells.append(f"{row['roof']:.1%} of the roof" if "roof" in row else "")
    return cells


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width each; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(c for c, w in zip(cells, widths, strict=True) if w).rstrip())
    return lines


if __name__ == "__main__":
    print("\n".join(report_lines(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
