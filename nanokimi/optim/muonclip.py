"""MuonClip (Kimi K2 report, section 2.1): Muon for hidden matrices, AdamW for the rest, QK-Clip after the step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanokimi.ops.adamw import AdamW, Lists, adamw_
from nanokimi.ops.newton_schulz import batches_of, orthogonalise
from nanokimi.optim.qk_clip import ScaledRows, qk_clip_
from nanokimi.optim.shards import Orthogonalise, is_sharded, local, orthogonalise_gathered
from nanokimi.optim.statistics import Noting, group_of, share_statistics, unwrapped

MUON_ROLES = frozenset({"query_key", "matrix", "experts"})
ADAMW_ROLES = frozenset({"embedding", "head", "norm"})
UNDECLARED = ("undeclared matrix", "undeclared vector")  # roles of what nobody declared; AdamW's
STATE = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}  # tensors like the parameter


class Declares(Noting, Protocol):
    """What MuonClip needs of a model; ``nanokimi.Transformer`` has it."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...

    def param_roles(self) -> Sequence[tuple[str, nn.Parameter]]: ...

    def qk_rows(self) -> Sequence[Sequence[ScaledRows]]: ...


class Together(NamedTuple):
    """Parameters that are updated by the same calls, as they are declared; their rows on this rank, and its state."""

    declared: list[Tensor]
    parameters: list[Tensor]
    state: dict[str, list[Tensor]]

    @property
    def grads(self) -> list[Tensor]:
        """The present gradients, of the same rows."""
        return [local(p.grad) for p in self.declared if p.grad is not None]


