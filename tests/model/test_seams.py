"""A model is what every PyTorch user expects: modules that are called, labels that may not count, types that hold."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import lively
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from nanokimi.config import ModelConfig
from nanokimi.inference.decoding import new_decoder
from nanokimi.model.cache import LatentCache
from nanokimi.model.layers import Embedding, Linear
from nanokimi.model.transformer import Transformer
from nanokimi.ops import loss as ops

KINDS = ("mla", "mha", "gqa")


def tokens(*shape: int) -> Tensor:
    return torch.randint(257, shape, generator=torch.Generator().manual_seed(3))


def some_labels(ignored: float = 0.4) -> Tensor:
    """``[2, 24]``; some do not count, the last ones of the second sequence do."""
    labels = tokens(2, 25)[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(5)) < ignored] = -100
    labels[0, 20:] = -100
    return labels


# ---- modules ------------------------------------------------------------------------------------


def test_parts_are_pytorchs_own(debug_model: Transformer) -> None:
    assert isinstance(debug_model.embed, nn.Embedding)
    assert all(isinstance(m, nn.Linear) for m in debug_model.modules() if isinstance(m, Linear))
    assert {type(m) for m in debug_model.modules() if isinstance(m, nn.RMSNorm)} == {type(debug_model.norm)}


@pytest.mark.parametrize("make", [lambda: Linear(3, 4), lambda: Embedding(3, 4)])
def test_construction_draws_no_random_numbers(make: Any) -> None:
    before = torch.get_rng_state()
    make()
    assert torch.equal(torch.get_rng_state(), before)


def watched(model: nn.Module) -> Counter[str]:
    """How often each module of ``model`` is called from here on; lists are never called."""
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", ["training", "prefill", "decoding"])
def test_forward_hooks_see_every_module(kind: str, use: str) -> None:
    model = lively(Transformer(ModelConfig.preset("debug", attention=kind)))
    calls = watched(model)
    if use == "training":
        model.train()(tokens(2, 16), tokens(2, 16)).loss.backward()
    else:
        decoder = new_decoder(model)
        decoder.prefill(0, tokens(12).tolist())
        if use == "decoding":
            calls.clear()
            decoder.step([0], [5])
    everything = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    assert set(calls) == everything


def test_hooks_do_not_change_what_is_computed(debug_model: Transformer) -> None:
    labels = some_labels()
    debug_model.double().train()
    plain = debug_model(tokens(2, 24), labels).loss
    expected = torch.autograd.grad(plain, list(debug_model.parameters()))
    watched(debug_model)
    seen = debug_model(tokens(2, 24), labels).loss
    torch.testing.assert_close(seen, plain, rtol=1e-12, atol=0)
    found = torch.autograd.grad(seen, list(debug_model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", ["layers.1.attention.wkv_b", "head"])
def test_a_parametrised_weight_counts_with_its_present_value(debug_model: Transformer, name: str) -> None:
    """``wkv_b`` is read by the absorbed decoding form, the head by the fused loss."""
    module = debug_model.get_submodule(name)
    parametrize.register_parametrization(module, "weight", Doubled())
    seen = (debug_model(tokens(1, 9)), debug_model(tokens(1, 9), tokens(1, 9)).loss, decoded(debug_model))
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    assert module.weight.abs().max() > 1  # doubled for good
    expected = (debug_model(tokens(1, 9)), debug_model(tokens(1, 9), tokens(1, 9)).loss, decoded(debug_model))
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def decoded(model: Transformer) -> Tensor:
    """Logits of 9 tokens through the cache, one by one after the first three."""
    cache = LatentCache(model.config, 1, 16)
    parts = [model(tokens(1, 9)[:, a:b], cache=cache) for a, b in [(0, 3), *((i, i + 1) for i in range(3, 9))]]
    return torch.cat(parts, dim=1)


# ---- types --------------------------------------------------------------------------------------


def test_in_bf16_tables_biases_and_statistics_stay_fp32(debug_model: Transformer) -> None:
    cos, bias = debug_model.cos.clone(), debug_model.moe_layers()[0].router.balance_bias.clone()
    model = debug_model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.cos, cos)
    assert torch.equal(model.moe_layers()[0].router.balance_bias, bias)
    assert model.max_logits.dtype == torch.float32
    model.train()(tokens(2, 16), tokens(2, 16)).loss.backward()
    assert model.expert_counts.sum() == 2 * 16 * 2 * 2
    assert model.to(torch.float64).cos.dtype == torch.float64
    assert model.half().cos.dtype == torch.float32


# ---- labels -------------------------------------------------------------------------------------


def by_hand(model: Transformer, inputs: Tensor, labels: Tensor) -> Tensor:
    """Nats of each label that counts, from whole logits."""
    logits = model(inputs).double()[labels != -100]
    return F.cross_entropy(logits, labels[labels != -100], reduction="none")


def test_the_loss_is_the_mean_over_labels_that_count(debug_model: Transformer) -> None:
    labels = some_labels()
    expected = by_hand(debug_model, tokens(2, 24), labels)
    losses = debug_model(tokens(2, 24), labels)
    torch.testing.assert_close(losses.cross_entropy.double(), expected.mean(), rtol=1e-6, atol=0)
    assert losses.loss == losses.cross_entropy + losses.balance
    summed = debug_model(tokens(2, 24), labels, label_count=10).cross_entropy
    torch.testing.assert_close(summed.double(), expected.sum() / 10, rtol=1e-6, atol=0)


@pytest.mark.parametrize("hooked", [False, True])
def test_losses_per_token_are_zero_where_no_label_counts(debug_model: Transformer, hooked: bool) -> None:
    labels = some_labels()
    expected = by_hand(debug_model, tokens(2, 24), labels)
    if hooked:
        watched(debug_model)  # so that the head is called
    per_token = debug_model(tokens(2, 24), labels, per_token=True).cross_entropy
    assert (per_token[labels == -100] == 0).all()
    torch.testing.assert_close(per_token[labels != -100].double(), expected, rtol=1e-5, atol=1e-6)


def test_parts_with_the_count_of_the_whole_add_up_to_its_mean(debug_config: ModelConfig) -> None:
    """Accumulation by hand, with different numbers of labels, in fp64."""
    model, labels = lively(Transformer(debug_config)).double().train(), some_labels()
    whole = model(tokens(2, 24), labels)
    expected = torch.autograd.grad(whole.loss, list(model.parameters()))
    counts, logits = model.expert_counts.clone(), model.max_logits.clone()
    model.reset_stats()
    parts = [model(tokens(2, 24)[i : i + 1], labels[i : i + 1], label_count=(labels != -100).sum()) for i in (0, 1)]
    found = torch.autograd.grad(parts[0].loss + parts[1].loss, list(model.parameters()))
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(model.expert_counts, counts)
    torch.testing.assert_close(model.max_logits, logits, rtol=1e-12, atol=0)


def test_a_batch_without_labels_contributes_nothing(debug_model: Transformer) -> None:
    model = debug_model.train()
    losses = model(tokens(2, 24), torch.full((2, 24), -100))
    losses.loss.backward()
    assert losses.loss == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    assert model.expert_counts.sum() == 0
    assert (model.max_logits == -torch.inf).all()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("how", ["after the last label", "documents of -1"])
def test_padding_enters_no_statistic_and_no_loss(debug_config: ModelConfig, how: str, exact: bool) -> None:
    model = lively(Transformer(debug_config)).double().train()
    model.exact_logits = exact
    short = model(tokens(1, 16), tokens(1, 16))
    counts, logits = model.expert_counts.clone(), model.max_logits.clone()
    model.reset_stats()
    if how == "documents of -1":  # in front, where tokens would see it
        inputs, labels, documents = F.pad(tokens(1, 16), (8, 0)), F.pad(tokens(1, 16), (8, 0), value=-100), None
        documents = F.pad(torch.zeros_like(tokens(1, 16)), (8, 0), value=-1)
    else:
        inputs, labels, documents = F.pad(tokens(1, 16), (0, 8)), F.pad(tokens(1, 16), (0, 8), value=-100), None
    padded = model(inputs, labels, documents=documents)
    torch.testing.assert_close(padded, short, rtol=1e-6, atol=0)  # positions differ, tables are rounded to fp32
    assert torch.equal(model.expert_counts, counts)
    torch.testing.assert_close(model.max_logits, logits, rtol=1e-6, atol=0)


# ---- the operations -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, ops.ROWS_PER_CHUNK, 2 * ops.ROWS_PER_CHUNK + 100])
@pytest.mark.parametrize("called", [False, True], ids=["fused", "called"])
def test_log_probabilities_and_their_gradients_are_those_of_whole_logits(rows: int, called: bool) -> None:
    x = torch.randn(rows, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 24, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(50, (rows,))
    labels[1::3] = -100
    expected = ops.reference_log_probabilities(x @ weight.mT, labels)
    if called:
        found = ops.log_probabilities_by(lambda part: part @ weight.mT, x, labels)
    else:
        found = ops.linear_log_probabilities(x, weight, labels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn(rows, dtype=torch.float64)
    theirs = torch.autograd.grad(expected, (x, weight), grad)
    torch.testing.assert_close(torch.autograd.grad(found, (x, weight), grad), theirs, rtol=1e-9, atol=1e-12)


def test_labels_that_do_not_count_leave_no_gradient() -> None:
    x, weight = torch.randn(9, 24, requires_grad=True), torch.randn(50, 24, requires_grad=True)
    labels = torch.randint(50, (9,))
    labels[3] = -100
    (grad,) = torch.autograd.grad(ops.linear_cross_entropy(x, weight, labels, 8), x)
    assert (grad[3] == 0).all()
    expected = F.cross_entropy(x @ weight.mT, labels)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x)[0], rtol=1e-4, atol=1e-6)
