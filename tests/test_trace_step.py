"""How many files one training step runs through: a reader has to open all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_FILES = 18


@pytest.mark.slow
def test_a_training_step_runs_through_few_files(tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "trace_step.py"), "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    functions = {name for file in record["files"] for name in file["functions"]}
    # The step is in it from the loader to the metrics, and what happens once in a run is not.
    assert {"MuonClip.step", "Transformer.forward"} <= functions
    assert {file["path"].partition("/")[0] for file in record["files"]} >= {"data", "model", "ops", "optim", "training"}
    assert not {"cli.py", "data/tokenizer.py"} & {file["path"] for file in record["files"]}
    assert record["total"]["n_files"] <= MOST_FILES, [file["path"] for file in record["files"]]
