"""Trains the debug preset for a few steps in every way that it can be spread over ranks, and writes down what happened.

``equal_worker.py FOLDER`` forks into one process, then into 2 and 4 ranks; all of ``WAYS`` leave FOLDER/WAY.pt.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import forked
from torch import Tensor

from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.data.sources import open_corpus
from nanokimi.optim import muonclip
from nanokimi.optim.qk_clip import local, qk_clip_
from nanokimi.parallel.layout import Layout
from nanokimi.parallel.ranks import Ranks, from_bytes, to_bytes
from nanokimi.training.trainer import Trainer

STEPS, FP32_STEPS, SEQUENCES, LENGTH, LIMIT = 30, 10, 8, 32, 1.0
SMALL_PASSES = {"batch_size": 1, "gradient_accumulation": SEQUENCES}
PLAIN = {"batch_size": 2, "gradient_accumulation": SEQUENCES // 2, "learning_rate": 0.05, "qk_clip_tau": 3.52}
# Documents kept apart, blocks computed twice, and logits that grow until they are measured exactly.
OTHER = {**PLAIN, "learning_rate": 0.2, "qk_clip_tau": 3.6, "qk_clip_meter": "exact"}
OTHER |= {"mask_documents": True, "activation_checkpointing": True}


@dataclass(frozen=True)
class Way:
    """A layout, and the settings of the run that goes on it."""

    layout: Layout
    settings: dict[str, Any] = field(default_factory=lambda: PLAIN)

    @property
    def reference(self) -> str:
        """The name of the run of one process that must give the same."""
        return "other" if self.settings is OTHER else "plain"


WAYS = {
    "plain": Way(Layout("one")),
    "other": Way(Layout("one"), OTHER),
    "ddp-2": Way(Layout("ddp", 2)),
    "fsdp-2": Way(Layout("fsdp", 2)),
    "experts-2": Way(Layout("fsdp", 2, expert_parallel=2)),
    "ddp-4": Way(Layout("ddp", 4)),
    "fsdp-4": Way(Layout("fsdp", 4)),
    "hybrid-4": Way(Layout("fsdp", 4, replicate=2), {**PLAIN, **SMALL_PASSES}),
    "experts-4": Way(Layout("fsdp", 4, expert_parallel=4)),
    "experts-2-of-4": Way(Layout("fsdp", 4, expert_parallel=2)),
    "experts-2-in-hybrid-2": Way(Layout("fsdp", 4, replicate=2, expert_parallel=2)),
    "other-ddp-2": Way(Layout("ddp", 2), OTHER),
    "other-experts-2": Way(Layout("fsdp", 2, expert_parallel=2), OTHER),
}
FP32 = ("plain", "ddp-2", "fsdp-2", "experts-2-in-hybrid-2")


def write_text(folder: Path) -> None:
    """A thousand documents of four words: several to every sequence."""
    words = Path(argparse.__file__).read_text(encoding="utf-8").split()[:4000]
    lines = [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(lines), encoding="utf-8")


def make_trainer(folder: Path, name: str, way: Way, ranks: Ranks, steps: int) -> Trainer:
    output = folder / name
    (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    config = TrainConfig(
        preset="debug", data_path=str(folder / "text.txt"), output_dir=str(output), max_steps=steps, warmup_steps=3,
        max_grad_norm=LIMIT, eval_interval=STEPS // 2, val_tokens=320, save_interval=0, timeout=60.0,
        compile="off", device="cpu", **way.settings,
    )  # fmt: skip
    with ranks.first_of_machine_first():
        corpus = open_corpus(config, "byte", log=lambda line: None)
    model = ModelConfig.preset("debug", max_seq_length=LENGTH)
    return Trainer(config, model, corpus, torch.device("cpu"), layout=way.layout)


def row_norms(trainer: Trainer) -> list[Tensor]:
    """Of the weights that QK-Clip scales, layer by layer, the norms of the rows here."""
    layers = [dict.fromkeys(rows.weight for rows in layer) for layer in trainer.model.qk_rows()]
    return [local(weight.detach()).norm(dim=1) for weights in layers for weight in weights]


def watch(trainer: Trainer) -> tuple[list[dict[str, Any]], list[list[Tensor]]]:
    """What the steps of ``trainer`` show, and by which factors QK-Clip changes the rows here, as they are made."""
    readings: list[dict[str, Any]] = []
    factors: list[list[Tensor]] = []
    read = trainer.step.read

    def reading(*arguments: Any) -> Any:
        found = read(*arguments)
        readings.append(found._asdict())
        return found

    def clipping(*arguments: Any) -> None:
        before = row_norms(trainer)
        qk_clip_(*arguments)
        factors.append([a / b for a, b in zip(row_norms(trainer), before, strict=True)])

    trainer.step.read, muonclip.qk_clip_ = reading, clipping  # type: ignore[method-assign]
    trainer.save = lambda *_, **__: None  # type: ignore[method-assign]  # takes longer than all the steps
    return readings, factors


def of_all_rows(factors: list[list[Tensor]], trainer: Trainer) -> list[list[Tensor]]:
    """For each replica, for each weight that QK-Clip scales, the factors ``[steps, rows]``."""
    here = [torch.stack(steps) for steps in zip(*factors, strict=True)]
    everyone = [from_bytes(data) for data in trainer.ranks.gather(to_bytes(here))]
    shards = trainer.parallel.layout.shards
    replicas = [everyone[first : first + shards] for first in range(0, len(everyone), shards)]
    return [[torch.cat(parts, dim=1) for parts in zip(*replica, strict=True)] for replica in replicas]


def train(folder: Path, name: str, ranks: Ranks, dtype: torch.dtype) -> dict[str, Any]:
    """A run of ``WAYS[name]``; what happened."""
    torch.set_default_dtype(dtype)
    steps = STEPS if dtype == torch.float64 else FP32_STEPS
    trainer = make_trainer(folder, f"{name}-{steps}", WAYS[name], ranks, steps)
    trainer.optimizer.ns_dtype = dtype  # bf16, which some CPUs would take, tells any two orders of a sum apart
    # The taus are such that the bound itself clips some heads, which is what has to be equal.
    trainer.optimizer.needs_exact_logits = trainer.model.exact_logits = False
    readings, factors = watch(trainer)
    trainer.train()
    return {
        "readings": readings,
        "factors": of_all_rows(factors, trainer),
        "weights": trainer.parallel.full_tensors(trainer.model.state_dict()),
        "counters": asdict(trainer.counters),
        "history": trainer.metrics.history(),
    }


def rank_of(folder: Path, rank: int, size: int) -> None:
    """All runs of this rank among ``size``, one after the other."""
    if size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet-{size}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=60),
        )
    ranks = Ranks(rank, size, rank, size, launched=size > 1)
    for name, way in WAYS.items():
        if way.layout.ranks == size:
            found = {"fp64": train(folder, name, ranks, torch.float64)}
            if name in FP32:
                found["fp32"] = train(folder, name, ranks, torch.float32)
            if ranks.is_main:
                torch.save(found, folder / f"{name}.pt")
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for slow in ("torch.distributed.fsdp", "torch._dynamo"):
        importlib.import_module(slow)  # what every rank would do, once
    place = Path(sys.argv[1])
    write_text(place)
    sys.exit(sum(forked(lambda rank, size=size: rank_of(place, rank, size), size) for size in (1, 2, 4)))
