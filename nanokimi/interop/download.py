"""Models from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from nanokimi.data.tokenizer import hub_problem
from nanokimi.errors import UserError

PARTS = ("*.json", "*.safetensors", "*.jinja")  # of a repository, what a folder is read from


def download_model(name: str) -> Path:
    """The folder of a repository ``owner/name``: what the local cache holds of it, brought up to date.

    Raises:
        UserError: no such repository, or it cannot be reached and is not on this machine.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(PARTS)))
    except HFValidationError:
        raise UserError(f"{name}: no such file or folder, and not a repository name (owner/name)") from None
    except Exception as error:  # besides its own errors, those of whichever HTTP client the hub library uses
        raise UserError(f"{name}: {hub_problem(error)}") from error
