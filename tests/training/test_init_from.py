"""``train --init_from``: a fresh run with the weights and the tokenizer of another."""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import assert_same_run, history, refused

from nanokimi import checkpoint
from nanokimi.cli import main
from nanokimi.config import ModelConfig, TrainConfig, field_names
from nanokimi.data.loader import LoaderOptions
from nanokimi.data.sources import open_corpus
from nanokimi.interop.loading import load
from nanokimi.model.transformer import weight_shapes
from nanokimi.training import plots
from nanokimi.training.metrics import MetricsLog

FROZEN = ("--learning_rate", "0", "--adam_lr", "0", "--set", "bias_update_rate=0")
QUICK = ("--batch_size", "2", "--warmup_steps", "0", "--eval_interval", "0", "--save_interval", "0")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model with a tokenizer of its own and a padded vocabulary."""
    folder = tmp_path_factory.mktemp("source")
    text = folder / "train.txt"
    text.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    shape = ("--preset", "debug", "--set", "tokenizer_name=bpe:300", "--set", "vocab_size=304")
    where = ("--data_path", str(text), "--output_dir", str(folder), "--max_steps", "6")
    assert main(["train", *shape, *QUICK, *where, "--set", "max_seq_length=64"]) == 0
    return folder / "checkpoints" / "final.pt"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text than the one the source has seen."""
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text(Path(json.__file__).read_text(encoding="utf-8") * 3, encoding="utf-8")
    return path


def arguments(source: Path, text: Path, output: Path, *more: str) -> list[str]:
    return ["train", "--init_from", str(source), *QUICK, "--data_path", str(text), "--output_dir", str(output), *more]


def test_weights_biases_and_tokenizer_are_those_of_the_source(source: Path, text: Path, tmp_path: Path) -> None:
    assert main(arguments(source, text, tmp_path, *FROZEN, "--max_steps", "1")) == 0
    before, after = checkpoint.read(source), checkpoint.read(tmp_path / "checkpoints" / "final.pt")
    assert before["model"].keys() == after["model"].keys()
    assert all(torch.equal(tensor, after["model"][name]) for name, tensor in before["model"].items())
    assert any(bool(tensor.any()) for name, tensor in after["model"].items() if name.endswith("balance_bias"))
    assert after["tokenizer"] == before["tokenizer"]
    assert after["model_config"] == before["model_config"] | {"bias_update_rate": 0.0}
    assert after["counters"]["step"] == 1


def test_the_first_loss_is_the_sources_own_on_the_same_batch(source: Path, text: Path, tmp_path: Path) -> None:
    assert main(arguments(source, text, tmp_path, "--max_steps", "2", "--seed", "5")) == 0
    model, tokenizer = load(source)
    corpus = open_corpus(TrainConfig(data_path=str(text)), "byte", tokenizer=tokenizer, log=lambda line: None)
    batches = iter(corpus.train.loader(LoaderOptions(model.config.max_seq_length, batch_size=2, seed=5)))
    with torch.no_grad():
        losses = [model(batch.tokens, batch.labels).cross_entropy.item() for batch in (next(batches), next(batches))]
    assert history(tmp_path)["train_ce_loss"][0] == pytest.approx(sum(losses) / 2, rel=1e-5)


@pytest.mark.fault(44)
def test_the_seed_decides_the_order_of_the_data(source: Path, text: Path, tmp_path: Path) -> None:
    losses = []
    for seed in ("1", "2", "1"):
        folder = tmp_path / str(len(losses))
        assert main(arguments(source, text, folder, "--max_steps", "1", "--seed", seed)) == 0
        losses.append(history(folder)["train_ce_loss"][0])
    assert losses[0] == losses[2] != losses[1]


