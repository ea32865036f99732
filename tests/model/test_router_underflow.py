"""Router logits so low that every score is zero in fp32: losses, gradients and gates stay numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lively
from stored_models import stored_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from nanokimi.checkpoint.weights import build_model
from nanokimi.config import ModelConfig
from nanokimi.inference.decoder import EagerDecoder
from nanokimi.inference.native_decoder import NativeDecoder
from nanokimi.interop.hf_writer import write_folder
from nanokimi.model.moe import MoE
from nanokimi.model.transformer import Transformer
from nanokimi.optim.muonclip import MuonClip

LOWEST = -104.0  # below it a sigmoid is zero in fp32
GROUPS: list[dict[str, Any]] = [{}, {"n_expert_groups": 4, "n_limited_groups": 2}]


def with_low_logits(model: Transformer) -> Transformer:
    """``model`` with an embedding that points one way and routers that score this way below ``LOWEST``."""
    with torch.no_grad():
        model.embed.weight[:, 0] = 100.0
        for router in model.routers():
            router.weight.mul_(1e-3)[:, 0] = -100.0
    return model


def routed_logits(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """The router's logits in every sparse layer."""
    seen: list[Tensor] = []

    def note(module: MoE, inputs: tuple[Tensor, ...], _: object) -> None:
        seen.append(inputs[0].detach().flatten(0, 1) @ module.router.weight.detach().T)

    hooks = [moe.register_forward_hook(note) for moe in model.moe_layers()]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.fault("A11")
@pytest.mark.parametrize("fields", GROUPS)
@pytest.mark.parametrize("norm", [True, False])
def test_losses_gradients_and_a_step_are_finite_where_all_scores_underflow(fields: dict[str, Any], norm: bool) -> None:
    config = ModelConfig.preset("debug", aux_loss_coeff=10.0, norm_topk_prob=norm, **fields)
    model = with_low_logits(lively(Transformer(config))).train()
    tokens = torch.randint(0, 257, (2, 12))
    assert max(float(logits.max()) for logits in routed_logits(model, tokens)) < LOWEST
    losses = model(tokens, tokens)
    assert bool(losses.cross_entropy.isfinite())
    assert losses.balance == 0, "no score, no share"
    losses.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    MuonClip(model).step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.fault("A11")
@pytest.mark.parametrize("fields", GROUPS)
def test_softmax_that_selects_experts_without_a_score_gives_them_gates_of_zero(fields: dict[str, Any]) -> None:
    """The bias steers to experts whose share is zero, which is then what their gates are made of."""
    config = ModelConfig.preset("debug", score_func="softmax", norm_topk_prob=True, **fields)
    moe = lively(Transformer(config)).moe_layers()[0]
    x = torch.ones(1, 5, config.dim)
    with torch.no_grad():
        moe.router.weight.fill_(-200 / config.dim)[0].zero_()
        moe.router.balance_bias.fill_(10.0)[0] = 0.0
    routing = moe.router(x[0])
    assert not bool((routing.experts == 0).any())
    assert bool((routing.weights == 0).all())
    _, load = moe(x, torch.ones(1, 5, dtype=torch.bool))
    assert load is not None
    assert bool(load.imbalance.isfinite().all())


@pytest.mark.fault("A11")
@pytest.mark.parametrize("fields", GROUPS)
def test_gates_are_zero_as_in_transformers_and_in_the_native_decoder(fields: dict[str, Any], tmp_path: Path) -> None:
    stored = stored_model(**fields)
    with_low_logits(model := build_model(tmp_path, stored.config, stored.weights))
    stored.weights.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
    write_folder(tmp_path, stored)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(0, 257, (1, 20))
    with torch.no_grad():
        ours, theirs = model.eval()(tokens), reference(tokens).logits
        assert max(float(logits.max()) for logits in routed_logits(model, tokens)) < LOWEST
        for moe in model.moe_layers():
            assert bool((moe.router(torch.full((3, stored.config.dim), 5.0)).weights == 0).all())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    for decoder in (EagerDecoder(model), NativeDecoder(model)):
        decoded = decoder.prefill(0, tokens[0].tolist())
        torch.testing.assert_close(decoded, ours[0, -1], rtol=0, atol=2e-4)
