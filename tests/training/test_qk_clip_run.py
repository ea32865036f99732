"""The short form of benchmarks/qk_clip.py, whose full runs are recorded in docs/results.md."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "qk_clip.py"


@pytest.mark.slow
def test_clipping_holds_logits_that_would_pass_three_tau_and_the_loss_falls(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("qk_clip_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    text = tmp_path / "train.txt"
    text.write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")

    tau = 40.0
    unclipped = benchmark.run(text, 150, 0.1, 0.0)
    clipped = benchmark.run(text, 150, 0.1, tau)
    assert max(unclipped["max_logit"]) > 3 * tau
    assert max(clipped["max_logit"]) < 1.5 * tau  # over single steps; the mean of the last is held closer
    assert benchmark.mean_tail(clipped["max_logit"], 50) < 1.2 * tau
    assert benchmark.mean_tail(clipped["loss"]) < clipped["loss"][0] - 2
