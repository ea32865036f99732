"""What a parameter is, so that an optimizer can treat it rightly without knowing the model.

A module that holds parameters has an attribute ``role``, which goes for all of them.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import nn

Role: TypeAlias = Literal["query_key", "matrix", "experts", "embedding", "head", "norm"]
Declaration: TypeAlias = tuple[Role, nn.Parameter]

QUERY_KEY: Role = "query_key"  # a matrix that attention logits depend on
MATRIX: Role = "matrix"  # any other hidden matrix, [out, in]
EXPERTS: Role = "experts"  # a stack of matrices, [E, out, in]
EMBEDDING: Role = "embedding"
HEAD: Role = "head"
NORM: Role = "norm"
