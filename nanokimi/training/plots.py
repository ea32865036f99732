"""One picture of a training run, drawn from its history with matplotlib's object interface (no global state)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray

from nanokimi.files import atomic_write
from nanokimi.training.metrics import History, cannot_write

# S steps, L layers, M layers with experts, E experts
Floats = NDArray[np.float64]

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"  # Okabe and Ito, 2008
BALANCE = colormaps["PuOr_r"]  # purple: idle expert, white: even share, brown: busy expert
WIDTH, HEIGHT, DPI = 1600, 1000, 110
FONT_SIZE = 9
ROUND_STEPS = [1, 2, 2.5, 5, 10]  # tick distances, times a power of ten
MAX_POINTS = 800  # a curve with more is finer than the pixels of its panel
MAX_LAYER_POINTS = 150  # curves that cross each other stay legible only when they are coarser


def plot_training(history: History, path: Path, *, tau: float, title: str = "") -> None:
    """Draws ``history`` (see ``MetricsLog.history``) to a PNG of 1600 x 1000 pixels at ``path``.

    Gaps, short runs and missing validation are fine; long runs are thinned out with their peaks kept.

    Args:
        tau: the QK-Clip threshold, drawn beside the attention logits; 0 for none.

    Raises:
        RunError: ``path`` cannot be written.
    """
    steps, logits = _column(history, "max_logit")  # [S, L]
    load = _relative_load(history)  # [S, M, E]
    layers = logits.shape[1] if logits.ndim == 2 else load.shape[1]

    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(2, 4)
    figure.subplots_adjust(left=0.042, right=0.988, top=0.865, bottom=0.062, wspace=0.27, hspace=0.36)
    _draw_header(figure, history, title)
    _draw_loss(panels[0, 0], history)
    _draw_bits_per_byte(panels[0, 1], history)
    _draw_gradient_norm(panels[0, 2], history)
    _draw_learning_rate(panels[0, 3], history)
    _draw_max_logit(panels[1, 0], history, logits, tau)
    _draw_busiest_expert(panels[1, 1], steps, load, layers)
    _draw_expert_load(panels[1, 2], load, layers)
    _draw_throughput(panels[1, 3], history)
    last = max([1, *history["steps"]])
    for panel in panels.flat:
        _draw_legend(panel)
        if panel.get_xlabel() == "step":
            panel.set_xlim(-0.02 * last, 1.02 * last)
    try:
        with atomic_write(path) as file:
            canvas.print_png(file)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise cannot_write(path, error) from error


def _draw_header(figure: Figure, history: History, title: str) -> None:
    facts = [_count_steps(len(history["steps"]))]
    if tokens := [count for count in history.get("tokens", []) if count is not None]:
        facts.append(f"{EngFormatter(places=1)(tokens[-1])} tokens")
    style: dict[str, Any] = {"y": 0.965, "va": "center", "parse_math": False}
    figure.text(0.012, s=title or "Training", ha="left", fontsize=14, fontweight="bold", **style)
    figure.text(0.988, s="  ·  ".join(facts), ha="right", fontsize=FONT_SIZE + 2, color="#444444", **style)


def _draw_loss(ax: Axes, history: History) -> None:
    _dress(ax, "Loss", "nats per token")
    steps, loss = _column(history, "train_loss")
    val_steps, val_loss = _column(history, "val_loss", "val_steps")
    if not np.isfinite(np.append(loss, val_loss)).any():
        return _say_empty(ax, "no finite loss in this run")
    _draw_noisy(ax, steps, loss, "train")
    _draw_validation(ax, val_steps, val_loss)
    skipped = np.isnan(loss)
    if skipped.any():
        _draw_marks(ax, steps[skipped], "x", RED, f"skipped: {skipped.sum():,}")
    _limit_to_bulk(ax, np.concatenate([loss, val_loss]))


def _draw_bits_per_byte(ax: Axes, history: History) -> None:
    _dress(ax, "Held-out text", "bits per byte")
    steps, bits = _column(history, "val_bits_per_byte", "val_steps")
    if not np.isfinite(bits).any():
        return _say_empty(ax, "no validation in this run")
    _draw_validation(ax, steps, bits)
    best = int(np.nanargmin(bits))
    label = f"best: {bits[best]:.3f} at step {steps[best]:,.0f}"
    ax.plot(steps[best], bits[best], "o", color=GREEN, markersize=7, label=label, zorder=4)
    _limit_to_bulk(ax, bits)


def _draw_gradient_norm(ax: Axes, history: History) -> None:
    _dress(ax, "Gradient norm", "norm")
    steps, norm = _column(history, "grad_norm")
    norm = np.where(norm > 0, norm, np.nan)
    if not np.isfinite(norm).any():
        return _say_empty(ax, "no finite gradient in this run")
    _draw_noisy(ax, steps, norm, "running mean")
    _use_log_scale(ax, norm)


def _draw_learning_rate(ax: Axes, history: History) -> None:
    _dress(ax, "Learning rate", "rate of Muon")
    steps, rate = _column(history, "learning_rate")
    _draw_line(ax, *_thin(steps, rate, np.fmax, MAX_POINTS), color=BLUE, linewidth=1.8)
    ax.set_ylim(bottom=0)


def _draw_throughput(ax: Axes, history: History) -> None:
    _dress(ax, "Throughput", "tokens per second")
    _draw_noisy(ax, *_column(history, "tokens_per_second"), "running mean")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_max_logit(ax: Axes, history: History, logits: Floats, tau: float) -> None:
    _dress(ax, "Largest logit", "attention logit, upper bound")
    finite = logits[np.isfinite(logits)]
    if not finite.size:
        return _say_empty(ax, "not measured in this run")
    steps, clipped_heads = _column(history, "clipped_heads")
    _draw_layers(ax, steps, logits, first=0, layers=logits.shape[1])
    if tau > 0:
        ax.axhline(tau, color=RED, linestyle="--", linewidth=1.3, label=f"τ = {tau:g}")
        finite = np.append(finite, tau)
    if (clipped_heads > 0).any():
        clipped = steps[clipped_heads > 0]
        _draw_marks(ax, clipped, "^", ORANGE, f"heads clipped: {_count_steps(len(clipped))}")
    if finite.min() > 0 and finite.max() > 10 * finite.min():
        _use_log_scale(ax, finite)


def _draw_busiest_expert(ax: Axes, steps: Floats, load: Floats, layers: int) -> None:
    _dress(ax, "Busiest expert", "load / even share")
    if not np.isfinite(load).any():
        return _say_empty(ax, "no expert load in this run")
    _draw_layers(ax, steps, _smooth(load.max(axis=2)), first=layers - load.shape[1], layers=layers)
    ax.axhline(1.0, color=GREY, linestyle="--", linewidth=1.3, label="perfect balance")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 1.0 - 0.04 * (high - 1.0)), high)


def _draw_expert_load(ax: Axes, load: Floats, layers: int) -> None:
    """Heat map [M, E] of the last tenth of the run, with numbers where they fit."""
    known = load[np.isfinite(load).all(axis=(1, 2))]
    recent = known[-max(1, len(known) // 10) :]
    _dress(ax, f"Expert load, last {_count_steps(len(recent))}", "layer", xlabel="expert")
    if not recent.size:
        return _say_empty(ax, "no expert load in this run")
    mean = recent.mean(axis=0)
    first, experts = layers - len(mean), mean.shape[1]
    spread = max(0.1, float(np.abs(mean - 1).max()))
    extent = (-0.5, experts - 0.5, layers - 0.5, first - 0.5)
    norm = TwoSlopeNorm(1.0, 1 - spread, 1 + spread)
    ax.imshow(mean, aspect="auto", cmap=BALANCE, norm=norm, extent=extent, interpolation="nearest")
    if experts <= 8 and len(mean) <= 16:
        for (row, expert), share in np.ndenumerate(mean):
            color = "white" if abs(share - 1) > 0.55 * spread else "#222222"
            ax.text(expert, first + row, f"{share:.2f}", ha="center", va="center", fontsize=FONT_SIZE - 1, color=color)
    ax.grid(False)
    ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    ends = (f"{max(0.0, 1 - spread):.2g}", f"{1 + spread:.3g} of the even share")
    _draw_color_key(ax, BALANCE(np.linspace(0, 1, 64)), ends, x=0.12, y=1.03)


def _draw_noisy(ax: Axes, steps: Floats, values: Floats, label: str) -> None:
    """A strong line of the running mean over a faint one of every value (its envelope once thinned)."""
    at, low = _thin(steps, values, np.fmin, MAX_POINTS)
    _, high = _thin(steps, values, np.fmax, MAX_POINTS)
    envelope = np.stack([low, high], axis=1).ravel()
    _draw_line(ax, np.repeat(at, 2), envelope, color=BLUE, alpha=0.3, linewidth=0.8)
    _draw_line(ax, *_thin(steps, _smooth(values), np.fmax, MAX_POINTS), color=BLUE, linewidth=1.8, label=label)


def _draw_validation(ax: Axes, steps: Floats, values: Floats) -> None:
    marker = "o" if len(steps) <= 60 else ""
    if len(steps):
        _draw_line(ax, steps, values, color=ORANGE, marker=marker, markersize=4, label="validation", zorder=3)


def _draw_line(ax: Axes, steps: Floats, values: Floats, **style: Any) -> None:
    """A line through the finite values; a single value becomes a dot."""
    finite = np.isfinite(values)
    if len(np.unique(steps[finite])) == 1:
        style |= {"marker": "o", "markersize": 5}
    ax.plot(steps[finite], values[finite], **style)


def _draw_layers(ax: Axes, steps: Floats, values: Floats, *, first: int, layers: int) -> None:
    """One curve of peaks per column of ``values`` [S, L], from layer ``first`` on, light to dark with depth."""
    colors = colormaps["viridis_r"](np.linspace(0.15, 1.0, layers))
    at, peaks = _thin(steps, values, np.fmax, MAX_LAYER_POINTS)
    for layer in range(first, layers):
        _draw_line(ax, at, peaks[:, layer - first], color=colors[layer], linewidth=1.2)
    if layers > 1:
        _draw_color_key(ax, colors[first:], (f"layer {first}", str(layers - 1)), x=0.75, y=1.115)


def _draw_color_key(ax: Axes, colors: Any, ends: tuple[str, str], *, x: float, y: float) -> None:
    """A strip of ``colors`` above the axes with the meaning of its two ends; ``x, y`` in axes coordinates."""
    strip = ax.inset_axes((x, y, 0.18, 0.03))
    strip.imshow(np.linspace(0, 1, len(colors))[None], aspect="auto", cmap=ListedColormap(colors))
    strip.set_axis_off()
    strip.text(-0.06, 0.45, ends[0], ha="right", va="center", fontsize=FONT_SIZE, transform=strip.transAxes)
    strip.text(1.06, 0.45, ends[1], ha="left", va="center", fontsize=FONT_SIZE, transform=strip.transAxes)


def _draw_marks(ax: Axes, steps: Floats, marker: str, color: str, label: str) -> None:
    """Marks along the lower edge of a panel, wherever its y axis ends."""
    chosen = steps[:: max(1, len(steps) // 100)]
    style: dict[str, Any] = {"color": color, "markersize": 4, "label": label, "clip_on": False, "zorder": 4}
    ax.plot(chosen, np.full(len(chosen), 0.025), marker, transform=ax.get_xaxis_transform(), **style)


def _dress(ax: Axes, title: str, ylabel: str, *, xlabel: str = "step") -> None:
    # An explicit y, or matplotlib lifts the title above the color key.
    ax.set_title(title, loc="left", fontsize=FONT_SIZE + 2, fontweight="bold", y=1.0, pad=26)
    ax.set_xlabel(xlabel, fontsize=FONT_SIZE)
    ax.set_ylabel(ylabel, fontsize=FONT_SIZE)
    ax.tick_params(which="both", labelsize=FONT_SIZE, color=GREY)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=ROUND_STEPS))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.yaxis.set_major_locator(MaxNLocator(7, steps=ROUND_STEPS))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)


def _draw_legend(ax: Axes) -> None:
    """The legend in one row between title and axes, where no curve can be."""
    if names := ax.get_legend_handles_labels()[1]:
        tight: dict[str, Any] = {"borderpad": 0.0, "borderaxespad": 0.3, "handlelength": 1.2, "handletextpad": 0.5}
        tight |= {"columnspacing": 1.0, "frameon": False, "fontsize": FONT_SIZE}
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.005), ncols=len(names), **tight)


def _use_log_scale(ax: Axes, values: Floats) -> None:
    """A logarithmic y axis with plain numbers: 1, 2, 5 per decade, fewer over many decades."""
    finite = values[np.isfinite(values)]
    narrow = finite.max() < 300 * finite.min()
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _count_steps(count: int) -> str:
    return f"{count:,} step" if count == 1 else f"{count:,} steps"


def _say_empty(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, ha="center", va="center", color=GREY, fontsize=FONT_SIZE + 1, transform=ax.transAxes)
    ax.set_xticks([])
    ax.set_yticks([])


def _limit_to_bulk(ax: Axes, values: Floats) -> None:
    """Keeps a handful of spikes from squashing everything else."""
    finite = values[np.isfinite(values)]
    if len(finite) > 1:
        low, high = np.percentile(finite, [0.0, 99.5])
        margin = 0.05 * (high - low) or 0.5
        ax.set_ylim(low - margin, high + margin)


def _column(history: History, name: str, steps: str = "steps") -> tuple[Floats, Floats]:
    """Steps [S] and a column as floats [S, ...]; null, or a column that is missing, as NaN of the others' shape."""
    at = np.asarray(history[steps], dtype=np.float64)
    rows = [np.asarray(value, dtype=np.float64) for value in history.get(name, [None] * len(at))]
    shape = max((row.shape for row in rows), key=len, default=())
    filled = [row if row.shape == shape else np.full(shape, np.nan) for row in rows]
    return at, np.asarray(filled, dtype=np.float64).reshape(len(rows), *shape)


