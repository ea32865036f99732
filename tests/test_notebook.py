"""The guided tour runs from top to bottom, and shows what its text says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parent.parent / "base.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def test_the_tour_is_stored_without_outputs() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))


def test_the_tour_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    seen: dict[str, Any] = {}
    for number, cell in enumerate(cells("code")):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), seen)
    assert seen["fresh_loss"] == pytest.approx(math.log(257), abs=0.1)
    assert seen["counts"]["nano-243m"] == (243_263_104, 165_848_704)
    assert seen["counts"]["kimi-k2"] == (1_026_408_209_408, 32_861_477_888)
    assert seen["cache_error"] < 2e-5
    assert {layer: tuple(experts.shape) for layer, experts in seen["choices"].items()} == {1: (23, 2), 2: (23, 2)}
    assert seen["before"].min() < 0.1 * seen["before"].max()
    assert 0.68 < seen["after"].min() < seen["after"].max() < 1.21
    assert seen["pushed"][0] > seen["TAU"]
    assert seen["clipped"].tolist() == pytest.approx([seen["TAU"], float(seen["pushed"][1])], rel=1e-4)
    assert seen["exit_code"] == 0
    assert seen["history"]["steps"] == list(range(1, 31))
    assert seen["history"]["train_ce_loss"][-1] < 3 < 5 < seen["history"]["train_ce_loss"][0]
    assert len(seen["continuation"]) > 20
    assert list(tmp_path.iterdir()) == []
