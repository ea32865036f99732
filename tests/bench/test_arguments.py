"""Flags of ``python -m benchmarks.bench``: what they mean, and mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench.__main__ import main
from benchmarks.bench.arguments import PARTS, BenchArguments

WRONG = {
    "--preset kimi-k2": "--preset kimi-k2: the bench runs nano-243m, tiny, debug",
    "--parts speed": "--parts speed: choose from roofs,",
    "--parts ,": "--parts: name at least one",
    "--contexts 1k": "--contexts 1k: takes whole numbers with commas between them",
    "--contexts 128,4": "--contexts 4: must be 8 or more",
    "--repeats 0": "--repeats must be 1 or more, got 0",
    "--batch_size -1": "--batch_size must be 0 or more, got -1",
    "--threads -2": "--threads must be 0 or more, got -2",
    "--instructions sse": "--instructions sse: choose one of native, avx2",
    "--checkpoint missing.pt": "--checkpoint missing.pt: no such file",
    "--parts formats": "--parts formats needs a trained model: name one with --checkpoint",
    "--device quantum": "--device quantum: unknown; choose auto, cpu, cuda, cuda:N or mps",
    "--output .": "--output . is a directory: name a file, such as bench.json",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_mistake_takes_one_line_and_exit_code_2(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "debug", *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert WRONG[flags] in err
    assert err.count("\n") == 1
    assert out == ""


def test_the_arguments_take_batch_and_context_from_the_preset() -> None:
    assert (BenchArguments().rows, BenchArguments().context) == (2, 1024)
    assert (BenchArguments(preset="tiny").rows, BenchArguments(preset="tiny").context) == (8, 256)
    assert BenchArguments(batch_size=3).rows == 3
    assert BenchArguments().parts == PARTS


def test_instructions_and_threads_reach_every_candidate() -> None:
    environment = BenchArguments(instructions="avx2", threads=3).environment
    assert environment["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert "ONEDNN_MAX_CPU_ISA" not in BenchArguments().environment


def test_figures_go_to_the_results_of_a_checkout_or_to_the_named_file() -> None:
    path = BenchArguments(preset="tiny", instructions="avx2").path
    assert path.parent.parts[-2:] == ("benchmarks", "results")
    assert path.name.startswith("bench-tiny-avx2-20")
    assert BenchArguments(output="x/y.json").path == Path("x/y.json")
