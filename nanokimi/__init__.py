"""nanokimi: train, understand and run Kimi-K2-style language models of your own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanokimi.config import ModelConfig, TrainConfig
    from nanokimi.inference.generate import generate, generate_batch, generate_tokens
    from nanokimi.interop.loading import load
    from nanokimi.model.transformer import Transformer
    from nanokimi.optim.muonclip import MuonClip
    from nanokimi.optim.qk_clip import balance_experts

__version__ = "0.1.0"
__all__ = [
    "ModelConfig",
    "MuonClip",
    "TrainConfig",
    "Transformer",
    "balance_experts",
    "generate",
    "generate_batch",
    "generate_tokens",
    "load",
]

_HOMES = {
    "ModelConfig": "nanokimi.config",
    "MuonClip": "nanokimi.optim.muonclip",
    "TrainConfig": "nanokimi.config",
    "Transformer": "nanokimi.model.transformer",
    "balance_experts": "nanokimi.optim.qk_clip",
    "generate": "nanokimi.inference.generate",
    "generate_batch": "nanokimi.inference.generate",
    "generate_tokens": "nanokimi.inference.generate",
    "load": "nanokimi.interop.loading",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: ``import nanokimi`` alone stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'nanokimi' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
