"""The two kinds of failure that a user is told about in one line."""


class UserError(Exception):
    """A mistake in the input: one line that names the flag, file or field and the remedy; exit code 2."""


class RunError(Exception):
    """A failure at run time (full disk, diverged training): one clear line; exit code 1."""


class ConfigError(UserError, ValueError):
    """A configuration value that cannot be used."""
