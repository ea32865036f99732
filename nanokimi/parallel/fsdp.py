"""Fully sharded data parallelism (Zhao et al., 2023) by PyTorch's ``fully_shard``; hybrid; with expert parallelism.

Weights, gradients and optimizer state are cut along their first dimension over the ranks of a replica. A block is
gathered for as long as it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from nanokimi.model.transformer import Transformer
from nanokimi.optim.qk_clip import local
from nanokimi.parallel.ddp import compile_blocks
from nanokimi.parallel.distributed_muon import DistributedMuon
from nanokimi.parallel.experts import ExpertExchange
from nanokimi.parallel.layout import Layout
from nanokimi.parallel.ranks import Ranks


class Sharded:
    """A model whose weights are sharded along their rows.

    Args:
        model: on the meta device: no rank ever holds all of it.
    """

    def __init__(self, model: Transformer, ranks: Ranks, layout: Layout, device: torch.device) -> None:
        layout.check_experts(model.config.n_routed_experts)
        self.model, self.ranks, self.layout = model, ranks, layout
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        self._shard = ranks.rank % layout.shards
        by_replica = torch.arange(ranks.size).view(layout.replicas, layout.shards)
        self._mesh = DeviceMesh(device.type, by_replica, mesh_dim_names=("replicate", "shard"))
        if layout.expert_parallel:
            self._expert_mesh = self._distribute_experts(by_replica, device)
        self._wrap()
        model.to_empty(device=device)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._initialise()
        groups = (self._mesh.get_group("shard"), self._mesh.get_group("replicate"))
        self.orthogonalise = DistributedMuon(layout, self, ranks.rank, *groups).orthogonalise

    # ---- setting up -----------------------------------------------------------------------------

    def _distribute_experts(self, by_replica: Tensor, device: torch.device) -> DeviceMesh:
        """Leaves each rank its own experts, and sends tokens to those of the others."""
        experts, n = self.layout.expert_parallel, self.model.config.n_routed_experts
        ranks = by_replica.view(self.layout.replicas, -1, experts).transpose(1, 2)
        mesh = DeviceMesh(device.type, ranks, mesh_dim_names=("replicate", "expert", "expert_shard"))
        for moe in self.model.moe_layers():
            for name, stack in list(moe.experts.named_parameters()):
                setattr(moe.experts, name, nn.Parameter(stack[: n // experts].detach().clone()))
            ExpertExchange(mesh.get_group("expert")).attach(moe.experts)
        return mesh

    def _wrap(self) -> None:
        # Experts first: ranks of one expert group hold different experts, so their shards lie on a mesh of its own, and
        # a module that is sharded already is left out when the block around it is.
        if self.layout.expert_parallel:
            for moe in self.model.moe_layers():
                fully_shard(moe.experts, mesh=self._fsdp_mesh(self._expert_mesh, "expert_shard"))
        for module in (*self.model.blocks(), self.model):
            fully_shard(module, mesh=self._fsdp_mesh(self._mesh, "shard"))
        for part in self._fsdp_modules():
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot compute a mean

    def _fsdp_mesh(self, mesh: DeviceMesh, shard: str) -> DeviceMesh:
        return mesh["replicate", shard] if self.layout.replicas > 1 else mesh[shard]

    def _fsdp_modules(self) -> list[FSDPModule]:
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    @torch.no_grad()
    def _initialise(self) -> None:
        """Draws the weights that one process would begin with: each whole, one after the other, and keeps its rows."""
        for role, parameter in self.model.param_roles():
            name = self._names[id(parameter)]
            whole = torch.empty(self._shapes[name], dtype=parameter.dtype)
            self.model.fill(role, whole)
            self.copy_rows(name, parameter, whole)
        for router in self.model.routers():
            nn.init.zeros_(router.balance_bias)
        self.model.reset_buffers()

    # ---- training -------------------------------------------------------------------------------

    def training_module(self, compiled: bool) -> nn.Module:
        if compiled:
            compile_blocks(self.model)
        return self.model

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        # Within a replica gradients are reduced after every pass, for whole ones would not fit; between replicas the
        # sum of all passes is enough.
        for module in self._fsdp_modules():
            module.set_requires_all_reduce(last, recurse=False)
        return nullcontext()

    def clip_gradients(self, limit: float) -> Tensor:
        gradients = {name: local(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}
        if experts := [grad for name, grad in gradients.items() if self._has_own_mesh(name)]:
            # An expert has seen the tokens of all ranks of its group. FSDP averages over the ranks that hold the same
            # experts, so the division by the size of the group is missing.
            torch._foreach_mul_(experts, 1 / self.layout.expert_parallel)
        grads = list(gradients.values())
        norms = torch.stack(torch._foreach_norm(grads)).double()
        square = norms.square().sum() / self.layout.replicas
        dist.all_reduce(square)
        norm = square.sqrt()
        torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0).to(grads[0].dtype))
        return norm

    def all_reduce(self, numbers: Tensor) -> Tensor:
        dist.all_reduce(numbers)
        return numbers

    # ---- rows of shards and whole tensors -------------------------------------------------------

    def shard_rows(self, parameter: Tensor, shard: int) -> slice:
        return self._shard_rows(self._names[id(parameter)], shard)

    def _shard_rows(self, name: str, shard: int) -> slice:
        return self.layout.shard_rows(self._shapes[name][0], shard, distributed=self._has_own_mesh(name))

    def _has_own_mesh(self, name: str) -> bool:
        """Whether ``name`` is a stack of experts that are distributed over ranks of their own."""
        return self.layout.expert_parallel > 0 and ".experts." in name

    def copy_rows(self, name: str, here: Tensor, whole: Tensor) -> None:
        rows = self._shard_rows(name, self._shard) if name in self._shapes else slice(None)
        local(here.detach()).copy_(whole[rows])

    def as_dtensor(self, name: str, tensor: Tensor) -> Tensor:
        if not self._has_own_mesh(name):
            return tensor
        shape = self._shapes[name]
        stride = torch.empty(shape, device="meta").stride()
        placements = (Replicate(), Shard(0), Shard(0))
        return DTensor.from_local(
            local(tensor), self._expert_mesh, placements, run_check=False, shape=shape, stride=stride
        )

    def full_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            value = self.as_dtensor(name, tensor.detach())
            if isinstance(value, DTensor):
                if value.device_mesh.ndim == 3:  # of experts; gathered along one dimension of the mesh after the other
                    value = value.redistribute(placements=(Replicate(), Shard(0), Replicate()))
                value = value.full_tensor()
            if self.ranks.is_main:
                found[name] = value.cpu()
        return found
