"""``nanokimi export`` and ``nanokimi import``: models for other programs, models from them, and receipts for both."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from nanokimi import checkpoint
from nanokimi.checkpoint.weights import build_model
from nanokimi.console import log
from nanokimi.device import out_of_memory_explained
from nanokimi.errors import RunError, UserError
from nanokimi.files import is_full_disk, move_into, new_folder, partial_folder, require_writable
from nanokimi.interop import gguf_file, hf_folder
from nanokimi.interop.llamacpp import compare_llamacpp
from nanokimi.interop.push import push_folder, require_pushable
from nanokimi.interop.receipt import RECEIPT, Comparison, NotCompared, write_receipt
from nanokimi.interop.stored import StoredModel, with_shared_expert
from nanokimi.interop.transformers_engine import compare_transformers
from nanokimi.loading import read_model
from nanokimi.model.transformer import Transformer

AUTO = "auto"  # the type in which the weights are stored
# What an engine may differ by before the export is called wrong. In fp32 only the order of sums differs;
# with fewer bits llama.cpp rounds activations too, which shows in single numbers but hardly in the loss.
LARGEST_DIFFERENCE = 1e-3
LARGEST_LOSS_DIFFERENCE = 0.05
NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class Export(NamedTuple):
    """What the user asked for.

    Attributes:
        source: a checkpoint, or a folder in Hugging Face format.
        target: where to.
        dtype: of the weights; ``auto``: as they are stored.
        compare: reload the result in an independent engine.
    """

    source: Path
    target: Path
    dtype: str = AUTO
    compare: bool = True


def export_hf(
    request: Export, *, shard_bytes: int = hf_folder.SHARD_BYTES, push: str = "", public: bool = False
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
    stored = read_model(request.source)
    hf_folder.require_expressible(stored)
    hf_folder.require_finite(stored)
    stored = stored if request.dtype == AUTO else hf_folder.with_dtype(stored, request.dtype)
    with _target_explained(request.target), out_of_memory_explained(), new_folder(request.target) as folder:
        files = hf_folder.write_folder(folder, stored, shard_bytes=shard_bytes)
        compared = _compared(
            request,
            lambda: compare_transformers(folder, _built(request, stored, stored.weights), stored.tokenizer),
            exact=True,
        )
        dtype = hf_folder.dtype_of(stored)
        write_receipt(folder / RECEIPT, files, target="huggingface", dtype=dtype, compared=compared)
        size = sum(file.stat().st_size for file in files)
    print(f"{request.target}: {len(files)} files, {size / 1e6:,.1f} MB, {dtype}\n{compared}")
    if push:
        print(push_folder(request.target, push, private=not public, log=log))
    return 0


def export_gguf(request: Export) -> int:
    """Writes a GGUF file for llama.cpp, and its receipt beside it; returns the exit code.

    Raises:
        UserError: the source cannot be read, llama.cpp cannot compute exactly that, the target exists or cannot be
            written.
        RunError: the disk is full, or the engine computes something else.
    """
    stored, target = with_shared_expert(read_model(request.source)), request.target
    dtype = hf_folder.dtype_of(stored) if request.dtype == AUTO else request.dtype
    if os.path.exists(target):
        raise UserError(f"{target}: exists already: choose another name, or remove it")
    gguf_file.require_expressible(stored.config)
    with _target_explained(target), out_of_memory_explained(), partial_folder(target) as folder:
        file, receipt = folder / target.name, folder / f"{target.name}.{RECEIPT}"
        gguf_file.write_gguf(file, stored.config, stored.weights, stored.tokenizer, dtype=dtype, name=target.stem)
        compared = _compared(
            request,
            lambda: compare_llamacpp(file, _as_in_gguf(request, stored, dtype), stored.tokenizer),
            exact=dtype == "f32",
        )
        write_receipt(receipt, [file], target="gguf", dtype=dtype, compared=compared)
        move_into(target.parent, receipt, file)  # the file last: where it lies, its receipt does
    print(f"{target}: {target.stat().st_size / 1e6:,.1f} MB, {dtype}\n{compared}")
    return 0


def import_hf(folder: Path, output: Path, *, tokenizer: str = "") -> int:
    """Makes a checkpoint of a folder in Hugging Face format; returns the exit code.

    The weights keep the type in which the folder stores them, so that an export gives them back as they were.

    Raises:
        UserError: see ``interop.hf_folder.read_folder``; or ``output`` exists or cannot be written.
        RunError: the disk is full.
    """
    if output.exists():
        raise UserError(f"--output {output}: exists already: choose another name, or remove it")
    stored = hf_folder.read_folder(folder, tokenizer=tokenizer)
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
    print(
        f"{output}: {parameters:,} parameters, {hf_folder.dtype_of(stored)}, a context of "
        f"{stored.config.max_seq_length:,} tokens\n"
        f"Continue a prompt with `nanokimi generate {output}`, train it further with "
        f"`nanokimi train --init_from {output}`."
    )
    return 0


def _compared(request: Export, compare: Callable[[], Comparison], *, exact: bool) -> Comparison | NotCompared:
    """What the engine found, or why there is none; RunError if it computes something else.

    Args:
        exact: the engine rounds nothing but the last digit.
    """
    if not request.compare:
        return NotCompared("not compared with another engine, as asked for")
    try:
        found = compare()
    except NotCompared as reason:
        return reason
    except RunError as error:
        raise RunError(f"{request.target}: not written: {error} (--no_compare writes it all the same)") from error
    close = not exact or found.max_difference <= LARGEST_DIFFERENCE
    if not (close and abs(found.loss - found.loss_there) <= LARGEST_LOSS_DIFFERENCE):
        raise RunError(f"{request.target}: not written, because another engine computes something else ({found})")
    return found


def _built(request: Export, stored: StoredModel, weights: Mapping[str, Tensor]) -> Transformer:
    return build_model(request.source, stored.config, weights)


def _as_in_gguf(request: Export, stored: StoredModel, dtype: str) -> Transformer:
    return _built(request, stored, gguf_file.stored_weights(stored.config, stored.weights, dtype))


@contextmanager
def _target_explained(target: Path) -> Iterator[None]:
    """One line for what the file system has against ``target``."""
    try:
        yield
    except FileExistsError as error:
        raise UserError(f"{target}: exists already: choose another name, or remove it") from error
    except BlockingIOError as error:
        raise UserError(f"{target}: another process is writing it: choose another name, or wait") from error
    except (OSError, SafetensorError) as error:
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
        if number in NO_PLACE:
            raise UserError(f"{target}: cannot be written ({reason}): choose another place") from error
        if is_full_disk(error):
            reason = "the disk is full: free space"
        raise RunError(f"{target} cannot be written: {reason}") from error
