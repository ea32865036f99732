"""Checkpoints that are written while training goes on: a copy in memory, and a thread that writes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """A copy of a run in host memory, taken again and again into the same place.

    Memory that is new costs several times the copy itself, for the system fills it page by page.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[Any, ...], Tensor] = {}

    def take(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """``content`` as it is now; valid until it is taken again."""
        return {name: self._copy(value, (name,)) for name, value in content.items()}

    def _copy(self, value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, dict):
            return {name: self._copy(inner, (*place, name)) for name, inner in value.items()}
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        kept = self._copies.get(place)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            kept = self._copies[place] = torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format)
        return kept.copy_(value.detach())


class Background:
    """Work for one thread, in the order in which it came; after a failure nothing more is done."""

    def __init__(self) -> None:
        self._last: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Has ``work`` done as soon as what came before it is."""
        earlier, done = self._last, Future[None]()

        def do() -> None:
            try:
                if earlier is not None:
                    earlier.result()
                work()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._last = done
        Thread(target=do, daemon=True).start()  # a daemon: a second Ctrl-C waits for nothing

    @property
    def busy(self) -> bool:
        """Whether there is work left."""
        return self._last is not None and not self._last.done()

    def raise_failure(self) -> None:
        """Raises what has gone wrong so far, without waiting."""
        if not self.busy:
            self.finish()

    def finish(self) -> None:
        """Waits for all of it; raises what went wrong, once."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def wait(self) -> None:
        """Waits for all of it, whatever became of it."""
        with suppress(Exception):
            self.finish()
