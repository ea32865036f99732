"""The step itself: what is not finite never reaches the weights; clipping and balance use the whole step."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nanokimi import checkpoint
from nanokimi.cli import main
from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.data.batch import Batch
from nanokimi.data.sources import open_corpus
from nanokimi.errors import RunError
from nanokimi.model.transformer import Losses, Transformer
from nanokimi.optim.muonclip import MuonClip
from nanokimi.training.metrics import MetricsLog
from nanokimi.training.step import WINDOW, SpikeWatch, StepReading, cross_entropy
from nanokimi.training.trainer import Trainer

TrainerFactory = Callable[..., Trainer]


@pytest.fixture
def make_trainer(tmp_path: Path) -> TrainerFactory:
    text = tmp_path / "train.txt"
    text.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:20_000], encoding="utf-8")

    def make(*, context: int = 32, **settings: Any) -> Trainer:
        defaults = {"preset": "debug", "data_path": str(text), "output_dir": str(tmp_path), "eval_interval": 0}
        config = TrainConfig(**{**defaults, "warmup_steps": 0, "max_steps": 8, **settings})
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        corpus = open_corpus(config, "byte", log=lambda line: None)
        return Trainer(config, ModelConfig.preset("debug", max_seq_length=context), corpus, torch.device("cpu"))

    return make


def spoil(trainer: Trainer, steps: set[int], value: float = float("nan")) -> None:
    """Multiplies the loss of some steps (counted from 0), gradients included."""

    def objective(model: nn.Module, batch: Batch) -> Losses:
        found = cross_entropy(model, batch)
        bad = trainer.counters.step in steps
        return Losses(found.cross_entropy * value if bad else found.cross_entropy, found.balance)

    trainer.step.objective = objective


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for i, values in trainer.optimizer.state_dict()["state"].items():
        state |= {f"{i}.{name}": tensor.clone() for name, tensor in values.items()}
    return state


@pytest.mark.fault("B3")
def test_a_guarded_spike_touches_nothing_and_a_plain_one_is_only_told(make_trainer: TrainerFactory) -> None:
    for guard in (True, False):
        trainer = make_trainer(max_steps=WINDOW, spike_guard=guard, batch_size=1, gradient_accumulation=1)
        spoil(trainer, {WINDOW // 2}, 50.0)
        batches = iter(trainer.batches)
        quiet = [trainer._train_step(batches)["spike"] for _ in range(WINDOW // 2)]
        assert sum(quiet) == 0
        before = snapshot(trainer)
        values = trainer._train_step(batches)
        assert (values["spike"], values["skipped"], values["non_finite"]) == (1, int(guard), 0)
        assert values["train_ce_loss"] > 50
        after = snapshot(trainer)
        assert all(torch.equal(before[name], after[name]) for name in before) == guard
        assert (trainer.counters.skipped, trainer.counters.skipped_in_a_row) == (int(guard), 0)
        assert trainer._train_step(batches)["skipped"] == 0


@pytest.mark.fault("B3")
def test_the_window_of_the_guard_comes_back_to_the_bit(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(max_steps=6, spike_guard=True)
    spoil(trainer, {3})
    trainer.train()
    again = SpikeWatch(MetricsLog(None, state=trainer.metrics.state()).losses_and_norms())
    assert vars(again) == vars(trainer.step.spikes)
    assert len(again._losses) == 5


@pytest.mark.fault("B3")
def test_six_deviations_of_the_last_steps_are_the_limit() -> None:
    steps = [(1.0, 10.0), (3.0, 30.0)] * (WINDOW // 2)  # means 2 and 20, deviations 1.004 and 10.04
    assert SpikeWatch(steps)(8.1, 20.0)
    assert SpikeWatch(steps)(2.0, 81.0)
    assert not SpikeWatch(steps)(7.9, 79.0)
    assert not SpikeWatch(steps[: WINDOW // 2 - 1])(1e9, 1e9), "half a window is what a judgement needs"
    assert SpikeWatch([(1e9, 1e9), (None, 1.0), (1.0, None), *steps])(8.1, 20.0), "only the last steps count"
    watch = SpikeWatch(steps)
    found = [watch(50.0, 20.0) for _ in range(WINDOW)]
    assert found[0]
    assert sum(found) < 10, "a level that stays is no spike"


@pytest.mark.fault("B3")
def test_a_spike_on_one_rank_is_one_on_all(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(spike_guard=True)
    ranks = SimpleNamespace(max=lambda values: [1.0], size=2)  # the other one saw it
    trainer.step.parallel = SimpleNamespace(ranks=ranks)  # type: ignore[assignment]
    assert trainer.step.judge(StepReading(1.0, 0.0, 1.0, 1, [[0.0]], [])).skipped


@pytest.mark.fault(48, 49)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_step_touches_nothing_and_is_counted(make_trainer: TrainerFactory, value: float) -> None:
    trainer = make_trainer()
    spoil(trainer, {3}, value)
    batches = iter(trainer.batches)
    for _ in range(3):
        trainer._train_step(batches)
    before = snapshot(trainer)
    values = trainer._train_step(batches)
    assert values["train_ce_loss"] is None
    assert trainer.counters.skipped_in_a_row == 1
    after = snapshot(trainer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert bool((trainer.model.max_logits == -torch.inf).all()), "a skipped step clears the meter"
    assert int(trainer.model.expert_counts.sum()) == 0
    assert trainer._train_step(batches)["train_ce_loss"] > 0
    assert trainer.counters.skipped_in_a_row == 0


@pytest.mark.fault(49)
def test_infinite_attention_logits_are_skipped_too(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer()

    def objective(model: nn.Module, batch: Batch) -> Losses:
        found = cross_entropy(model, batch)
        trainer.model.max_logits[1, 0] = torch.inf
        return found

    trainer.step.objective = objective
    before = snapshot(trainer)
    assert trainer._train_step(iter(trainer.batches))["train_ce_loss"] is None
    assert all(torch.equal(before[name], tensor) for name, tensor in snapshot(trainer).items())


@pytest.mark.fault(48)
def test_too_many_in_a_row_stop_the_run_and_leave_the_last_good_checkpoint(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(save_interval=2, max_skipped_steps=3, max_steps=50)
    spoil(trainer, set(range(3, 50)))
    with pytest.raises(RunError, match="not finite in 3 steps in a row"):
        trainer.train()
    saved = checkpoint.read(trainer.checkpoints.folder / "latest.pt")
    assert saved["counters"]["step"] == 4
    assert all(bool(t.isfinite().all()) for t in saved["model"].values() if t.is_floating_point())
    assert trainer.metrics.history()["train_loss"][3:] == [None, None, None]


def test_the_balance_biases_move_by_the_load_of_the_whole_step(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(gradient_accumulation=3)
    seen = []
    update = trainer.model.update_balance

    def note() -> None:
        seen.append(trainer.model.expert_counts.clone())
        update()

    trainer.model.update_balance = note  # type: ignore[method-assign]
    trainer._train_step(iter(trainer.batches))
    assert seen[0].sum(dim=-1).tolist() == [3 * 2 * 32 * 2] * 2
    expected = 0.001 * torch.sign(seen[0].float().mean(dim=-1, keepdim=True) - seen[0])
    biases = torch.stack([moe.router.balance_bias for moe in trainer.model.moe_layers()])
    torch.testing.assert_close(biases, expected)


def test_clipped_heads_are_reported_and_land_on_tau(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(qk_clip_tau=20.0, qk_clip_meter="exact", learning_rate=0.0, adam_lr=0.0)
    trainer.model.exact_logits = True
    with torch.no_grad():
        for query in (rows for layer in trainer.model.qk_rows() for rows in layer[:2]):
            query.of(query.weight)[0].mul_(5000)
    batches = itertools.repeat(next(iter(trainer.batches)))
    first, second = trainer._train_step(batches), trainer._train_step(batches)
    assert first["clipped_heads"] == 3  # the first head of every layer
    assert min(first["max_logit"]) > 60
    assert second["max_logit"][0] == pytest.approx(20, rel=1e-4)  # deeper layers have other inputs now
    assert max(second["max_logit"]) < 20 * 1.3


def test_the_exact_meter_is_used_after_a_step_that_came_near_tau(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(qk_clip_meter="exact", qk_clip_tau=100.0, learning_rate=0.0, adam_lr=0.0)
    batches = iter(trainer.batches)
    trainer._train_step(batches)
    assert not trainer.model.exact_logits  # a fresh model is far from tau / 2
    with torch.no_grad():
        for query in (rows for layer in trainer.model.qk_rows() for rows in layer[:2]):
            query.of(query.weight).mul_(5000)
    bound = trainer._train_step(batches)["max_logit"]
    assert max(bound) > 50
    assert trainer.model.exact_logits


@pytest.mark.fault("A4")
@pytest.mark.parametrize("meter", ["lse", "exact"])
def test_no_head_is_clipped_whose_logits_are_small_beside_a_tau_that_the_bound_cannot_see(
    make_trainer: TrainerFactory, meter: str
) -> None:
    """tau 4 and a context of 128: ln 128 is 4.85, the largest logit of a fresh model far below 1."""
    trainer = make_trainer(qk_clip_meter=meter, qk_clip_tau=4.0, context=128)
    batches = iter(trainer.batches)
    for _ in range(3):
        seen = trainer._train_step(batches)
        assert seen["clipped_heads"] == 0
        assert max(seen["max_logit"]) < 1.0


@pytest.mark.fault("A4")
def test_logits_are_measured_exactly_where_ln_of_the_context_is_over_a_quarter_of_tau() -> None:
    model = Transformer(ModelConfig.preset("debug", max_seq_length=128))
    assert not MuonClip(model, tau=4 * math.log(128) + 0.01).needs_exact_logits
    assert not MuonClip(model, tau=0.0).needs_exact_logits
    assert not model.exact_logits
    assert MuonClip(model, tau=4 * math.log(128) - 0.01).needs_exact_logits
    assert model.exact_logits, "in everyone's loop too"


# ---- the machine --------------------------------------------------------------------------------------------


@pytest.mark.fault(47)
def test_a_step_that_does_not_fit_into_memory_says_what_to_lower_and_leaves_the_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.txt").write_text("a line of text\n" * 400)
    train_step = Trainer._train_step

    def too_large(trainer: Trainer, batches: Any) -> dict[str, Any]:
        if trainer.counters.step == 4:
            torch.empty(1 << 50)
        return train_step(trainer, batches)

    flags = ["--preset", "debug", "--data_path", str(tmp_path / "train.txt"), "--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as small_machine:
        small_machine.setattr(Trainer, "_train_step", too_large)
        assert main(["train", *flags, "--max_steps", "6", "--save_interval", "2", "--eval_interval", "0"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("nanokimi: out of memory: lower --batch_size")
    assert main(["train", "--resume", "--output_dir", str(tmp_path / "run")]) == 0
    assert "latest.pt at step 4 of 6" in capsys.readouterr().err


@pytest.mark.fault(44)
def test_the_seed_makes_the_run_and_deterministic_forbids_what_would_not_be(make_trainer: TrainerFactory) -> None:
    losses = []
    for seed, deterministic in ((1, False), (1, True), (2, True)):
        trainer = make_trainer(seed=seed, deterministic=deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        batches = iter(trainer.batches)
        losses.append([trainer._train_step(batches)["train_ce_loss"] for _ in range(2)])
    torch.use_deterministic_algorithms(False)
    assert losses[0] == losses[1] != losses[2]
