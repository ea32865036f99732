"""What only a CUDA device shows of a training step: one graph, no waiting for the device, bf16 near fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import no_waiting

from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.data.batch import Batch
from nanokimi.model.transformer import Transformer
from nanokimi.optim.muonclip import make_optimizer
from nanokimi.training.batch_size import with_fitting_batch
from nanokimi.training.step import TrainingStep

pytestmark = pytest.mark.gpu

# Widths that the grouped kernels take: multiples of eight.
SHAPE: dict[str, Any] = {"dim": 64, "moe_inter_dim": 32, "inter_dim": 128, "vocab_size": 512}


def make_step(**settings: Any) -> TrainingStep:
    torch.manual_seed(5)
    device = torch.device("cuda")
    model = Transformer(ModelConfig.preset("debug", **SHAPE)).to(device)
    config = TrainConfig(**{"gradient_accumulation": 2, "compile": "off", "mixed_precision": "on", **settings})
    return TrainingStep(model, make_optimizer(model, config), config, device)


def batches(seed: int = 0, *, eot_id: int | None = None) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(512, (2, 129), generator=generator) for _ in range(2)]
    return iter([Batch.of_rows(part, eot_id).pin_memory() for part in rows])


@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}, {"mask_documents": True}], ids=str)
def test_a_step_waits_for_the_device_once_only(compile: str, settings: dict[str, Any]) -> None:
    step = make_step(compile=compile, **settings)
    eot_id = 0 if step.config.mask_documents else None
    step(batches(eot_id=eot_id))  # warm-up: compiling and choosing kernels wait
    pinned = batches(1, eot_id=eot_id)
    with no_waiting():
        losses, labels = step.accumulate(pinned)
        norm = step.clip_gradients()
    assert step.read(losses, labels, norm).finite
    with no_waiting():
        step.optimizer.step()
        step.clear()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_one_graph_that_is_compiled_once(checkpointing: bool) -> None:
    step = make_step(activation_checkpointing=checkpointing)
    step.called = torch.compile(step.model, fullgraph=True)
    step(batches())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            assert step(batches(seed)).finite


@pytest.mark.parametrize("settings", [{"compile": "on"}, {"activation_checkpointing": True}], ids=str)
def test_compiled_and_checkpointed_steps_come_near_the_plain_one(settings: dict[str, Any]) -> None:
    plain, other = make_step()(batches()), make_step(**settings)(batches())
    assert other.cross_entropy == pytest.approx(plain.cross_entropy, rel=1e-2)
    assert other.grad_norm == pytest.approx(plain.grad_norm, rel=5e-2)
    assert sum(map(sum, other.expert_counts)) == sum(map(sum, plain.expert_counts))


def test_bf16_comes_near_fp32() -> None:
    exact, rounded = make_step(mixed_precision="off")(batches()), make_step()(batches())
    assert rounded.cross_entropy == pytest.approx(exact.cross_entropy, rel=1e-2)
    assert rounded.grad_norm == pytest.approx(exact.grad_norm, rel=5e-2)


def test_the_optimizer_moves_weights_as_it_does_on_a_cpu() -> None:
    there, here = make_step(), make_step()
    here.model.cpu()
    for p, q in zip(there.model.parameters(), here.model.parameters(), strict=True):
        q.grad = torch.randn_like(q)
        p.grad = q.grad.cuda()
    before = [p.detach().clone() for p in here.model.parameters()]
    there.optimizer.ns_dtype = here.optimizer.ns_dtype = torch.float32
    there.optimizer.step()
    here.optimizer.step()
    for p, q, start in zip(there.model.parameters(), here.model.parameters(), before, strict=True):
        moved = p.detach().cpu() - start
        assert float((moved - (q.detach() - start)).norm()) < 2e-2 * float((q.detach() - start).norm())


def test_the_batch_size_is_found_by_trying() -> None:
    config = TrainConfig(gradient_accumulation=4, compile="off")
    said: list[str] = []
    chosen = with_fitting_batch(config, ModelConfig.preset("debug", **SHAPE), torch.device("cuda"), said.append)
    assert (chosen.batch_size, chosen.gradient_accumulation) == (8, 1)
    assert said[0].startswith("batch size 8: a step's 8 sequences in 1 pass")
