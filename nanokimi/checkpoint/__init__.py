"""Checkpoints: one file, or one folder of shards; and the run that writes them and goes on from them."""

from nanokimi.checkpoint.file import CheckpointError, check_fits, link, plain_state, read, require, save

__all__ = ["CheckpointError", "check_fits", "link", "plain_state", "read", "require", "save"]
