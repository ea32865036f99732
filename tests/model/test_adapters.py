"""Low-rank adapters by PEFT, on every matrix there is: nothing of ours has to know of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import lively
from torch import Tensor, nn

from nanokimi.config import ModelConfig
from nanokimi.errors import UserError
from nanokimi.inference.decoder import EagerDecoder
from nanokimi.inference.decoding import new_decoder
from nanokimi.model.cache import LatentCache
from nanokimi.model.transformer import Transformer
from nanokimi.optim.muonclip import MuonClip

peft = pytest.importorskip("peft")

LINEAR = r".*\.(wq|wq_a|wq_b|wkv_a|wkv_b|wk|wv|wo|w1|w2|w3)|head|embed"
STACKS = ["experts.w1", "experts.w2", "experts.w3", "router.weight"]
KINDS = ("mla", "mha", "gqa")


def tokens() -> Tensor:
    return torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(3))


def adapted(kind: str = "mla") -> Transformer:
    """A model with an adapter, far from zero, on every matrix."""
    torch.manual_seed(1)
    model = lively(Transformer(ModelConfig.preset("debug", attention=kind))).double()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=LINEAR, target_parameters=STACKS, lora_dropout=0.0)
    model = peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    return model(tokens())


@torch.no_grad()
def cached(model: Transformer) -> Tensor:
    """The same, through the cache: a few tokens, then one after the other, then many."""
    cache = LatentCache(model.config, 2, 20, dtype=torch.float64)
    ends = [0, 3, 4, 5, 6, 20]
    return torch.cat([model(tokens()[:, a:b], cache=cache) for a, b in pairwise(ends)], dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_takes_an_adapter(kind: str) -> None:
    plain, model = Transformer(ModelConfig.preset("debug", attention=kind)), adapted(kind)
    matrices = sum(p.ndim > 1 for p in plain.parameters())
    assert sum("lora_A" in name or "lora_embedding_A" in name for name, _ in model.named_parameters()) == matrices


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_learn_and_all_of_them_do(kind: str) -> None:
    model = adapted(kind).train()
    model(tokens(), tokens().roll(-1)).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert learning == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_changes_the_logits(kind: str) -> None:
    model = adapted(kind)
    with_all = logits(model)
    for name, parameter in list(model.named_parameters()):
        if "lora_B" in name or "lora_embedding_B" in name:
            kept = parameter.detach().clone()
            nn.init.zeros_(parameter)
            assert (logits(model) - with_all).abs().max() > 1e-6, name
            parameter.data.copy_(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_equals_the_full_pass(kind: str) -> None:
    model = adapted(kind)
    torch.testing.assert_close(cached(model), logits(model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_the_same_logits(kind: str) -> None:
    model = adapted(kind)
    before = logits(model)
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.merge()
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cached(model), before, rtol=1e-9, atol=1e-9)


def test_decoders_that_read_weights_leave_adapters_to_the_one_that_calls_modules() -> None:
    model = adapted().float()
    assert type(new_decoder(model)) is EagerDecoder
    with pytest.raises(UserError, match=r"--decoder native: the model carries adapters"):
        new_decoder(model, kind="native")


def test_muonclip_trains_adapters_with_adamw_and_clips_no_frozen_weight() -> None:
    model = adapted().train()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    with pytest.warns(UserWarning, match=r"go to AdamW: embed\.lora_embedding_A\.default, .* and \d+ more"):
        optimizer = MuonClip(model, adam_lr=0.01, tau=0.1)
    losses = []
    for _ in range(8):
        losses.append(model(tokens(), tokens().roll(-1)).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
