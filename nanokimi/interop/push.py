"""An exported folder on the Hugging Face hub: all of its files in one commit, or none of them."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanokimi import __version__
from nanokimi.data.tokenizer import is_hub_name
from nanokimi.errors import RunError, UserError
from nanokimi.interop.receipt import RECEIPT, verify_receipt

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

Say = Callable[[str], None]

_TEMPORARY = (".tmp", ".part", ".incomplete", "~")
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf", ".bin")
_CARD = "README.md"
_STATUS = re.compile(r"\((\d{3}) ")  # how hf_xet words the answer of a server
_FULL = re.compile(r"quota|storage|limit", re.IGNORECASE)


def push_folder(folder: Path, repository: str, *, private: bool = True, log: Say) -> str:
    """Uploads the files of ``folder`` as one commit to a model repository, which is made if there is none.

    Hidden and temporary files and folders inside it stay here. What the repository holds beyond these files is left
    as it is. Where the hub is, and who the user is, huggingface_hub finds out: HF_ENDPOINT, HF_TOKEN, `hf auth login`.

    Args:
        repository: ``owner/name``, or ``name`` for a repository of the user's own.
        private: of a new repository; one that is there stays what it is.
        say: told in a line what is uploaded, and what the user may not expect.

    Returns:
        The address of the commit's page.

    Raises:
        UserError: an invalid name, nothing to upload, files that do not match their receipt, no login, no right to
            write, HF_HUB_OFFLINE.
        RunError: the hub cannot be reached, is out of order, or has no room.
    """
    require_pushable(repository)
    files = files_to_push(folder)
    verify_receipt(folder / RECEIPT, {file.name for file in files} - {_CARD})  # the card may be edited before a push
    _settle_library()
    try:
        return _push(files, repository, private, log)
    except Exception as error:  # besides the library's own errors, those of whichever HTTP client it uses
        raise _explained(error, f"--push {repository}", _by_hand(folder, repository, private)) from error


def require_pushable(repository: str) -> None:
    """Checks what can be known without a network: good to ask before the work that a push comes after.

    Raises:
        UserError: an invalid name, no login, HF_HUB_OFFLINE.
    """
    if not is_hub_name(repository):
        problem = "not the name of a repository" if repository else "no name"
        raise UserError(f"--push {repository or '(empty)'}: {problem}: write owner/name")
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"--push {repository}: HF_HUB_OFFLINE is set (or TRANSFORMERS_OFFLINE): unset it, or leave out --push"
        )
    if not get_token():
        raise UserError(
            f"--push {repository}: not logged in: run `hf auth login`, or set HF_TOKEN to a token that may write"
        )


def files_to_push(folder: Path) -> list[Path]:
    """The files of ``folder`` that belong to the model: none that is hidden or temporary.

    Raises:
        UserError: no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: export a model first, `nanokimi export hf CHECKPOINT {folder}`")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    files = [path for path in files if not path.name.endswith(_TEMPORARY)]
    if not any(path.name.endswith(_WEIGHTS) for path in files):
        raise UserError(f"{folder}: holds no weights: export a model first, `nanokimi export hf CHECKPOINT {folder}`")
    return files


def _push(files: Sequence[Path], repository: str, private: bool, log: Say) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    name = api.create_repo(repository, private=private, exist_ok=True).repo_id
    before = api.model_info(name)
    for line in _surprises(before, name, files, private):
        log(line)
    size = sum(file.stat().st_size for file in files) / 1e6
    log(f"uploading {len(files)} files ({size:,.1f} MB) to {name}, {'private' if before.private else 'public'}")
    # upload_folder may split a folder over several commits; a reader must never find half of a model.
    operations = [CommitOperationAdd(file.name, file) for file in files]
    commit = api.create_commit(name, operations, commit_message=f"Upload model with nanokimi {__version__}")
    if commit.oid == before.sha:
        log(f"{name} holds exactly these files already: there is nothing to commit")
    return commit.commit_url


def _surprises(before: ModelInfo, name: str, files: Sequence[Path], private: bool) -> Iterator[str]:
    """What the user may not expect of a repository that is there already."""
    there = {sibling.rfilename for sibling in before.siblings or ()}
    if private and not before.private:
        yield f"{name} is public already, and stays so: everybody can read what is uploaded"
    if "config.json" in there:
        yield f"{name} holds a model already: it stays in the history, behind a new commit"
    stale = sorted(path for path in there if path.endswith(_WEIGHTS) and path not in {file.name for file in files})
    if stale:
        patterns = shlex.join(stale[:3]) + (" ..." if len(stale) > 3 else "")
        yield (
            f"{name} holds other weights besides, which programs may load instead: if they are of an earlier upload, "
            f"remove them with `hf repos delete-files {name} {patterns}`"
        )


def _settle_library() -> None:
    """Bars on a terminal, nothing elsewhere; what goes wrong is told by us, in one line."""
    from huggingface_hub import utils

    if not sys.stderr.isatty():
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]


# ---- what went wrong -------------------------------------------------------------------------------------


def _by_hand(folder: Path, repository: str, private: bool) -> str:
    """The command that uploads the folder without us."""
    return f"hf upload {repository} {shlex.quote(str(folder))}" + (" --private" if private else "")


def _explained(error: Exception, flag: str, command: str) -> UserError | RunError:
    """What is wrong, and the remedy."""
    from huggingface_hub.errors import HFValidationError

    if isinstance(error, HFValidationError):
        return UserError(f"{flag}: not the name of a repository ({str(error).splitlines()[0]}): write owner/name")
    status, said = _answer(error)
    if status == 401:
        return UserError(f"{flag}: the hub does not accept your token{said}: run `hf auth login`, or correct HF_TOKEN")
    if status == 403 and not _FULL.search(said):
        return UserError(
            f"{flag}: you have no right to write there{said}: `hf auth login` with a token that may write, or name a "
            "repository of your own"
        )
    if status == 404:
        return UserError(f"{flag}: the hub knows no such user or organization{said}: check the name")
    again = f"the exported folder is intact, try again with `{command}`"
    if status in (402, 403, 413):
        return RunError(f"{flag}: the hub has no room for it ({status}{said}): free or buy storage; {again}")
    if "Invalid metadata" in str(error):
        return UserError(f"{flag}: the hub cannot read the head of {_CARD}{said}: correct it; {again}")
    if status == 400:
        return UserError(f"{flag}: the hub refuses the files{said}: correct them; {again}")
    if status:
        return RunError(f"{flag}: the hub is out of order or busy ({status}{said}): wait a little; {again}")
    kind, first = type(error).__name__, next(iter(str(error).splitlines()), "")
    if any(isinstance(cause, ConnectionError | TimeoutError) or _is_http(cause) for cause in _causes(error)):
        return RunError(f"{flag}: the hub cannot be reached ({kind}: {first}): check the network; {again}")
    return RunError(f"{flag}: the upload failed ({kind}: {first}); {again}")


def _answer(error: Exception) -> tuple[int, str]:
    """Status and message of the answer behind ``error``; 0 and nothing if there was none."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if response is not None:
            said = " ".join((getattr(cause, "server_message", None) or "").split())
            said = "".join(filter(str.isprintable, said))[:200]  # a server has no business with the terminal
            return int(response.status_code), f" ({said})" if said else ""
        if found := _STATUS.search(str(cause)):
            return int(found[1]), ""
    return 0, ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_http(error: BaseException) -> bool:
    return type(error).__module__.startswith("http")
