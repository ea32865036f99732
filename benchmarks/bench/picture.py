"""The pictures of a run of the bench, drawn from its file alone.

    python -m benchmarks.bench.picture benchmarks/results/bench-tiny-native-DATE.json docs/images/bench-tiny.png

draws ratios there, and growth beside it in ``bench-tiny-growth.png``.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.bench.report import amount
from nanokimi.files import atomic_path

COLUMNS = 3
OURS, THEIRS, LINE = "#0072B2", "#BBBBBB", "#D55E00"
DRAWN = ("training", "optimizer", "memory", "prefill", "decoding")  # parts whose ratios are bars

Panel: TypeAlias = Callable[[Any, dict[str, Any]], None]


def draw(content: dict[str, Any], path: Path) -> list[Path]:
    """Bars at ``path`` (ratios to ours), curves beside it (logarithmic axes); the files that were written.

    Raises:
        OSError: the folder is not writable, or the disk is full.
    """
    parts, drawn = content["parts"], list[Path]()
    comparisons = [c for name in DRAWN for c in parts.get(name, {}).get("comparisons", []) if len(c["rows"]) > 1]
    curves = [c for part in parts.values() for c in part["curves"] if len(c["points"]) > 1]
    growth = path.with_name(f"{path.stem}-growth{path.suffix}")
    for panels, panel, target in ((comparisons, _bars, path), (curves, _curve, growth)):
        if panels:
            _grid(panels, panel, _headline(content["about"]), target)
            drawn.append(target)
    return drawn


def _grid(
    panels: Sequence[dict[str, Any]], panel: Callable[[Any, dict[str, Any]], None], title: str, path: Path
) -> None:
    """One figure of many small ones."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 2.3 * rows + 0.5), dpi=90, layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for at, found in zip(axes, panels, strict=False):
        panel(at, found)
    for at in axes[len(panels) :]:
        at.set_visible(False)
    figure.suptitle(title, fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _bars(axes: Any, comparison: dict[str, Any]) -> None:
    """How many times ours each candidate takes; its own figure is written on the bar."""
    rows = [row for row in reversed(comparison["rows"]) if "ratio" in row]
    colours = [OURS if row["name"].startswith(("nanokimi", "MuonClip", "QK-Clip")) else THEIRS for row in rows]
    bars = axes.barh([row["name"] for row in rows], [row["ratio"] for row in rows], color=colours)
    labels = [f"{row['ratio']:.3g} x  {amount(row['median'], comparison['unit'])}{_roof(row)}" for row in rows]
    axes.bar_label(bars, labels, padding=3, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlim(0, 2.0 * max((row["ratio"] for row in rows), default=1.0))
    axes.set_title(comparison["title"], fontsize=9)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _roof(row: dict[str, Any]) -> str:
    return f"  {row['roof']:.0%} of roof" if "roof" in row else ""


def _curve(axes: Any, curve: dict[str, Any]) -> None:
    """Time, what explains it, and memory, each over its first value, so that slopes compare; ends say how much."""
    from matplotlib import ticker

    points = curve["points"]
    x = [point["x"] for point in points]
    axes.set(xscale="log", yscale="log", xlabel=curve["axis"], ylabel="times the first")
    lines = (("seconds", "s", "time", "o-", OURS, 5), ("bytes", "B", "memory", "s:", LINE, -10))
    for key, unit, label, style, color, above in lines:
        if key in points[0] and points[0][key] > 0:
            y = [point[key] / points[0][key] for point in points]
            axes.plot(x, y, style, color=color, markersize=4, label=label)
            for at in (0, -1):
                text = amount(points[at][key], unit)
                axes.annotate(
                    text, (x[at], y[at]), xytext=(0, above), textcoords="offset points", fontsize=7, ha="center"
                )
    if "explained" in points[0]:
        y = [point["explained"] / points[0]["seconds"] for point in points]
        axes.plot(x, y, "--", color=LINE, label="explained by the bytes of the cache")
    axes.set_xticks(x, [f"{value:,.0f}" for value in x])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.margins(0.12, 0.25)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    slopes = ", ".join(f"{name} ~ {curve['axis']}^{power:.2f}" for name, power in curve["slopes"].items())
    axes.set_title(f"{curve['title']}\n{slopes}", fontsize=8)
    axes.legend(frameon=False, fontsize=7)


def _headline(about: dict[str, Any]) -> str:
    where = about.get("device") if about.get("device") not in (None, "cpu") else about.get("cpu", "")
    return f"{about['preset']} on {where}, {about['threads']} threads, {about['instructions']}, {about['date']}"


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
