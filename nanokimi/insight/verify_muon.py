"""``verify_muon.py``: a readable report of whether MuonClip does what it says, on this machine, in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.model.attention import MLA
from nanokimi.model.transformer import Transformer
from nanokimi.ops.newton_schulz import best_dtype, newton_schulz
from nanokimi.optim.muonclip import ADAMW_ROLES, MUON_ROLES, MuonClip

LOWEST, HIGHEST = 0.68, 1.21  # singular values that five quintic steps can leave
TAU = 5.0

Checks = Iterator[tuple[str, str, bool]]  # statements, the figure that was seen, and whether each holds


def main() -> int:
    """Prints the report; 0 when every statement holds, else 1."""
    torch.manual_seed(0)
    print(f"MuonClip on this machine: torch {torch.__version__}, Newton-Schulz in {best_dtype(torch.device('cpu'))}\n")
    passed = True
    for title, checks in {
        "Orthogonality, against an SVD in fp64": check_orthogonality,
        "Agreement with torch.optim.Muon": check_torch_muon,
        "Roles: every parameter has one optimizer": check_roles,
        "QK-Clip, on a model whose logits are pushed over tau": check_qk_clip,
    }.items():
        print(title)
        for statement, seen, holds in checks():
            print(f"  {'ok  ' if holds else 'FAIL'}  {statement}: {seen}")
            passed &= holds
        print()
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


def check_orthogonality() -> Checks:
    """Singular values in range, direction that of the polar factor, experts one by one."""
    for shape in ((256, 128), (128, 256), (8, 96, 64)):
        g = torch.randn(shape, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        out = newton_schulz(g.float(), dtype=torch.float32).double()
        values = torch.linalg.svdvals(out)
        low, high = float(values.min()), float(values.max())
        in_range = low >= LOWEST and high <= HIGHEST
        yield f"{list(shape)}: singular values within [{LOWEST}, {HIGHEST}]", f"{low:.3f} to {high:.3f}", in_range
        cosine = float(torch.cosine_similarity(out.flatten(-2), (u @ vh).flatten(-2), dim=-1).min())
        yield f"{list(shape)}: cosine to the polar factor above 0.98", f"{cosine:.4f}", cosine > 0.98


def check_torch_muon() -> Checks:
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
        yield f"{adjust}: difference over 5 steps below 5 % (theirs rounds to bf16)", f"{worst:.2%}", worst < 0.05


def check_roles() -> Checks:
    """Each parameter declared once; Muon has the hidden matrices and nothing else."""
    model = Transformer(ModelConfig.preset("debug"))
    declared, parameters = [id(p) for _, p in model.param_roles()], [id(p) for p in model.parameters()]
    once = sorted(declared) == sorted(parameters)
    yield "declared exactly once", f"{len(declared)} of {len(parameters)} parameters", once
    numbers = {
        kind: sum(p.numel() for role, p in model.param_roles() if role in roles)
        for kind, roles in (("Muon", MUON_ROLES), ("AdamW", ADAMW_ROLES))
    }
    whole = sum(numbers.values()) == model.num_parameters()
    yield "Muon and AdamW together hold the whole model", str(numbers), whole


def check_qk_clip() -> Checks:
    """Clip-only steps (learning rate 0): logits of the same inputs land on tau, values stay to the bit."""
    model = Transformer(ModelConfig.preset("debug"))
    with torch.no_grad():
        for rows in (rows for layer in model.qk_rows() for rows in layer):
            rows.of(rows.weight)[0].mul_(60)  # the first head only: the second must not change
    x = torch.randn(2, 32, model.config.dim)
    attentions = [cast(MLA, block.attention) for block in model.blocks()]
    before = _exact_logits(model, x)
    model.max_logits.copy_(before)
    values = [attention.wkv_b_heads()[1].detach().clone() for attention in attentions]
    MuonClip(model, 0.0, adam_lr=0.0, tau=TAU).step()
    after, pushed = _exact_logits(model, x), before > TAU
    yield "a head in every layer stands above tau", f"largest {float(before.max()):.1f}", bool(pushed.any(1).all())
    error = float((after[pushed] / TAU - 1).abs().max())
    yield f"clipped heads land on tau = {TAU}", f"relative error {error:.1e}", error < 1e-5
    same = torch.equal(after[~pushed], before[~pushed])
    yield "heads below tau keep their logits to the bit", f"{int((~pushed).sum())} heads", same
    kept = all(torch.equal(a.wkv_b_heads()[1], v) for a, v in zip(attentions, values, strict=True))
    yield "value rows are unchanged to the bit", f"{len(values)} layers", kept


@torch.no_grad()
def _exact_logits(model: Transformer, x: Tensor) -> Tensor:
    """Largest causal logit of each layer and head ``[L, H]`` for the inputs ``x`` ``[B, T, D]``."""
    rope = (model.cos[: x.shape[1]], model.sin[: x.shape[1]])
    return torch.stack([block.attention(x, rope, exact=True)[1] for block in model.blocks()])
