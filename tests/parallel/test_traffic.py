"""Bytes that a step exchanges and holds, counted on real processes, against the formulas of the planner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import traffic_worker as worker

from nanokimi.insight.planner import transfers
from nanokimi.ops.newton_schulz import best_dtype
from nanokimi.parallel.layout import Layout
from nanokimi.parallel.memory_estimate import CPU, Device, Job, memory

pytestmark = pytest.mark.serial

LAYOUTS = [  # ranks, mode, replicas, ranks that experts are dealt out to, checkpointing, memory measured
    "2,ddp,1,0,0,1",
    "2,fsdp,1,0,0,0",
    "2,fsdp,1,2,1,1",
    "4,ddp,1,0,0,0",
    "4,fsdp,2,0,0,1",
    "4,fsdp,1,2,0,0",
    "4,fsdp,2,2,1,0",
]
HERE = Device(half=False, cuda=best_dtype(torch.device("cpu")).itemsize == 2)  # as this processor does Newton-Schulz


@pytest.mark.slow
def test_what_is_exchanged_and_held_is_what_the_planner_says(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", worker.__file__, str(tmp_path / "store"), *LAYOUTS],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for words, values in zip(LAYOUTS, json.loads(done.stdout), strict=True):
        ranks, mode, replicate, experts, checkpointing, measured = words.split(",")
        layout, found = Layout(mode, int(ranks), int(replicate), int(experts)), worker.Found(*values)
        check_traffic(layout, checkpointing == "1", found.sent)
        if measured == "1":
            check_memory(layout, checkpointing == "1", found)


def check_traffic(layout: Layout, checkpointing: bool, sent: dict[str, float]) -> None:
    job = Job(worker.small_config(), layout, worker.SEQUENCES, worker.PASSES, HERE, checkpointing)
    planned: dict[str, float] = {}
    for transfer in transfers(job):
        planned[transfer.collective] = planned.get(transfer.collective, 0) + transfer.payload
    assert planned == pytest.approx(sent, rel=0.05), layout


def check_memory(layout: Layout, checkpointing: bool, found: worker.Found) -> None:
    """In a pass never too little, and at most three tenths too much: not all is there when the largest block is."""
    job = Job(worker.small_config(), layout, worker.SEQUENCES, device=CPU, checkpointing=checkpointing)
    parts = memory(job)
    assert parts["weights"] == found.weights, layout
    passing = parts["kept for the backward pass"] + parts["embedding and head, gathered"]
    passing += max(parts["blocks on their way"], parts["a chunk of logits"])
    assert found.passing <= passing <= 1.3 * found.passing, layout
    updating = memory(job._replace(device=HERE))["Newton-Schulz"]
    assert updating == pytest.approx(found.updating, rel=0.1), layout
