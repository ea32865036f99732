"""MuonClip (Kimi K2 report, section 2.1): Muon for hidden matrices, AdamW for the rest, QK-Clip after the step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nanokimi.optim.newton_schulz import best_dtype, orthogonalise
from nanokimi.optim.qk_clip import QKViews, qk_clip_

MUON_ROLES = frozenset({"query_key", "matrix", "experts"})
ADAMW_ROLES = frozenset({"embedding", "head", "norm"})


class Declares(Protocol):
    """What MuonClip needs of a model; ``nanokimi.Transformer`` has it."""

    max_logits: Tensor

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...

    def declare(self) -> Sequence[tuple[str, nn.Parameter]]: ...

    def qk_heads(self) -> Sequence[QKViews]: ...


class MuonClip(torch.optim.Optimizer):
    """One optimizer for the whole model; what each parameter is, the model declares.

    Args:
        model: declares the role of every parameter, and where attention logits come from.
        lr: Muon's rate; 0.02 belongs to ``adjust_lr_fn="original"``, AdamW-like rates to the other.
        adam_lr: AdamW's rate.
        momentum, nesterov: Muon's momentum, in the exponential form of ``torch.optim.Muon``.
        weight_decay: decoupled, of matrices only (embedding and head included).
        adjust_lr_fn: ``original`` scales an update by ``sqrt(max(1, rows / cols))`` (Jordan et al., 2024),
            ``match_rms_adamw`` by ``0.2 sqrt(max(rows, cols))`` (Liu et al., 2025).
        tau: largest attention logit allowed; 0 switches QK-Clip off.
        ns_dtype: precision of Newton-Schulz; None chooses by hardware.

    Raises:
        ValueError: a parameter is declared twice, or not at all, or with an unknown role, or a value is out of range.
    """

    def __init__(
        self,
        model: Declares,
        lr: float = 0.02,
        *,
        adam_lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adjust_lr_fn: str = "original",
        tau: float = 100.0,
        ns_dtype: torch.dtype | None = None,
    ) -> None:
        if adjust_lr_fn not in ("original", "match_rms_adamw"):
            raise ValueError(f"adjust_lr_fn is {adjust_lr_fn!r}: choose original or match_rms_adamw")
        if not (lr >= 0 and adam_lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0 and tau >= 0):
            raise ValueError("lr, adam_lr, weight_decay and tau must be 0 or more, momentum in [0, 1)")
        self._model, self.tau, self.ns_dtype = model, tau, ns_dtype
        muon = {"kind": "muon", "lr": lr, "momentum": momentum, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
        adamw = {"kind": "adamw", "lr": adam_lr, "betas": betas, "eps": eps}
        groups = []
        for role, parameters in parameters_by_role(model).items():
            kind = muon if role in MUON_ROLES else adamw
            decay = 0.0 if role == "norm" else weight_decay
            groups.append({**kind, "params": parameters, "weight_decay": decay, "is_qk": role == "query_key"})
        super().__init__(groups, {})
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    def set_lr_factor(self, factor: float) -> None:
        """Sets each group's rate to ``factor`` times its initial one; call it before ``step``."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * factor

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient, then QK-Clip by the model's ``max_logits``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._muon if group["kind"] == "muon" else self._adamw)(group, parameters)
        if self.tau:
            qk_clip_(self._model.qk_heads(), self._model.max_logits, self.tau)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes ``state_dict()`` back; ValueError unless it fits this model's parameters."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            names = {"momentum_buffer"} if group["kind"] == "muon" else {"exp_avg", "exp_avg_sq"}
            for parameter in group["params"]:
                shapes = {name: tensor.shape for name, tensor in self.state.get(parameter, {}).items()}
                if self.state and shapes != dict.fromkeys(names, parameter.shape):
                    raise ValueError(f"the state of a {list(parameter.shape)} parameter is {shapes or 'missing'}")

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Momentum, orthogonalisation, decay and update; matrices of one shape go together."""
        grads = [_gradient(p) for p in parameters]
        buffers = [self._state(p, "momentum_buffer") for p in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        by_shape = defaultdict(list)
        for parameter, update in zip(parameters, updates, strict=True):
            by_shape[parameter.shape[-2:]].append((parameter, update))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for (rows, cols), pairs in by_shape.items():
            lr = group["lr"] * update_scale(group["adjust_lr_fn"], rows, cols)
            weights, matrices = zip(*pairs, strict=True)
            dtype = self.ns_dtype or best_dtype(weights[0].device)
            orthogonal = orthogonalise(matrices, dtype=dtype)
            torch._foreach_add_(weights, [o.to(w.dtype) for o, w in zip(orthogonal, weights, strict=True)], alpha=-lr)

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """AdamW (Loshchilov and Hutter, 2019), in the order of operations of ``torch.optim.AdamW``."""
        beta1, beta2 = group["betas"]
        group["step"] = step = group.get("step", 0) + 1
        grads = [_gradient(p) for p in parameters]
        means = [self._state(p, "exp_avg") for p in parameters]
        squares = [self._state(p, "exp_avg_sq") for p in parameters]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(parameters, means, denominators, -group["lr"] / (1 - beta1**step))

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        """The optimizer state of ``parameter``, zero before the first step."""
        state: dict[str, Tensor] = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]


def update_scale(adjust_lr_fn: str, rows: int, cols: int) -> float:
    """Factor of the learning rate for a ``[rows, cols]`` matrix, as ``torch.optim.Muon`` defines the names."""
    if adjust_lr_fn == "original":
        return math.sqrt(max(1.0, rows / cols))
    return 0.2 * math.sqrt(max(rows, cols))


def parameters_by_role(model: Declares) -> dict[str, list[nn.Parameter]]:
    """Every parameter of ``model`` under its declared role; raises ValueError unless each has exactly one."""
    roles: dict[str, list[nn.Parameter]] = {}
    seen: dict[int, str] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for role, parameter in model.declare():
        if role not in MUON_ROLES | ADAMW_ROLES:
            raise ValueError(f"parameter {names.get(id(parameter))} has the unknown role {role!r}")
        if id(parameter) in seen:
            raise ValueError(f"parameter {names.get(id(parameter))} is declared twice: {seen[id(parameter)]}, {role}")
        seen[id(parameter)] = role
        roles.setdefault(role, []).append(parameter)
    missing = [name for key, name in names.items() if key not in seen]
    if missing:
        raise ValueError(f"parameters without a role: {', '.join(missing)}")
    return roles


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
