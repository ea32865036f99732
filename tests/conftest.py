"""Fixtures of the whole suite: small models with a fixed seed, one thread, no network."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nanokimi.config import ModelConfig
from nanokimi.model.transformer import Transformer

pytest_plugins = ["tests.properties.bench"]  # not a conftest.py: there can be one of that name

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of child processes: models this small only lose by more threads
os.environ["NANOKIMI_PRODUCTS"] = "fixed"  # results must not depend on what is faster here
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def debug_config() -> ModelConfig:
    return ModelConfig.preset("debug")


@pytest.fixture(scope="session")
def library_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real text of 20,000 characters: a module of the standard library."""
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return path


@pytest.fixture
def folder_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty, for runs that draw no pictures; their caches lie in it too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("nanokimi.training.plots.plot_training", lambda *args, **options: None)
    return tmp_path


@pytest.fixture
def debug_model(debug_config: ModelConfig) -> Transformer:
    """A debug model whose weights are large enough that every part of it matters to the logits."""
    return lively(Transformer(debug_config))


@torch.no_grad()
def lively(model: Transformer, std: float = 0.2) -> Transformer:
    """Random weights far from the quiet initial ones, norms and balance biases included."""
    generator = torch.Generator().manual_seed(7)
    for role, parameter in model.param_roles():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if role == "norm" else std * noise)
    for moe in model.moe_layers():
        moe.router.balance_bias.copy_(0.3 * torch.randn(moe.router.balance_bias.shape, generator=generator))
    return model.eval()


def locked_folder(tmp_path: Path) -> Path:
    """A folder in which nobody can write, not even root, whom no mode keeps out."""
    if os.geteuid() == 0:
        return Path("/proc/self")
    (tmp_path / "locked").mkdir(mode=0o555)
    return tmp_path / "locked"


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any wait of the host for the CUDA device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
