"""The step by itself: activation checkpointing changes memory alone; bf16 autocast works where the CPU has bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.data.batch import Batch
from nanokimi.model.transformer import Transformer
from nanokimi.optim.muonclip import make_optimizer
from nanokimi.training.step import TrainingStep

VARIANTS: list[dict[str, Any]] = [{}, {"score_func": "softmax", "n_dense_layers": 0}, {"n_dense_layers": 3}]


def make_step(shape: dict[str, Any], **settings: Any) -> TrainingStep:
    torch.manual_seed(5)
    model = Transformer(ModelConfig.preset("debug", **shape))
    config = TrainConfig(**{"gradient_accumulation": 2, "compile": "off", **settings})
    return TrainingStep(model, make_optimizer(model, config), config, torch.device("cpu"))


def batches(count: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [Batch.of_rows(torch.randint(257, (2, 65), generator=generator)) for _ in range(count)]


def saved_bytes(step: TrainingStep) -> int:
    """What autograd keeps for the backward pass, parameters left out."""
    parameters = {p.data_ptr() for p in step.model.parameters()}
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = batches(1)[0]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = step.model.train()(batch.tokens, batch.labels)
    del losses
    step.clear()
    return sum(kept.values())


@pytest.mark.parametrize("shape", VARIANTS, ids=str)
def test_checkpointing_gives_the_same_step_to_the_bit(shape: dict[str, Any]) -> None:
    plain, checkpointed = make_step(shape), make_step(shape, activation_checkpointing=True)
    for _ in range(2):
        results = [step.accumulate(iter(batches())) for step in (plain, checkpointed)]
        assert torch.equal(results[0][0], results[1][0])
        for p, q in zip(plain.model.parameters(), checkpointed.model.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad)
        assert torch.equal(plain.model.max_logits, checkpointed.model.max_logits)
        assert torch.equal(plain.model.expert_counts, checkpointed.model.expert_counts), "no pass is counted twice"
        for step in (plain, checkpointed):
            step.optimizer.step()
            step.clear()


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    assert saved_bytes(make_step({}, activation_checkpointing=True)) < 0.5 * saved_bytes(make_step({}))


def test_a_limit_of_zero_reads_the_gradient_norm_and_leaves_the_gradients() -> None:
    step = make_step({}, max_grad_norm=0.0)
    step.accumulate(iter(batches()))
    before = [p.grad.clone() for p in step.model.parameters() if p.grad is not None]
    norm = step.clip_gradients()
    torch.testing.assert_close(norm, torch.stack([g.square().sum() for g in before]).sum().sqrt())
    after = [p.grad for p in step.model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU does not multiply bf16")
def test_bf16_autocast_on_a_cpu_comes_near_fp32() -> None:
    exact, rounded = make_step({})(iter(batches())), make_step({}, mixed_precision="on")(iter(batches()))
    assert rounded.finite
    assert rounded.cross_entropy == pytest.approx(exact.cross_entropy, rel=1e-2)
    assert rounded.grad_norm == pytest.approx(exact.grad_norm, rel=5e-2)
    assert rounded.cross_entropy != exact.cross_entropy
