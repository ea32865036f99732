"""Every kind of attention trains, saves, resumes and decodes; what knows one kind alone says so in one line."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lively
from torch import Tensor
from torch.nn import functional as F

from nanokimi import generate_tokens, load
from nanokimi.cli import main
from nanokimi.config import ModelConfig
from nanokimi.errors import ConfigError, UserError
from nanokimi.inference.decoder import EagerDecoder
from nanokimi.inference.decoding import new_decoder
from nanokimi.inference.graph_decoder import GraphDecoder
from nanokimi.model.attention import ATTENTIONS, GroupedQuery, apply_rope
from nanokimi.model.cache import LatentCache
from nanokimi.model.transformer import Transformer
from nanokimi.optim.qk_clip import qk_clip_

KINDS = [
    {"attention": "mla"},
    {"attention": "mla", "q_lora_rank": 0},
    {"attention": "mha"},
    {"attention": "gqa", "n_heads": 4, "n_kv_heads": 2},
    {"attention": "gqa"},  # one head of keys and values for all
]
PLAIN = KINDS[2:]


def kind_name(kind: dict[str, Any]) -> str:
    return "-".join(map(str, kind.values()))


def make(kind: dict[str, Any]) -> Transformer:
    return lively(Transformer(ModelConfig.preset("debug", **kind)))


def tokens(n: int) -> Tensor:
    return torch.randint(257, (2, n), generator=torch.Generator().manual_seed(3))


every_kind = pytest.mark.parametrize("kind", KINDS, ids=kind_name)
plain_kinds = pytest.mark.parametrize("kind", PLAIN, ids=kind_name)


def test_every_value_of_the_setting_is_tested() -> None:
    assert {kind["attention"] for kind in KINDS} == set(ATTENTIONS)


@plain_kinds
def test_grouped_attention_is_torchs(kind: dict[str, Any]) -> None:
    """Queries, keys and values by hand, and PyTorch's own grouped attention over them."""
    model = make(kind).double()
    attention, config = model.blocks()[1].attention, model.config
    assert isinstance(attention, GroupedQuery)
    x, rope = torch.randn(2, 9, config.dim, dtype=torch.float64), (model.cos[:9], model.sin[:9])
    nope = config.qk_nope_head_dim

    def heads(weight: Tensor, count: int) -> Tensor:
        return (x @ weight.T).view(2, 9, count, -1)

    def turned(parts: Tensor) -> Tensor:
        return torch.cat((parts[..., :nope], apply_rope(parts[..., nope:], *rope)), dim=-1).transpose(1, 2)

    shared = config.key_value_heads
    q, k = turned(heads(attention.wq.weight, config.n_heads)), turned(heads(attention.wk.weight, shared))
    v = heads(attention.wv.weight, shared).transpose(1, 2)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out, bound = attention(x, rope)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2) @ attention.wo.weight.T)
    _, largest = attention(x, rope, exact=True)
    logits = q @ k.repeat_interleave(config.n_heads // shared, dim=1).mT * config.qk_head_dim**-0.5
    torch.testing.assert_close(largest, logits.masked_fill(torch.ones(9, 9).triu(1).bool(), -1e9).amax((0, 2, 3)))
    assert (bound >= largest).all()


@every_kind
def test_cached_decoding_equals_the_full_pass(kind: dict[str, Any]) -> None:
    model = make(kind).double()
    with torch.no_grad():
        expected = model(tokens(20))
        for ends in ([0, 20], [0, 1, 20], [0, 7, 8, 9, 15, 20], list(range(21))):
            cache = LatentCache(model.config, 2, 20, dtype=torch.float64)
            parts = [model(tokens(20)[:, a:b], cache=cache) for a, b in pairwise(ends)]
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-9, atol=1e-9)


@every_kind
def test_decoders_agree_on_sequences_of_unequal_length(kind: dict[str, Any]) -> None:
    model = make(kind)
    eager, graph = EagerDecoder(model, slots=3), GraphDecoder(model, slots=3, capture=False)
    for slot, length in enumerate((3, 9, 17)):
        prompt = tokens(length)[0].tolist()
        torch.testing.assert_close(graph.prefill(slot, prompt), eager.prefill(slot, prompt), rtol=1e-4, atol=1e-4)
    for token in (5, 6, 7):
        pair = [decoder.step([0, 1, 2], [token] * 3) for decoder in (graph, eager)]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


