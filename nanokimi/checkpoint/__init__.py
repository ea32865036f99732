"""Checkpoints: one file, or one folder of shards; and the run that writes them and goes on from them."""

from nanokimi.checkpoint.file import (
    FORMAT,
    VERSION,
    CheckpointError,
    check_fits,
    link,
    plain_state,
    read,
    require,
    save,
    verify,
)

__all__ = [
    "FORMAT",
    "VERSION",
    "CheckpointError",
    "check_fits",
    "link",
    "plain_state",
    "read",
    "require",
    "save",
    "verify",
]
