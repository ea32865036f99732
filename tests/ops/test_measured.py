"""The precision of Newton-Schulz that is faster here: measured once, kept in checkpoints, fixed where asked."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from nanokimi import checkpoint
from nanokimi.cli import main
from nanokimi.ops import measured
from nanokimi.ops.measured import GAIN, machine_choice
from nanokimi.optim import muonclip

OUTCOMES = [(GAIN + 0.01, torch.float32), (GAIN - 0.01, torch.bfloat16)]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A processor that says it multiplies bf16, and a cache folder of its own."""
    monkeypatch.delenv("NANOKIMI_PRODUCTS")
    monkeypatch.setenv("NANOKIMI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "best_dtype", lambda *_: torch.bfloat16)
    return monkeypatch


def trained(folder: Path, *more: str) -> str:
    """The precision that the newest checkpoint of a run holds."""
    text = folder / "text.txt"
    text.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    words = ["train", "--preset", "debug", "--data_path", str(text), "--output_dir", str(folder), "--compile", "off"]
    assert main([*words, "--eval_interval", "0", "--device", "cpu", *more]) == 0
    found: str = checkpoint.read(folder / "checkpoints" / "latest.pt")["newton_schulz"]
    return found


@pytest.mark.fault("A23")
@pytest.mark.parametrize(("gain", "dtype"), OUTCOMES)
def test_each_outcome_is_taken_recorded_and_kept_by_a_resume(
    gain: float, dtype: torch.dtype, machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine.setattr(measured, "measured_gain", lambda *_: gain)
    seen: list[torch.dtype | None] = []
    orthogonalise = muonclip.orthogonalise

    def watched(updates: list[torch.Tensor], *, dtype: torch.dtype | None) -> list[torch.Tensor]:
        seen.append(dtype)
        return orthogonalise(updates, dtype=dtype)

    machine.setattr(muonclip, "orthogonalise", watched)
    name = str(dtype).removeprefix("torch.")
    assert trained(tmp_path, "--max_steps", "1") == name
    machine.setattr(measured, "measured_gain", lambda *_: 2.5 - gain)
    machine.setenv("NANOKIMI_CACHE", str(tmp_path / "other"))
    assert trained(tmp_path, "--resume", "--max_steps", "2") == name
    assert set(seen) == {dtype}


@pytest.mark.fault("A23")
def test_a_machine_is_measured_once_and_never_where_the_choice_is_fixed(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[int, int]] = []

    def measure(rows: int, cols: int) -> float:
        calls.append((rows, cols))
        return 2.0

    machine.setattr(measured, "measured_gain", measure)
    assert machine_choice((30, 4000), tmp_path).dtype == "float32"
    assert machine_choice((30, 4000), tmp_path).gain == 2.0
    assert calls == [(30, 1024)]
    assert machine_choice((31, 40), tmp_path, deterministic=True).dtype == "bfloat16"
    machine.setenv("NANOKIMI_PRODUCTS", "fixed")
    assert machine_choice((31, 40), tmp_path).dtype == "bfloat16"
    assert len(calls) == 1
    machine.delenv("NANOKIMI_PRODUCTS")
    for file in tmp_path.glob("products-*.json"):
        file.write_text("{", encoding="utf-8")
    assert machine_choice((30, 4000), tmp_path).dtype == "float32"
    assert len(calls) == 2, "a damaged file is no measurement"