def _relative_load(history: History) -> Floats:
    """Each expert's share over the even one [S, M, E]; without experts the last axes are empty."""
    load = _column(history, "expert_load")[1]
    return load * load.shape[2] if load.ndim == 3 else np.zeros((len(load), 0, 0))


def _thin(steps: Floats, values: Floats, reduce: np.ufunc, limit: int) -> tuple[Floats, Floats]:
    """At most ``limit`` of both: each the ``reduce`` (fmin or fmax, which pass over NaN) of its neighbours."""
    if len(steps) <= limit:
        return steps, values
    starts = np.linspace(0, len(steps), limit, endpoint=False).astype(int)
    return steps[starts], reduce.reduceat(values, starts, axis=0)


def _smooth(values: Floats) -> Floats:
    """Mean over a centred window of a fortieth of the run [S, ...]; NaN is left out, the ends have half a window."""
    reach = len(values) // 80
    finite = np.isfinite(values)
    zero = np.zeros((1, *values.shape[1:]))
    totals = np.concatenate([zero, np.cumsum(np.where(finite, values, 0.0), axis=0)])
    counts = np.concatenate([zero, np.cumsum(finite, axis=0)])
    last = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    first = np.maximum(np.arange(len(values)) - reach, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray((totals[last] - totals[first]) / (counts[last] - counts[first]))
