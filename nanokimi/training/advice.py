"""Settings that are allowed, and that a user has hardly meant."""

from __future__ import annotations

from collections.abc import Iterator

from nanokimi.config import TrainConfig
from nanokimi.device import own_cores
from nanokimi.optim.schedule import lr_factor

LOW_PEAK = 0.75  # a cosine that falls from a warm-up of a quarter of the run stays above


def doubts(config: TrainConfig) -> Iterator[str]:
    """A line for each, with the figures and the remedy."""
    warmup, steps = config.warmup_steps, config.max_steps
    peak = max(
        lr_factor(config.schedule, step, step / steps, warmup_steps=warmup, decay_fraction=config.decay_fraction)
        for step in range(min(steps, warmup + 1))
    )
    if peak < LOW_PEAK:
        yield (
            f"--warmup_steps {warmup} is long for a run of {steps:,} steps: its learning rate gets no further than "
            f"{peak:.1%} of --learning_rate {config.learning_rate:g}: lower it, or raise --max_steps"
        )
    if config.num_workers > (cores := own_cores()):
        yield f"--num_workers {config.num_workers}: there is work for {cores}, as many as this process has cores"