def test_a_resume_equals_the_whole_run_to_the_bit_and_needs_no_source(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    borrowed = tmp_path / "borrowed.pt"
    borrowed.write_bytes(source.read_bytes())
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(arguments(borrowed, text, whole, "--max_steps", "8")) == 0
    record = MetricsLog.record

    def record_and_stop(log: MetricsLog, step: int, values: dict[str, Any]) -> None:
        record(log, step, values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as stopped:
        stopped.setattr(MetricsLog, "record", record_and_stop)
        assert main(arguments(borrowed, text, broken, "--max_steps", "8")) == 143
    borrowed.unlink()
    assert main(arguments(borrowed, text, broken, "--resume")) == 0, "the same --init_from is no other setting"
    assert history(broken)["steps"] == list(range(1, 9))
    assert_same_run(whole, broken)


def test_what_alters_no_weight_may_be_set(source: Path, text: Path, tmp_path: Path) -> None:
    changes = ("--set", "max_seq_length=32", "--set", "aux_loss_coeff=0.5", "--set", "vocab_size=304")
    assert main(arguments(source, text, tmp_path, *changes, "--max_steps", "1")) == 0
    content = checkpoint.read(tmp_path / "checkpoints" / "final.pt")
    shape = content["model_config"]
    assert [shape[name] for name in ("max_seq_length", "aux_loss_coeff", "vocab_size")] == [32, 0.5, 304]
    assert history(tmp_path)["tokens"] == [2 * 2 * 32]


def test_the_fields_that_shape_weights_are_known() -> None:
    base = ModelConfig.preset("debug", n_expert_groups=2, original_seq_len=64)
    others = {"score_func": "softmax", "tokenizer_name": "other", "qk_rope_head_dim": 12, "attention": "mha"}

    def another(name: str, value: Any) -> Any:
        if name in others:
            return others[name]
        return not value if isinstance(value, bool) else value * 2 or 2

    shaping = {
        name
        for name, value in asdict(base).items()
        if weight_shapes(replace(base, **{name: another(name, value)})) != weight_shapes(base)
    }
    assert shaping == set(field_names(ModelConfig, shapes_weights=True))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--set", "dim=48"], ["dim 48", "32", "leave it out"]),
        (["--set", "n_layers=2"], ["n_layers 2"]),
        (["--set", "vocab_size=512"], ["vocab_size 512", "304"]),
        (["--preset", "debug"], ["--preset", "--init_from"]),
        (["--set", "tokenizer_name=byte"], ["tokenizer_name", "--init_from"]),
        (["--set", "n_activated_experts=9"], ["n_activated_experts"]),
        (["--init_from", "nowhere.pt"], ["nowhere.pt"]),
        (["--checkpoint_path", "x.pt"], ["add --resume"]),
    ],
)
def test_what_does_not_go_with_the_weights_is_refused(
    capsys: pytest.CaptureFixture[str], source: Path, text: Path, tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    line = refused(capsys, arguments(source, text, tmp_path / "run", *flags))
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_tokens_of_another_tokenizer_are_refused(
    capsys: pytest.CaptureFixture[str], source: Path, text: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    made = ["--set", "tokenizer_name=byte", "--data_path", str(text), "--output", str(tokens)]
    assert main(["prepare", "tokens", *made]) == 0
    line = refused(capsys, arguments(source, tokens, tmp_path / "run", "--dataset", "tokenbin"))
    assert "tokenizer" in line
    assert str(tokens) in line


def test_a_resume_takes_no_other_weights(
    capsys: pytest.CaptureFixture[str], source: Path, text: Path, tmp_path: Path
) -> None:
    assert main(arguments(source, text, tmp_path, "--max_steps", "1")) == 0
    other = tmp_path / "checkpoints" / "final.pt"
    for more in ((), ("--override", "init_from")):
        line = refused(capsys, arguments(other, text, tmp_path, "--resume", "--max_steps", "2", *more))
        assert "--init_from" in line or "init_from: no such field" in line
    assert main(["train", "--resume", "--output_dir", str(tmp_path), "--max_steps", "2"]) == 0


def test_a_model_without_a_run_is_resumed_by_init_from(
    capsys: pytest.CaptureFixture[str], source: Path, text: Path, tmp_path: Path
) -> None:
    content = checkpoint.read(source)
    imported = tmp_path / "imported.pt"
    kept = ("model_config", "model", "tokenizer")
    checkpoint.save(imported, {name: copy.deepcopy(content[name]) for name in kept})
    run = ["train", "--output_dir", str(tmp_path / "run"), "--resume", "--checkpoint_path", str(imported)]
    assert f"--init_from {imported}" in refused(capsys, run)
    assert main(arguments(imported, text, tmp_path / "run", "--max_steps", "1")) == 0


def test_a_folder_is_begun_with_like_the_checkpoint_that_it_was_made_from(
    source: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    assert main(["export", "hf", str(source), str(folder), "--no_compare"]) == 0
    runs = [tmp_path / "of_the_checkpoint", tmp_path / "of_the_folder"]
    for origin, output in zip((source, folder), runs, strict=True):
        assert main(arguments(origin, text, output, "--max_steps", "3", "--seed", "5")) == 0
    assert history(runs[0])["train_loss"] == history(runs[1])["train_loss"]
    one, other = (checkpoint.read(output / "checkpoints" / "final.pt") for output in runs)
    assert all(torch.equal(tensor, other["model"][name]) for name, tensor in one["model"].items())
    assert one["tokenizer"] == other["tokenizer"]
    assert one["model_config"] == other["model_config"]


def test_the_plot_is_titled_by_where_the_weights_come_from(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(plots, "plot_training", lambda *args, title, **more: titles.append(title))
    assert main(arguments(source, text, tmp_path, "--max_steps", "1")) == 0
    assert titles == [str(source)]
