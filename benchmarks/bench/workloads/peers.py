"""The others: transformers' network of the same shape, and torch's optimizers."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bench.workloads.setup import seconds
from nanokimi.config import ModelConfig
from nanokimi.interop.huggingface import huggingface_config

PATIENCE = 20.0  # seconds: a step that would take longer is put together from one matrix of each shape
LR, ADAM_LR = 0.02, 0.003


def deepseek_v3(config: ModelConfig, device: torch.device) -> Any:
    """``DeepseekV3ForCausalLM`` of the same shape in fp32, random weights.

    Raises:
        ImportError: transformers is not installed.
    """
    transformers: Any = import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    shape = transformers.DeepseekV3Config(**huggingface_config(config))
    return transformers.DeepseekV3ForCausalLM(shape).float().to(device)


class MuonAndAdamW:
    """torch.optim.Muon for the matrices, torch.optim.AdamW for the rest: what one would combine by hand.

    Muon takes nothing but matrices, so a stack of experts ``[E, rows, cols]`` becomes views of one matrix each, which
    share weight and gradient with it and cost no memory. Embedding and head, known by their names, go to AdamW.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.matrices: list[Tensor] = []
        self._stacks: list[tuple[Tensor, list[Tensor]]] = []
        others = []
        for name, parameter in parameters:
            if parameter.ndim < 2 or any(part in name for part in ("embed", "head.")):
                others.append(parameter)
            elif parameter.ndim == 2:
                self.matrices.append(parameter)
            else:
                views = [view.requires_grad_() for view in parameter.detach().unbind()]
                self._stacks.append((parameter, views))
                self.matrices += views
        self.muon = torch.optim.Muon(self.matrices, lr=LR)
        self.adamw = torch.optim.AdamW(others, lr=ADAM_LR)

    def step(self) -> None:
        """One update of everything."""
        with self._gradients():
            self.muon.step()
        self.adamw.step()

    def is_slow(self) -> bool:
        """Whether a step would take longer than PATIENCE, judged by one matrix of a middling shape.

        torch.optim.Muon computes in bf16, which takes minutes on a CPU without bf16 arithmetic.
        """
        groups = self._by_shape()
        group = groups[len(groups) // 2]
        total = sum(newton_schulz_cost(matrix) for matrix in self.matrices)
        with self._gradients():
            began = time.perf_counter()
            torch.optim.Muon([group[0]], lr=LR).step()
        return (time.perf_counter() - began) / newton_schulz_cost(group[0]) * total > PATIENCE

    def extrapolated(self, device: torch.device) -> float:
        """Seconds of a step: one matrix of each distinct shape, times their number, and all of AdamW."""
        total = seconds(self.adamw.step, device)
        with self._gradients():
            for group in self._by_shape():
                total += len(group) * seconds(torch.optim.Muon([group[0]], lr=LR).step, device)
        return total

    def step_largest(self) -> None:
        """The memory of a step without its time: all of the state, Muon for one matrix of the largest shape."""
        for matrix in self.matrices:
            state = self.muon.state[matrix]
            state.setdefault("momentum_buffer", torch.ones_like(matrix))
        largest = self._by_shape()[-1][0]
        with self._gradients():
            kept = [matrix.grad for matrix in self.matrices]
            for matrix in self.matrices:
                matrix.grad = matrix.grad if matrix is largest else None
            self.muon.step()
            for matrix, gradient in zip(self.matrices, kept, strict=True):
                matrix.grad = gradient
        self.adamw.step()

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """Lends the views their share of the stacks' gradients."""
        for stack, views in self._stacks:
            assert stack.grad is not None
            for view, gradient in zip(views, stack.grad.unbind(), strict=True):
                view.grad = gradient
        yield
        for _, views in self._stacks:
            for view in views:
                view.grad = None

    def _by_shape(self) -> list[list[Tensor]]:
        """The matrices of each distinct shape, cheap shapes first."""
        groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for matrix in self.matrices:
            groups[matrix.shape].append(matrix)
        return sorted(groups.values(), key=lambda group: newton_schulz_cost(group[0]))


def newton_schulz_cost(matrix: Tensor) -> float:
    """Multiplications of a step, up to a constant: ``2 s^2 l + s^3`` for the shorter and the longer side."""
    short, long = sorted(matrix.shape)
    return float(2 * short**2 * long + short**3)


def random_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Something to step along."""
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
