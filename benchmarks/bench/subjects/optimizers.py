"""One update of all parameters: MuonClip, torch.optim.Muon with AdamW, AdamW alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.bench.clock import seconds
from benchmarks.bench.subjects.peers import LR, MuonAndAdamW, random_gradients
from benchmarks.bench.subjects.shapes import as_training_does, model_of, train_config, use
from nanokimi.optim.muonclip import make_optimizer


class Optimizer:
    """An optimizer over the weights of a preset, with random gradients.

    Args:
        kind: ``muonclip``, ``muon`` (torch.optim.Muon and AdamW), ``adamw_fused`` or ``adamw_foreach``.
    """

    def __init__(self, preset: str, kind: str, device: str, threads: int) -> None:
        self.device = use(device, threads)
        if kind == "muonclip":
            as_training_does(self.device)
        model = model_of(preset, self.device)
        random_gradients(model.parameters())
        model.max_logits.fill_(1.0)
        makers: dict[str, Callable[[], Any]] = {
            "muonclip": lambda: make_optimizer(model, train_config(preset, "off", 1)),
            "muon": lambda: MuonAndAdamW(model.named_parameters()),
            "adamw_fused": lambda: torch.optim.AdamW(model.parameters(), lr=LR, fused=True),
            "adamw_foreach": lambda: torch.optim.AdamW(model.parameters(), lr=LR, foreach=True),
        }
        self.optimizer = makers[kind]()

    def step(self) -> dict[str, Any]:
        """One update."""
        return {"seconds": seconds(self.optimizer.step, self.device)}

    def is_slow(self) -> dict[str, Any]:
        """See ``MuonAndAdamW.is_slow``."""
        return {"slow": self.optimizer.is_slow()}

    def extrapolate(self) -> dict[str, Any]:
        """See ``MuonAndAdamW.extrapolated``."""
        return {"seconds": self.optimizer.extrapolated(self.device)}
