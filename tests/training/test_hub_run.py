"""Whole runs on streams of a hub, which is a server on loopback: killed, resumed, and the hub gone meanwhile."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import LoopbackHub, fineweb, hub_environment
from test_run import assert_same_run, history, wait_for_steps

COMMAND = [sys.executable, "-c", "import sys; from nanokimi.cli import main; sys.exit(main(sys.argv[1:]))", "train"]


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 8))) for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=rng.randint(20, 200))) for _ in range(160)]
    with LoopbackHub({"HuggingFaceFW/fineweb": fineweb(texts)}) as server:
        yield server


def start(hub: LoopbackHub, home: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    flags = (
        "--preset", "debug", "--dataset", "fineweb", "--batch_size", "2", "--warmup_steps", "4", "--max_steps", "40",
        "--eval_interval", "10", "--save_interval", "20", "--val_tokens", "500", "--shuffle_buffer", "20",
        "--set", "max_seq_length=64", "--set", "tokenizer_name=byte", "--output_dir", str(output),
    )  # fmt: skip
    environment = hub_environment(hub.url, home) | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(home / "cache")}
    return subprocess.Popen([*COMMAND, *flags, *more], stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> str:
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    return errors


@pytest.mark.fault(68)
@pytest.mark.slow
def test_a_killed_run_on_a_hub_stream_resumes_to_the_bit(hub: LoopbackHub, tmp_path: Path) -> None:
    """First without workers, then with two, though the data set has grown by a commit in between."""
    stream = ("--streaming", "--num_samples", "0")
    said = finish(start(hub, tmp_path / "hf", tmp_path / "whole", *stream))
    assert "training on a stream of HuggingFaceFW/fineweb (config sample-10BT, split train)" in said
    assert "held out (by hash)" in said
    killed = start(hub, tmp_path / "hf", tmp_path / "broken", *stream)
    wait_for_steps(killed, tmp_path / "broken", 25)  # lines: 22 or more steps, of which the first 20 are saved
    killed.kill()
    killed.communicate()
    files = hub.repositories["HuggingFaceFW/fineweb"]
    hub.repositories["HuggingFaceFW/fineweb"] = files | {
        "sample/10BT/zzz.parquet": files["sample/10BT/000_00000.parquet"]
    }
    finish(start(hub, tmp_path / "hf", tmp_path / "broken", *stream, "--num_workers", "2", "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_a_sample_is_fetched_once_and_trained_on_without_a_network(hub: LoopbackHub, tmp_path: Path) -> None:
    sample = ("--num_samples", "150", "--max_steps", "8", "--eval_interval", "8", "--save_interval", "0")
    finish(start(hub, tmp_path / "hf", tmp_path / "first", *sample))
    hub.requests.clear()
    finish(start(hub, tmp_path / "hf", tmp_path / "second", *sample))
    assert hub.requests == []
    assert history(tmp_path / "first")["train_loss"] == history(tmp_path / "second")["train_loss"]
