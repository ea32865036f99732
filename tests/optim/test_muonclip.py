"""Oracles 1 to 3, 7 and 8 of Muon: torch's own optimizers, an SVD, and invariances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nanokimi.config import ModelConfig
from nanokimi.model.attention import QKRows
from nanokimi.model.transformer import Transformer
from nanokimi.ops.newton_schulz import CPU_BATCHED_NUMEL, _quintic, newton_schulz, orthogonalise, symmetric_square
from nanokimi.optim.muonclip import MuonClip, update_scale

SHAPES = [(48, 32), (32, 48), (64, 24), (40, 90)]


class WithRoles(nn.Module):
    """Bare parameters with roles, as small a model as MuonClip takes."""

    def __init__(self, **roles: tuple[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.roles = {name: role for name, (role, _) in roles.items()}
        for name, (_, shape) in roles.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.max_logits, self.expert_counts = torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.int64)
        self.logit_excess, self.exact_logits = 0.0, False

    def param_roles(self) -> list[tuple[str, nn.Parameter]]:
        return [(role, getattr(self, name)) for name, role in self.roles.items()]

    def qk_rows(self) -> list[list[QKRows]]:
        return []

    def update_balance(self) -> None:
        """There are no experts."""

    def reset_stats(self) -> None:
        """There are no statistics."""


def matrices() -> WithRoles:
    return WithRoles(**{f"w{i}": ("matrix", shape) for i, shape in enumerate(SHAPES)})


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def updates_of_both(adjust: str | None, ns_dtype: torch.dtype, steps: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Total movement of each weight under ours and torch.optim.Muon, on the same gradients."""
    ours = matrices()
    theirs = [p.detach().clone().requires_grad_() for p in ours.parameters()]
    start = [p.detach().clone() for p in theirs]
    lr = 0.02 if adjust is None else 0.001
    mine = MuonClip(ours, lr, weight_decay=0.1, adjust_lr_fn=adjust or "original", ns_dtype=ns_dtype)
    reference = torch.optim.Muon(theirs, lr=lr, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn=adjust)
    for _ in range(steps):
        for p, q in zip(ours.parameters(), theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        reference.step()
    moved = zip(ours.parameters(), theirs, start, strict=True)
    return [(p.detach() - s, q.detach() - s) for p, q, s in moved]


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_updates_agree_with_torch_muon_in_fp32(adjust: str | None) -> None:
    for ours, theirs in updates_of_both(adjust, torch.float32):
        assert relative(ours, theirs) < 0.05


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_updates_equal_torch_muon_when_forced_to_bf16(adjust: str | None) -> None:
    for ours, theirs in updates_of_both(adjust, torch.bfloat16):
        assert relative(ours, theirs) < 0.01


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (80, 60), (2, 5, 48, 24)])
def test_singular_values_and_direction_are_those_of_the_polar_factor(shape: tuple[int, ...]) -> None:
    g = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    assert float((s / g.norm(dim=(-2, -1))[..., None]).min()) >= 3e-3  # the range the bounds below are for
    out = newton_schulz(g.float(), dtype=torch.float32).double()
    values = torch.linalg.svdvals(out)
    assert 0.682 - 0.005 < float(values.min()) <= float(values.max()) < 1.202 + 0.005
    cosine = torch.nn.functional.cosine_similarity(out.flatten(-2), (u @ vh).flatten(-2), dim=-1)
    assert float(cosine.min()) > 0.98


@pytest.mark.parametrize("shape", [(24, 40), (300, 260)])
def test_batched_equals_one_by_one(shape: tuple[int, int]) -> None:
    single, stack = torch.randn(shape), torch.randn(3, *shape)
    done = orthogonalise([single, stack], dtype=torch.float32)
    torch.testing.assert_close(done[0], newton_schulz(single, dtype=torch.float32), rtol=0, atol=1e-5)
    for got, matrix in zip(done[1], stack, strict=True):
        torch.testing.assert_close(got, newton_schulz(matrix, dtype=torch.float32), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 223, 224, 500])
