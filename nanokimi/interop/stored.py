"""A model as it is stored, in whichever format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nanokimi.config import ModelConfig
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.errors import UserError
from nanokimi.model.transformer import weight_shapes

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StoredModel:
    """What a checkpoint or a folder holds of a model."""

    config: ModelConfig
    weights: Mapping[str, Tensor]  # by the names of Transformer.state_dict(), in the type in which they are stored
    tokenizer: Tokenizer
    training: Mapping[str, Any] = field(default_factory=dict)  # how it was trained, for the model card
    notes: tuple[str, ...] = ()  # what of the original was left out or changed, a line each

    @property
    def dtype(self) -> str:
        """The type in which the matrices are stored: a key of ``DTYPES``."""
        stored = self.weights["head.weight"].dtype
        return next(name for name, dtype in DTYPES.items() if dtype == stored)

    def require_finite(self, problem: str = "values that are not finite: export an earlier checkpoint") -> None:
        """Raises UserError, naming the weight, if one holds NaN or infinity."""
        for name, weight in self.weights.items():
            if not weight.isfinite().all():
                raise UserError(f"{name}: holds {problem}")

    def with_dtype(self, dtype: str) -> StoredModel:
        """The same model with weights of type ``dtype``, a key of ``DTYPES``; balance biases are always fp32.

        Raises:
            UserError: an unknown type, or one that does not reach as far as the values.
        """
        if dtype not in DTYPES:
            raise UserError(f"--dtype {dtype}: choose one of auto, {', '.join(DTYPES)}")
        exact = {name for name in self.weights if name.endswith(".balance_bias")}
        types = {name: torch.float32 if name in exact else DTYPES[dtype] for name in self.weights}
        cast = replace(self, weights={name: weight.to(types[name]) for name, weight in self.weights.items()})
        cast.require_finite(f"values beyond those of {dtype}: choose --dtype bf16 or f32")
        return cast

    def with_shared_expert(self) -> StoredModel:
        """The same function of its tokens, with a shared expert of zeros where it has none, as engines need one."""
        if self.config.n_shared_experts or not self.config.n_moe_layers:
            return self
        config, like = replace(self.config, n_shared_experts=1), self.weights["head.weight"]
        added = {n: like.new_zeros(shape) for n, shape in weight_shapes(config).items() if n not in self.weights}
        return replace(self, config=config, weights={**self.weights, **added})
