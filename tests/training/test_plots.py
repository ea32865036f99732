from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from nanokimi.errors import RunError
from nanokimi.training import plots
from nanokimi.training.metrics import History
from nanokimi.training.plots import plot_training


def history_of(steps: int, *, layers: int = 3, moe_layers: int = 2, experts: int = 4, validate: bool = True) -> History:
    rng = np.random.default_rng(0)
    every = list(range(1, steps + 1))
    val_steps = every[4::5] if validate else []
    return {
        "steps": every,
        "train_loss": (3 + rng.random(steps)).tolist(),
        "train_ce_loss": (3 + rng.random(steps)).tolist(),
        "train_aux_loss": [0.001] * steps,
        "learning_rate": [0.02] * steps,
        "grad_norm": (0.5 + rng.random(steps)).tolist(),
        "tokens": [512 * step for step in every],
        "tokens_per_second": (3000 + rng.random(steps)).tolist(),
        "max_logit": (5 + 100 * rng.random((steps, layers))).tolist(),
        "clipped_heads": [step % 2 for step in every],
        "clipped_gradient": [int(step % 3 == 0) for step in every],
        "spike": [int(step == 5) for step in every],
        "non_finite": [0] * steps,
        "skipped": [int(step == 5) for step in every],
        "expert_load": rng.dirichlet(np.ones(experts), (steps, moe_layers)).tolist(),
        "val_steps": val_steps,
        "val_loss": [3.5 for _ in val_steps],
        "val_bits_per_byte": [2.1 for _ in val_steps],
    }


def with_nulls(history: History, *rows: int) -> History:
    for name in ("train_loss", "grad_norm", "tokens_per_second", "max_logit", "expert_load", "clipped_heads"):
        for row in rows:
            history[name][row] = None
    return history


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG whose every chunk has the right checksum."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    place, kinds = 8, []
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        body = data[place + 4 : place + 8 + length]
        assert struct.unpack_from(">I", data, place + 8 + length)[0] == zlib.crc32(body)
        kinds.append(body[:4])
        place += 12 + length
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    return struct.unpack_from(">II", data, 16)


def drawn_figure(monkeypatch: pytest.MonkeyPatch, path: Path, history: History, **options: Any) -> Figure:
    figures: list[Figure] = []
    canvas = plots.FigureCanvasAgg
    monkeypatch.setattr(plots, "FigureCanvasAgg", lambda figure: figures.append(figure) or canvas(figure))
    plot_training(history, path, **options)
    return figures[0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("history", "tau"),
    [
        pytest.param(history_of(0), 100.0, id="nothing yet"),
        pytest.param(history_of(1, validate=False), 100.0, id="one step"),
        pytest.param(with_nulls(history_of(40), 0, 7, 39), 100.0, id="skipped steps"),
        pytest.param(with_nulls(history_of(3), 0, 1, 2), 100.0, id="every step skipped"),
        pytest.param(history_of(20, moe_layers=0, validate=False), 0.0, id="dense, no tau"),
        pytest.param(history_of(10, layers=61, moe_layers=60, experts=16), 100.0, id="61 layers"),
    ],
)
def test_every_kind_of_history_becomes_a_picture_of_one_size(tmp_path: Path, history: History, tau: float) -> None:
    path = tmp_path / "training_metrics.png"
    plot_training(history, path, tau=tau, title="tiny $1_")
    assert png_size(path) == (1600, 1000)
    assert list(tmp_path.iterdir()) == [path]


def test_titles_and_legends_overlap_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn_figure(monkeypatch, tmp_path / "plot.png", with_nulls(history_of(60), 3), tau=100.0)
    for ax in figure.axes:
        legend, boxes = ax.get_legend(), [text.get_window_extent() for child in ax.child_axes for text in child.texts]
        boxes += [ax.title.get_window_extent()] if ax.get_title() else []
        boxes += [ax._left_title.get_window_extent(), ax.get_window_extent()]
        boxes += [legend.get_window_extent()] if legend else []
        overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        assert not overlaps, ax.get_title(loc="left")
        assert all(min(box.x0, box.y0) >= 0 and box.x1 <= 1600 and box.y1 <= 1000 for box in boxes)


@pytest.mark.fault("B3")
def test_tau_and_all_that_was_clipped_or_skipped_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn_figure(monkeypatch, tmp_path / "plot.png", with_nulls(history_of(10), 2), tau=80.0)
    labels = [label for ax in figure.axes for label in ax.get_legend_handles_labels()[1]]
    assert {"τ = 80", "skipped: 2", "heads clipped: 4 steps", "clipped: 3", "spikes: 1"} <= set(labels)


@pytest.mark.fault(50)
def test_a_long_run_is_thinned_and_keeps_its_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = history_of(5000, layers=2, moe_layers=1, experts=2)
    history["max_logit"][3333][1] = 777.0
    figure = drawn_figure(monkeypatch, tmp_path / "plot.png", history, tau=100.0)
    (logits,) = [ax for ax in figure.axes if ax.get_title(loc="left") == "Largest logit"]
    curves = [np.asarray(line.get_ydata()) for line in logits.get_lines()]
    assert max(curve.max() for curve in curves) == 777.0
    assert all(len(line.get_xdata()) <= 2 * plots.MAX_POINTS for ax in figure.axes for line in ax.get_lines())


def test_the_means_leave_out_gaps_and_keep_constants() -> None:
    values = np.full(400, 2.0)
    values[100:103] = np.nan
    np.testing.assert_allclose(plots._means(values), 2.0)


def test_a_picture_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*plot\.png"):
        plot_training(history_of(1), tmp_path / "missing" / "plot.png", tau=0.0)


def test_plotting_never_loads_pyplot() -> None:
    code = "import sys, nanokimi.training.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
