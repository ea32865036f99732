"""A picture of how long the documents of a text are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray

from nanokimi.files import atomic_write
from nanokimi.insight.findings import Document
from nanokimi.training.metrics import cannot_write
from nanokimi.training.plots import BLUE, DPI, FONT_SIZE, GREY, RED, ROUND_STEPS

WIDTH, HEIGHT = 1100, 600  # pixels
BINS = 48


def plot_lengths(documents: Sequence[Document], context: int, path: Path) -> None:
    """Draws a histogram of the documents' lengths, with the context marked, to a PNG of 1100 x 600 pixels at ``path``.

    Documents without a token have no place on a logarithmic axis: they are only counted in the title.

    Raises:
        RunError: ``path`` cannot be written.
    """
    whole = np.array([d.n_tokens for d in documents if d.whole and d.n_tokens], np.int64)
    cut = np.array([d.n_tokens for d in documents if not d.whole and d.n_tokens], np.int64)
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.85, bottom=0.1)
    ax = figure.subplots()
    parts = " and parts of documents" if len(cut) else ""
    n_empty = len(documents) - len(whole) - len(cut)
    empty = f" ({n_empty:,} empty, not drawn)" if n_empty else ""
    _dress(ax, f"Lengths of {len(documents):,} document{'' if len(documents) == 1 else 's'}{parts}{empty}")
    _draw(ax, whole, cut, context)
    try:
        with atomic_write(path) as file:
            canvas.print_png(file)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise cannot_write(path, error) from error


def _dress(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=FONT_SIZE + 3, fontweight="bold", pad=28)
    ax.set_xlabel("tokens, without the end of text", fontsize=FONT_SIZE + 1)
    ax.set_ylabel("documents", fontsize=FONT_SIZE + 1)
    ax.tick_params(which="both", labelsize=FONT_SIZE, color=GREY)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_xscale("log")
    ax.yaxis.set_major_locator(MaxNLocator(7, integer=True, steps=ROUND_STEPS))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _draw(ax: Axes, whole: NDArray[np.int64], cut: NDArray[np.int64], context: int) -> None:
    """Stacked bars, the median and the context; the legend stands above, where no bar can be."""
    lengths = np.concatenate([whole, cut])
    kinds = [
        kind for kind in ((whole, BLUE, "whole documents"), (cut, GREY, "cut: what a sequence shows")) if len(kind[0])
    ]
    if kinds:
        values, colors, labels = zip(*kinds, strict=True)
        ax.hist(values, _edges(lengths), stacked=True, color=colors, label=labels, edgecolor="white", linewidth=0.4)
        median = float(np.median(lengths))
        ax.axvline(median, color="#222222", linestyle=":", linewidth=1.8, label=f"median: {median:,.0f} tokens")
    ax.axvline(context, color=RED, linestyle="--", linewidth=1.5, label=f"context: {context:,} tokens")
    shown = np.append(lengths, context)
    low, high = float(shown.min()), float(shown.max())
    margin = max(1.25, (10 * low / high) ** 0.5)  # a decade or more, or there would hardly be a number below
    ax.set_xlim(low / margin, high * margin)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 3000 * low else (1.0,), numticks=20))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.005), ncols=4, frameon=False, fontsize=FONT_SIZE + 1,
        borderpad=0.0, borderaxespad=0.3, handlelength=1.5, columnspacing=1.5,
    )  # fmt: skip


def _edges(lengths: NDArray[np.int64]) -> list[float]:
    """Edges between whole numbers, evenly spread over the logarithm as far as whole numbers allow."""
    edges = np.geomspace(lengths.min(), lengths.max() + 1, BINS + 1).round()
    return [float(edge) - 0.5 for edge in np.unique(edges)]
