"""Takes steps of the debug preset on some layouts, on several processes, and counts what they exchange and hold.

``python traffic_worker.py STORE RANKS,MODE,REPLICATE,EXPERT_PARALLEL,CHECKPOINTING,MEASURED ...`` prints, in JSON, what
was found for each layout, if MEASURED is 1 with the heights of memory. The processes are forked: all is imported once.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from forks import forked
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.data.batch import Batch
from nanokimi.optim.muonclip import make_optimizer
from nanokimi.optim.qk_clip import local
from nanokimi.parallel import fsdp  # noqa: F401 (here, for all processes)
from nanokimi.parallel.build import build_parallel_model
from nanokimi.parallel.layout import Layout
from nanokimi.parallel.ranks import Ranks
from nanokimi.training.step import TrainingStep

SEQUENCES, PASSES, LENGTH = 2, 2, 32
TRIES = 4
# The operators behind torch.distributed, and which of their arguments is the buffer that counts.
BUFFERS = {
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "alltoall_base_": ("all_to_all", 1),
}


def small_config() -> ModelConfig:
    """Of the model that takes the steps: one dense layer, one with experts."""
    return ModelConfig.preset("debug", max_seq_length=LENGTH, n_layers=2)


class Counted(TorchDispatchMode):
    """Adds up the bytes of everything that goes through torch.distributed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::").split(".")[0]
            collective, place = BUFFERS[name]  # a KeyError: a collective that nobody has thought of
            self.bytes[collective] += sum(buffer.nbytes for buffer in tree_leaves(args[place]))
        return func(*args, **(kwargs or {}))


class Live(TorchDispatchMode):
    """Bytes of all tensors that are there, at the most, beside those that were there before."""

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}
        for tensor in before:
            self._see(local(tensor))
        self.before = self.peak = self._now()

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages.setdefault(storage._cdata, StorageWeakRef(storage))

    def _now(self) -> int:
        """FSDP frees a storage by making it small: hence the look at each."""
        self._storages = {key: ref for key, ref in self._storages.items() if not ref.expired()}
        there = [torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self._storages.values()]
        return sum(storage.nbytes() for storage in there if storage is not None)  # a thread of gloo may free one now

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if type(value) in (torch.Tensor, torch.nn.Parameter):
                self._see(value)
        self.peak = max(self.peak, self._now())
        return out


class Found(NamedTuple):
    """Of one rank, or of all together."""

    sent: dict[str, float]  # bytes by collective
    weights: int  # bytes of all that lie here
    passing: int  # bytes that a forward and backward pass adds to weights, gradients and state
    updating: int  # bytes that an update adds


def one_layout(words: str, ranks: Ranks) -> Found:
    """A step whose traffic is counted, for DistributedDataParallel the third: before it, it sets up its buckets."""
    _, mode, replicate, experts, checkpointing, measured = words.split(",")
    config = small_config()
    torch.manual_seed(0)
    layout, device = Layout(mode, ranks.size, int(replicate), int(experts)), torch.device("cpu")
    parallel = build_parallel_model(config, layout, device)
    train = TrainConfig(
        batch_size=SEQUENCES, gradient_accumulation=PASSES * ranks.size, compile="off",
        activation_checkpointing=checkpointing == "1",
    )  # fmt: skip
    optimizer = make_optimizer(parallel.model, train, orthogonalise=parallel.orthogonalise)
    step = TrainingStep(parallel.model, optimizer, train, device, parallel=parallel)
    generator = torch.Generator().manual_seed(ranks.rank)
    shape = (SEQUENCES, LENGTH + 1)
    batches = iter(lambda: Batch.of_rows(torch.randint(config.vocab_size, shape, generator=generator)), None)
    for _ in range(2 if mode == "ddp" else 0):
        step(batches)
    with Counted() as counted:
        step(batches)
    weights = sum(local(p).nbytes for p in parallel.model.parameters())
    return Found(dict(counted.bytes), weights, *(heights(step, batches) if measured == "1" else (0, 0)))


def heights(step: TrainingStep, batches: Iterator[Batch]) -> tuple[int, int]:
    """``Found.passing`` and ``updating``."""
    step.accumulate(batches)  # so that there are gradients
    parameters = list(step.model.parameters())
    lies = [*parameters, *(p.grad for p in parameters), *step.model.buffers()]
    lies += [step.model.max_logits, step.model.expert_counts]
    lies += [tensor for p in parameters for tensor in step.optimizer.state[p].values()]
    return height(lies, lambda: step.accumulate(batches)), height(lies, step.optimizer.step)


def height(lies: list[torch.Tensor], work: Callable[[], object]) -> int:
    """Bytes that ``work`` adds to those of ``lies`` at the most.

    The least of several times: gloo's threads let go of a buffer now or a little later.
    """
    found = []
    for _ in range(TRIES):
        with Live(lies) as seen:
            work()
        found.append(seen.peak - seen.before)
    return min(found)


def together(ranks: list[Found]) -> Found:
    """The mean of what they send, the most of what they hold."""
    sent = {name: sum(rank.sent[name] for rank in ranks) / len(ranks) for name in ranks[0].sent}
    return Found(sent, *(max(values) for values in list(zip(*ranks, strict=True))[1:]))


def run(rank: int, size: int, store: str, layouts: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    found = [one_layout(words, Ranks(rank, size, rank, launched=True)) for words in layouts]
    Path(f"{store}.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(store: str, layouts: list[str]) -> int:
    """Prints what all ranks together found; returns how many of them failed."""
    everything: list[Found] = []
    for size, alike in groupby(layouts, lambda words: int(words.split(",")[0])):
        wanted, place = list(alike), f"{store}_{size}"
        if failed := forked(partial(run, size=size, store=place, layouts=wanted), size):
            return failed
        found = [json.loads(Path(f"{place}.{rank}").read_text()) for rank in range(size)]
        everything += [together([Found(*one) for one in ranks]) for ranks in zip(*found, strict=True)]
    print(json.dumps(everything))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
