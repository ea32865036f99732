"""From ``--parallel`` and the ranks there are to a layout, and to a model that lies on them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.console import counted, log
from nanokimi.errors import UserError
from nanokimi.memory import free_memory
from nanokimi.model.transformer import Transformer
from nanokimi.parallel.layout import Layout, share_of_step
from nanokimi.parallel.ranks import ParallelModel, Ranks, SingleDevice, current_ranks

REPLICA_SHARE = 0.8  # of a rank's memory: what a replica may need, by estimate


def layout_of_run(config: TrainConfig, model_config: ModelConfig, device: torch.device) -> Layout:
    """How the model will lie on the ranks of this run, which are told of it; errors as for ``choose_layout``."""
    ranks = current_ranks()

    def fits() -> bool:  # on all ranks, for they must choose the same
        return not any(ranks.max([not replica_fits(config, model_config, device, ranks)]))

    layout = choose_layout(config, model_config, ranks, fits)
    if line := about_layout(layout, config):
        log(line)
    return layout


def choose_layout(
    config: TrainConfig, model_config: ModelConfig, ranks: Ranks, replica_fits: Callable[[], bool]
) -> Layout:
    """What ``--parallel``, ``--replicate`` and ``--expert_parallel`` mean on these ranks.

    ``auto`` shards nothing on one rank. On several, every rank holds a replica if one fits, and a shard if none does or
    if ``--replicate`` or ``--expert_parallel`` asks for shards.

    Raises:
        UserError: the numbers do not divide, or there is nobody to share with.
    """
    mode = config.parallel
    asks_for_shards = config.replicate > 1 or config.expert_parallel > 0
    if mode == "auto" and ranks.size == 1 and not asks_for_shards:
        mode = "one"
    elif mode == "auto":
        mode = "fsdp" if asks_for_shards or not replica_fits() else "ddp"
    if mode != "one" and not ranks.launched:
        raise UserError(
            "--parallel, --replicate and --expert_parallel need several processes: start them with "
            "torchrun --nproc_per_node=N train.py ..., or leave the flag out"
        )
    layout = Layout(mode, ranks.size, config.replicate, config.expert_parallel)
    layout.check_experts(model_config.n_routed_experts)
    share_of_step(config.batch_size, config.gradient_accumulation, ranks.size)
    return layout


def replica_fits(config: TrainConfig, model_config: ModelConfig, device: torch.device, ranks: Ranks) -> bool:
    """Whether each rank has the memory to train the whole model; True where the memory cannot be measured."""
    from nanokimi.parallel.memory_estimate import CPU, GPU, Job, memory, peak

    parts = share_of_step(config.batch_size, config.gradient_accumulation, ranks.size)
    cuda, layout = device.type == "cuda", Layout("ddp", ranks.size)
    estimated = GPU if cuda else CPU
    job = Job(model_config, layout, *parts, device=estimated, checkpointing=config.activation_checkpointing)
    need = peak(memory(job))
    if cuda:
        return need < REPLICA_SHARE * torch.cuda.get_device_properties(device).total_memory
    free = free_memory()
    return free is None or need * ranks.on_this_machine < REPLICA_SHARE * free


def build_parallel_model(config: ModelConfig, layout: Layout, device: torch.device) -> ParallelModel:
    """A model with fresh weights, the same for every layout, on ``device`` and the other ranks' devices."""
    if layout.mode == "one":
        return SingleDevice(Transformer(config).to(device))
    ranks = current_ranks()
    if layout.mode == "ddp":
        from nanokimi.parallel.ddp import Replicated

        return Replicated(Transformer(config).to(device), ranks)
    from nanokimi.parallel.fsdp import Sharded

    with torch.device("meta"):
        model = Transformer(config)
    return Sharded(model, ranks, layout, device)


def about_layout(layout: Layout, config: TrainConfig) -> str:
    """One line for the user; empty for one process."""
    if layout.mode == "one":
        return ""
    parts = share_of_step(config.batch_size, config.gradient_accumulation, layout.ranks)
    kinds = [counted(layout.replicas, "replica"), f"each in {counted(layout.shards, 'shard')}"]
    kinds += [f"experts distributed over {counted(layout.expert_parallel, 'rank')}"] if layout.expert_parallel else []
    sequences = config.batch_size * config.gradient_accumulation
    return (
        f"{counted(layout.ranks, 'rank')}, {layout.mode}: {', '.join(kinds)}; a step's {sequences} sequences are "
        f"{parts.passes} x {parts.batch_size} on each rank"
    )
