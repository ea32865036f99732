"""``Transformer.from_pretrained`` and ``save_pretrained``: a model without its tokenizer, from wherever it lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub import HubHandler, LoopbackHub, run_with_hub
from stored_models import in_folder, saved, stored_model
from torch import Tensor

from nanokimi import load
from nanokimi.config import ModelConfig
from nanokimi.errors import UserError
from nanokimi.model.transformer import Transformer

LOAD = """
import sys
import torch
from nanokimi import Transformer
from nanokimi.errors import UserError
try:
    model = Transformer.from_pretrained(sys.argv[1])
    print(model(torch.arange(9)[None]).double().sum().item())
except UserError as error:
    print(error)
"""


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None])


def test_what_was_saved_comes_back_to_the_bit(debug_model: Transformer, tmp_path: Path) -> None:
    debug_model.save_pretrained(tmp_path / "mine")
    model = Transformer.from_pretrained(tmp_path / "mine")
    assert not model.training
    assert torch.equal(logits(model), logits(debug_model))


def test_transformers_opens_it_with_the_same_logits(debug_model: Transformer, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    debug_model.save_pretrained(tmp_path / "mine")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "mine").eval()
    with torch.no_grad():
        found = theirs(torch.arange(40)[None]).logits
    torch.testing.assert_close(found, logits(debug_model), rtol=0, atol=2e-5)


def test_a_type_of_ones_own_is_kept_by_a_folder(debug_model: Transformer, tmp_path: Path) -> None:
    debug_model.save_pretrained(tmp_path / "mine")
    half = Transformer.from_pretrained(tmp_path / "mine", dtype=torch.bfloat16)
    assert half.head.weight.dtype == torch.bfloat16
    assert half.cos.dtype == torch.float32
    half.save_pretrained(tmp_path / "half")
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < (
        0.6 * (tmp_path / "mine" / "model.safetensors").stat().st_size
    )
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)), logits(half))


def test_checkpoints_and_folders_with_a_tokenizer_are_taken_too(tmp_path: Path) -> None:
    stored = stored_model()
    for path in (saved(stored, tmp_path / "model.pt"), in_folder(tmp_path / "folder", stored)):
        assert torch.equal(logits(Transformer.from_pretrained(path)), logits(load(path)[0]))


def test_what_is_there_is_not_overwritten(debug_model: Transformer, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="exists already"):
        debug_model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_what_transformers_has_not_is_refused(tmp_path: Path) -> None:
    model = Transformer(ModelConfig.preset("debug", score_func="softmax"))
    with pytest.raises(UserError, match="norm_topk_prob"):
        model.save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("no/such/place", "no such checkpoint"), ("gone.pt", "no such checkpoint")]
)
def test_a_name_of_nothing_is_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Transformer.from_pretrained(name)


class ModelHandler(HubHandler):
    """The hub's addresses of models."""

    def route(self, path: str, sent: bytes) -> None:
        super().route(path.removeprefix("/api").removeprefix("/models").lstrip("/"), sent)


@pytest.mark.slow
def test_a_model_of_the_hub_is_fetched_once(debug_model: Transformer, tmp_path: Path) -> None:
    debug_model.save_pretrained(tmp_path / "mine")
    files = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} | {"big.bin": b"not wanted"}
    expected = debug_model(torch.arange(9)[None]).double().sum().item()
    with LoopbackHub({"some/model": files}, handler=ModelHandler) as hub:
        for _ in range(2):
            said = run_with_hub(hub.url, LOAD, "some/model", tmp_path=tmp_path)
            assert float(said.stdout) == pytest.approx(expected, rel=1e-6), said.stderr
        assert hub.bytes_served["some/model/model.safetensors"] == len(files["model.safetensors"])
        assert not hub.bytes_served["some/model/big.bin"]
        missing = run_with_hub(hub.url, LOAD, "no/model", tmp_path=tmp_path)
        assert missing.stdout.startswith("no/model: the hub has no such repository")
        assert len(missing.stdout.splitlines()) == 1
