"""What each rank does in the tests of the sharded checkpoint.

``sharded_worker.py MODE SIZE FOLDER`` forks into SIZE ranks; its last line says how each ended.
"""

from __future__ import annotations

import copy
import errno
import importlib
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from nanokimi.checkpoint import shards as sharded
from nanokimi.errors import RunError

ABOUT: dict[str, Any] = {"step": 10, "name": "run", "losses": [2.5, None], "position": {"order": torch.arange(3)}}


def whole(seed: int = 0) -> dict[str, Tensor]:
    """Of every kind: types, shapes that leave ranks without a row, no dimension, not contiguous."""
    make = torch.Generator().manual_seed(seed)
    return {
        "fp64": torch.randn(5, 3, dtype=torch.float64, generator=make),
        "three_rows": torch.randn(3, 5, generator=make),
        "one_row": torch.randn(1, 4, generator=make),
        "experts": torch.randn(2, 3, 2, generator=make),
        "replicated": torch.randn(4, generator=make),
        "bf16": torch.randn(6, 2, generator=make).bfloat16(),
        "turned": torch.randn(4, 6, generator=make).t(),
        "plain.step": torch.tensor(seed),
        "plain.int": torch.arange(seed, seed + 7),
        "plain.bool": torch.tensor([True, False, True]),
    }


def spread(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same on this job's ranks; the experts over two dimensions of a mesh where there are four ranks."""
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    square = init_device_mesh("cpu", (2, 2)) if size == 4 else None
    result = {}
    for name, tensor in tensors.items():
        if name.startswith("plain."):
            result[name] = tensor.clone()
        elif name == "experts" and square is not None:
            result[name] = distribute_tensor(tensor, square, [Shard(0), Shard(0)])
        else:
            result[name] = distribute_tensor(tensor, line, [Replicate() if name == "replicated" else Shard(0)])
    return result


def save(folder: Path, seed: int, group: Any) -> None:
    sharded.begin_save(folder, spread(whole(seed)), ABOUT, group, asynchronous=False).result()


def save_while_training(folder: Path, seed: int, group: Any) -> None:
    """What is to be saved changes at once, and the ranks have things to tell each other meanwhile."""
    tensors, about = spread(whole(seed)), copy.deepcopy(ABOUT)
    pending = sharded.begin_save(folder, tensors, about, group, asynchronous=True)
    for tensor in tensors.values():
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    about["position"]["order"].zero_()
    about["losses"].append(0.0)
    for _ in range(200):
        dist.all_reduce(torch.ones(1))
    pending.result()


def write(folder: Path, rank: int, group: Any) -> None:
    """The life of a run: saves, a full disk on one rank, and that rank's end in mid-save."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    save(sharded.step_folder(folder, 10), 99, group)
    save(sharded.step_folder(folder, 10), 0, group)
    save_while_training(sharded.step_folder(folder, 20), 1, group)
    create = FileSystem.create_stream

    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 1:
        FileSystem.create_stream = full
    expect_error(folder / f"full_{rank}", lambda: save(sharded.step_folder(folder, 30), 2, group))
    FileSystem.create_stream = create
    if rank == 1:
        sharded.sha256_of = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing is summed
    expect_error(folder / f"lost_{rank}", lambda: save(sharded.step_folder(folder, 40), 3, group))


def expect_error(note: Path, act: Any) -> None:
    try:
        act()
    except RunError as error:
        note.write_text(str(error))


def go_on(folder: Path, rank: int, group: Any) -> None:
    """Another number of ranks reads what was written, and writes it anew."""
    step = sharded.step_folder(folder, 10)
    sharded.verify(step)
    tensors = spread(whole(5))
    sharded.load_into(step, tensors)
    for name, expected in spread(whole(0)).items():
        found = tensors[name]
        if isinstance(found, DTensor) and isinstance(expected, DTensor):
            found, expected = found.to_local(), expected.to_local()
        assert torch.equal(found, expected), name
    sharded.begin_save(sharded.step_folder(folder, 50), tensors, ABOUT, group, asynchronous=True).result()


def write_endlessly(folder: Path, rank: int, group: Any) -> None:
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    for step in range(1, 10**6):
        rows = distribute_tensor(torch.full((400, 300), float(step)), line, [Shard(0)])
        sharded.begin_save(
            sharded.step_folder(folder, 1), {"x": rows}, {"step": step}, group, asynchronous=False
        ).result()
        if rank == 0:
            print(step, flush=True)


def work(mode: str, rank: int, size: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet_{mode}", rank=rank, world_size=size)
    group = sharded.new_group(timedelta(seconds=60))
    {"write": write, "go_on": go_on, "endlessly": write_endlessly}[mode](folder, rank, group)


def forked(mode: str, rank: int, size: int, folder: Path) -> int:
    """Process id of a rank, which never comes back from here."""
    if child := os.fork():
        return child
    failed = 1
    try:
        work(mode, rank, size, folder)
        failed = 0
    except BaseException:
        traceback.print_exc()
    os._exit(failed)  # a process group that lost a rank cannot be taken down in good order


if __name__ == "__main__":
    torch.set_num_threads(1)
    for slow in ("torch.distributed.checkpoint", "torch._dynamo"):
        importlib.import_module(slow)  # what every rank would do, once
    mode, size, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    ranks = [forked(mode, rank, size, folder) for rank in range(size)]
    print(*(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks))
