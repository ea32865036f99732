"""llama.cpp, in process through xllamacpp, is the reference for exported GGUF files."""

from __future__ import annotations

import json
import random
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lively
from tokenizers import Tokenizer as HFTokenizer

from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe
from nanokimi.errors import RunError
from nanokimi.inference.generate import generate_tokens
from nanokimi.interop.engines import TEXT, LlamaCpp, compare_llamacpp
from nanokimi.interop.gguf_file import DTYPES, stored_weights, write_gguf
from nanokimi.interop.stored import StoredModel
from nanokimi.model.transformer import Transformer
from nanokimi.receipt import NotCompared

pytest.importorskip("xllamacpp")

YARN = {"rope_factor": 4.0, "original_seq_len": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "debug": {},
    "without q_lora": {"q_lora_rank": 0},
    "all layers sparse": {"n_dense_layers": 0, "n_shared_experts": 1},
    "all layers dense": {"n_dense_layers": 3},
    "no shared experts": {"n_shared_experts": 0},
    "groups": {"n_expert_groups": 4, "n_limited_groups": 2, "n_dense_layers": 2, "n_activated_experts": 3},
    "groups, scaled, without q_lora": {
        "n_expert_groups": 2,
        "n_limited_groups": 1,
        "q_lora_rank": 0,
        "route_scale": 2.5,
    },
    "narrow values, weights as they are": {"v_head_dim": 12, "rope_theta": 50000.0, "norm_topk_prob": False},
    "wide values, many experts": {"v_head_dim": 24, "n_routed_experts": 64, "n_activated_experts": 24},
    "large eps": {"norm_eps": 1e-2, "n_heads": 3, "qk_rope_head_dim": 4},
    "large eps without q_lora": {"norm_eps": 1e-2, "q_lora_rank": 0},
    "softmax": {"score_func": "softmax"},
    "softmax, weights as they are": {"score_func": "softmax", "norm_topk_prob": False, "route_scale": 2.0},
    "one expert": {"n_routed_experts": 1, "n_activated_experts": 1},
    "27 layers": {"n_layers": 27, "q_lora_rank": 0},
    "padded vocabulary": {"vocab_size": 300},
    "yarn": YARN,
    "yarn, wide": {**YARN, "rope_factor": 32.0, "rope_theta": 500.0, "qk_rope_head_dim": 16, "original_seq_len": 100},
    "yarn, other betas that come to the same": {**YARN, "beta_fast": 16.0, "beta_slow": 0.9},
    "yarn, one mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
    "yarn, two mscales": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, more in all": {**YARN, "mscale": 0.5, "mscale_all_dim": 1.0},
    "yarn as in the paper": {**YARN, "mscale": 0.0, "mscale_all_dim": 0.0},
    "yarn, rotary only": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0},
    "yarn, all only": {**YARN, "mscale": 0.0, "mscale_all_dim": 1.0},
}


def exported(folder: Path, model: Transformer, tokenizer: Tokenizer | None = None, *, dtype: str = "f32") -> Path:
    found = tokenizer or load_tokenizer("byte")
    stored = StoredModel(model.config, model.state_dict(), found).with_shared_expert()
    write_gguf(folder / "m.gguf", stored.config, stored.weights, found, dtype=dtype, name="debug")
    return folder / "m.gguf"


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_equal_llama_cpp(name: str, tmp_path: Path) -> None:
    model = lively(Transformer(ModelConfig.preset("debug", **CONFIGS[name])), std=0.1)
    compared = compare_llamacpp(exported(tmp_path, model), model, load_tokenizer("byte"))
    assert compared.max_difference < 2e-5
    assert compared.positions >= 100
    assert compared.measure == "log-probabilities"
    assert compared.version


@pytest.mark.parametrize(
    "part",
    [
        "embed.weight",
        "layers.0.attention.kv_norm.weight",
        "layers.2.mlp.router.balance_bias",
        "layers.2.mlp.shared.w3.weight",
    ],
)
@torch.no_grad()
def test_a_model_with_another_weight_is_told_apart(part: str, tmp_path: Path) -> None:
    model = lively(Transformer(ModelConfig.preset("debug")), std=0.1)
    path = exported(tmp_path, model)
    weight = model.state_dict()[part]
    weight.copy_(weight.roll(1, dims=-1))
    assert compare_llamacpp(path, model, load_tokenizer("byte")).max_difference > 1e-2


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_smaller_types_lose_little(dtype: str, tmp_path: Path) -> None:
    """llama.cpp rounds the activations too where weights are not fp32."""
    fields = {"kv_lora_rank": 32, "q_lora_rank": 32, "moe_inter_dim": 32}
    model = lively(Transformer(ModelConfig.preset("debug", **fields)), std=0.1)
    path = exported(tmp_path, model, dtype=dtype)
    tokens = torch.randint(0, 256, (100,)).tolist()
    model.load_state_dict(stored_weights(model.config, model.state_dict(), dtype))
    with LlamaCpp(path) as engine:
        assert engine.loss(tokens) == pytest.approx(loss_of(model, tokens), abs=0.01)


