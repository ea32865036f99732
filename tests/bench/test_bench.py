"""The whole command on the ``debug`` preset, once; what it leaves; what a Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.bench import bench, parts_decoding, parts_growth
from benchmarks.bench.__main__ import main
from benchmarks.bench.picture import draw
from benchmarks.bench.report import report_lines
from benchmarks.bench.results import ROOT
from benchmarks.bench.rounds import Worker
from benchmarks.bench.worker import WORKLOADS

pytestmark = pytest.mark.slow
PARTS = "roofs,training,optimizer,memory,prefill,decoding,growth"


class InThisProcess:
    """Stands in for a worker, whose start takes seconds: the same workload, asked in JSON, in this process."""

    def __init__(self, workload: str, settings: Mapping[str, Any]) -> None:
        self.name, self.settings = workload, json.dumps(settings)
        self.loaded: Any = None

    def load(self) -> None:
        if self.loaded is None:
            module, _, kind = WORKLOADS[self.name].partition(":")
            make = getattr(import_module(f"benchmarks.bench.workloads.{module}"), kind)
            self.loaded = make(**json.loads(self.settings))

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.load()
        found: dict[str, Any] = json.loads(json.dumps(getattr(self.loaded, do)(**json.loads(json.dumps(arguments)))))
        return found

    def close(self) -> None:
        self.loaded = None


def make_worker(workload: str, settings: Mapping[str, Any], environment: Mapping[str, str]) -> Worker | InThisProcess:
    """Processes of their own for the memory that they take, and for one more."""
    if workload in ("memory", "roofs"):
        return Worker(workload, settings, environment)
    return InThisProcess(workload, settings)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file of a short run: nothing compiled by torch, two weight formats, two sizes of everything."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        patch.setattr(torch._dynamo.config, "disable", True)
        patch.setattr(bench, "Worker", make_worker)
        patch.setattr(parts_decoding, "GGUF_TYPES", {"fp32": "f32", "int8": "q8_0"})
        patch.setattr(parts_decoding, "BATCHES", {"cpu": (1, 2)})
        patch.setattr(parts_growth, "DOUBLINGS", (1, 2))
        flags = ["--parts", PARTS, "--contexts", "16,24", "--repeats", "2", "--device", "cpu", "--threads", "1"]
        assert main(["--preset", "debug", *flags, "--output", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    pictures = [path.with_suffix(".png"), path.with_name("bench-growth.png")]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    return found


def rows(content: dict[str, Any], part: str, title: str) -> dict[str, dict[str, Any]]:
    """The rows of the comparison whose title begins so, by name."""
    comparison = next(c for c in content["parts"][part]["comparisons"] if c["title"].startswith(title))
    return {row["name"]: row for row in comparison["rows"]}


def test_nothing_is_missing_and_ratios_are_those_of_medians(content: dict[str, Any]) -> None:
    assert content["complete"] is True
    assert list(content["parts"]) == [*PARTS.split(",")[:-1], "batches", "growth"]
    for part in content["parts"].values():
        for comparison in part["comparisons"]:
            assert comparison["missing"] == [], comparison["title"]
            by_name = {row["name"]: row for row in comparison["rows"]}
            for row in comparison["rows"]:
                assert row["median"] == statistics.median(row["values"])
                assert min(row["values"]) > 0
                if comparison["ours"]:
                    assert row["ratio"] == row["median"] / by_name[comparison["ours"]]["median"]


def test_the_file_says_where_and_of_what_it_is(content: dict[str, Any]) -> None:
    about = content["about"]
    assert about["preset"] == "debug"
    assert about["threads"] == 1
    assert about["contexts"] == [16, 24]
    assert {"date", "commit", "cpu", "torch", "transformers", "torch_cpu_capability", "llama.cpp"} <= set(about)


def test_every_candidate_of_the_training_parts_is_there(content: dict[str, Any]) -> None:
    passes = rows(content, "training", "forward and backward, 2 x 128 tokens")
    assert list(passes) == ["nanokimi, compiled", "nanokimi, eager", "transformers"]
    assert all(len(row["values"]) == 2 and row["rate"] > 0 < row["roof"] < 1 for row in passes.values())
    whole = rows(content, "training", "whole step")
    assert list(whole) == ["QK-Clip off", "QK-Clip on", "QK-Clip alone", "next batch of the loader"]
    assert len(whole["QK-Clip on"]["values"]) == 4
    optimizers = rows(content, "optimizer", "optimizer step")
    assert list(optimizers) == ["MuonClip", "torch.optim.Muon + AdamW", "AdamW, fused", "AdamW, foreach"]
    peak = rows(content, "memory", "peak memory")
    above = rows(content, "memory", "the same above")
    assert all(peak[name]["median"] > above[name]["median"] > 1e6 for name in peak)


def test_every_engine_decodes_at_every_context(content: dict[str, Any]) -> None:
    llama = ["llama.cpp f32", "llama.cpp f32, its defaults"]
    fp32 = ["nanokimi fp32, native", "nanokimi fp32, eager", "transformers fp32", *llama]
    for context in (16, 24):
        assert list(rows(content, "decoding", f"decoding a token, fp32, context {context}")) == fp32
        assert list(rows(content, "prefill", f"prefill of {context} tokens")) == fp32
        int8 = rows(content, "decoding", f"decoding a token, int8, context {context}")
        assert list(int8) == ["nanokimi int8, native", "llama.cpp q8_0", "llama.cpp q8_0, its defaults"]
    together = rows(content, "batches", "decoding step of 2 sequences")
    assert list(together) == ["nanokimi fp32, native", "nanokimi bf16, native", "transformers fp32"]


def test_growth_has_a_slope_along_every_axis(content: dict[str, Any]) -> None:
    curves = content["parts"]["growth"]["curves"]
    assert [curve["axis"] for curve in curves] == ["context", "batch", "experts", "context"]
    assert [[point["x"] for point in curve["points"]] for curve in curves] == [[128, 256], [1, 2], [4, 8], [128, 256]]
    assert all("seconds" in curve["slopes"] for curve in curves)
    assert curves[-1]["points"][0]["explained"] == curves[-1]["points"][0]["seconds"]


def test_the_picture_comes_from_the_file_alone(content: dict[str, Any], tmp_path: Path) -> None:
    drawn = draw(content, tmp_path / "a.png")
    assert drawn == [tmp_path / "a.png", tmp_path / "a-growth.png"]
    growth = {name: part for name, part in content["parts"].items() if name == "growth"}
    assert draw({**content, "parts": growth}, tmp_path / "b.png") == [tmp_path / "b-growth.png"]
    assert sorted(tmp_path.iterdir()) == sorted([*drawn, tmp_path / "b-growth.png"])


def test_the_tables_can_be_printed_again(content: dict[str, Any]) -> None:
    lines = list(report_lines(content))
    for part in content["parts"].values():
        for found in (*part["comparisons"], *part["curves"]):
            assert found["title"] in lines


def test_ctrl_c_leaves_what_was_measured_and_no_process(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    command = [sys.executable, "-m", "benchmarks.bench"]
    flags = ["--preset", "debug", "--parts", "roofs,memory", "--threads", "1", "--output", str(path)]
    started = subprocess.Popen([*command, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not path.exists() and started.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130, said
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert content["parts"]["roofs"]["comparisons"]
    assert "bench.json: incomplete" in said
    ends = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < ends, "a process was left"
        time.sleep(0.05)
