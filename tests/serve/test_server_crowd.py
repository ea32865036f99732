"""Ten seconds of ``benchmarks/serving.py soak``: many clients at once, a third of whom leave in mid-stream."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from stored_models import saved, stored_model

pytestmark = pytest.mark.serial

ROOT = Path(__file__).parents[2]


@pytest.mark.fault(93)
@pytest.mark.slow
def test_a_crowd_that_comes_and_leaves_costs_no_error_no_slot_and_no_memory(tmp_path: Path) -> None:
    output, model = tmp_path / "soak.json", saved(stored_model(max_seq_length=256), tmp_path / "small.pt")
    flags = ["--seconds", "15", "--clients", "64", "--checkpoint", str(model), "--output", str(output)]
    command = [sys.executable, "-m", "benchmarks.serving", "soak", *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = json.loads(output.read_text())["soak"]
    assert found["errors"] == []
    assert found["left"] > 64
    assert found["finished"] > 64
    health = found["health_afterwards"]
    assert (health["status"], health["running"], health["waiting"], health["failures"]) == ("ok", 0, 0, 0)
    assert found["memory_growth_in_the_second_half"] < 0.05
