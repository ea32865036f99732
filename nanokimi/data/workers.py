"""Processes that read ahead, and what becomes of them when one fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from nanokimi.errors import RunError, UserError

TIMEOUT_SECONDS = 900  # more than a hub's worst silence, which has retries of its own


def read_ahead(data: Any, requests: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """``data[request]`` for every request, in order; request i goes to worker i modulo their number.

    Args:
        data: arrays come out of it as they are; a worker has a copy of it, as it was at the start.
        num_workers: processes that read ahead; 0 reads in this one.

    Raises:
        RunError: a worker died or hangs.
        UserError, RunError: as ``data`` raises them.
    """
    try:
        for item in DataLoader(
            _Reporting(data),
            sampler=requests,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            timeout=TIMEOUT_SECONDS if num_workers else 0,
            worker_init_fn=_begin,
            generator=torch.Generator(),  # or it would draw from the run's random numbers
        ):
            if isinstance(item, (UserError, RunError)):
                raise item
            yield item
    except RuntimeError as error:
        if not num_workers:
            raise
        reason = str(error).strip().splitlines()[-1]  # behind the worker's traceback
        raise RunError(f"a data worker failed ({reason}): lower --num_workers") from error


class _Reporting(Dataset[Any]):
    """Hands back what a user is to be told: raised in a worker it would come wrapped in a traceback."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.data[request]
        except (UserError, RunError) as error:
            return error


def _as_it_is(item: Any) -> Any:
    return item


def _begin(worker: int) -> None:
    """Ctrl-C reaches the whole group: the parent ends its workers once the step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers themselves are what is parallel
