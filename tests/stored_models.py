"""Debug models at rest, folders of them to damage, and commands that go through or fail in one line."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lively
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanokimi import checkpoint
from nanokimi.cli import main
from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import Tokenizer, load_tokenizer
from nanokimi.interop.hf_writer import write_folder
from nanokimi.interop.stored import StoredModel
from nanokimi.model.transformer import Transformer

SOFTMAX: dict[str, Any] = {"score_func": "softmax", "norm_topk_prob": False}


def stored_model(tokenizer: Tokenizer | None = None, **fields: Any) -> StoredModel:
    """A lively debug model; with softmax scores it has no balance biases, which DeepSeek-V2 lacks."""
    model = lively(Transformer(ModelConfig.preset("debug", **fields)), std=0.1)
    if model.config.score_func == "softmax":
        for moe in model.moe_layers():
            moe.router.balance_bias.zero_()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return StoredModel(model.config, weights, tokenizer or load_tokenizer("byte"))


def saved(model: StoredModel, path: Path) -> Path:
    """The model as a checkpoint at ``path``."""
    content = {
        "model_config": asdict(model.config),
        "model": dict(model.weights),
        "tokenizer": model.tokenizer.to_state(),
    }
    checkpoint.save(path, content)
    return path


def in_folder(folder: Path, model: StoredModel | None = None, **config: Any) -> Path:
    """The model as a folder without a receipt; ``config`` goes into its ``config.json``, None takes a field out."""
    folder.mkdir(parents=True)
    write_folder(folder, model or stored_model())
    edit_json(folder / "config.json", **config)
    return folder


def edit_json(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in fields or value != OUT}))


OUT = "out"  # a field of edit_json with this value is taken out


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replaces, adds or (None) takes out tensors of ``model.safetensors``; dots of names are written as ``__``."""
    tensors: dict[str, Tensor | None] = {**load_file(folder / "model.safetensors")}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """The same names, types and bits, in whichever order."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def line_of(capsys: pytest.CaptureFixture[str], arguments: list[Any], *words: str, code: int = 2) -> str:
    """The one line with which a command fails, which has all of ``words`` in it."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, err
    assert not out
    assert all(word in lines[0] for word in words), lines[0]
    return lines[0]


def run(*arguments: Any) -> None:
    """A command that goes through."""
    assert main([str(argument) for argument in arguments]) == 0


def contents(folder: Path) -> dict[str, bytes]:
    """The files of ``folder`` by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def nothing_at(target: Path) -> bool:
    """Whether the folder in which ``target`` was to lie is empty: not even a temporary is left."""
    return os.listdir(target.parent) == []


# ---- fixtures, for tests that import them -----------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a debug model."""
    return saved(stored_model(), tmp_path_factory.mktemp("source") / "model.pt")


@pytest.fixture(scope="module")
def exported(source: Path) -> Path:
    """Its export, compared with transformers, with a receipt. Not to be changed."""
    run("export", "hf", source, source.with_name("hf"))
    return source.with_name("hf")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be damaged."""
    shutil.copytree(exported, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A place for a result in a folder of its own, where a fault must leave nothing."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "result"
