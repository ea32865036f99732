"""MuonClip in loops that other people write: nothing has to be known of it but ``step``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lively
from torch import Tensor, nn

from nanokimi import load
from nanokimi.cli import main
from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.data.corpus import Corpus
from nanokimi.data.sources import open_corpus
from nanokimi.model.transformer import Transformer
from nanokimi.optim.muonclip import MuonClip, make_optimizer
from nanokimi.optim.qk_clip import balance_experts
from nanokimi.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
LOW = 0.02  # the logits of a model that has hardly trained
TAU = 6.0


def tokens(seed: int = 3) -> tuple[Tensor, Tensor]:
    rows = torch.randint(257, (2, 25), generator=torch.Generator().manual_seed(seed))
    return rows[:, :-1], rows[:, 1:]


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[TrainConfig, Corpus]:
    (tmp_path / "text.txt").write_text(Path(torch.optim.__file__).read_text(encoding="utf-8") * 20, encoding="utf-8")
    config = TrainConfig(
        data_path=str(tmp_path / "text.txt"), output_dir=str(tmp_path), max_steps=50, gradient_accumulation=1,
        eval_interval=0, save_interval=0, compile="off", device="cpu", qk_clip_tau=LOW,
    )  # fmt: skip
    return config, open_corpus(config, "byte", log=lambda line: None)


def test_the_loop_of_the_readme_gives_the_trainers_weights_to_the_bit(
    corpus: tuple[TrainConfig, Corpus], tmp_path: Path
) -> None:
    """With a tau so low that heads are clipped on the way."""
    config, text = corpus
    (tmp_path / "checkpoints").mkdir()
    trainer = Trainer(config, ModelConfig.preset("debug"), text, torch.device("cpu"))
    trainer.train()
    assert any(trainer.metrics.history()["clipped_heads"])
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    loop = next(block for block in blocks if "set_lr_factor" in block)
    loop = loop.replace("data/train.txt", config.data_path).replace("MuonClip(model)", f"MuonClip(model, tau={LOW})")
    names: dict[str, Any] = {}
    exec(compile(loop, "README.md", "exec"), names)
    ours, theirs = names["model"].state_dict(), trainer.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def pushed_model() -> Transformer:
    """A model whose first head stands far above tau in every layer."""
    model = lively(Transformer(ModelConfig.preset("debug")), std=0.05).train()
    with torch.no_grad():
        for rows in (rows for layer in model.qk_rows() for rows in layer):
            rows.of(rows.weight)[0].mul_(40)
    return model


def query_norms(model: Transformer) -> Tensor:
    """``[L, H]``."""
    return torch.stack([rows[1].of(rows[1].weight).detach().norm(dim=(1, 2)) for rows in model.qk_rows()])


def test_a_head_over_tau_is_clipped_once_and_then_left_alone() -> None:
    model = pushed_model()
    optimizer = MuonClip(model, 0.0, adam_lr=0.0, tau=TAU)
    model.exact_logits = True
    norms, biases = [query_norms(model)], []
    for _ in range(6):
        model(*tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(query_norms(model))
        biases.append(torch.stack([router.balance_bias.clone() for router in model.routers()]))
    assert (norms[1][:, 0] < 0.5 * norms[0][:, 0]).all()
    assert torch.equal(norms[-1][:, 1], norms[0][:, 1]), "the other head never was over tau"
    torch.testing.assert_close(norms[-1][0], norms[1][0], rtol=1e-6, atol=0)
    # Layers after a clipped one see other inputs, and may be clipped a little more; none is clipped without end.
    assert (norms[-1][:, 0] > 0.7 * norms[1][:, 0]).all()
    torch.testing.assert_close(norms[-1], norms[-2], rtol=1e-3, atol=0)
    assert (biases[0] != biases[-1]).any(), "the experts' biases move at every step"


def test_all_passes_of_a_step_count_and_a_skipped_step_loses_none() -> None:
    """The largest logit of several micro-batches, one of them in a step that was not taken."""
    model = pushed_model()
    optimizer = MuonClip(model, 0.0, adam_lr=0.0, tau=TAU)
    seen = []
    for seed in (1, 2, 3):
        apart = pushed_model()
        apart.exact_logits = True  # as a tau this low has the model measure
        apart(*tokens(seed))
        seen.append(apart.max_logits)
        model(*tokens(seed)).loss.backward()
        if seed == 1:
            optimizer.zero_grad()  # a user who does not like the gradients goes on without a step
    assert torch.equal(model.max_logits, torch.stack(seen).amax(dim=0))
    before = query_norms(model)
    expected = before * (TAU / model.max_logits.clamp_min(TAU))
    optimizer.step()
    torch.testing.assert_close(query_norms(model), expected)
    assert (model.max_logits == -torch.inf).all()
    assert model.expert_counts.sum() == 0


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_maximum_that_is_not_finite_clips_nothing_and_is_gone_after_the_step(value: float) -> None:
    model = pushed_model()
    optimizer = MuonClip(model, 0.0, adam_lr=0.0, tau=TAU)
    model(*tokens())
    model.max_logits[0, 0] = value
    before = query_norms(model)
    optimizer.step()
    assert query_norms(model)[0, 0] == before[0, 0]
    assert query_norms(model)[1, 0] < before[1, 0]
    assert optimizer.non_finite == 1
    assert (model.max_logits == -torch.inf).all()


def test_what_a_gradient_scaler_skips_is_as_if_it_had_not_been() -> None:
    """GradScaler does not call ``step`` when a gradient is infinite; the pass that showed it left non-finite logits."""
    model = pushed_model()
    optimizer = MuonClip(model, tau=TAU)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = query_norms(model)
    for broken in (True, False):
        losses = model(*tokens())
        scaler.scale(losses.loss).backward()
        if broken:
            model.embed.weight.grad[0, 0] = torch.inf
            model.max_logits[0, 0] = torch.nan
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if broken:
            assert torch.equal(query_norms(model), before)
    assert optimizer.non_finite == 1
    assert (query_norms(model)[1:, 0] < before[1:, 0]).all()
    assert all(p.isfinite().all() for p in model.parameters())


def test_any_other_optimizer_balances_experts_by_one_line() -> None:
    model = pushed_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_post_hook(balance_experts(model))
    twin = pushed_model()
    muonclip = MuonClip(twin, 0.0, adam_lr=0.0, tau=0.0)
    for _ in range(3):
        for other, stepper in ((model, optimizer), (twin, muonclip)):
            other(*tokens()).loss.backward()
            stepper.step()
            stepper.zero_grad()
    biases = [[router.balance_bias for router in other.routers()] for other in (model, twin)]
    assert all(torch.equal(a, b) for a, b in zip(*biases, strict=True))
    assert model.expert_counts.sum() == 0


class Wrapped(nn.Module):
    """A model with a head of its own, as a user makes one for rewards."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.value = nn.Linear(32, 1)


