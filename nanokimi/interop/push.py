"""``--push``: uploads an exported folder to the Hugging Face hub, in one commit."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from nanokimi.data.tokenizer import is_hub_name
from nanokimi.errors import RunError, UserError

# What a refusal of the hub means, by its HTTP status; the user can correct these.
MISTAKES = {
    400: "the hub refuses the files: correct them",
    401: "the hub does not accept your token: run `hf auth login`, or correct HF_TOKEN",
    403: "you have no right to write there: `hf auth login` with a token that may write, or name a repository of yours",
    404: "the hub knows no such user or organization: check the name",
}


def require_pushable(repository: str) -> None:
    """Checks what can be known without a network, before the work that precedes an upload.

    Raises:
        UserError: an invalid name, no login, HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants, get_token

    flag = f"--push {repository or '(empty)'}"
    if not is_hub_name(repository):
        raise UserError(f"{flag}: not the name of a repository: write owner/name")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{flag}: HF_HUB_OFFLINE is set (or TRANSFORMERS_OFFLINE): unset it, or leave out --push")
    if not get_token():
        raise UserError(f"{flag}: not logged in: run `hf auth login`, or set HF_TOKEN to a token that may write")


def push_folder(folder: Path, repository: str, *, private: bool = True, log: Callable[[str], None]) -> str:
    """Uploads the files of ``folder`` to a model repository ``owner/name``; returns the address of the commit.

    Args:
        private: of a new repository; one that is there stays what it is, and keeps its other files.

    Raises:
        UserError: as ``require_pushable``, or the hub does not accept the token, the name or the files.
        RunError: the hub cannot be reached, is out of order, or has no room.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, utils

    require_pushable(repository)
    if not sys.stderr.isatty():
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    files, api = [path for path in sorted(folder.glob("[!.]*")) if path.is_file()], HfApi()
    try:
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        before = api.model_info(name)
        if private and not before.private:
            log(f"{name} is public already, and stays so: everybody can read what is uploaded")
        size, seen_by = sum(file.stat().st_size for file in files), "private" if before.private else "public"
        log(f"uploading {len(files)} files ({size / 1e6:,.1f} MB) to {name}, {seen_by}")
        # Not upload_folder: it splits a large folder over several commits, and a reader could find half of a model.
        operations = [CommitOperationAdd(file.name, file) for file in files]
        commit = api.create_commit(name, operations, commit_message=f"Upload model with nanokimi {version('nanokimi')}")
    except Exception as error:  # besides the library's own errors, those of whichever HTTP client it uses
        by_hand = f"hf upload {repository} {shlex.quote(str(folder))}" + (" --private" if private else "")
        raise _explained(error, f"--push {repository}", by_hand) from error
    if commit.oid == before.sha:
        log(f"{name} holds exactly these files already: there is nothing to commit")
    return commit.commit_url


def _explained(error: Exception, flag: str, by_hand: str) -> UserError | RunError:
    """What is wrong and how to go on, in one line."""
    from huggingface_hub.errors import HFValidationError

    told = getattr(error, "server_message", None) or f"{type(error).__name__}: {error}"
    told = "".join(filter(str.isprintable, " ".join(told.split())))[:200]  # the hub must not control the terminal
    if isinstance(error, HFValidationError):
        return UserError(f"{flag}: not the name of a repository ({told}): write owner/name")
    causes = (error, error.__cause__ or error)
    responses = [getattr(cause, "response", None) for cause in causes]
    response = next((found for found in responses if found is not None), None)
    in_words = re.search(r"\((\d{3}) ", " ".join(map(str, causes)))  # as hf_xet tells the status
    status = response.status_code if response is not None else int(in_words[1]) if in_words else 0
    no_room = status in (402, 413) or (status == 403 and re.search(r"quota|storage|limit", told, re.IGNORECASE))
    if status in MISTAKES and not no_room:
        return UserError(f"{flag}: {MISTAKES[status]} ({told})")
    problem = "the hub has no room for it" if no_room else "the hub is out of order or busy"
    problem = f"{problem}, status {status}" if status else "the hub cannot be reached, or the upload broke off"
    return RunError(f"{flag}: {problem} ({told}): the exported folder is intact, try again with `{by_hand}`")
