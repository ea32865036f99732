"""How products are multiplied faster here: measured once, kept in checkpoints, the same on all ranks, or fixed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanokimi import checkpoint
from nanokimi.cli import main
from nanokimi.config import ModelConfig
from nanokimi.inference import decoding
from nanokimi.insight import doctor
from nanokimi.model.transformer import Transformer
from nanokimi.ops import measured, products
from nanokimi.ops.measured import GAIN, Choice, machine_choice
from nanokimi.ops.products import Library, fp32_library, multiply_fp32_by
from nanokimi.optim import muonclip
from nanokimi.training import run

needs_onednn = pytest.mark.skipif(not products.HAS_ONEDNN, reason="this build of torch has no oneDNN")
LITTLE, MUCH = GAIN - 0.01, GAIN + 0.01
OUTCOMES = [(MUCH, LITTLE, "float32", "onednn"), (LITTLE, MUCH, "bfloat16", "mkl")]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A processor that says it multiplies bf16, and a cache folder of its own."""
    monkeypatch.delenv("NANOKIMI_PRODUCTS")
    monkeypatch.setenv("NANOKIMI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "best_dtype", lambda *_: torch.bfloat16)
    before = fp32_library()
    yield monkeypatch
    multiply_fp32_by(before)


def outcome(machine: pytest.MonkeyPatch, dtype_gain: float, library_gain: float) -> list[tuple[int, int]]:
    """Has the measurements give these gains; returns the shapes they are asked for, as they come."""
    calls: list[tuple[int, int]] = []

    def measure(rows: int, cols: int) -> float:
        calls.append((rows, cols))
        return dtype_gain

    machine.setattr(measured, "dtype_gain", measure)
    machine.setattr(measured, "library_gain", lambda *_: library_gain)
    return calls


def trained(folder: Path, *more: str) -> dict[str, object]:
    """The newest checkpoint of a run."""
    text = folder / "text.txt"
    text.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    words = ["train", "--preset", "debug", "--data_path", str(text), "--output_dir", str(folder), "--compile", "off"]
    assert main([*words, "--eval_interval", "0", "--device", "cpu", *more]) == 0
    found: dict[str, object] = checkpoint.read(folder / "checkpoints" / "latest.pt")
    return found


def onednn_calls(machine: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every product by oneDNN."""
    calls: list[int] = []
    onednn = products._onednn

    def watched(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        out: torch.Tensor = onednn(x, weight)
        return out

    machine.setattr(products, "_onednn", watched)
    return calls


@needs_onednn
@pytest.mark.fault("A23")
@pytest.mark.parametrize(("dtype_gain", "library_gain", "dtype", "library"), OUTCOMES)
def test_each_outcome_is_taken_said_recorded_and_kept_by_a_resume_to_the_bit(
    dtype_gain: float,
    library_gain: float,
    dtype: str,
    library: str,
    machine: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    seen: list[torch.dtype | None] = []
    orthogonalise = muonclip.orthogonalise

    def watched(updates: list[torch.Tensor], *, dtype: torch.dtype | None) -> list[torch.Tensor]:
        seen.append(dtype)
        return orthogonalise(updates, dtype=dtype)

    machine.setattr(muonclip, "orthogonalise", watched)
    by_onednn = onednn_calls(machine)
    outcome(machine, dtype_gain, library_gain)
    said = f"products: fp32 by {measured.NAMES[library]}, Newton-Schulz in {dtype} ("
    (tmp_path / "whole").mkdir()
    whole = trained(tmp_path / "whole", "--max_steps", "2")
    assert f"{said}measured: MKL has {library_gain:.2f} times" in capfd.readouterr().err
    trained(tmp_path, "--max_steps", "2", "--stop_after", "1")
    assert f"{said}measured: " in capfd.readouterr().err, "read from the cache it is said too"

    outcome(machine, 2.5 - dtype_gain, 2.5 - library_gain)
    machine.setenv("NANOKIMI_CACHE", str(tmp_path / "other"))
    multiply_fp32_by("onednn" if library == "mkl" else "mkl")
    resumed = trained(tmp_path, "--resume")
    assert f"{said}as the checkpoint says)" in capfd.readouterr().err
    assert (resumed["newton_schulz"], resumed["fp32_products"]) == (dtype, library)
    assert set(map(str, seen)) == {f"torch.{dtype}"}
    assert bool(by_onednn) == (library == "onednn")
    weights = [{k: v for k, v in run["model"].items()} for run in (whole, resumed)]  # type: ignore[attr-defined]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@needs_onednn
@pytest.mark.fault("A23")
def test_a_checkpoint_from_before_the_choice_goes_on_with_onednn(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outcome(machine, LITTLE, MUCH)
    assert trained(tmp_path, "--max_steps", "2", "--stop_after", "1")["fp32_products"] == "mkl"
    path = tmp_path / "checkpoints" / "latest.pt"
    content = checkpoint.read(path)
    del content["fp32_products"]
    checkpoint.save(path, content)
    assert trained(tmp_path, "--resume")["fp32_products"] == "onednn"


@pytest.mark.fault("A23")
def test_a_machine_is_measured_once_and_never_where_the_choice_is_fixed(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = outcome(machine, 2.0, LITTLE)
    assert machine_choice((30, 4000), tmp_path).dtype == "float32"
    assert machine_choice((30, 4000), tmp_path).dtype_gain == 2.0
    assert calls == [(30, measured.LARGEST)]
    assert machine_choice((31, 40), tmp_path, deterministic=True).dtype == "bfloat16"
    machine.setenv("NANOKIMI_PRODUCTS", "fixed")
    assert machine_choice((31, 40), tmp_path).dtype == "bfloat16"
    assert len(calls) == 1
    machine.delenv("NANOKIMI_PRODUCTS")
    for damaged in ("{", '{"dtype": "float32", "library": "blas"}', '{"dtype": "float32", "gain": 2.0}'):
        for file in tmp_path.glob("products-*.json"):
            file.write_text(damaged, encoding="utf-8")
        calls.clear()
        assert machine_choice((30, 4000), tmp_path).dtype == "float32"
        assert len(calls) == 1, "a damaged file is no measurement"


@pytest.mark.fault("A23")
def test_a_slow_measurement_ends_after_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], [0, 0]
    monkeypatch.setattr(measured, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def call(number: int) -> None:
        calls[number] += 1
        clock[0] += (0.3, 0.2)[number]

    assert measured.ratio_of(lambda: call(0), lambda: call(1)) == pytest.approx(1.5)
    assert calls == [4, 4]


@needs_onednn
@pytest.mark.fault("A23")
def test_the_measurement_leaves_switch_and_random_numbers_as_they_were(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(measured, "SECONDS", 0)
    multiply_fp32_by("mkl")
    state = torch.get_rng_state()
    choice = measured.measured_choice(192, 192)
    assert min(choice.library_gain, choice.dtype_gain) > 0
    assert measured.measured_choice(32, 64).library_gain == 0, "too small to tell"
    assert fp32_library() == "mkl"
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="'blas': choose one of onednn, mkl"):
        multiply_fp32_by("blas")  # type: ignore[arg-type]


@needs_onednn
@pytest.mark.fault("A23")
def test_the_main_ranks_choice_holds_for_all(machine: pytest.MonkeyPatch) -> None:
    sent: list[bytes | None] = []

    class Ranks:
        def __init__(self, is_main: bool) -> None:
            self.is_main = is_main

        def broadcast(self, content: bytes | None) -> bytes | None:
            sent.append(content)
            return sent[0]

    taken: list[Choice] = []
    config = SimpleNamespace(deterministic=False)
    model = Transformer(ModelConfig.preset("debug"))
    trainer = SimpleNamespace(device=torch.device("cpu"), config=config, model=model, multiply_by=taken.append)
    for is_main, library_gain in ((True, MUCH), (False, LITTLE)):
        outcome(machine, LITTLE, library_gain)
        machine.setattr(run, "current_ranks", lambda is_main=is_main: Ranks(is_main))
        run.choose_products(trainer)  # type: ignore[arg-type]
    assert sent[1] is None, "the other rank measures nothing"
    assert [choice.library for choice in taken] == ["mkl", "mkl"]


@needs_onednn
@pytest.mark.fault("A23")
@pytest.mark.parametrize(("library_gain", "library"), [(LITTLE, "onednn"), (MUCH, "mkl")])
def test_prompts_are_read_by_the_library_that_is_faster_here(
    library_gain: float, library: Library, machine: pytest.MonkeyPatch
) -> None:
    machine.setattr(decoding, "PRODUCTS_PER_THREAD", 1)
    outcome(machine, LITTLE, library_gain)
    by_onednn = onednn_calls(machine)
    model = Transformer(ModelConfig.preset("debug")).eval()
    choice = decoding.choose_products(model)
    assert choice
    assert choice.library == fp32_library() == library
    with torch.no_grad():
        model(torch.zeros(4, 128, dtype=torch.int64))
    assert bool(by_onednn) == (library == "onednn")


@needs_onednn
@pytest.mark.fault("A23")
def test_compiled_code_follows_the_switch(machine: pytest.MonkeyPatch) -> None:
    by: list[bool] = []
    x, weight = torch.randn(130, 170), torch.randn(190, 170)

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        by.append("onednn" in graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(products.product, backend=backend)
    for library in ("onednn", "mkl", "onednn"):
        multiply_fp32_by(library)  # type: ignore[arg-type]
        torch.testing.assert_close(compiled(x, weight.mT), x @ weight.mT, rtol=1e-4, atol=1e-4)
    assert by == [True, False], "a constant of each graph"


@needs_onednn
@pytest.mark.fault("A23")
def test_the_doctor_says_what_a_run_would_choose(machine: pytest.MonkeyPatch) -> None:
    outcome(machine, LITTLE, MUCH)
    *_, finding = doctor.speed()
    assert finding.seen.startswith("fp32 by MKL, Newton-Schulz in bfloat16 (measured: MKL has 1.16 times the speed")
    machine.setenv("NANOKIMI_PRODUCTS", "fixed")
    *_, finding = doctor.speed()
    assert finding.seen.startswith("fp32 by oneDNN, Newton-Schulz in ")
    assert finding.seen.endswith(" (by default)")