@torch.no_grad()
def loss_of(model: Transformer, tokens: list[int]) -> float:
    log_probs = model(torch.tensor([tokens[:-1]]))[0].log_softmax(dim=-1)
    return -float(log_probs.gather(-1, torch.tensor(tokens[1:])[:, None]).mean())


def test_loss_and_greedy_tokens_equal_ours_also_within_characters(tmp_path: Path) -> None:
    model = lively(Transformer(ModelConfig.preset("debug")), std=0.1)
    tokens = [*"naïve 東京".encode(), 256, *b"end", 240, 159, 256]
    with LlamaCpp(exported(tmp_path, model)) as engine:
        assert engine.loss(tokens) == pytest.approx(loss_of(model, tokens), abs=1e-5)
        ours = generate_tokens(model, tokens, max_tokens=40, temperature=0.0)
        assert len(set(ours)) > 3
        assert engine.greedy(tokens, 40) == (ours[: ours.index(256) + 1] if 256 in ours else ours)


def test_nothing_is_printed(tmp_path: Path, debug_model: Transformer, capfd: pytest.CaptureFixture[str]) -> None:
    compare_llamacpp(exported(tmp_path, debug_model), debug_model, load_tokenizer("byte"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((tmp_path / "m.gguf").read_bytes()[:5000])
    with pytest.raises(RunError, match=r"broken\.gguf"):
        LlamaCpp(broken)
    assert capfd.readouterr() == ("", "")


def test_another_tokenizer_is_noticed_at_its_first_token(tmp_path: Path, debug_model: Transformer) -> None:
    path = exported(tmp_path, debug_model)
    with pytest.raises(RunError, match=r"token 0 is \[84\] there"):
        compare_llamacpp(path, debug_model, train_bpe([TEXT] * 3, 300))


def test_without_xllamacpp_the_command_is_named(
    tmp_path: Path, debug_model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported(tmp_path, debug_model)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(NotCompared, match="pip install xllamacpp"):
        compare_llamacpp(path, debug_model, load_tokenizer("byte"))


# ---- tokens ----------------------------------------------------------------------------------------------

PIECES = [
    *"abc XYZ 0123 '\".,;!?()[]{}<>|/\\_-+=*&^%$#@~`",
    *"\t\n\r\x0b\x0c\x00\x1b\x7f\u0085\u00a0\u00ad\u1680\u180e\u2003\u2028\u2029\u200b\u200d\u202f\u3000\ufeff",
    *"éßøñłİı\u0301\u0308\u20ddсловоλόγος中文かなカナ한국어हिन्दीไทยعربىעברית𝔘𐍈ⅷ½²٣४๕１②𝟙",
    *["🙂", "👩‍🚀", "👨🏽", "🇰🇪", "❤️", "🏴‍☠️"],
    *["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "’s", "n't"],
    *["  ", "   ", "\n\n", "\n \n", "\r\n", "\t\t", "    ", " \n"],
    *[END_OF_TEXT, "<|im_end|>", "<tool>", "def ", "return", "self.", "import os\n", "https://", "1e-9", "0x1F"],
]


def varied_strings(count: int) -> list[str]:
    generator = random.Random(0)
    return ["", TEXT, *("".join(generator.choices(PIECES, k=generator.randrange(1, 60))) for _ in range(count - 2))]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A BPE with thousands of merges."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    return train_bpe([*(file.read_text(encoding="utf-8", errors="ignore") for file in files), *PIECES * 2], 4096)


def like_smollm(tokenizer: Tokenizer) -> Tokenizer:
    """The same merges behind SmolLM's splitting rule, and added tokens of both kinds."""
    layout = json.loads(tokenizer.to_json())
    digits = {"type": "Digits", "individual_digits": True}
    layout["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, layout["pre_tokenizer"]]}
    for content, special in (("<tool>", False), ("    ", False), ("<|im_end|>", True)):
        entry = {**layout["added_tokens"][0], "content": content, "special": special}
        layout["added_tokens"].append({**entry, "id": 4096 + len(layout["added_tokens"])})
    return Tokenizer(HFTokenizer.from_str(json.dumps(layout)), "smollm")


@pytest.mark.parametrize("kind", ["byte", "bpe", "smollm"])
def test_tokens_equal_llama_cpps_for_text_of_every_kind(kind: str, trained: Tokenizer, tmp_path: Path) -> None:
    tokenizer = {"byte": load_tokenizer("byte"), "bpe": trained, "smollm": like_smollm(trained)}[kind]
    model = Transformer(ModelConfig.preset("debug", vocab_size=tokenizer.vocab_size + 5))
    with LlamaCpp(exported(tmp_path, model, tokenizer)) as engine:
        for text in varied_strings(200):
            assert engine.tokenize(text) == tokenizer.encode(text), repr(text)


def test_every_dtype_is_read(tmp_path: Path, debug_model: Transformer) -> None:
    for dtype in DTYPES:
        with LlamaCpp(exported(tmp_path, debug_model, dtype=dtype)) as engine:
            assert engine.log_probs([1, 2, 3]).exp().sum(dim=-1) == pytest.approx([1.0] * 3, abs=1e-4)
