"""Routing and experts against a token-by-token reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import lively
from torch import Tensor
from torch.nn import functional as F

from nanokimi.config import ModelConfig
from nanokimi.model.moe import MoE, Routing
from nanokimi.model.transformer import Transformer


def moe_with(**overrides: object) -> MoE:
    return lively(Transformer(ModelConfig.preset("debug", **overrides))).moe_layers()[0]


def reference_output(moe: MoE, token: Tensor) -> Tensor:
    """One token through the formulas of the papers, in plain Python."""
    c = moe.config
    logits = moe.router.weight @ token
    scores = torch.sigmoid(logits) if c.score_func == "sigmoid" else torch.softmax(logits, 0)
    biased = (scores + moe.router.balance_bias).tolist()
    size = c.n_routed_experts // c.n_expert_groups
    groups = [biased[g * size : (g + 1) * size] for g in range(c.n_expert_groups)]
    best_of = 2 if c.score_func == "sigmoid" else 1
    ranked = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-best_of:]))
    allowed = {g * size + i for g in ranked[: c.n_limited_groups] for i in range(size)}
    chosen = sorted(allowed, key=lambda e: -biased[e])[: c.n_activated_experts]
    total = sum(float(scores[e]) for e in chosen) if c.norm_topk_prob else 1.0
    out = moe.shared.w2(F.silu(moe.shared.w1(token)) * moe.shared.w3(token)) if moe.shared else 0 * token
    for e in chosen:
        inner = F.silu(moe.experts.w1[e] @ token) * (moe.experts.w3[e] @ token)
        out = out + float(scores[e]) / total * c.route_scale * (moe.experts.w2[e] @ inner)
    return out


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("groups", "limited"), [(1, 1), (4, 2), (2, 1)])
@pytest.mark.parametrize("norm", [True, False])
def test_output_equals_the_reference_token_by_token(score_func: str, groups: int, limited: int, norm: bool) -> None:
    moe = moe_with(
        score_func=score_func, n_expert_groups=groups, n_limited_groups=limited, norm_topk_prob=norm, route_scale=1.7
    )
    x = torch.randn(2, 9, moe.config.dim)
    with torch.no_grad():
        out, load = moe(x, torch.ones(2, 9, dtype=torch.bool))
        for b, t in itertools.product(range(2), range(9)):
            torch.testing.assert_close(out[b, t], reference_output(moe, x[b, t]), rtol=1e-4, atol=1e-4)
    assert load is not None
    assert int(load.counts.sum()) == 2 * 9 * moe.config.n_activated_experts


def test_the_bias_steers_the_selection_and_never_the_gate_value() -> None:
    moe = moe_with(norm_topk_prob=False)
    x = torch.randn(50, moe.config.dim)
    moe.router.balance_bias.zero_()
    moe.router.balance_bias[3] = 10.0
    routing = moe.router(x)
    assert bool((routing.experts == 3).any(dim=-1).all())
    torch.testing.assert_close(routing.weights, routing.scores.gather(-1, routing.experts))


def test_gradients_reach_the_router_through_the_gate_values() -> None:
    moe = moe_with()
    x = torch.randn(1, 20, moe.config.dim)
    moe(x)[0].square().sum().backward()
    assert float(moe.router.weight.grad.abs().sum()) > 0
    assert not moe.router.balance_bias.requires_grad


def test_experts_without_tokens_get_a_zero_gradient() -> None:
    moe = moe_with()
    moe.router.balance_bias.zero_()
    moe.router.balance_bias[:2] = 10.0
    moe(torch.randn(1, 6, moe.config.dim))[0].sum().backward()
    assert float(moe.experts.w1.grad[:2].abs().sum()) > 0
    assert float(moe.experts.w1.grad[2:].abs().sum()) == 0


def test_the_balance_update_moves_every_bias_one_step_towards_an_even_load() -> None:
    moe = moe_with(bias_update_rate=0.25)
    moe.router.balance_bias.zero_()
    moe.router.update_balance(torch.tensor([9, 1, 5, 5, 5, 5, 5, 5]))
    assert moe.router.balance_bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0, 0]


def test_the_imbalance_of_each_sequence_equals_the_formula() -> None:
    moe = moe_with()
    c = moe.config
    with torch.no_grad():
        routing = moe.router(torch.randn(3 * 7, c.dim))
    expected = [0.0] * 3
    for s in range(3):
        rows = slice(7 * s, 7 * s + 7)
        for e in range(c.n_routed_experts):
            f = float((routing.experts[rows] == e).sum()) * c.n_routed_experts / (c.n_activated_experts * 7)
            p = float((routing.scores[rows] / routing.scores[rows].sum(-1, keepdim=True))[:, e].mean())
            expected[s] += f * p
    load = moe.load(routing, torch.ones(3, 7, dtype=torch.bool))
    assert load.imbalance.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_imbalance_is_smallest_for_an_even_load() -> None:
    moe = moe_with()
    experts = torch.tensor([[2 * (t % 4), 2 * (t % 4) + 1] for t in range(8)])
    even = torch.full((8, 8), 0.5)
    skewed = even.clone()
    skewed[:, :2] = 0.9
    crowded = torch.tensor([[0, 1]] * 8)
    weights = torch.ones(8, 2)
    counted = torch.ones(1, 8, dtype=torch.bool)
    assert float(moe.load(Routing(weights, experts, even), counted).imbalance) == pytest.approx(1.0)
    assert float(moe.load(Routing(weights, crowded, skewed), counted).imbalance) > 1.3


def test_the_balance_loss_is_the_coefficient_times_the_mean_imbalance_of_every_layer() -> None:
    model = lively(Transformer(ModelConfig.preset("debug", aux_loss_coeff=0.5))).train()
    imbalances: list[Tensor] = []
    for moe in model.moe_layers():
        moe.register_forward_hook(lambda _, inputs, out: imbalances.append(out[1].imbalance))
    tokens = torch.randint(0, 257, (3, 7))
    balance = model(tokens, tokens).balance
    assert [imbalance.shape for imbalance in imbalances] == [(3,)] * model.config.n_moe_layers
    torch.testing.assert_close(balance, 0.5 * torch.stack(imbalances).mean(dim=1).sum())


def test_no_balance_loss_in_evaluation_or_when_switched_off() -> None:
    tokens = torch.randint(0, 257, (1, 5))
    for coefficient, training in ((1.0, False), (0.0, True)):
        model = lively(Transformer(ModelConfig.preset("debug", aux_loss_coeff=coefficient))).train(training)
        assert float(model(tokens, tokens).balance) == 0


def test_router_scores_are_fp32_under_autocast() -> None:
    moe = moe_with()
    x = torch.randn(6, moe.config.dim)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(moe.router(x).scores, moe.router(x.float()).scores)
        assert moe.router(x.bfloat16()).scores.dtype == torch.float32