class MuonClip(torch.optim.Optimizer):
    """One optimizer for the whole model; what each parameter is, the model declares.

    A step updates every parameter that has a gradient, clips the heads whose logits passed ``tau`` in any forward pass
    since the step before, on any rank, has the model move its balance biases, and starts its statistics anew. Heads
    whose largest logit is not finite are not clipped.

    Args:
        model: a ``Transformer``, which may be compiled, wrapped in DistributedDataParallel, sharded by ``fully_shard``
            or a part of another module. Parameters that it does not declare go to AdamW, with a warning.
        lr: Muon's rate; 0.02 belongs to ``adjust_lr_fn="original"``, AdamW-like rates to the other.
        adam_lr: AdamW's rate.
        momentum, nesterov: Muon's momentum, in the exponential form of ``torch.optim.Muon``.
        weight_decay: decoupled, of matrices only (embedding and head included).
        adjust_lr_fn: ``original`` scales an update by ``sqrt(max(1, rows / cols))`` (Jordan et al., 2024),
            ``match_rms_adamw`` by ``0.2 sqrt(max(rows, cols))`` (Liu et al., 2025).
        tau: largest attention logit allowed; 0 switches QK-Clip off.
        ns_dtype: precision of Newton-Schulz; None chooses by hardware.
        group: the ranks that train the model together; None: all there are.
        orthogonalise: where the model lies on several ranks, a way to share that work (``parallel.owners``); by
            default every rank does all of it.

    Attributes:
        non_finite: how many largest logits were not finite so far, a scalar.

    Raises:
        ValueError: a parameter is declared twice, or with an unknown role, or a value is out of range.
    """

    muon_roles = MUON_ROLES

    def __init__(
        self,
        model: nn.Module,
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
        group: dist.ProcessGroup | None = None,
        orthogonalise: Orthogonalise | None = None,
    ) -> None:
        if adjust_lr_fn not in ("original", "match_rms_adamw"):
            raise ValueError(f"adjust_lr_fn is {adjust_lr_fn!r}: choose original or match_rms_adamw")
        if not (lr >= 0 and adam_lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0 and tau >= 0):
            raise ValueError("lr, adam_lr, weight_decay and tau must be 0 or more, momentum in [0, 1)")
        self._model = cast(Declares, unwrapped(model))
        self._group, self._shared = group or group_of(model), False
        self.tau, self.ns_dtype, self.non_finite = tau, ns_dtype, torch.zeros((), dtype=torch.int64)
        muon = {"kind": "muon", "lr": lr, "momentum": momentum, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
        adamw = {"kind": "adamw", "lr": adam_lr, "betas": betas, "eps": eps}
        groups = []
        for role, parameters in parameters_by_role(model).items():
            kind = muon if role in self.muon_roles else adamw
            decay = 0.0 if role in ("norm", "undeclared vector") else weight_decay
            groups.append({**kind, "params": parameters, "weight_decay": decay, "is_qk": role == "query_key"})
        self._arrangements: dict[int, tuple[list[int], list[Together]]] = {}  # by the number of a group
        super().__init__(groups, {})
        for options in self.param_groups:
            options["initial_lr"] = options["lr"]
        if orthogonalise is None and any(is_sharded(p) for options in self.param_groups for p in options["params"]):
            orthogonalise = orthogonalise_gathered
        self._orthogonalise = orthogonalise

    @property
    def lr(self) -> float:
        """The present rate of hidden matrices."""
        return next(float(group["lr"]) for group in self.param_groups if group["is_qk"])

    def set_lr_factor(self, factor: float) -> None:
        """Sets each group's rate to ``factor`` times its initial one; call it before ``step``."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * factor

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; then QK-Clip, balance biases, fresh statistics."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.share_statistics()
        for number, group in enumerate(self.param_groups):
            for together in self._arranged(number, group):
                (self._muon if group["kind"] == "muon" else self._adamw)(group, together)
        if self.tau:
            self._clip()
        self._model.update_balance()
        self.skip_step()
        return loss

    def share_statistics(self) -> None:
        """Makes what the model noted that of all ranks: for who wants to look at it before ``step``."""
        if not self._shared:
            share_statistics(self._model, self._group)
            self._shared = True

    def skip_step(self) -> None:
        """Forgets what the model noted, without a step. Not to call it keeps that for the next one."""
        self._model.reset_stats()
        self._shared = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes ``state_dict()`` back; ValueError unless it fits this model's parameters."""
        super().load_state_dict(state_dict)
        self._arrangements.clear()  # they hold the state that there was
        for group in self.param_groups:
            names = STATE[group["kind"]]
            for parameter in group["params"]:
                shapes = {name: tensor.shape for name, tensor in self.state.get(parameter, {}).items()}
                fits = shapes == dict.fromkeys(names, parameter.shape) or not (shapes or parameter.requires_grad)
                if self.state and not fits:
                    raise ValueError(f"the state of a {list(parameter.shape)} parameter is {shapes or 'missing'}")

    def _arranged(self, number: int, group: dict[str, Any]) -> list[Together]:
        """The parameters of a group that have a gradient, arranged; anew only where others have one than before."""
        parameters: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        places = [local(p).data_ptr() for p in parameters]
        if self._arrangements.get(number, ([], []))[0] != places:
            whole = group["kind"] == "muon" and self._orthogonalise is None
            batches = batches_of(parameters) if whole else [range(len(parameters))]
            arranged = [self._together([parameters[i] for i in batch], STATE[group["kind"]]) for batch in batches]
            self._arrangements[number] = (places, arranged)
        return self._arrangements[number][1] if parameters else []

    def _together(self, declared: list[Tensor], names: Iterable[str]) -> Together:
        state = {name: [local(self._state(p, name)) for p in declared] for name in names}
        return Together(declared, [local(p) for p in declared], state)

    def _muon(self, group: dict[str, Any], together: Together) -> None:
        """Momentum, orthogonalisation, decay and update of matrices that share a batch."""
        parameters, grads, buffers = together.parameters, together.grads, together.state["momentum_buffer"]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        if self._orthogonalise is None:
            updates = orthogonalise(updates, dtype=self.ns_dtype)
        else:
            updates = self._orthogonalise(together.declared, updates, dtype=self.ns_dtype)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        shapes = [p.shape[-2:] for p in together.declared]
        for shape in dict.fromkeys(shapes):  # of whole matrices one, or the same transposed
            alike = [i for i, other in enumerate(shapes) if other == shape]
            lr = group["lr"] * update_scale(group["adjust_lr_fn"], *shape)
            torch._foreach_add_([parameters[i] for i in alike], [updates[i] for i in alike], alpha=-lr)

    def _adamw(self, group: dict[str, Any], together: Together) -> None:
        group["step"] = group.get("step", 0) + 1
        by = AdamW(group["step"], group["lr"], group["weight_decay"], group["betas"], group["eps"])
        state = together.state
        adamw_(Lists(together.parameters, together.grads, state["exp_avg"], state["exp_avg_sq"]), by)

    def _clip(self) -> None:
        logits = self._model.max_logits
        if self.non_finite.device != logits.device:
            self.non_finite = self.non_finite.to(logits.device)
        self.non_finite += (~(logits < torch.inf)).sum()
        qk_clip_(self._model.qk_rows(), logits, self.tau)

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


def parameters_by_role(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every parameter of ``model`` under its declared role; those without one at the end, as ``UNDECLARED``.

    Raises:
        ValueError: an unknown role, or a parameter that is declared twice.
    """
    roles: dict[str, list[nn.Parameter]] = {}
    seen: dict[int, str] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for role, parameter in cast(Declares, unwrapped(model)).param_roles():
        if role not in MUON_ROLES | ADAMW_ROLES:
            raise ValueError(f"parameter {names.get(id(parameter))} has the unknown role {role!r}")
        if id(parameter) in seen:
            raise ValueError(f"parameter {names.get(id(parameter))} is declared twice: {seen[id(parameter)]}, {role}")
        seen[id(parameter)] = role
        roles.setdefault(role, []).append(parameter)
    others = [(name, p) for name, p in model.named_parameters() if id(p) not in seen and p.requires_grad]
    if others:
        listed = ", ".join(name for name, _ in others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        warnings.warn(f"parameters that the model does not declare go to AdamW: {listed}", stacklevel=3)
    for _, parameter in others:
        roles.setdefault(UNDECLARED[parameter.ndim < 2], []).append(parameter)
    return roles
