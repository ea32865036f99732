"""Processes that read ahead, and what becomes of them when one fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from nanokimi.errors import RunError

TIMEOUT_SECONDS = 300


def read_ahead(data: Any, num_workers: int, **options: Any) -> Iterator[Any]:
    """What torch's ``DataLoader`` gives for ``data``, in order; request i goes to worker i modulo their number.

    Args:
        num_workers: processes that read ahead; 0 reads in this one.
        options: of ``DataLoader``: which items are asked for, and how they are put together.

    Raises:
        RunError: a worker died or hangs.
    """
    try:
        yield from DataLoader(
            data,
            num_workers=num_workers,
            timeout=TIMEOUT_SECONDS if num_workers else 0,
            worker_init_fn=_begin,
            generator=torch.Generator(),  # or it would draw from the run's random numbers
            **options,
        )
    except RuntimeError as error:
        if not num_workers:
            raise
        reason = str(error).strip().splitlines()[-1]  # behind the worker's traceback
        raise RunError(f"a data worker failed ({reason}): lower --num_workers") from error


def as_it_is(item: Any) -> Any:
    """What a worker made, not turned into tensors."""
    return item


def _begin(worker: int) -> None:
    """Ctrl-C reaches the whole group: the parent ends its workers once the step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers themselves are what is parallel
