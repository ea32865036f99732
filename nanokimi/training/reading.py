"""Reading data in the middle of a run: a failure ends the run, on all ranks together, with its work saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nanokimi.errors import RunError, UserError
from nanokimi.parallel.ranks import Ranks

Read = TypeVar("Read")


def read_or_save(read: Callable[[], Read], save: Callable[[], str], ranks: Ranks) -> Read:
    """What ``read`` takes from the data. All ranks call it; where it fails on any, all save the run, which ends.

    Args:
        save: saves the run; returns what the user should know of it, to be said after what is wrong.

    Raises:
        UserError, RunError: as ``read`` raises them.
        LostContact: it was another rank that failed, and told.
    """
    failure: UserError | RunError | None = None
    try:
        found = read()
    except (UserError, RunError) as error:
        failure = error
    if not ranks.max([failure is not None])[0]:
        return found
    note = save()
    if failure is not None:
        raise type(failure)(f"{failure}{note}") from failure
    ranks.barrier()  # which never comes: the rank that failed ends without it
    raise RunError("the data of another rank cannot be read")
