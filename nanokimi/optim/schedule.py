"""The learning rate over a run, as a factor of its peak."""

from __future__ import annotations

import math


def lr_factor(schedule: str, step: int, progress: float, *, warmup_steps: int, decay_fraction: float) -> float:
    """Factor in (0, 1] for the step that is about to be taken.

    Warm-up is linear and never zero: the first step already learns. Behind it ``constant`` stays level,
    ``cosine`` falls to zero along half a wave, ``wsd`` (warm-up, stable, decay; Hu et al., 2024)
    stays level and falls linearly to zero over the last ``decay_fraction``.

    Args:
        step: steps taken before this one.
        progress: share of the run that is over, 0 to 1, by steps or by time.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    left = max(0.0, 1.0 - progress)
    if schedule == "cosine":
        return warmup * 0.5 * (1.0 - math.cos(math.pi * left))
    if schedule == "wsd" and left < decay_fraction:
        return warmup * left / decay_fraction
    return warmup
