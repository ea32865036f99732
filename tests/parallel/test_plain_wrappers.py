"""``MuonClip(model)`` under PyTorch's own wrappers: two ranks learn what one process learns, unasked."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import plain_worker
import pytest
import torch
from plain_worker import WAYS

pytestmark = pytest.mark.slow
Runs = dict[str, dict[str, Any]]
OTHERS = [way for way in WAYS if way not in ("one", "one, sgd")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What happened in every way of training, by its name."""
    folder = tmp_path_factory.mktemp("plain")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", plain_worker.__file__, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return {way: torch.load(folder / f"{way}.pt", weights_only=True) for way in WAYS}


@pytest.mark.parametrize("way", OTHERS)
def test_losses_and_weights_are_those_of_one_process(runs: Runs, way: str) -> None:
    one, many = runs["one, sgd" if way.endswith("sgd") else "one"], runs[way]
    torch.testing.assert_close(many["losses"], one["losses"], rtol=0, atol=1e-9)
    assert many["weights"].keys() == one["weights"].keys()
    for name, expected in one["weights"].items():
        apart = (many["weights"][name] - expected).norm() / expected.norm()
        assert apart < 1e-8 or torch.equal(many["weights"][name], expected), name


def test_heads_were_clipped_and_biases_moved_on_the_way(runs: Runs) -> None:
    assert runs["one"]["clipped"] > plain_worker.STEPS
    assert {run["clipped"] for way, run in runs.items() if not way.endswith("sgd")} == {runs["one"]["clipped"]}
    biases = [w for run in runs.values() for name, w in run["weights"].items() if name.endswith("balance_bias")]
    assert all((bias != 0).all() for bias in biases)
