"""The most memory that a process takes to train, from its start to the end of the fourth step."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from itertools import repeat
from typing import Any

from benchmarks.bench.clock import peak_bytes
from benchmarks.bench.subjects.peers import MuonAndAdamW, deepseek_v3
from benchmarks.bench.subjects.shapes import as_training_does, model_of, random_batch, random_tokens, train_config, use
from benchmarks.bench.subjects.training import forward_and_backward
from nanokimi.config import ModelConfig
from nanokimi.optim.muonclip import make_optimizer
from nanokimi.training.step import TrainingStep

STEPS = 4  # the later ones meet the optimizer's state and what the allocator kept


class Memory:
    """A training run in a process of its own, measured once.

    Args:
        kind: ``nanokimi``, or ``transformers`` with torch.optim.Muon and AdamW.
        compiled, checkpointing: ours, as for ``--compile`` and ``--activation_checkpointing``.
    """

    def __init__(
        self, preset: str, batch_size: int, context: int, kind: str, device: str, threads: int, compiled: str = "off",
        checkpointing: bool = False,
    ) -> None:  # fmt: skip
        self.device = use(device, threads)
        self.preset, self.batch_size, self.context = preset, batch_size, context
        self.compiled, self.checkpointing = compiled, checkpointing
        self.run = {"nanokimi": self._ours, "transformers": self._theirs}[kind]
        if kind == "transformers":
            import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")  # before the baseline, as all imports
        self.imports = peak_bytes(self.device)

    def measure(self) -> dict[str, Any]:
        """Bytes at the peak, those of the imports, and whether Muon stepped for a single matrix only."""
        partial = self.run()
        return {"bytes": peak_bytes(self.device), "imports": self.imports, "partial": partial}

    def _ours(self) -> bool:
        as_training_does(self.device)
        model = model_of(self.preset, self.device, max_seq_length=self.context)
        config = train_config(self.preset, self.compiled, self.batch_size)
        config = replace(config, activation_checkpointing=self.checkpointing)
        step = TrainingStep(model, make_optimizer(model, config), config, self.device)
        batch = random_batch(model.config, self.batch_size, self.context)
        for _ in range(STEPS):
            step(repeat(batch))
        return False

    def _theirs(self) -> bool:
        config = ModelConfig.preset(self.preset, max_seq_length=self.context)
        model = deepseek_v3(config, self.device).train()
        tokens = random_tokens(config, self.batch_size, self.context).to(self.device)
        passes = forward_and_backward(model, tokens, self.device.type == "cuda")
        optimizer, slow = MuonAndAdamW(model.named_parameters()), None
        for _ in range(STEPS):
            passes()
            slow = optimizer.is_slow() if slow is None else slow
            (optimizer.step_largest if slow else optimizer.step)()
            model.zero_grad()
        return bool(slow)
