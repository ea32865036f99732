"""What goes wrong in ``nanokimi export`` and ``nanokimi import``: one line, and nothing is left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import locked_folder
from safetensors import SafetensorError
from stored_models import (
    OUT,
    SOFTMAX,
    contents,
    edit_json,
    edit_tensors,
    exported,
    folder,
    line_of,
    nothing_at,
    run,
    saved,
    source,
    stored_model,
    target,
)

from nanokimi import checkpoint
from nanokimi.checkpoint.weights import build_model
from nanokimi.data.tokenizer import train_bpe
from nanokimi.files import new_folder, partial_folder
from nanokimi.interop import commands, gguf_file, hf_writer
from nanokimi.interop.engines import TEXT
from nanokimi.interop.hf_reader import INDEX, OWN
from nanokimi.interop.loading import load, read_model
from nanokimi.receipt import RECEIPT

WEIGHTS = "model.safetensors"


# ---- faults of the source --------------------------------------------------------------------------------


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def write(path: Path, text: str) -> None:
    path.write_text(text)


FAULTS: dict[str, tuple[Callable[[Path], Any], bool, list[str]]] = {
    # What is done to the folder, whether the receipt is left, what the line says.
    "a flipped weight": (lambda f: flip(f / WEIGHTS, 0.9), True, [WEIGHTS, "damaged", "again"]),
    "a flipped bit of the config": (lambda f: flip(f / "config.json", 0.3), True, ["config.json"]),
    "another config": (lambda f: edit_json(f / "config.json", rope_theta=1e4 + 1), True, ["config.json", RECEIPT]),
    "a flipped bit of the tokenizer": (lambda f: flip(f / "tokenizer.json"), True, ["tokenizer.json", "damaged"]),
    "our own file changed": (lambda f: flip(f / OWN), True, [OWN]),
    "truncated weights": (lambda f: cut(f / WEIGHTS), True, [WEIGHTS, "truncated"]),
    "truncated weights without a receipt": (lambda f: cut(f / WEIGHTS), False, [WEIGHTS, "truncated", "again"]),
    "empty weights": (lambda f: write(f / WEIGHTS, ""), False, [WEIGHTS, "truncated"]),
    "text for weights": (lambda f: write(f / WEIGHTS, "version https://git-lfs"), False, [WEIGHTS, "damaged"]),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), True, [WEIGHTS, "missing"]),
    "another shape": (lambda f: edit_json(f / "config.json", hidden_size=40), False, ["[32]", "[40]"]),
    "no config": (lambda f: (f / "config.json").unlink(), True, ["config.json", "no such file"]),
    "a broken config": (lambda f: write(f / "config.json", '{"a": '), False, ["config.json", "damaged", "again"]),
    "a list for a config": (lambda f: write(f / "config.json", "[]"), False, ["config.json", "not a JSON object"]),
    "a broken tokenizer": (lambda f: write(f / "tokenizer.json", "{}"), False, ["tokenizer.json", "damaged"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), False, ["no tokenizer.json", "--tokenizer", "byte"]),
    "a lost tokenizer": (lambda f: (f / "tokenizer.json").unlink(), True, ["no tokenizer.json in it"]),
    "a tokenizer too large": (
        lambda f: train_bpe([TEXT] * 3, 300).save(f / "tokenizer.json"), False, ["300", "257", "another model"],
    ),
    "another architecture": (lambda f: edit_json(f / "config.json", model_type="llama"), False, ["'llama'"]),
    "two features that we lack": (
        lambda f: edit_json(f / "config.json", attention_bias=True, moe_layer_freq=2, n_group=OUT), False,
        ["attention_bias", "moe_layer_freq", "lacks n_group"],
    ),
    "fp8": (
        lambda f: edit_tensors(f, lm_head__weight=torch.ones(257, 32).to(torch.float8_e4m3fn)), False,
        ["lm_head.weight", "F8_E4M3", "bf16"],
    ),
    "pickles": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), False, ["*.bin", "convert", "safetensors"]),
    "an index without files": (
        lambda f: write(f / INDEX, '{"weight_map": {"a": "model-1.safetensors"}}'), False, ["model-1", "missing"],
    ),
    "a receipt of something else": (lambda f: write(f / RECEIPT, "{}"), True, [RECEIPT, "not a receipt"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_folder_are_one_line_and_leave_nothing(
    name: str, folder: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, has_receipt, words = FAULTS[name]
    damage(folder)
    if not has_receipt:
        (folder / RECEIPT).unlink()
    line = line_of(capsys, ["import", "hf", folder, "--output", target], str(folder), *words)
    assert nothing_at(target)
    assert line_of(capsys, ["export", "hf", folder, target], *words) == line
    assert line_of(capsys, ["generate", folder, "--prompt", "x"], *words) == line
    assert nothing_at(target)


@pytest.mark.parametrize("has_receipt", [True, False])
def test_a_missing_tokenizer_can_be_given(has_receipt: bool, folder: Path, target: Path) -> None:
    (folder / "tokenizer.json").unlink()
    if not has_receipt:
        (folder / RECEIPT).unlink()
    run("import", "hf", folder, "--output", target, "--tokenizer", "byte")
    assert load(target)[1].encode("ab") == [97, 98]


def test_a_given_tokenizer_that_does_not_fit_is_named(
    capsys: pytest.CaptureFixture[str], folder: Path, target: Path, tmp_path: Path
) -> None:
    train_bpe([TEXT] * 3, 300).save(tmp_path / "other.json")
    for given, words in ((tmp_path / "other.json", ["300", "257"]), (tmp_path / "none.json", ["none.json"])):
        line_of(capsys, ["import", "hf", folder, "--output", target, "--tokenizer", given], *words)
    assert nothing_at(target)


def test_what_is_no_folder_is_named_with_the_way_to_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path, target: Path
) -> None:
    (tmp_path / "empty").mkdir()
    where = ["--output", target]
    line_of(capsys, ["import", "hf", tmp_path / "none", *where], "none: no such folder", "hf download")
    line_of(capsys, ["import", "hf", "owner/name", *where], "owner/name: no such folder", "hf download")
    line_of(capsys, ["import", "hf", tmp_path / "empty", *where], "config.json: no such file", "Hugging Face")
    line_of(capsys, ["import", "hf", source, *where], f"{source} is a file", "folder")
    assert nothing_at(target)


def test_what_is_no_model_to_export_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path, target: Path
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty").mkdir()
    (folder / "config.json").unlink()
    for form in ("hf", "gguf"):
        line_of(capsys, ["export", form, tmp_path / "m.gguf", target], "m.gguf", "checkpoint")
        line_of(capsys, ["export", form, tmp_path / "none.pt", target], "none.pt", "no such")
        line_of(capsys, ["export", form, tmp_path / "empty", target], "empty is a directory")
        line_of(capsys, ["export", form, folder, target], "config.json: no such file")
    line_of(capsys, ["generate", tmp_path / "m.gguf", "--prompt", "x"], "m.gguf", "checkpoint")
    assert nothing_at(target)


def test_models_that_transformers_does_not_have_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    normalised = saved(stored_model(score_func="softmax"), tmp_path / "normalised.pt")
    line_of(capsys, ["export", "hf", normalised, target], "norm_topk_prob", "softmax")
    biased = stored_model(**SOFTMAX)
    biased.weights["layers.2.mlp.router.balance_bias"][0] = 0.1
    line_of(capsys, ["export", "hf", saved(biased, tmp_path / "biased.pt"), target], "layers.2", "balance bias")
    assert nothing_at(target)


def test_weights_that_cannot_be_written_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: Path
) -> None:
    large, broken = stored_model(), stored_model()
    large.weights["embed.weight"][1, 1] = 1e5
    broken.weights["norm.weight"][0] = float("nan")
    large_path, broken_path = saved(large, tmp_path / "large.pt"), saved(broken, tmp_path / "broken.pt")
    for form in ("hf", "gguf"):
        line_of(capsys, ["export", form, large_path, target, "--dtype", "f16"], "embed.weight", "f32")
        for flags in ([], ["--dtype", "bf16"], ["--no_compare"]):
            line_of(capsys, ["export", form, broken_path, target, *flags], "norm.weight", "not finite", "earlier")
        line_of(capsys, ["export", form, large_path, target, "--dtype", "int4"], "int4", "bf16")
    assert nothing_at(target)


# ---- faults of the target --------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[Path, Path, Path], list[Any]]] = {
    "hf": lambda source, _, target: ["export", "hf", source, target],
    "gguf": lambda source, _, target: ["export", "gguf", source, target],
    "import": lambda _, exported, target: ["import", "hf", exported, "--output", target],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_exists_is_not_touched(
    command: str, source: Path, exported: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = COMMANDS[command](source, exported, target)
    target.write_text("mine")
    line_of(capsys, arguments, str(target), "exists already", "another name")
    assert target.read_text() == "mine"
    target.unlink()
    target.mkdir()
    (target / "mine").write_text("too")
    line_of(capsys, arguments, str(target), "exists already")
    assert os.listdir(target) == ["mine"]
    assert os.listdir(target.parent) == [target.name]


def test_an_empty_folder_is_filled_and_the_current_one_is_not(
    capsys: pytest.CaptureFixture[str], source: Path, exported: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.mkdir()
    monkeypatch.chdir(target)
    for command in COMMANDS.values():
        line_of(capsys, command(source, exported, Path(".")), "exists already")
    run("export", "hf", source, target, "--no_compare")
    assert (target / WEIGHTS).is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_cannot_be_written_is_one_line(
    command: str, source: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    locked = locked_folder(tmp_path)
    too_long = [tmp_path / ("x" * 300)] if command != "import" else []
    for place in (locked / "new", locked / "below" / "new", tmp_path / "file" / "new", *too_long):
        line_of(capsys, COMMANDS[command](source, exported, place), str(place), "cannot be written", "choose another")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    command: str,
    source: Path,
    exported: Path,
    target: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_for_safetensors(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def full_for_numpy(*_: Any, **__: Any) -> None:
        raise OSError("147456 requested and 93264 written")

    arguments = COMMANDS[command](source, exported, target)
    places: list[tuple[Any, str, Callable[..., None]]] = {
        "hf": [(hf_writer, "save_file", full_for_safetensors), (commands, "write_receipt", full)],
        "gguf": [(gguf_file, "_write_tensors", full_for_numpy), (commands, "write_receipt", full)],
        "import": [(checkpoint.file, "_write", full)],
    }[command]
    for module, name, fault in places:
        with monkeypatch.context() as broken:
            broken.setattr(module, name, fault)
            line_of(capsys, arguments, str(target), "the disk is full", "free space", code=1)
        assert nothing_at(target)
    run(*arguments)


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_an_interrupted_export_leaves_nothing(
    form: str, source: Path, target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        assert os.listdir(target.parent) == [f".{target.name}.partial"]
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_compared", interrupt)
    line_of(capsys, ["export", form, source, target], "interrupted", code=130)
    assert nothing_at(target)


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_what_a_killed_export_left_is_used_and_not_delivered(form: str, source: Path, target: Path) -> None:
    run("export", form, source, target.with_name("whole"), "--no_compare")
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir()
    for name in ("model-00001-of-00009.safetensors", ".result.0badcafe.tmp", target.name):
        (partial / name).write_bytes(b"half")
    run("export", form, source, target, "--no_compare")
    names = ["whole", target.name]
    names += [f"{name}.{RECEIPT}" for name in names if form == "gguf"]
    assert sorted(os.listdir(target.parent)) == sorted(names)
    if form == "hf":
        assert contents(target) == contents(target.with_name("whole"))


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_two_exports_at_once_do_not_mix(
    form: str, source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with partial_folder(target) as busy:
        (busy / "other").write_text("being written")
        line_of(capsys, ["export", form, source, target], str(target), "another process", "another name")
        assert os.listdir(busy) == ["other"]
    assert nothing_at(target)


def test_an_export_that_comes_second_is_not_overwritten(target: Path) -> None:
    def fill() -> None:
        with new_folder(target) as folder:
            (folder / "a").write_text("second")
            target.mkdir()
            (target / "a").write_text("first")

    with pytest.raises(OSError, match="not empty"):
        fill()
    assert (target / "a").read_text() == "first"
    assert os.listdir(target.parent) == [target.name]


def test_a_push_that_cannot_work_is_refused_before_the_export(
    capsys: pytest.CaptureFixture[str], source: Path, target: Path
) -> None:
    line_of(capsys, ["export", "hf", source, target, "--push", "not a name"], "--push", "owner/name")
    assert nothing_at(target)


def test_weights_of_a_folder_that_do_not_fit_are_refused_by_build_model(folder: Path) -> None:
    stored = read_model(folder)
    weights = dict(stored.weights) | {"norm.weight": torch.ones(31)}
    with pytest.raises(checkpoint.CheckpointError, match=r"norm\.weight is \[31\]"):
        build_model(folder, stored.config, weights)
