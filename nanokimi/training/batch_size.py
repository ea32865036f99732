"""``--batch_size auto``: the largest batch size that fits into memory, in steps that keep their number of sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.data.batch import Batch
from nanokimi.errors import UserError
from nanokimi.memory import free_memory, process_memory
from nanokimi.model.transformer import Transformer
from nanokimi.optim.muonclip import STATE, make_optimizer
from nanokimi.parallel.layout import share_of_step
from nanokimi.parallel.ranks import current_ranks
from nanokimi.training.step import TrainingStep

CPU_SHARE, CUDA_SHARE = 0.7, 0.9  # of the free memory: other programs need some, and allocators waste some
GB = 1e9

Need = Callable[[int], float]  # bytes of a training step by its batch size; infinite where it was tried and failed


def with_fitting_batch(
    config: TrainConfig,
    model_config: ModelConfig,
    device: torch.device,
    log: Callable[[str], None],
) -> TrainConfig:
    """``config`` with the largest batch size that fits and the gradient accumulation that goes with it.

    It measures a whole model with the share of a step that each rank has; the smallest result counts.

    Raises:
        UserError: not even one sequence fits, the memory cannot be measured here, or the model is to be in shards.
    """
    if config.parallel == "fsdp" or config.replicate > 1 or config.expert_parallel:
        raise UserError("--batch_size auto measures whole models: name a number (nanokimi plan says what it takes)")
    ranks = current_ranks()
    parts = share_of_step(config.batch_size, config.gradient_accumulation, ranks.size)
    sequences = parts.batch_size * parts.passes
    divisors = [n for n in range(1, sequences + 1) if sequences % n == 0]
    trial = replace(config, batch_size=1, gradient_accumulation=1, compile="off")
    if device.type == "cuda":
        free, need = _free_on_cuda(device) * CUDA_SHARE, _cuda_need(trial, model_config, device)
    elif device.type == "cpu":
        free, need = _free_on_host() * CPU_SHARE, _cpu_need(trial, model_config)
    else:
        raise UserError(f"--batch_size auto cannot measure the memory of {device.type}: name a number")
    batch = largest_fitting(divisors, need, free)
    passes = sequences // batch
    log(
        f"batch size {batch}: a step's {sequences} sequences in {passes} pass{'es' if passes > 1 else ''}, "
        f"about {need(batch) / GB:.1f} GB of the {free / GB:.1f} GB that may be used"
    )
    smallest = -int(ranks.max([-batch])[0])
    return replace(config, batch_size=smallest, gradient_accumulation=sequences // smallest * ranks.size)


def largest_fitting(sizes: list[int], need: Need, free: float) -> int:
    """The largest of the ascending ``sizes`` below the first one that needs more than ``free`` bytes.

    Raises:
        UserError: even the smallest size needs more.
    """
    best = 0
    for size in sizes:
        if need(size) > free:
            break
        best = size
    if not best:
        raise UserError(
            f"--batch_size auto: a step of one sequence needs more than the {free / GB:.1f} GB that may be used: "
            "try --activation_checkpointing, --set max_seq_length=... or a smaller --preset"
        )
    return best


# ---- on a CPU: one and two sequences are measured, and a line through both tells the rest -------


def _cpu_need(config: TrainConfig, model_config: ModelConfig) -> Need:
    before = _known(process_memory("VmRSS"))
    step = _trial_step(config, model_config, torch.device("cpu"))
    groups = step.optimizer.param_groups
    state = sum(len(STATE[group["kind"]]) * p.nbytes for group in groups for p in group["params"])
    one, two = (_peak_on_host(step, batch) - before + state for batch in (1, 2))
    return lambda batch: one + (batch - 1) * max(0, two - one)


def _peak_on_host(step: TrainingStep, batch: int) -> int:
    """Bytes that this process holds at the peak of one forward and backward pass."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (man 5 proc)
    except OSError as error:
        raise UserError("--batch_size auto cannot measure memory on this system: name a number") from error
    _pass(step, batch)
    peak = _known(process_memory("VmHWM"))
    step.clear()
    return peak


def _free_on_host() -> int:
    return _known(free_memory())


def _known(size: int | None) -> int:
    if size is None:
        raise UserError("--batch_size auto cannot measure memory on this system: name a number")
    return size


# ---- on CUDA: each size is tried with a whole step ----------------------------------------------


def _cuda_need(config: TrainConfig, model_config: ModelConfig, device: torch.device) -> Need:
    @cache
    def need(batch: int) -> float:
        """Bytes reserved at the peak of a step."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        try:
            step = _trial_step(config, model_config, device)
            _pass(step, batch)
            step.optimizer.step()
            return float(torch.cuda.max_memory_reserved(device) - before)
        except torch.OutOfMemoryError:
            return float("inf")

    return need


def _free_on_cuda(device: torch.device) -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _trial_step(config: TrainConfig, model_config: ModelConfig, device: torch.device) -> TrainingStep:
    """A step with a model of its own, so that nothing of the run is touched."""
    model = Transformer(model_config).to(device)
    return TrainingStep(model, make_optimizer(model, config), config, device)


def _pass(step: TrainingStep, batch: int) -> None:
    shape = (batch, step.model.config.max_seq_length + 1)
    step.accumulate(iter([Batch.of_rows(torch.randint(step.model.config.vocab_size, shape))]))
