"""Importing matplotlib for pictures that go to files, wherever a process runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

VARIABLE = "MPLBACKEND"


@contextmanager
def matplotlib_without_screen() -> Iterator[None]:
    """Within it matplotlib can be imported although ``MPLBACKEND`` names a backend that this Python does not have.

    Notebooks set it for all that they start. A picture for a file needs no backend; for what does, it is set again.
    """
    backend = os.environ.pop(VARIABLE, None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ[VARIABLE] = backend
            with suppress(Exception):
                from matplotlib import rcParams

                rcParams["backend"] = backend
