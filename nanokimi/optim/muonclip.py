"""MuonClip (Kimi K2 report, section 2.1): Muon for hidden matrices, AdamW for the rest, QK-Clip after the step.

Most of the work is elementwise, on the rows of each parameter that lie on this rank. Newton-Schulz alone needs whole
matrices.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanokimi.config import TrainConfig
from nanokimi.ops.adamw import AdamWStep, TensorLists, adamw_
from nanokimi.ops.newton_schulz import batches_of, newton_schulz, newton_schulz_flops, orthogonalise
from nanokimi.optim.qk_clip import (
    bound_is_loose,
    group_of,
    is_sharded,
    local,
    local_rows,
    qk_clip_,
    share_statistics,
    unwrapped,
)

MUON_ROLES = frozenset({"query_key", "matrix", "experts"})
ADAMW_ROLES = frozenset({"embedding", "head", "norm"})
WITHOUT_ROLE = ("matrix without a role", "vector without a role")  # what the model does not know; AdamW's
STATE = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}  # tensors like the parameter


class Orthogonalise(Protocol):
    """``newton_schulz`` of the update of each parameter, given and returned as the rows on this rank.

    All ranks call it with the same parameters. ``dtype`` is that of the products; None chooses by hardware.
    """

    def __call__(
        self, parameters: Sequence[Tensor], updates: Sequence[Tensor], /, *, dtype: torch.dtype | None
    ) -> list[Tensor]: ...


class Bucket(NamedTuple):
    """Parameters that are updated by the same calls.

    Attributes:
        parameters: as the model holds them.
        local: their rows on this rank.
        state: by name, the optimizer state of the same rows.
    """

    parameters: list[Tensor]
    local: list[Tensor]
    state: dict[str, list[Tensor]]

    @property
    def grads(self) -> list[Tensor]:
        """The present gradients of the same rows."""
        return [local(p.grad) for p in self.parameters if p.grad is not None]


class MuonClip(torch.optim.Optimizer):
    """One optimizer for the whole model, which tells it the role of each parameter (``param_roles``).

    A step updates every parameter that has a gradient, clips the heads whose logits passed ``tau`` in any forward pass
    since the step before, on any rank, has the model move its balance biases, and starts its statistics anew. Heads
    whose largest logit is not finite are not clipped.

    Args:
        model: a ``Transformer``, which may be compiled, wrapped in DistributedDataParallel, sharded by ``fully_shard``
            or a part of another module. Parameters without a role go to AdamW, with a warning.
        lr: Muon's rate; 0.02 belongs to ``adjust_lr_fn="original"``, AdamW-like rates to the other.
        adam_lr: AdamW's rate.
        momentum, nesterov: Muon's momentum, in the exponential form of ``torch.optim.Muon``.
        weight_decay: decoupled, of matrices only (embedding and head included).
        adjust_lr_fn: ``original`` scales an update by ``sqrt(max(1, rows / cols))`` (Jordan et al., 2024),
            ``match_rms_adamw`` by ``0.2 sqrt(max(rows, cols))`` (Liu et al., 2025).
        tau: largest attention logit allowed; 0 switches QK-Clip off. Where ln(context) is over tau / 4 the model is
            told to measure logits exactly: their bound alone could pass tau.
        muon_roles: of the parameters that Muon updates; AdamW updates the others.
        ns_dtype: precision of Newton-Schulz; None chooses by hardware.
        group: the ranks that train the model together; None: all there are.
        orthogonalise: where the model lies on several ranks, a way to share that work
            (``parallel.distributed_muon``); by default every rank does all of it.

    Attributes:
        non_finite: how many largest logits were not finite so far, a scalar.
        needs_exact_logits: whether ``tau`` lies where the bound of the logits says too little.

    Raises:
        ValueError: a parameter has two roles or an unknown one, or a value is out of range.
    """

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
        muon_roles: frozenset[str] = MUON_ROLES,
        ns_dtype: torch.dtype | None = None,
        group: dist.ProcessGroup | None = None,
        orthogonalise: Orthogonalise | None = None,
    ) -> None:
        if adjust_lr_fn not in ("original", "match_rms_adamw"):
            raise ValueError(f"adjust_lr_fn is {adjust_lr_fn!r}: choose original or match_rms_adamw")
        if not (lr >= 0 and adam_lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0 and tau >= 0):
            raise ValueError("lr, adam_lr, weight_decay and tau must be 0 or more, momentum in [0, 1)")
        self._model = unwrapped(model)
        self._group, self._shared = group or group_of(model), False
        self.tau, self.ns_dtype, self.non_finite = tau, ns_dtype, torch.zeros((), dtype=torch.int64)
        self.needs_exact_logits = bound_is_loose(tau, self._model.logit_excess)
        self._model.exact_logits |= self.needs_exact_logits
        muon = {"kind": "muon", "lr": lr, "momentum": momentum, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
        adamw = {"kind": "adamw", "lr": adam_lr, "betas": betas, "eps": eps}
        groups = []
        for role, parameters in parameters_by_role(model).items():
            kind = muon if role in muon_roles else adamw
            decay = 0.0 if role in ("norm", "vector without a role") else weight_decay
            groups.append({**kind, "params": parameters, "weight_decay": decay, "is_qk": role == "query_key"})
        self._buckets: dict[int, tuple[list[int], list[Bucket]]] = {}  # by the number of a group
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
            for bucket in self._buckets_of(number, group):
                (self._muon if group["kind"] == "muon" else self._adamw)(group, bucket)
        if self.tau:
            logits = self._model.max_logits
            self.non_finite = self.non_finite.to(logits.device) + (~(logits < torch.inf)).sum()
            qk_clip_(self._model.qk_rows(), logits, self.tau)
        self._model.update_balance()
        self.skip_step()
        return loss

    def share_statistics(self) -> None:
        """Makes the statistics of the model those of all ranks, for a look at them before ``step``."""
        if not self._shared:
            share_statistics(self._model, self._group)
            self._shared = True

    def skip_step(self) -> None:
        """Starts the statistics of the model anew without a step; otherwise they count for the next one."""
        self._model.reset_stats()
        self._shared = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes ``state_dict()`` back; ValueError unless it fits this model's parameters."""
        super().load_state_dict(state_dict)
        self._buckets.clear()  # they hold the state that there was
        for group in self.param_groups:
            names = STATE[group["kind"]]
            for parameter in group["params"]:
                shapes = {name: tensor.shape for name, tensor in self.state.get(parameter, {}).items()}
                fits = shapes == dict.fromkeys(names, parameter.shape) or not (shapes or parameter.requires_grad)
                if self.state and not fits:
                    raise ValueError(f"the state of a {list(parameter.shape)} parameter is {shapes or 'missing'}")

    def _buckets_of(self, number: int, group: dict[str, Any]) -> list[Bucket]:
        """The parameters of a group that have a gradient; sorted anew only where others have one than before."""
        parameters: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        pointers = [local(p).data_ptr() for p in parameters]
        if self._buckets.get(number, ([], []))[0] != pointers:
            whole = group["kind"] == "muon" and self._orthogonalise is None
            batches = batches_of(parameters) if whole else [range(len(parameters))]
            buckets = [self._bucket([parameters[i] for i in batch], STATE[group["kind"]]) for batch in batches]
            self._buckets[number] = (pointers, buckets)
        return self._buckets[number][1] if parameters else []

    def _bucket(self, parameters: list[Tensor], names: Sequence[str]) -> Bucket:
        for parameter in parameters:
            for name in names:
                if name not in self.state[parameter]:  # before its first step
                    self.state[parameter][name] = torch.zeros_like(parameter)
        state = {name: [local(self.state[p][name]) for p in parameters] for name in names}
        return Bucket(parameters, [local(p) for p in parameters], state)

    def _muon(self, group: dict[str, Any], bucket: Bucket) -> None:
        """Momentum, orthogonalisation, decay and update of matrices that share a batch."""
        grads, buffers = bucket.grads, bucket.state["momentum_buffer"]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        if self._orthogonalise is None:
            updates = orthogonalise(updates, dtype=self.ns_dtype)
        else:
            updates = self._orthogonalise(bucket.parameters, updates, dtype=self.ns_dtype)
        torch._foreach_mul_(bucket.local, 1 - group["lr"] * group["weight_decay"])
        shapes = [p.shape[-2:] for p in bucket.parameters]
        for shape in dict.fromkeys(shapes):  # the scale depends on it, and a bucket may hold its transpose as well
            alike = [i for i, other in enumerate(shapes) if other == shape]
            lr = group["lr"] * update_scale(group["adjust_lr_fn"], *shape)
            torch._foreach_add_([bucket.local[i] for i in alike], [updates[i] for i in alike], alpha=-lr)

    def _adamw(self, group: dict[str, Any], bucket: Bucket) -> None:
        group["step"] = group.get("step", 0) + 1
        step = AdamWStep(group["step"], group["lr"], group["weight_decay"], group["betas"], group["eps"])
        adamw_(TensorLists(bucket.local, bucket.grads, bucket.state["exp_avg"], bucket.state["exp_avg_sq"]), step)


