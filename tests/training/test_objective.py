"""A step minimises whatever an objective says, and its mean is over the labels that count, wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.data.batch import Batch
from nanokimi.model.transformer import Losses, Transformer
from nanokimi.optim.muonclip import make_optimizer
from nanokimi.training.step import TrainingStep, cross_entropy

ROWS = torch.randint(257, (8, 33), generator=torch.Generator().manual_seed(2))


def labelled(share: float = 0.6) -> Batch:
    """Eight sequences; of the first two hardly any label counts, of the last two none."""
    batch = Batch.of_rows(ROWS)
    chance = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(4))
    chance[:2] /= 3
    return batch._replace(
        labels=batch.labels.masked_fill(chance < 1 - share, -100).index_fill(0, torch.tensor([6, 7]), -100)
    )


def cut(batch: Batch, size: int) -> list[Batch]:
    return [Batch(*parts) for parts in zip(batch.tokens.split(size), batch.labels.split(size), strict=True)]


def step_on(batches: Sequence[Batch], **options: object) -> TrainingStep:
    """One step, in as many passes as there are ``batches``, in fp64."""
    torch.manual_seed(1)
    model = Transformer(ModelConfig.preset("debug", max_seq_length=32, aux_loss_coeff=0.01)).double()
    config = TrainConfig(
        preset="debug", compile="off", batch_size=len(batches[0].tokens), gradient_accumulation=len(batches)
    )
    step = TrainingStep(model, make_optimizer(model, config), config, torch.device("cpu"), **options)  # type: ignore[arg-type]
    step.optimizer.ns_dtype = torch.float64
    step.seen = step(iter(batches))  # type: ignore[attr-defined]
    return step


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_in_passes_is_the_step_of_the_whole(size: int) -> None:
    """Mean over 100 labels, of which passes have from none to 40."""
    whole, parts = step_on([labelled()]), step_on(cut(labelled(), size))
    assert parts.seen.tokens == labelled().counted()
    assert parts.seen.cross_entropy == pytest.approx(whole.seen.cross_entropy, rel=1e-12)
    assert parts.seen.balance_loss == pytest.approx(whole.seen.balance_loss, rel=1e-6)  # read in fp32
    assert parts.seen.expert_counts == whole.seen.expert_counts
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert all(
        torch.equal(a.balance_bias, b.balance_bias)
        for a, b in zip(parts.model.routers(), whole.model.routers(), strict=True)
    )


def test_the_mean_is_that_of_whole_logits_by_hand() -> None:
    batch = labelled()
    torch.manual_seed(1)
    model = Transformer(ModelConfig.preset("debug", max_seq_length=32, aux_loss_coeff=0.01)).double()
    expected = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.labels.flatten())
    assert step_on(cut(batch, 2)).seen.cross_entropy == pytest.approx(expected.item(), rel=1e-6)


def test_an_empty_pass_changes_nothing() -> None:
    batch = labelled()
    full = Batch(batch.tokens[2:4], batch.labels[2:4])
    empty = Batch(batch.tokens[6:8], batch.labels[6:8])
    with_it, without = step_on([full, empty]), step_on([full])
    assert with_it.seen == without.seen
    assert all(torch.equal(a, b) for a, b in zip(with_it.model.parameters(), without.model.parameters(), strict=True))


def test_a_step_without_any_label_is_no_accident() -> None:
    batch = labelled()
    step = step_on([Batch(batch.tokens[6:8], batch.labels[6:8])])
    assert step.seen.finite
    assert step.seen.tokens == 0
    assert step.seen.cross_entropy == 0


def test_an_objective_of_ones_own_is_what_the_step_minimises() -> None:
    """Each token weighted, as tuning on rewards does it."""
    weights = torch.rand(8, 32, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def weighted(model: nn.Module, batch: Batch) -> Losses:
        nats, balance = model(batch.tokens, batch.labels, label_count=batch.label_count, per_token=True)
        own: Tensor = weights[[ROWS[:, :-1].eq(row).all(1).nonzero().item() for row in batch.tokens]]
        return Losses((own * nats).sum() / batch.label_count, balance)

    def twice(model: nn.Module, batch: Batch) -> Losses:
        losses = cross_entropy(model, batch)
        return Losses(2 * losses.cross_entropy, losses.balance)

    whole, parts = step_on([labelled()], objective=weighted), step_on(cut(labelled(), 2), objective=weighted)
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    plain = step_on([labelled()])
    assert any(not torch.equal(a, b) for a, b in zip(plain.model.parameters(), whole.model.parameters(), strict=True))
    doubled = step_on([labelled()], objective=twice)
    assert doubled.seen.cross_entropy == pytest.approx(2 * plain.seen.cross_entropy)
