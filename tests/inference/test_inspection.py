from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanokimi.data.tokenizer import load_tokenizer
from nanokimi.errors import UserError
from nanokimi.inference import inspection
from nanokimi.inference.inspection import inspect_tokens
from nanokimi.model.transformer import Transformer

IDS = [104, 105, 32, 195, 169, 33]


def test_alternatives_are_the_models_own(debug_model: Transformer) -> None:
    views = inspect_tokens(debug_model, load_tokenizer("byte"), IDS, top=3)
    with torch.inference_mode():
        rows = debug_model(torch.tensor([IDS]))[0].log_softmax(-1)
    assert (views[0].logprob, views[0].likeliest) == (None, ())
    assert [view.id for view in views] == IDS
    assert [view.text for view in views] == ["h", "i", " ", "\ufffd", "\ufffd", "!"]
    for view, row in zip(views[1:], rows, strict=False):
        values, best = row.topk(3)
        assert view.logprob == pytest.approx(float(row[view.id]), abs=1e-5)
        assert [i for i, _, _ in view.likeliest] == best.tolist()
        assert [value for _, _, value in view.likeliest] == pytest.approx(values.tolist(), abs=1e-5)


def test_experts_are_those_whose_weights_the_token_depends_on(debug_model: Transformer) -> None:
    """Brute force: spoiling an expert of the first MoE layer changes that token's output, and no other expert does."""
    views = inspect_tokens(debug_model, load_tokenizer("byte"), IDS)
    moe = debug_model.moe_layers()[0]
    inputs: list[Tensor] = []
    handle = moe.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    with torch.inference_mode():
        debug_model(torch.tensor([IDS]))
        handle.remove()
        before = moe(inputs[0])[0][0]
        for expert in range(debug_model.config.n_routed_experts):
            kept = moe.experts.w2[expert].clone()
            moe.experts.w2[expert] += 1.0
            changed = (moe(inputs[0])[0][0] != before).any(dim=-1).tolist()
            moe.experts.w2[expert] = kept
            assert changed == [expert in view.experts[0] for view in views]
    layers, chosen = len(debug_model.moe_layers()), debug_model.config.n_activated_experts
    assert all([len(experts) for experts in view.experts] == [chosen] * layers for view in views)


def test_a_start_leaves_out_the_tokens_before_it_and_rows_are_taken_in_parts(
    debug_model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, ids = load_tokenizer("byte"), list(range(100))
    whole = inspect_tokens(debug_model, tokenizer, ids)
    monkeypatch.setattr(inspection, "ROWS", 7)
    part = inspect_tokens(debug_model, tokenizer, ids, start=40)
    assert len(part) == 60
    for one, other in zip(part, whole[40:], strict=True):
        assert (one.id, one.experts) == (other.id, other.experts)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


@pytest.mark.parametrize(("ids", "message"), [([], "no tokens"), ([1] * 129, "129 tokens"), ([1, 999], "token 999")])
def test_a_text_that_cannot_be_is_refused(debug_model: Transformer, ids: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inspect_tokens(debug_model, load_tokenizer("byte"), ids)


def test_looking_leaves_nothing_behind(debug_model: Transformer) -> None:
    inspect_tokens(debug_model, load_tokenizer("byte"), IDS)
    assert all(not moe.router._forward_hooks for moe in debug_model.moe_layers())
    assert (debug_model.expert_counts == 0).all()
