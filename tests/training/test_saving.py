"""Which checkpoint a run goes on from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nanokimi import checkpoint
from nanokimi.checkpoint import CheckpointError
from nanokimi.errors import UserError
from nanokimi.training.saving import has_run, newest_run

WHOLE: dict[str, Any] = {"model": {"w": torch.ones(3)}, "optimizer": {}, "counters": {"step": 7}}
WEIGHTS: dict[str, Any] = {"model": {"w": torch.ones(3)}, "counters": {"step": 9}}


def save(path: Path, content: dict[str, Any], age: int, *, damaged: bool = False) -> None:
    """A checkpoint that was written ``age`` seconds ago."""
    checkpoint.save(path, content)
    if damaged:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    at = 2_000_000_000 - age
    os.utime(path, (at, at))


def test_the_newest_readable_run_is_taken_and_what_is_wrong_with_newer_ones_is_said(tmp_path: Path) -> None:
    save(tmp_path / "latest.pt", WHOLE, 0, damaged=True)
    save(tmp_path / "final.pt", WEIGHTS, 1)
    save(tmp_path / "previous.pt", WHOLE, 2)
    path, content, problems = newest_run(tmp_path)
    assert (path.name, content["counters"]["step"]) == ("previous.pt", 7)
    assert len(problems) == 1
    assert "latest.pt: damaged" in problems[0]


def test_where_none_can_be_read_every_reason_is_given(tmp_path: Path) -> None:
    save(tmp_path / "latest.pt", WHOLE, 0, damaged=True)
    save(tmp_path / "best.pt", WHOLE, 1, damaged=True)
    with pytest.raises(CheckpointError, match=r"latest\.pt: damaged.*; .*best\.pt: damaged"):
        newest_run(tmp_path)
    assert has_run(tmp_path)


def test_weights_alone_are_no_run(tmp_path: Path) -> None:
    save(tmp_path / "latest.pt", WEIGHTS, 0)
    assert not has_run(tmp_path)
    with pytest.raises(UserError, match="--resume: no checkpoint in"):
        newest_run(tmp_path)