@every_kind
def test_a_clipped_head_lands_on_tau_and_no_other_changes(kind: dict[str, Any]) -> None:
    model = make(kind)
    attention, tau = model.blocks()[0].attention, 3.0
    x, rope = torch.randn(2, 24, model.config.dim), (model.cos[:24], model.sin[:24])

    def largest() -> Tensor:
        with torch.no_grad():
            return attention(x, rope, exact=True)[1]

    with torch.no_grad():
        rows = attention.qk_rows()[0]
        rows.of(rows.weight)[0].mul_(40)
    before = largest()
    assert before[0] > tau
    values = {name: p.detach().clone() for name, p in attention.named_parameters()}
    qk_clip_([attention.qk_rows()], before[None], tau)
    after = largest()
    torch.testing.assert_close(after[before > tau], torch.full_like(after[before > tau], tau), rtol=1e-5, atol=0)
    assert torch.equal(after[before <= tau], before[before <= tau])
    untouched = ("wo.weight", "wv.weight", "wkv_a.weight")
    assert all(torch.equal(p, values[name]) for name, p in attention.named_parameters() if name in untouched)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(Path(json.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return str(tmp_path / "text.txt")


@plain_kinds
def test_it_trains_saves_resumes_and_generates(kind: dict[str, Any], text: str, tmp_path: Path) -> None:
    """A run that was interrupted has the weights of one that was not."""
    settings = [part for name, value in kind.items() for part in ("--set", f"{name}={value}")]

    def train(output: str, *more: str) -> Path:
        common = ["--output_dir", str(tmp_path / output), "--device", "cpu", "--eval_interval", "0"]
        assert main(["train", *more, *common]) == 0
        return tmp_path / output / "checkpoints" / "latest.pt"

    begin = ["--preset", "debug", "--data_path", text, *settings, "--schedule", "constant"]
    whole = train("whole", *begin, "--max_steps", "6")
    train("parts", *begin, "--max_steps", "3")
    parts = train("parts", "--resume", "--max_steps", "6")
    (model, _), (other, _) = load(whole), load(parts)
    assert model.config.attention == kind["attention"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    found = generate_tokens(model, [5, 6, 7], max_tokens=12, temperature=0.0)
    with torch.no_grad():
        for n, token in enumerate(found):
            assert model(torch.tensor([[5, 6, 7, *found[:n]]]))[0, -1].argmax() == token


def test_exports_refuse_in_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "debug", "--set", "attention=mha", "--data_path", text, "--max_steps", "1"]
    assert main(["train", *arguments, "--output_dir", str(tmp_path), "--eval_interval", "0"]) == 0
    checkpoint = str(tmp_path / "checkpoints" / "latest.pt")
    for form in ("hf", "gguf"):
        capsys.readouterr()
        assert main(["export", form, checkpoint, str(tmp_path / form)]) == 2
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1
        assert "attention is mha" in err[0]
        assert not (tmp_path / form).exists()
    with pytest.raises(UserError, match="attention is mha"):
        load(checkpoint)[0].save_pretrained(tmp_path / "saved")
    capsys.readouterr()
    assert main(["plan", "--preset", "debug", "--set", "attention=gqa"]) == 2
    assert "those of mla" in capsys.readouterr().err


@plain_kinds
def test_compiled_kernels_leave_it_to_the_reference(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanokimi.inference.decoding.WORTH_COMPILING", 0)
    assert type(new_decoder(make(kind))) is EagerDecoder
    with pytest.raises(UserError, match=r"--decoder native: the compiled kernels know mla alone"):
        new_decoder(make(kind), kind="native")


def test_the_heads_have_to_divide() -> None:
    with pytest.raises(ConfigError, match=r"n_kv_heads \(3\) does not divide n_heads \(4\)"):
        ModelConfig.preset("debug", attention="gqa", n_heads=4, n_kv_heads=3)
