"""Settings of any value: a model is what its settings say, or the first thing that is wrong with them is one line."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanokimi.config import ModelConfig, TrainConfig, from_dict
from nanokimi.errors import ConfigError
from nanokimi.model.transformer import Transformer
from tests.properties.seam import Bench, answer, tries

pytestmark = pytest.mark.fault("B5")

ODD: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)


def values(cls: type[ModelConfig] | type[TrainConfig]) -> st.SearchStrategy[dict[str, Any]]:
    """A few fields with values of their type or of none."""
    names = [f.name for f in fields(cls)]
    small = st.integers(0, 6) | st.sampled_from(["mla", "gqa", "mha", "sigmoid", "softmax"])
    return st.dictionaries(st.sampled_from([*names, "no_such_field"]), ODD | small, min_size=1, max_size=4)


def made(cls: Any, drawn: dict[str, Any]) -> tuple[Any, str]:
    """The config, or None and why not."""
    try:
        return from_dict(cls, drawn), ""
    except ConfigError as error:
        return None, str(error)


@pytest.mark.parametrize("cls", [ModelConfig, TrainConfig])
@tries(150)
@given(data=st.data())
def test_settings_hold_what_they_were_given_or_one_line_says_what_is_wrong(
    cls: type[ModelConfig] | type[TrainConfig], data: st.DataObject
) -> None:
    drawn = data.draw(values(cls))
    config, problem = made(cls, drawn)
    if config is None:
        assert any(name in problem for name in (*drawn, "experts")), "the line names a field"
        return
    assert {name: getattr(config, name) for name in drawn} == drawn
    assert from_dict(cls, asdict(config)) == config


small_shapes = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(1, 20),
        "dim": st.integers(1, 12),
        "n_heads": st.integers(1, 4),
        "n_layers": st.integers(1, 3),
        "n_dense_layers": st.integers(0, 3),
        "inter_dim": st.integers(1, 12),
        "n_routed_experts": st.integers(1, 8),
        "n_activated_experts": st.integers(1, 4),
        "n_shared_experts": st.integers(0, 2),
        "moe_inter_dim": st.integers(1, 8),
        "n_expert_groups": st.integers(1, 3),
        "n_limited_groups": st.integers(1, 3),
        "score_func": st.sampled_from(["sigmoid", "softmax"]),
        "attention": st.sampled_from(["mla", "mha", "gqa"]),
        "n_kv_heads": st.integers(1, 3),
        "kv_lora_rank": st.integers(1, 8),
        "q_lora_rank": st.integers(0, 8),
        "qk_nope_head_dim": st.integers(0, 6),
        "qk_rope_head_dim": st.integers(1, 6),
        "v_head_dim": st.integers(1, 6),
        "max_seq_length": st.just(8),
    }
)


def parameters_of(c: ModelConfig) -> int:
    """Counted from the shapes that docs/model.md writes down."""
    query_width, rope = c.n_heads * c.qk_head_dim, c.qk_rope_head_dim
    query = c.dim * query_width
    if c.attention == "mla":
        if c.q_lora_rank:
            query = c.dim * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * query_width
        latent = c.dim * (c.kv_lora_rank + rope) + c.kv_lora_rank
        attention = query + latent + c.kv_lora_rank * c.n_heads * (c.qk_nope_head_dim + c.v_head_dim)
    else:
        attention = query + c.dim * c.key_value_heads * (c.qk_head_dim + c.v_head_dim)
    attention += c.n_heads * c.v_head_dim * c.dim
    dense = 3 * c.dim * c.inter_dim
    experts = (c.n_routed_experts + c.n_shared_experts) * 3 * c.dim * c.moe_inter_dim + c.dim * c.n_routed_experts
    blocks = c.n_layers * (attention + 2 * c.dim) + c.n_dense_layers * dense + c.n_moe_layers * experts
    return 2 * c.vocab_size * c.dim + c.dim + blocks


@tries(40)
@given(shape=small_shapes)
def test_a_model_has_as_many_parameters_as_its_settings_say_and_computes(shape: dict[str, Any]) -> None:
    try:
        config = ModelConfig(**shape)
    except ConfigError:
        return
    model = Transformer(config)
    assert model.num_parameters() == parameters_of(config)
    losses = model(torch.randint(config.vocab_size, (1, 8)), torch.randint(config.vocab_size, (1, 8)))
    losses.loss.backward()
    assert losses.loss.isfinite()


toml_values = st.sampled_from(
    ["1", "-1", "0.5", "nan", "inf", "9" * 20, "true", '"auto"', '"x"', '"a\\nb"', "[1]", "{a = 1}", "1979-05-27", ""]
)
toml_line = st.tuples(
    st.sampled_from([f.name for f in fields(TrainConfig)] + ["dim", "x", "[model", "a.b"]), toml_values
)
toml_text = st.lists(toml_line.map(" = ".join) | st.sampled_from(["[model]", "[[a]]", "#", '"'])).map("\n".join)


@tries(40)
@given(content=toml_text.map(str.encode) | st.binary(max_size=20) | st.just(b"x = " + b"[" * 3000))
def test_a_settings_file_of_any_content_is_read_or_named(bench: Bench, content: bytes) -> None:
    with bench.copy() as folder:
        (folder / "run.toml").write_bytes(content)
        answer(["plan", "--preset", "debug", "--config", "run.toml"], folder).require_plain()
