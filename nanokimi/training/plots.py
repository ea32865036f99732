"""One picture of a training run, drawn from its history with matplotlib's object interface (no global state)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray

from nanokimi.console import counted
from nanokimi.files import atomic_write
from nanokimi.training.metrics import STEP_COLUMNS, VALIDATION_COLUMNS, History, log_errors_explained

# S steps, L layers, M layers with experts, E experts
Floats = NDArray[np.float64]

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"  # Okabe and Ito, 2008
BALANCE = colormaps["PuOr_r"]  # purple: idle expert, white: even share, brown: busy expert
MAX_POINTS = 800  # a curve with more is finer than the pixels of its panel
MAX_LAYER_POINTS = 150  # curves that cross each other stay legible only when they are coarser
MAX_MEANS = 60
MARKED = {"clipped_gradient": "clipped", "spike": "spikes"}  # columns of 0 and 1, drawn below the gradient norm

Columns = dict[str, Floats]


class Curves(NamedTuple):
    """A panel with a number of every step, of every validation, or both; without any it says ``empty``."""

    title: str
    unit: str
    empty: str
    train: str = ""
    validation: str = ""
    label: str = "mean"
    y_axis: str = "from zero"  # or "log", or "bulk": without the few highest values


CURVES = (
    Curves("Loss", "nats per token", "no finite loss in this run", "train_loss", "val_loss", "train", "bulk"),
    Curves("Held-out text", "bits per byte", "no validation in this run", "", "val_bits_per_byte", y_axis="bulk"),
    Curves("Gradient norm", "norm", "no finite gradient in this run", "grad_norm", y_axis="log"),
    Curves("Learning rate", "rate of Muon", "no steps in this run", "learning_rate", label=""),
    Curves("Throughput", "tokens per second", "no steps in this run", "tokens_per_second"),
)


def plot_training(history: History, path: Path, *, tau: float, title: str = "") -> None:
    """Draws ``history`` (see ``MetricsLog.history``) to a PNG of 1600 x 1000 pixels at ``path``.

    Gaps, short runs and missing validation are fine; long runs are thinned out with their peaks kept.

    Args:
        tau: the QK-Clip threshold, drawn beside the attention logits; 0 for none.

    Raises:
        RunError: ``path`` cannot be written.
    """
    figure = Figure(figsize=(16, 10), dpi=100)
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(2, 4)
    figure.subplots_adjust(left=0.042, right=0.988, top=0.865, bottom=0.062, wspace=0.27, hspace=0.36)
    _draw_header(figure, history, title or "Training")
    columns = _columns(history)
    for ax, curves in zip((*panels[0], panels[1, 3]), CURVES, strict=True):
        _draw_curves(ax, curves, columns)
    # An old history knows only the layers with experts.
    layers = max([0, *columns["max_logit"].shape[1:], *columns["expert_load"].shape[1:2]])
    _draw_max_logit(panels[1, 0], columns, layers, tau)
    _draw_busiest_expert(panels[1, 1], columns, layers)
    _draw_expert_load(panels[1, 2], columns["expert_load"], layers)
    for ax in panels.flat:
        if names := ax.get_legend_handles_labels()[1]:
            tight = {"borderpad": 0, "borderaxespad": 0.3, "handlelength": 1.2, "columnspacing": 1.0}
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1.005), ncols=len(names), frameon=False, **tight)
        if ax.get_xlabel() == "step":
            last = max([1, *history["steps"]])
            ax.set_xlim(-0.02 * last, 1.02 * last)
    with log_errors_explained(path), atomic_write(path) as file:
        canvas.print_png(file)  # type: ignore[no-untyped-call]


def _draw_header(figure: Figure, history: History, title: str) -> None:
    facts = counted(len(history["steps"]), "step")
    if tokens := [count for count in history.get("tokens", []) if count is not None]:
        facts += f"  ·  {EngFormatter(places=1)(tokens[-1])} tokens"
    style: dict[str, Any] = {"y": 0.965, "va": "center", "parse_math": False}
    figure.text(0.012, s=title, ha="left", fontsize=15, fontweight="bold", **style)
    figure.text(0.988, s=facts, ha="right", fontsize=12, color="#444444", **style)


# ---- panels -------------------------------------------------------------------------------------


def _draw_curves(ax: Axes, panel: Curves, columns: Columns) -> None:
    """A strong line of means over a faint one of every value (their extremes once thinned), and the validations.

    What does not scatter has no label for its means, and is drawn as it is.
    """
    steps, train = columns["steps"], columns.get(panel.train, np.empty(0))
    val_steps, validation = columns["val_steps"], columns.get(panel.validation, np.empty(0))
    both = np.append(train, validation)
    if not _dress(ax, panel.title, panel.unit, both, empty=panel.empty):
        return
    if panel.train:
        extremes = np.stack([_thin(train, np.fmin), _thin(train, np.fmax)], axis=1).ravel()
        _draw_line(ax, np.repeat(_thin(steps, np.fmin), 2), extremes, color=BLUE, alpha=0.3, linewidth=0.9)
        strong = (_means(steps), _means(train)) if panel.label else (_thin(steps, np.fmin), _thin(train, np.fmax))
        _draw_line(ax, *strong, color=BLUE, linewidth=2, label=panel.label)
    if panel.train == "train_loss":
        skipped = np.isnan(train) | (columns["skipped"] > 0)  # an old history does not have that column
        _draw_marks(ax, steps[skipped], "x", RED, f"skipped: {skipped.sum():,}")
    if panel.train == "grad_norm":
        for name, marker, color, y in (("clipped_gradient", "|", GREY, 0.025), ("spike", "^", ORANGE, 0.06)):
            seen = steps[columns[name] > 0]
            _draw_marks(ax, seen, marker, color, f"{MARKED[name]}: {len(seen):,}", y=y)
    if len(validation):
        marker = "o" if len(validation) <= 60 else ""
        _draw_line(ax, val_steps, validation, color=ORANGE, marker=marker, markersize=4, label="validation", zorder=3)
    if not panel.train:
        best = int(np.nanargmin(validation))
        label = f"best: {validation[best]:.3f} at step {val_steps[best]:,.0f}"
        ax.plot(val_steps[best], validation[best], "o", color=GREEN, markersize=7, label=label, zorder=4)
    if panel.y_axis == "log":
        _use_log_scale(ax, both)
    elif panel.y_axis == "bulk":  # a handful of spikes must not squash everything else
        low, high = np.nanpercentile(both, [0.0, 99.5])
        margin = 0.05 * (high - low) or 0.5
        ax.set_ylim(low - margin, high + margin)
    else:
        ax.set_ylim(bottom=0)
    if panel.train == "tokens_per_second":
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_max_logit(ax: Axes, columns: Columns, layers: int, tau: float) -> None:
    steps, logits = columns["steps"], columns["max_logit"]  # [S, L]
    if not _dress(ax, "Largest logit", "attention logit, upper bound", logits, empty="not measured in this run"):
        return
    _draw_layers(ax, steps, logits, layers)
    shown = logits[np.isfinite(logits)]
    if tau > 0:
        ax.axhline(tau, color=RED, linestyle="--", label=f"τ = {tau:g}")
        shown = np.append(shown, tau)
    clipped = steps[columns["clipped_heads"] > 0]
    _draw_marks(ax, clipped, "^", ORANGE, f"heads clipped: {counted(len(clipped), 'step')}")
    if 0 < 10 * shown.min() < shown.max():
        _use_log_scale(ax, shown)


def _draw_busiest_expert(ax: Axes, columns: Columns, layers: int) -> None:
    load = columns["expert_load"]  # [S, M, E]
    if _dress(ax, "Busiest expert", "load / even share", load, empty="no expert load in this run"):
        _draw_layers(ax, _means(columns["steps"]), _means(load.max(axis=2)), layers)
        ax.axhline(1.0, color=GREY, linestyle="--", label="perfect balance")


def _draw_expert_load(ax: Axes, load: Floats, layers: int) -> None:
    """Heat map [M, E] of the last tenth of the run, with numbers where they fit."""
    known = load[np.isfinite(load).all(axis=tuple(range(1, load.ndim)))]
    recent = known[-max(1, len(known) // 10) :]
    title = f"Expert load, last {counted(len(recent), 'step')}"
    if not _dress(ax, title, "layer", recent, empty="no expert load in this run", xlabel="expert"):
        return
    mean = recent.mean(axis=0)
    first, experts = layers - len(mean), mean.shape[1]
    reach = max(0.1, float(np.abs(mean - 1).max()))
    extent = (-0.5, experts - 0.5, layers - 0.5, first - 0.5)
    norm = TwoSlopeNorm(1.0, 1 - reach, 1 + reach)
    ax.imshow(mean, aspect="auto", cmap=BALANCE, norm=norm, extent=extent, interpolation="nearest")
    if experts <= 8 and len(mean) <= 16:
        for (row, expert), share in np.ndenumerate(mean):
            color = "white" if abs(share - 1) > 0.55 * reach else "#222222"
            ax.text(expert, first + row, f"{share:.2f}", ha="center", va="center", fontsize=9, color=color)
    ax.grid(False)
    ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    ends = (f"{max(0.0, 1 - reach):.2g}", f"{1 + reach:.3g} of the even share")
    _draw_color_key(ax, BALANCE(np.linspace(0, 1, 64)), ends, x=0.12, y=1.03)


# ---- parts of a panel ---------------------------------------------------------------------------


def _dress(ax: Axes, title: str, ylabel: str, values: Floats, *, empty: str, xlabel: str = "step") -> bool:
    """Titles, ticks and grid; whether any of ``values`` is finite: if none is, the panel says ``empty``."""
    # An explicit y, or matplotlib lifts the title above the color key.
    ax.set_title(title, loc="left", fontweight="bold", y=1.0, pad=28)
    ax.set(xlabel=xlabel, ylabel=ylabel, axisbelow=True)
    ax.tick_params(which="both", color=GREY)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#E6E6E6")
    if np.isfinite(values).any():
        return True
    ax.text(0.5, 0.5, empty, ha="center", va="center", color=GREY, fontsize=11, transform=ax.transAxes)
    ax.set(xticks=[], yticks=[])
    return False


def _draw_line(ax: Axes, steps: Floats, values: Floats, **style: Any) -> None:
    """A line through the finite values; a single value becomes a dot."""
    finite = np.isfinite(values)
    if len(np.unique(steps[finite])) == 1:
        style |= {"marker": "o", "markersize": 5}
    ax.plot(steps[finite], values[finite], **style)


def _draw_layers(ax: Axes, steps: Floats, values: Floats, layers: int) -> None:
    """One curve of peaks for each column of ``values``, the last of ``layers``; light to dark with depth."""
    first = layers - values.shape[1]
    colors = colormaps["viridis_r"](np.linspace(0.15, 1.0, layers))[first:]
    at, peaks = _thin(steps, np.fmin, MAX_LAYER_POINTS), _thin(values, np.fmax, MAX_LAYER_POINTS)
    for column, color in zip(peaks.T, colors, strict=True):
        _draw_line(ax, at, column, color=color, linewidth=1.3)
    if layers > 1:
        _draw_color_key(ax, colors, (f"layer {first}", str(layers - 1)), x=0.75, y=1.115)


def _draw_color_key(ax: Axes, colors: Any, ends: tuple[str, str], *, x: float, y: float) -> None:
    """A strip of ``colors`` above the axes with the meaning of its two ends; ``x, y`` in axes coordinates."""
    strip = ax.inset_axes((x, y, 0.18, 0.03))
    strip.imshow(np.linspace(0, 1, len(colors))[None], aspect="auto", cmap=ListedColormap(colors))
    strip.set_axis_off()
    strip.text(-0.06, 0.45, ends[0], ha="right", va="center", transform=strip.transAxes)
    strip.text(1.06, 0.45, ends[1], ha="left", va="center", transform=strip.transAxes)


def _draw_marks(ax: Axes, steps: Floats, marker: str, color: str, label: str, *, y: float = 0.025) -> None:
    """Marks along the lower edge of a panel, wherever its y axis ends."""
    chosen = steps[:: max(1, len(steps) // 100)]
    style: dict[str, Any] = {"color": color, "markersize": 4, "label": label, "clip_on": False, "zorder": 4}
    if len(chosen):
        ax.plot(chosen, np.full(len(chosen), y), marker, transform=ax.get_xaxis_transform(), **style)


def _use_log_scale(ax: Axes, values: Floats) -> None:
    """A logarithmic y axis with plain numbers: 1, 2, 5 per decade, fewer over many decades."""
    positive = values[values > 0]
    narrow = positive.max(initial=0) < 300 * positive.min(initial=np.inf)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


# ---- numbers ------------------------------------------------------------------------------------


def _columns(history: History) -> Columns:
    """The columns as floats [S, ...]: null, or one that is missing, as NaN; each expert's load over the even share."""
    columns: Columns = {}
    for at, names in (("steps", STEP_COLUMNS), ("val_steps", VALIDATION_COLUMNS)):
        for name in (at, *names):
            rows = [np.asarray(value, np.float64) for value in history.get(name, [None] * len(history[at]))]
            shape = max((row.shape for row in rows), key=len, default=())
            columns[name] = np.array([np.broadcast_to(row, shape) for row in rows]).reshape(len(rows), *shape)
    columns["expert_load"] *= columns["expert_load"].shape[-1]
    return columns


def _thin(values: Floats, reduce: np.ufunc, limit: int = MAX_POINTS) -> Floats:
    """At most ``limit`` of ``values`` [S, ...]: each the ``reduce`` (fmin and fmax pass over NaN) of its neighbours."""
    count = min(limit, len(values))
    return np.asarray(reduce.reduceat(values, np.arange(count) * len(values) // count, axis=0))


def _means(values: Floats) -> Floats:
    """Means of at most ``MAX_MEANS`` stretches of the run [S, ...]; NaN is left out."""
    with np.errstate(invalid="ignore"):
        return _thin(np.nan_to_num(values), np.add, MAX_MEANS) / _thin(1.0 - np.isnan(values), np.add, MAX_MEANS)
