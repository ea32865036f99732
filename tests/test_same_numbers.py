"""The comparison of two checkouts, in short: it finds no difference where there is none, and one where there is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASE = "debug exact meter"


def compared(other: Path) -> subprocess.CompletedProcess[str]:
    """Two steps of one case, this checkout against the ``other``."""
    script = ROOT / "benchmarks" / "same_numbers.py"
    command = [sys.executable, str(script), "compare", str(ROOT), str(other), "--only", CASE, "--steps", "2"]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_the_comparison_finds_what_differs_and_nothing_else(tmp_path: Path) -> None:
    for name in ("nanokimi", "train.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    same = compared(tmp_path)
    assert same.returncode == 0, same.stdout + same.stderr
    config = tmp_path / "nanokimi" / "config.py"
    changed, count = re.subn(r"(?<=norm_eps: float = _positive\()1e-6", "1.01e-6", config.read_text(encoding="utf-8"))
    assert count == 1
    config.write_text(changed, encoding="utf-8")
    other = compared(tmp_path)
    assert other.returncode == 1
    assert f"{CASE}: DIFFERS" in other.stdout
