"""``nanokimi export`` and ``nanokimi import``: models for other programs, from other programs, and to the hub."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from errno import EACCES, EISDIR, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM, EROFS
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError

from nanokimi import checkpoint
from nanokimi.checkpoint.weights import build_model
from nanokimi.console import log, show
from nanokimi.data.tokenizer import Tokenizer, is_hub_name
from nanokimi.device import out_of_memory_explained
from nanokimi.errors import RunError, UserError
from nanokimi.files import is_full_disk, move_into, new_folder, partial_folder, require_writable
from nanokimi.interop import gguf_file, hf_reader, hf_writer
from nanokimi.interop.engines import compare_llamacpp, compare_transformers
from nanokimi.interop.loading import read_model
from nanokimi.interop.stored import StoredModel
from nanokimi.model.transformer import Transformer
from nanokimi.receipt import RECEIPT, Comparison, NotCompared, write_receipt

# What an engine may differ by before the export is called wrong. In fp32 only the order of sums differs;
# with fewer bits llama.cpp rounds activations too, which shows in single numbers but hardly in the loss.
LARGEST_DIFFERENCE = 1e-3
LARGEST_LOSS_DIFFERENCE = 0.05
# Errors that another target would not have.
BAD_PLACE = (EACCES, EPERM, EROFS, ENOENT, ENOTDIR, EISDIR, ENAMETOOLONG)
# What a refusal of the hub means, by its HTTP status; the user can correct these.
MISTAKES = {
    400: "the hub refuses the files: correct them",
    401: "the hub does not accept your token: run `hf auth login`, or correct HF_TOKEN",
    403: "you have no right to write there: `hf auth login` with a token that may write, or name a repository of yours",
    404: "the hub knows no such user or organization: check the name",
}


@dataclass(frozen=True)
class ExportOptions:
    """What the user asked for."""

    source: Path  # a checkpoint, or a folder in Hugging Face format
    target: Path  # the file or folder to write
    dtype: str = "auto"  # of the weights; auto: as they are stored
    compare: bool = True  # reload the result in an independent engine


def export_hf(
    options: ExportOptions, *, shard_bytes: int = hf_writer.SHARD_BYTES, push: str = "", public: bool = False
) -> int:
    """Writes a folder that transformers, and all that reads its format, opens; returns the exit code.

    Args:
        shard_bytes: weights beyond this size are split over several files.
        push: a hub repository, ``owner/name``, to upload the folder to.
        public: everyone may see the repository, if it is a new one.

    Raises:
        UserError: the source cannot be read or not be expressed exactly, the target exists or cannot be written, or
            the upload is known to fail.
        RunError: the disk is full, the engine computes something else, or the upload failed.
    """
    if push:
        require_pushable(push)
    stored, target = read_model(options.source), options.target
    hf_writer.require_expressible(stored)
    stored.require_finite()
    stored = stored if options.dtype == "auto" else stored.with_dtype(options.dtype)
    with _target_explained(target), out_of_memory_explained(), new_folder(target) as folder:
        files = hf_writer.write_folder(folder, stored, shard_bytes=shard_bytes)
        compared = _compared(options, compare_transformers, folder, stored)
        write_receipt(folder / RECEIPT, files, target="huggingface", dtype=stored.dtype, compared=compared)
        size = sum(file.stat().st_size for file in files)
    show(f"{target}: {len(files)} files, {size / 1e6:,.1f} MB, {stored.dtype}\n{compared}")
    if push:
        show(push_folder(target, push, private=not public, log=log))
    return 0


def export_gguf(options: ExportOptions) -> int:
    """Writes a GGUF file for llama.cpp, and its receipt beside it; returns the exit code.

    Raises:
        UserError: the source cannot be read, llama.cpp cannot compute exactly that, the target exists or cannot be
            written.
        RunError: the disk is full, or the engine computes something else.
    """
    stored, target = read_model(options.source).with_shared_expert(), options.target
    config, dtype = stored.config, stored.dtype if options.dtype == "auto" else options.dtype
    if os.path.exists(target):
        raise UserError(f"{target}: exists already: choose another name, or remove it")
    gguf_file.require_expressible(config)
    with _target_explained(target), out_of_memory_explained(), partial_folder(target) as folder:
        file, receipt = folder / target.name, folder / f"{target.name}.{RECEIPT}"
        gguf_file.write_gguf(file, config, stored.weights, stored.tokenizer, dtype=dtype, name=target.stem)
        compared = _compared(options, compare_llamacpp, file, stored, gguf_dtype=dtype)
        write_receipt(receipt, [file], target="gguf", dtype=dtype, compared=compared)
        move_into(target.parent, receipt, file)  # the receipt first: a file that is there always has one
    show(f"{target}: {target.stat().st_size / 1e6:,.1f} MB, {dtype}\n{compared}")
    return 0


def import_hf(folder: Path, output: Path, *, tokenizer: str = "") -> int:
    """Makes a checkpoint of a folder in Hugging Face format; returns the exit code.

    The weights keep the type in which the folder stores them, so that an export gives them back as they were.

    Raises:
        UserError: as ``hf_reader.read_folder``; or ``output`` exists or cannot be written.
        RunError: the disk is full.
    """
    if output.exists():
        raise UserError(f"--output {output}: exists already: choose another name, or remove it")
    stored = hf_reader.read_folder(folder, tokenizer=tokenizer)
    for note in stored.notes:
        log(f"note: {note}")
    require_writable(output, example="imported.pt")
    content = {
        "model_config": asdict(stored.config),
        "model": dict(stored.weights),
        "tokenizer": stored.tokenizer.to_state(),
        "training": dict(stored.training),
    }
    checkpoint.save(output, content)
    parameters = sum(w.numel() for name, w in stored.weights.items() if not name.endswith(".balance_bias"))
    show(
        f"{output}: {parameters:,} parameters, {stored.dtype}, a context of {stored.config.max_seq_length:,} tokens\n"
        f"Continue a prompt with `nanokimi generate {output}`, train it further with "
        f"`nanokimi train --init_from {output}`."
    )
    return 0


def _compared(
    options: ExportOptions,
    compare: Callable[[Path, Transformer, Tokenizer], Comparison],
    written: Path,
    stored: StoredModel,
    *,
    gguf_dtype: str = "",
) -> Comparison | NotCompared:
    """What an engine found in what was ``written``, or why not; RunError if it computes something else."""
    if not options.compare:
        return NotCompared("not compared with another engine, as asked for")
    weights = stored.weights
    if gguf_dtype:
        weights = gguf_file.stored_weights(stored.config, weights, gguf_dtype)
    try:
        found = compare(written, build_model(options.source, stored.config, weights), stored.tokenizer)
    except NotCompared as reason:
        return reason
    except RunError as error:
        raise RunError(f"{options.target}: not written: {error} (--no_compare writes it all the same)") from error
    close = gguf_dtype not in ("", "f32") or found.max_difference <= LARGEST_DIFFERENCE
    if not (close and abs(found.loss - found.loss_there) <= LARGEST_LOSS_DIFFERENCE):
        raise RunError(f"{options.target}: not written, because another engine computes something else ({found})")
    return found


@contextmanager
def _target_explained(target: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise UserError(f"{target}: exists already: choose another name, or remove it") from error
    except BlockingIOError as error:
        raise UserError(f"{target}: another process is writing it: choose another name, or wait") from error
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) in BAD_PLACE:
            raise UserError(f"{target}: cannot be written ({reason}): choose another place") from error
        if is_full_disk(error):
            reason = "the disk is full: free space"
        raise RunError(f"{target} cannot be written: {reason}") from error


# ---- upload to the hub --------------------------------------------------------------------------


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