def test_a_symmetric_square_is_the_whole_product(rows: int) -> None:
    x, plus = torch.randn(rows, 90), torch.randn(rows, rows)
    plus = plus + plus.mT
    torch.testing.assert_close(symmetric_square(x), x @ x.mT, rtol=1e-5, atol=1e-4)
    done = symmetric_square(x, plus=plus, beta=0.5, alpha=-2.0)
    torch.testing.assert_close(done, -2 * x @ x.mT + 0.5 * plus, rtol=1e-5, atol=1e-4)
    assert torch.equal(done, done.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_matrices_are_orthogonalised_as_small_ones_are(dtype: torch.dtype) -> None:
    g = torch.randn(290, 240)
    assert g.numel() > CPU_BATCHED_NUMEL
    reference = _quintic((g.mT / g.norm()).to(dtype)[None], 5)[0].mT
    assert relative(newton_schulz(g, dtype=dtype).float(), reference.float()) < (
        1e-5 if dtype == torch.float32 else 0.02
    )


def test_a_matrix_and_a_transposed_one_share_a_batch() -> None:
    wide, tall = torch.randn(3, 20, 30), torch.randn(30, 20)
    done = orthogonalise([wide, tall], dtype=torch.float32)
    for got, matrix in zip([*done[0], done[1]], [*wide, tall], strict=True):
        torch.testing.assert_close(got, newton_schulz(matrix, dtype=torch.float32), rtol=0, atol=1e-5)
    model = WithRoles(a=("matrix", (40, 20)), b=("matrix", (20, 40)))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    MuonClip(model, lr=1.0, momentum=0.0, weight_decay=0.0, ns_dtype=torch.float32).step()
    for p, old, scale in zip(model.parameters(), before, (2**0.5, 1.0), strict=True):  # each by its own shape
        assert p.grad is not None
        torch.testing.assert_close(old - p, scale * newton_schulz(p.grad, dtype=torch.float32), rtol=1e-4, atol=1e-5)


def test_a_parameter_without_a_gradient_stays_and_joins_when_it_has_one() -> None:
    model = WithRoles(a=("matrix", (6, 6)), b=("matrix", (6, 6)), e=("embedding", (5, 3)), h=("head", (5, 3)))
    optimizer = MuonClip(model)
    model.a.grad, model.e.grad = torch.randn(6, 6), torch.randn(5, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"a", "e"}
    model.b.grad, model.h.grad = torch.randn(6, 6), torch.randn(5, 3)
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_experts_are_orthogonalised_one_by_one_and_not_as_one_tall_matrix() -> None:
    stack = torch.randn(4, 16, 32)
    (done,) = orthogonalise([stack], dtype=torch.float32)
    for matrix in done:
        assert float(torch.linalg.svdvals(matrix).min()) > 0.6
    tall = newton_schulz(stack.flatten(0, 1), dtype=torch.float32).view_as(stack)
    assert relative(done, tall) > 0.3


def test_transposed_input_gives_the_transposed_output() -> None:
    g = torch.randn(20, 50)
    assert torch.equal(newton_schulz(g.mT, dtype=torch.float32), newton_schulz(g, dtype=torch.float32).mT)


@pytest.mark.parametrize("exponent", [-20, -3, 1, 15])
def test_a_gradient_times_a_power_of_two_gives_the_identical_update(exponent: int) -> None:
    g = torch.randn(32, 24)
    assert torch.equal(newton_schulz(g * 2.0**exponent, dtype=torch.float32), newton_schulz(g, dtype=torch.float32))


def test_a_zero_gradient_gives_a_zero_update() -> None:
    model = matrices()
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    MuonClip(model, weight_decay=0.0).step()
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, b)


def test_adamw_part_equals_torch_adamw() -> None:
    model = WithRoles(e=("embedding", (30, 8)), h=("head", (30, 8)), n=("norm", (8,)))
    theirs = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    mine = MuonClip(model, adam_lr=0.01, weight_decay=0.1)
    groups = [
        {"params": [theirs["e"], theirs["h"]], "weight_decay": 0.1},
        {"params": [theirs["n"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(10):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            theirs[name].grad = p.grad.clone()
        mine.step()
        reference.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, theirs[name], rtol=1e-6, atol=1e-7)


def test_steps_continue_to_the_bit_after_saving_and_loading() -> None:
    def run(model: Transformer, optimizer: MuonClip, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.set_lr_factor(1 / (1 + step))
            optimizer.step()

    torch.manual_seed(1)
    model = Transformer(ModelConfig.preset("debug"))
    optimizer = MuonClip(model)
    run(model, optimizer, range(4))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, optimizer.state_dict())
    run(model, optimizer, range(4, 7))

    other = Transformer(ModelConfig.preset("debug"))
    other.load_state_dict(weights)
    continued = MuonClip(other)
    continued.load_state_dict(saved)
    run(other, continued, range(4, 7))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("rows", "cols"), [(64, 16), (16, 64)])
def test_update_scales(rows: int, cols: int) -> None:
    assert update_scale("original", rows, cols) == pytest.approx(max(1, rows / cols) ** 0.5)
    assert update_scale("match_rms_adamw", rows, cols) == pytest.approx(0.2 * 8)


def test_every_parameter_of_the_model_has_exactly_one_role() -> None:
    model = Transformer(ModelConfig.preset("debug"))
    with_role = [id(p) for _, p in model.param_roles()]
    assert sorted(with_role) == sorted(id(p) for p in model.parameters())


def test_parameters_without_a_role_go_to_adamw_with_one_warning_and_only_matrices_decay() -> None:
    model = matrices()
    model.stray, model.spare = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 2))
    with pytest.warns(UserWarning, match="without a role in the model go to AdamW: stray, spare$") as caught:
        optimizer = MuonClip(model, weight_decay=0.1)
    assert len(caught) == 1
    others = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for parameter, decay in ((model.stray, 0.0), (model.spare, 0.1)):
        group = others[id(parameter)]
        assert (group["kind"], group["weight_decay"]) == ("adamw", decay)


def test_a_parameter_with_two_roles_is_refused() -> None:
    class Twice(WithRoles):
        def param_roles(self) -> list[tuple[str, nn.Parameter]]:
            return [*super().param_roles(), ("head", self.w)]

    with pytest.raises(ValueError, match="has two roles: matrix, head"):
        MuonClip(Twice(w=("matrix", (4, 4))))


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown role 'spare'"):
        MuonClip(WithRoles(w=("spare", (4, 4))))


def test_muon_never_takes_embedding_head_or_norms_and_decay_spares_norms() -> None:
    model = Transformer(ModelConfig.preset("debug"))
    optimizer = MuonClip(model, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names[id(p)]
            assert (group["kind"] == "adamw") == (name in ("embed.weight", "head.weight") or "norm" in name), name
            assert (group["weight_decay"] == 0) == ("norm" in name), name
            assert group["is_qk"] == any(part in name for part in (".wq", ".wkv")), name


def test_momentum_is_kept_in_fp32() -> None:
    model = Transformer(ModelConfig.preset("debug"))
    optimizer = MuonClip(model, ns_dtype=torch.bfloat16)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert {state["momentum_buffer"].dtype for state in optimizer.state.values() if "momentum_buffer" in state} == {
        torch.float32
    }
