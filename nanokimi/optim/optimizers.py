"""The values of ``--optimizer``."""

from __future__ import annotations

from typing import Any

from torch import nn

from nanokimi.config import TrainConfig
from nanokimi.optim.muonclip import MuonClip


class Muon(MuonClip):
    """Muon for hidden matrices and AdamW for the rest, without QK-Clip."""

    def __init__(self, model: nn.Module, lr: float = 0.02, **options: Any) -> None:
        super().__init__(model, lr, **{**options, "tau": 0.0})


class AdamW(Muon):
    """AdamW for every parameter, at ``adam_lr``."""

    muon_roles = frozenset()


OPTIMIZERS: dict[str, type[MuonClip]] = {"muonclip": MuonClip, "muon": Muon, "adamw": AdamW}


def make_optimizer(model: nn.Module, config: TrainConfig, **where: Any) -> MuonClip:
    """The optimizer of a run; ``where``: the arguments ``group`` and ``orthogonalise`` of ``MuonClip``."""
    return OPTIMIZERS[config.optimizer](
        model, config.learning_rate, adam_lr=config.adam_lr, momentum=config.momentum,
        weight_decay=config.weight_decay, adjust_lr_fn=config.adjust_lr_fn, tau=config.qk_clip_tau, **where,
    )  # fmt: skip
