"""Validation: each mistake is one line that names the field."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from nanokimi.cli import main
from nanokimi.config import ModelConfig, TrainConfig, field_names, from_dict, parse_value
from nanokimi.errors import ConfigError


@pytest.mark.fault(42, 43)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_activated_experts": 9}, r"n_activated_experts \(9\) exceeds the 8 experts"),  # fault 42
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7"),
        ({"n_expert_groups": 3}, r"n_routed_experts \(8\) does not divide into n_expert_groups \(3\)"),
        ({"n_expert_groups": 8, "n_limited_groups": 4}, "16 or more"),
        ({"n_expert_groups": 2, "n_limited_groups": 4}, "n_limited_groups"),
        ({"n_expert_groups": 4, "n_limited_groups": 1, "n_activated_experts": 3}, "exceeds the 2 experts"),
        ({"score_func": "relu"}, "score_func is 'relu': choose one of sigmoid, softmax"),  # fault 43
        ({"n_layers": -2}, "n_layers must be 1 or more and 1000 or less, got -2"),
        ({"n_dense_layers": 7}, r"n_dense_layers \(7\) exceeds n_layers \(6\)"),
        ({"dim": 12.5}, "dim takes a whole number"),
        ({"norm_topk_prob": 1}, "norm_topk_prob takes true or false"),
        ({"route_scale": float("nan")}, "route_scale must be more than 0 and finite, got nan"),
        ({"nheads": 8}, "unknown field 'nheads' in ModelConfig: did you mean n_heads"),
    ],
)
def test_impossible_models_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        from_dict(ModelConfig, values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("values", [{"dim": 2**70}, {"dim": 2**30, "inter_dim": 2**40}, {"n_routed_experts": 2**62}])
def test_a_model_that_no_memory_could_hold_is_refused_in_one_line(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    assert main(["plan", "--preset", "debug", "--batch_size", "8", *settings]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no memory could ever hold this model" in line


@pytest.mark.fault(32, 34, 35, 38, 40)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"val_fraction": 1.0}, "--val_fraction must be 0 or more and less than 1, got 1.0"),
        ({"decay_fraction": 1.5}, "--decay_fraction must be 0 or more and 1 or less, got 1.5"),
        ({"max_seconds": float("inf")}, "--max_seconds must be 0 or more and finite, got inf"),
        ({"seed": 2**63}, "--seed must be 0 or more and 9223372036854775807 or less"),
        ({"learning_rate": -0.1}, "--learning_rate must be 0 or more, got -0.1"),  # fault 32
        ({"learning_rate": float("nan")}, "--learning_rate"),
        ({"max_steps": 0}, "--max_steps must be 1 or more, got 0"),  # fault 34
        ({"max_steps": -3}, "--max_steps must be 1 or more, got -3"),
        ({"batch_size": 0}, "--batch_size must be 1 or more"),  # fault 35
        ({"max_grad_norm": -1.0}, "--max_grad_norm must be 0 or more"),  # fault 38
        ({"num_workers": -1}, "--num_workers must be 0 or more"),
        ({"momentum": 1.0}, "--momentum must be 0 or more and less than 1, got 1.0"),
        ({"schedule": "step"}, "--schedule is 'step': choose one of wsd"),
        ({"preset": "huge"}, "--preset is 'huge': choose one of nano-243m"),
    ],
)
def test_impossible_runs_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(TrainConfig, values)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().dim = 3  # type: ignore[misc]


def test_documented_defaults_hold() -> None:
    config = TrainConfig()
    assert (config.batch_size, config.learning_rate, config.momentum, config.weight_decay) == (2, 0.02, 0.95, 0.01)
    assert (config.qk_clip_tau, config.max_steps, config.eval_interval, config.save_interval) == (100.0, 1000, 25, 500)
    assert (config.warmup_steps, config.gradient_accumulation, config.max_grad_norm) == (100, 2, 1.0)
    assert (config.dataset, config.data_path, config.device) == ("local", "data/train.txt", "auto")
    assert config.preset == "nano-243m"
    assert (config.adjust_lr_fn, config.schedule, config.val_fraction) == ("original", "wsd", 0.05)


@pytest.mark.parametrize(("name", "text", "value"), [("dim", "96", 96), ("norm_topk_prob", "off", False)])
def test_values_given_as_text_are_read_by_the_type_of_their_field(name: str, text: str, value: Any) -> None:
    assert parse_value(ModelConfig, name, text) == value


@pytest.mark.parametrize(("name", "text"), [("dim", "wide"), ("norm_topk_prob", "perhaps"), ("rope_theta", "1e")])
def test_values_of_the_wrong_type_are_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} takes"):
        parse_value(ModelConfig, name, text)


def test_what_is_known_about_a_field_names_exactly_these() -> None:
    hub = {"hf_repo_name", "hf_config", "hf_split", "num_samples", "streaming"}
    source = hub | {"dataset", "data_path", "val_path", "val_fraction", "text_column", "encoding_errors"}
    local = {"output_dir", "parallel", "replicate", "expert_parallel", "async_checkpoints", "timeout"}
    when = {"max_steps", "max_seconds", "eval_interval", "save_interval", "samples", "sample_prompt", "val_tokens"}
    free = when | {"device", "num_workers", "log", "activation_checkpointing"}
    plan = {"batch_size", "gradient_accumulation", "activation_checkpointing", "mixed_precision", "parallel"}
    inspect = {"preset", "mix", "val_tokens", "shuffle_buffer", "num_workers", "seed"}

    def names(**facts: Any) -> set[str]:
        return set(field_names(TrainConfig, **facts))

    assert names(used_by="prepare") == source | {"preset"}
    assert names(used_by="inspect") == source | inspect
    assert names(used_by="eval") == source | {"mix", "device"}
    assert names(used_by="plan") == plan | {"preset", "replicate", "expert_parallel"}
    assert names(resume="local") == local
    assert names(resume="free") == free
    assert names(resume="never") == {"preset", "init_from"}
    assert names(resume="fixed") == names() - local - free - {"preset", "init_from"}
    assert names(decides_text=True) == source | {"mix", "hf_revision", "seed"}
    assert field_names(ModelConfig, decides_text=True) == ("max_seq_length",)
    assert all(f.metadata["group"] and f.metadata["help"] for f in dataclasses.fields(TrainConfig))
