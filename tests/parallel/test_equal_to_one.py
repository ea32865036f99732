"""However a run is spread over ranks, it is the run of one process: same losses, same clipped heads, same weights.

In fp64 nothing but the order of sums differs, and after 30 steps weights differ by about 1e-13. So a factor that is
wrong anywhere, a reduction too few or a token at the wrong expert is far outside of these bounds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import equal_worker
import pytest
import torch
from equal_worker import FP32, FP32_STEPS, LENGTH, LIMIT, SEQUENCES, STEPS, WAYS
from torch import Tensor

from nanokimi.config import ModelConfig

REFERENCES = ("plain", "other")
SPREAD = [name for name in WAYS if name not in REFERENCES]
Runs = dict[str, dict[str, dict[str, Any]]]

pytestmark = [pytest.mark.slow, pytest.mark.serial]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What happened in every way of training, by its name and precision."""
    folder = tmp_path_factory.mktemp("equal")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", equal_worker.__file__, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in WAYS}


def pair(runs: Runs, name: str, precision: str = "fp64") -> tuple[dict[str, Any], dict[str, Any]]:
    """The run of one process, and the same spread over ranks."""
    return runs[WAYS[name].reference][precision], runs[name][precision]


def shown(run: dict[str, Any], what: str) -> Tensor:
    """Of every step, ``[steps, ...]``."""
    return torch.tensor([reading[what] for reading in run["readings"]], dtype=torch.float64)


def apart(one: Tensor, many: Tensor) -> float:
    """The largest difference, relative where values are below 1."""
    assert one.shape == many.shape
    return float(((one - many).abs() / one.abs().clamp(1e-300, 1.0)).max())


@pytest.mark.parametrize("name", SPREAD)
def test_losses_gradient_norms_and_attention_logits_are_those_of_one_process(runs: Runs, name: str) -> None:
    one, many = pair(runs, name)
    assert len(many["readings"]) == STEPS
    for what in ("cross_entropy", "balance_loss", "grad_norm", "max_logits"):
        assert apart(shown(one, what), shown(many, what)) < 1e-9, what


@pytest.mark.parametrize("name", SPREAD)
def test_qk_clip_scales_the_same_rows_of_every_replica_by_the_same_factors(runs: Runs, name: str) -> None:
    """At the high rate of the other run even one process that cuts its steps otherwise ends a few 1e-12 away."""
    bound = {"plain": 1e-12, "other": 1e-10}[WAYS[name].reference]
    one, many = pair(runs, name)
    (expected,) = one["factors"]
    assert len(many["factors"]) == WAYS[name].layout.replicas
    for replica in many["factors"]:
        for factors, found in zip(expected, replica, strict=True):
            assert torch.equal(factors == 1, found == 1)
            assert apart(factors, found) < bound


@pytest.mark.parametrize("name", SPREAD)
def test_experts_are_counted_over_all_ranks_and_balanced_by_the_same_biases(runs: Runs, name: str) -> None:
    one, many = pair(runs, name)
    assert torch.equal(shown(one, "expert_counts"), shown(many, "expert_counts"))
    biases = [key for key in one["weights"] if key.endswith("balance_bias")]
    assert biases
    assert all(torch.equal(one["weights"][key], many["weights"][key]) for key in biases)


@pytest.mark.parametrize("name", SPREAD)
def test_weights_are_those_of_one_process(runs: Runs, name: str) -> None:
    one, many = (run["weights"] for run in pair(runs, name))
    assert one.keys() == many.keys()
    for key, weight in one.items():
        assert weight.shape == many[key].shape
        assert float((weight - many[key]).norm()) <= 1e-8 * float(weight.norm()), key


@pytest.mark.parametrize("name", SPREAD)
def test_held_out_losses_are_those_of_one_process(runs: Runs, name: str) -> None:
    one, many = (run["history"] for run in pair(runs, name))
    assert one["val_steps"] == many["val_steps"]
    assert len(many["val_steps"]) == 2
    for measure in ("val_loss", "val_bits_per_byte"):
        assert many[measure] == pytest.approx(one[measure], rel=0, abs=1e-9), measure


@pytest.mark.parametrize("name", SPREAD)
def test_a_step_learns_from_the_same_tokens_on_any_number_of_ranks(runs: Runs, name: str) -> None:
    one, many = pair(runs, name)
    assert one["history"]["tokens"] == many["history"]["tokens"]
    assert many["history"]["tokens"] == [SEQUENCES * LENGTH * (step + 1) for step in range(STEPS)]
    for count in ("step", "tokens", "skipped", "skipped_in_a_row"):
        assert one["counters"][count] == many["counters"][count], count
    assert many["counters"]["best_loss"] == pytest.approx(one["counters"]["best_loss"], rel=0, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in FP32 if name not in REFERENCES])
def test_in_fp32_the_first_losses_are_those_of_one_process(runs: Runs, name: str) -> None:
    one, many = pair(runs, name, "fp32")
    assert len(many["readings"]) == FP32_STEPS
    assert float((shown(one, "cross_entropy") - shown(many, "cross_entropy")).abs().max()) < 1e-4


@pytest.mark.parametrize("name", REFERENCES)
def test_the_runs_that_are_compared_clip_some_heads_and_some_gradients_and_move_biases(runs: Runs, name: str) -> None:
    one = runs[name]["fp64"]
    config, clipped = ModelConfig.preset("debug"), shown(one, "max_logits") > WAYS[name].settings["qk_clip_tau"]
    in_a_step = clipped.flatten(1).sum(dim=1)
    assert ((in_a_step > 0) & (in_a_step < config.n_layers * config.n_heads)).any()
    rotary_query = one["factors"][0][0].unflatten(1, (config.n_heads, -1))[..., -1]
    assert torch.equal(rotary_query < 1, clipped[:, 0])
    norms = shown(one, "grad_norm")
    assert norms.min() < LIMIT < norms.max()
    assert all(weight.any() for key, weight in one["weights"].items() if key.endswith("balance_bias"))
    assert one["readings"][-1]["cross_entropy"] < one["readings"][0]["cross_entropy"] - 2


def test_the_other_run_measures_logits_in_both_ways(runs: Runs) -> None:
    """A bound by the log-sum-exp is hardly below the logarithm of the context, a logit may be."""
    highest = shown(runs["other"]["fp64"], "max_logits").flatten(1).amax(dim=1)
    tau = WAYS["other"].settings["qk_clip_tau"]
    assert highest.min() < 1
    exact = torch.cat([torch.tensor([False]), highest[:-1] > tau / 2])
    assert (highest[exact] > tau).any()
