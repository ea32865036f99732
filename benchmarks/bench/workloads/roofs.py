"""The machine's roofs: how fast it multiplies matrices and moves memory when it does nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.bench.workloads.setup import seconds, use

SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192)}
COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes of one array, well beyond any cache
QUICK_SIZES, QUICK_COPIED = (256,), 1 << 22
PATIENCE = 1.0  # seconds: a product slower than that is no candidate for the roof

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Roofs:
    """Products and passes over memory; the fastest of each kind is the roof.

    Args:
        device: where.
        quick: small ones, to see that it works.
    """

    def __init__(self, quick: bool, device: str, threads: int) -> None:
        self.device = use(device, threads)
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        self.sizes = QUICK_SIZES if quick else SIZES[kind]
        self.copied = QUICK_COPIED if quick else COPIED[kind]
        self._best: dict[str, str] = {}
        self._trials: dict[str, dict[str, dict[str, Any]]] = {}
        self._arrays: dict[str, Any] = {}
        self._products: dict[str, dict[str, Product]] = {
            "fp32": products_fp32(self.device),
            "bf16": {"torch": torch.mm},
        }

    def about(self) -> dict[str, Any]:
        """What this process computes with."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        capability = torch.backends.cpu.get_cpu_capability()
        return {"device": device, "torch_cpu_capability": capability, "threads": torch.get_num_threads()}

    def products(self, dtype: str) -> dict[str, Any]:
        """Names of the products that are worth timing, by trial: those fast enough, or if none is, one."""
        taken = self._trial(dtype)
        return {"names": [name for name, best in taken.items() if best["seconds"] <= PATIENCE] or list(taken)[:1]}

    def product(self, dtype: str, name: str) -> dict[str, Any]:
        """One product of square matrices."""
        kind, size = name.rsplit(" ", 1)
        n = int(size)
        multiply = self._products[dtype][kind]
        x, w = self._matrices(dtype, n)
        return {"seconds": seconds(lambda: multiply(x, w), self.device), "work": 2 * n**3}

    def matrix_roof(self, dtype: str) -> dict[str, Any]:
        """The fastest product, looked for the first time: seconds and FLOPs as ``work``."""
        if dtype not in self._best:
            taken = self._trial(dtype)
            self._best[dtype] = max(taken, key=lambda name: taken[name]["work"] / taken[name]["seconds"])
        return self.product(dtype, self._best[dtype]) | {"name": f"{dtype} {self._best[dtype]}"}

    def memory(self, name: str) -> dict[str, Any]:
        """One pass over large arrays: ``copy`` (bytes read and written), ``sum`` and ``dot`` (bytes read)."""
        x, y = self._rows()
        passes: dict[str, tuple[Callable[[], object], int]] = {
            "copy": (lambda: y.copy_(x), 2),
            "sum": (lambda: x.sum(), 1),
            "dot": (lambda: torch.dot(x, y), 2),
        }
        work, arrays = passes[name]
        return {"seconds": seconds(work, self.device), "work": arrays * x.nbytes}

    def read_roof(self) -> dict[str, Any]:
        """The faster way to read memory: seconds and bytes as ``work``."""
        if "read" not in self._best:
            taken = {name: _best_of(partial(self.memory, name)) for name in ("sum", "dot")}
            self._best["read"] = max(taken, key=lambda name: taken[name]["work"] / taken[name]["seconds"])
        return self.memory(self._best["read"])

    def _trial(self, dtype: str) -> dict[str, dict[str, Any]]:
        """Every product once, smaller sizes first; one that takes too long ends its kind."""
        if dtype in self._trials:
            return self._trials[dtype]
        taken = self._trials[dtype] = {}
        for kind in self._products[dtype]:
            for size in self.sizes:
                name = f"{kind} {size}"
                taken[name] = _best_of(partial(self.product, dtype, name))
                if taken[name]["seconds"] > PATIENCE:
                    break
        return taken

    def _matrices(self, dtype: str, n: int) -> tuple[Tensor, Tensor]:
        key = f"{dtype} {n}"
        if key not in self._arrays:
            kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
            self._arrays[key] = torch.randn(2, n, n, device=self.device).to(kind).unbind()
        x, w = self._arrays[key]
        return x, w

    def _rows(self) -> tuple[Tensor, Tensor]:
        if "rows" not in self._arrays:
            count = self.copied // 4
            self._arrays["rows"] = (torch.ones(count, device=self.device), torch.ones(count, device=self.device))
        x, y = self._arrays["rows"]
        return x, y


def _best_of(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The fastest of three, or the first where that was slow; the first warms up."""
    first = work()
    if first["seconds"] > PATIENCE:
        return first
    return min((work() for _ in range(2)), key=lambda answer: float(answer["seconds"]))


def products_fp32(device: torch.device) -> dict[str, Product]:
    """What torch offers: its own product, and on a CPU oneDNN's, which transposes the second matrix."""
    offered: dict[str, Product] = {"torch": torch.mm}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise
        offered["oneDNN"] = lambda x, w: linear(x, w, None, "none", [], "")
    return offered