def test_parameters_without_a_role_go_to_adamw_with_one_warning() -> None:
    wrapped = Wrapped(Transformer(ModelConfig.preset("debug")))
    with pytest.warns(UserWarning, match=r"go to AdamW: value\.weight, value\.bias$") as caught:
        optimizer = MuonClip(wrapped)
    assert len(caught) == 1
    kinds = {id(p): (g["kind"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert kinds[id(wrapped.value.weight)] == ("adamw", 0.01)
    assert kinds[id(wrapped.value.bias)] == ("adamw", 0.0)
    assert len(kinds) == len(list(wrapped.parameters()))


def test_a_compiled_model_is_taken_as_it_is() -> None:
    plain, model = (Transformer(ModelConfig.preset("debug")) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    compiled = torch.compile(model, backend="aot_eager")
    for called, optimizer in ((plain, MuonClip(plain, tau=TAU)), (compiled, MuonClip(compiled, tau=TAU))):
        for seed in range(3):
            called(*tokens(seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=1e-4, atol=1e-5)
    assert any((router.balance_bias != 0).any() for router in model.routers())


def test_a_module_without_a_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0 modules of the model have param_roles\(\)"):
        MuonClip(nn.Linear(3, 3))


# ---- the table ----------------------------------------------------------------------------------


def trained(name: str, **settings: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("debug"))
    optimizer = make_optimizer(model, TrainConfig(optimizer=name, **settings))
    for seed in range(5):
        model(*tokens(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_muon_is_muonclip_without_the_clip() -> None:
    clipped, plain = trained("muonclip", qk_clip_tau=0.001), trained("muon", qk_clip_tau=0.001)
    without = trained("muonclip", qk_clip_tau=0.0)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), without.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), clipped.parameters(), strict=True))


def test_adamw_is_torchs() -> None:
    """Weight decay of matrices alone, as everywhere here."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("debug"))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=0.003, betas=(0.9, 0.95), eps=1e-8)
    theirs.register_step_post_hook(balance_experts(model))
    for seed in range(5):
        model(*tokens(seed)).loss.backward()
        theirs.step()
        theirs.zero_grad()
    ours = trained("adamw", adam_lr=0.003, weight_decay=0.1)
    torch.testing.assert_close(dict(ours.state_dict()), dict(model.state_dict()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_run_goes_on_with_its_optimizer(
    name: str, corpus: tuple[TrainConfig, Corpus], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted and resumed, it has the weights of a run that was not; a resume asks before it takes another."""

    def train(output: str, *more: str) -> int:
        arguments = ["--output_dir", str(tmp_path / output), "--device", "cpu", "--eval_interval", "0", *more]
        return main(["train", *arguments])

    begin = ["--preset", "debug", "--data_path", corpus[0].data_path, "--schedule", "constant", "--adam_lr", "0.001"]
    begin += ["--optimizer", name]
    assert train("whole", *begin, "--max_steps", "6") == train("parts", *begin, "--max_steps", "3") == 0
    assert train("parts", "--resume", "--max_steps", "6", "--optimizer", "muonclip") == 2
    assert "optimizer (saved" in capsys.readouterr().err
    assert train("parts", "--resume", "--max_steps", "6") == 0
    models = [load(tmp_path / output / "checkpoints" / "latest.pt")[0] for output in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
