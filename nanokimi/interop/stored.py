"""A model at rest, in whichever format it lies on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.model.transformer import weight_shapes


@dataclass(frozen=True)
class StoredModel:
    """What a checkpoint or a folder holds of a model, before it is built.

    Attributes:
        weights: by the names of ``Transformer.state_dict()``, in the type in which they are stored.
        training: how it came about, in plain values for the model card; empty where nothing is known.
        notes: what of the original was left out or changed, a line each.
    """

    config: ModelConfig
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer
    training: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def with_shared_expert(model: StoredModel) -> StoredModel:
    """The same function of its tokens, with a shared expert of zeros where there is none: engines insist on one."""
    config = model.config
    if config.n_shared_experts or not config.n_moe_layers:
        return model
    config, like = replace(config, n_shared_experts=1), model.weights["head.weight"]
    added = {n: like.new_zeros(shape) for n, shape in weight_shapes(config).items() if n not in model.weights}
    return replace(model, config=config, weights={**model.weights, **added})
