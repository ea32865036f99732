"""One graph without breaks, compiled once; where a compiler does not pay or fails, training goes on without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.data.batch import Batch, document_numbers
from nanokimi.errors import RunError
from nanokimi.model.transformer import Losses, Transformer
from nanokimi.optim.muonclip import make_optimizer
from nanokimi.training import step as training_step
from nanokimi.training.step import WORTH_FLOPS, TrainingStep, compiles, planned_flops

CPU = torch.device("cpu")
VARIANTS: list[dict[str, Any]] = [
    {},
    {"n_expert_groups": 4, "n_limited_groups": 2, "n_shared_experts": 0},
    {"q_lora_rank": 0, "v_head_dim": 12, "n_dense_layers": 2},
    {"masked": True, "n_layers": 1, "n_dense_layers": 0},
    {"checkpointing": True, "score_func": "softmax", "n_dense_layers": 0},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_loss_is_one_graph_that_is_never_compiled_again(variant: dict[str, Any]) -> None:
    shape = {name: value for name, value in variant.items() if name not in ("masked", "checkpointing")}
    masked = variant.get("masked", False)
    model = Transformer(ModelConfig.preset("debug", **{"n_layers": 2, **shape})).train()
    model.checkpointing = variant.get("checkpointing", False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # the graph alone is in question

    def step(tokens: torch.Tensor) -> torch.Tensor:
        documents = document_numbers(tokens[:, :-1], 0) if masked else None
        losses: Losses = compiled(tokens[:, :-1], tokens[:, 1:], documents=documents)
        losses.loss.backward()
        return losses.cross_entropy.detach()

    step(torch.randint(257, (2, 17)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (torch.randint(257, (2, 17)), torch.zeros(2, 17, dtype=torch.int64)):
            torch.testing.assert_close(step(tokens), reference(model, tokens, masked), rtol=1e-5, atol=1e-6)
            model.zero_grad()
            model.reset_stats()


def reference(model: Transformer, tokens: torch.Tensor, masked: bool) -> torch.Tensor:
    documents = document_numbers(tokens[:, :-1], 0) if masked else None
    losses: Losses = model(tokens[:, :-1], tokens[:, 1:], documents=documents)
    return losses.cross_entropy.detach()


def test_a_cpu_compiles_by_itself_in_long_runs_only(debug_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "_has_cpp_compiler", lambda: True)
    model = Transformer(debug_config)
    step = planned_flops(TrainConfig(max_steps=1), model)
    active = model.num_parameters(active=True) - 257 * 32
    assert step == 6 * active * 2 * 2 * 128
    steps = int(WORTH_FLOPS / step) + 1
    assert not compiles(TrainConfig(max_steps=steps // 2), model, CPU)
    assert compiles(TrainConfig(max_steps=steps), model, CPU)
    assert not compiles(TrainConfig(max_steps=steps, max_seconds=180.0), model, CPU)
    assert not compiles(TrainConfig(max_steps=steps, compile="off"), model, CPU)
    assert compiles(TrainConfig(max_steps=1, compile="on"), model, CPU)
    monkeypatch.setattr(training_step, "_has_cpp_compiler", lambda: False)
    assert not compiles(TrainConfig(max_steps=steps), model, CPU)


def random_batch() -> Batch:
    return Batch.of_rows(torch.randint(257, (2, 33)))


def broken_step(monkeypatch: pytest.MonkeyPatch, compile: str) -> TrainingStep:
    """A step whose compiled model fails, after it has noted what it should not."""
    torch.manual_seed(3)
    model = Transformer(ModelConfig.preset("debug"))
    monkeypatch.setattr("nanokimi.training.step.compiles", lambda *_: False)
    config = TrainConfig(compile=compile)
    step = TrainingStep(model, make_optimizer(model, config), config, CPU)

    def called(tokens: torch.Tensor, labels: torch.Tensor, **more: Any) -> Losses:
        model(tokens, labels, **more).cross_entropy.backward()
        raise TorchDynamoException("no compiler\nand a long story")

    step.module = called
    return step


def test_a_compiler_that_fails_is_done_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = [random_batch() for _ in range(2)]
    broken, sound = broken_step(monkeypatch, "auto"), broken_step(monkeypatch, "auto")
    sound.module = sound.model
    assert broken(iter(batches)) == sound(iter(batches))
    assert all(torch.equal(p, q) for p, q in zip(broken.model.parameters(), sound.model.parameters(), strict=True))
    assert "torch.compile failed (no compiler): training goes on without it" in capsys.readouterr().err


def test_who_insists_on_compiling_is_told_why_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"--compile on: torch.compile failed \(no compiler\): use --compile off"):
        broken_step(monkeypatch, "on")(iter([random_batch(), random_batch()]))


def test_errors_of_the_model_are_no_errors_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    step = broken_step(monkeypatch, "auto")

    def called(*_: torch.Tensor, **more: Any) -> Losses:
        raise ValueError("mine")

    step.module = called
    with pytest.raises(ValueError, match="mine"):
        step(iter([random_batch(), random_batch()]))
