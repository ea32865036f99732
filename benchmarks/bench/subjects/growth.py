"""How time and memory of a training step grow with its context, its batch and its experts."""

from __future__ import annotations

import statistics
from itertools import repeat
from typing import Any

from benchmarks.bench.clock import peak_bytes, seconds
from benchmarks.bench.subjects.shapes import as_training_does, model_of, random_batch, train_config, use
from nanokimi.optim.muonclip import make_optimizer
from nanokimi.training.step import TrainingStep


class Growth:
    """Forward and backward passes of changing size, eager; asked from small to large, for memory only ever grows."""

    def __init__(self, preset: str, device: str, threads: int) -> None:
        self.device, self.preset = use(device, threads), preset
        as_training_does(self.device)
        self.imports = peak_bytes(self.device)

    def passes(self, batch_size: int, context: int, repeats: int, **overrides: Any) -> dict[str, Any]:
        """Median seconds of ``repeats`` passes behind one to warm up, and the peak of memory above the imports."""
        model = model_of(self.preset, self.device, max_seq_length=context, **overrides)
        config = train_config(self.preset, "off", batch_size)
        step = TrainingStep(model, make_optimizer(model, config), config, self.device)
        batch = random_batch(model.config, batch_size, context)
        taken = []
        for _ in range(repeats + 1):
            taken.append(seconds(lambda: step.accumulate(repeat(batch)), self.device))
            step.clear()
        return {"seconds": statistics.median(taken[1:]), "bytes": peak_bytes(self.device) - self.imports}