# The values of ``--optimizer``: what each adds to the options of ``MuonClip``.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muonclip": {},
    "muon": {"tau": 0.0},
    "adamw": {"tau": 0.0, "muon_roles": frozenset()},
}


def make_optimizer(model: nn.Module, config: TrainConfig, **where: Any) -> MuonClip:
    """The optimizer of a run; ``where``: the arguments ``group`` and ``orthogonalise`` of ``MuonClip``."""
    rates = {"lr": config.learning_rate, "adam_lr": config.adam_lr, "momentum": config.momentum}
    scales = {"weight_decay": config.weight_decay, "adjust_lr_fn": config.adjust_lr_fn, "tau": config.qk_clip_tau}
    return MuonClip(model, **{**rates, **scales, **OPTIMIZERS[config.optimizer], **where})


def largest_matrix(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of the matrix that takes Muon longest."""
    shapes = [(p.shape[-2], p.shape[-1]) for role, p in unwrapped(model).param_roles() if role in MUON_ROLES]
    return max(shapes, key=lambda shape: newton_schulz_flops(*shape), default=(1, 1))


def update_scale(adjust_lr_fn: str, rows: int, cols: int) -> float:
    """Factor of the learning rate for a ``[rows, cols]`` matrix, as ``torch.optim.Muon`` defines the names."""
    if adjust_lr_fn == "original":
        return math.sqrt(max(1.0, rows / cols))
    return 0.2 * math.sqrt(max(rows, cols))


def parameters_by_role(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every parameter of ``model`` under its role; those without one at the end, under ``WITHOUT_ROLE``.

    Raises:
        ValueError: an unknown role, or a parameter with two.
    """
    by_role: dict[str, list[nn.Parameter]] = {}
    seen: dict[int, str] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for role, parameter in unwrapped(model).param_roles():
        name = names.get(id(parameter))
        if role not in MUON_ROLES | ADAMW_ROLES:
            raise ValueError(f"parameter {name} has the unknown role {role!r}")
        if id(parameter) in seen:
            raise ValueError(f"parameter {name} has two roles: {seen[id(parameter)]}, {role}")
        seen[id(parameter)] = role
        by_role.setdefault(role, []).append(parameter)
    others = [(name, p) for name, p in model.named_parameters() if id(p) not in seen and p.requires_grad]
    if others:
        listed = ", ".join(name for name, _ in others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        warnings.warn(f"parameters without a role in the model go to AdamW: {listed}", stacklevel=3)
    for _, parameter in others:
        by_role.setdefault(WITHOUT_ROLE[parameter.ndim < 2], []).append(parameter)
    return by_role


def orthogonalise_gathered(
    parameters: Sequence[Tensor], updates: Sequence[Tensor], *, dtype: torch.dtype | None
) -> list[Tensor]:
    """An ``Orthogonalise``: every rank gathers every sharded matrix. Stacks are sharded between their matrices."""
    from torch.distributed.tensor import DTensor

    done = []
    for p, update in zip(parameters, updates, strict=True):
        if isinstance(p, DTensor) and p.ndim == 2:
            sharded = DTensor.from_local(update, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            done.append(newton_schulz(sharded.full_tensor(), dtype=dtype)[local_rows(p)])
        else:
            done.append(newton_schulz(update, dtype=dtype) if update.numel() else update)
    return done
