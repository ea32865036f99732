"""``verify_muon.py``: a readable report of whether MuonClip does what it says, on this machine, in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.model.attention import MLA
from nanokimi.model.transformer import Transformer
from nanokimi.ops.newton_schulz import best_dtype, newton_schulz
from nanokimi.optim.muonclip import ADAMW_ROLES, MUON_ROLES, MuonClip

LOWEST, HIGHEST = 0.68, 1.21  # singular values that five quintic steps can leave
TAU = 5.0


class Check(NamedTuple):
    """One statement, the figure that was seen, and whether it holds."""

    statement: str
    seen: str
    holds: bool


def main() -> int:
    """Prints the report; 0 when every statement holds, else 1."""
    torch.manual_seed(0)
    print(f"MuonClip on this machine: torch {torch.__version__}, Newton-Schulz in {best_dtype(torch.device('cpu'))}\n")
    passed = True
    for title, checks in {
        "Orthogonality, against an SVD in fp64": check_orthogonality(),
        "Agreement with torch.optim.Muon": check_torch_muon(),
        "Roles: every parameter has one optimizer": check_roles(),
        "QK-Clip, on a model whose logits are pushed over tau": check_qk_clip(),
    }.items():
        print(title)
        for check in checks:
            print(f"  {'ok  ' if check.holds else 'FAIL'}  {check.statement}: {check.seen}")
            passed &= check.holds
        print()
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


def check_orthogonality() -> Iterator[Check]:
    """Singular values in range, direction that of the polar factor, experts one by one."""
    for shape in ((256, 128), (128, 256), (8, 96, 64)):
        g = torch.randn(shape, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        out = newton_schulz(g.float(), dtype=torch.float32).double()
        values = torch.linalg.svdvals(out)
        low, high = float(values.min()), float(values.max())
        yield Check(
            f"{list(shape)}: singular values within [{LOWEST}, {HIGHEST}]",
            f"{low:.3f} to {high:.3f}",
            low >= LOWEST and high <= HIGHEST,
        )
        cosine = float(torch.cosine_similarity(out.flatten(-2), (u @ vh).flatten(-2), dim=-1).min())
        yield Check(f"{list(shape)}: cosine to the polar factor above 0.98", f"{cosine:.4f}", cosine > 0.98)


def check_torch_muon() -> Iterator[Check]:
    """Five steps on the same gradients, both learning rate scales."""
    for adjust, lr in (("original", 0.02), ("match_rms_adamw", 0.001)):
        model = Transformer(ModelConfig.preset("debug"))
        mine = MuonClip(model, lr, adjust_lr_fn=adjust, tau=0.0, ns_dtype=torch.float32)
        ours = [p for role, p in model.param_roles() if role in MUON_ROLES and p.ndim == 2]
        start = [p.detach().clone() for p in ours]
        theirs = [p.clone().requires_grad_() for p in start]
        reference = torch.optim.Muon(theirs, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn=adjust)
        for _ in range(5):
            for p, q in zip(ours, theirs, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            mine.step()
            reference.step()
        moved = [(p.detach() - s, q.detach() - s) for p, q, s in zip(ours, theirs, start, strict=True)]
        worst = max(float((a - b).norm() / b.norm()) for a, b in moved)
        yield Check(
            f"{adjust}: difference over 5 steps below 5 % (theirs rounds to bf16)", f"{worst:.2%}", worst < 0.05
        )


def check_roles() -> Iterator[Check]:
    """Each parameter declared once; Muon has the hidden matrices and nothing else."""
    model = Transformer(ModelConfig.preset("debug"))
    declared = [id(p) for _, p in model.param_roles()]
    once = sorted(declared) == sorted(id(p) for p in model.parameters())
    yield Check("declared exactly once", f"{len(declared)} of {len(list(model.parameters()))} parameters", once)
    numbers = {
        kind: sum(p.numel() for role, p in model.param_roles() if role in roles)
        for kind, roles in (("Muon", MUON_ROLES), ("AdamW", ADAMW_ROLES))
    }
    whole = sum(numbers.values()) == model.num_parameters()
    yield Check("Muon and AdamW together hold the whole model", str(numbers), whole)


def check_qk_clip() -> Iterator[Check]:
    """Clip-only steps (learning rate 0): logits of the same inputs land on tau, values stay to the bit."""
    model = Transformer(ModelConfig.preset("debug"))
    with torch.no_grad():
        for rows in (rows for layer in model.qk_rows() for rows in layer):
            rows.of(rows.weight)[0].mul_(60)  # the first head only: the second must not change
    x = torch.randn(2, 32, model.config.dim)
    rope = (model.cos[:32], model.sin[:32])
    attentions = [cast(MLA, block.attention) for block in model.blocks()]
    before = torch.stack([exact_logits(attention, x, rope) for attention in attentions])
    model.max_logits.copy_(before)
    values = [attention.wkv_b_heads()[1].detach().clone() for attention in attentions]
    MuonClip(model, 0.0, adam_lr=0.0, tau=TAU).step()
    after = torch.stack([exact_logits(attention, x, rope) for attention in attentions])
    pushed = before > TAU
    yield Check(
        "a head in every layer stands above tau", f"largest {float(before.max()):.1f}", bool(pushed.any(1).all())
    )
    error = float((after[pushed] / TAU - 1).abs().max())
    yield Check(f"clipped heads land on tau = {TAU}", f"relative error {error:.1e}", error < 1e-5)
    same = torch.equal(after[~pushed], before[~pushed])
    yield Check("heads below tau keep their logits to the bit", f"{int((~pushed).sum())} heads", same)
    kept = all(torch.equal(a.wkv_b_heads()[1], v) for a, v in zip(attentions, values, strict=True))
    yield Check("value rows are unchanged to the bit", f"{len(values)} layers", kept)


@torch.no_grad()
def exact_logits(attention: torch.nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Largest causal logit of each head ``[H]`` for the inputs ``x`` ``[B, T, D]``, from the attention's own parts."""
    _, logits = attention(x, rope, exact=True)
    return torch.as_tensor(logits)
