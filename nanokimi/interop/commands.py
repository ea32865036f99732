"""``nanokimi export`` and ``nanokimi import``: writes models for other programs, and reads models from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from errno import EACCES, EISDIR, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM, EROFS
from pathlib import Path

from safetensors import SafetensorError

from nanokimi import checkpoint
from nanokimi.checkpoint.weights import build_model
from nanokimi.console import log
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.device import out_of_memory_explained
from nanokimi.errors import RunError, UserError
from nanokimi.files import is_full_disk, move_into, new_folder, partial_folder, require_writable
from nanokimi.interop import gguf_file, hf_reader, hf_writer
from nanokimi.interop.engines import compare_llamacpp, compare_transformers
from nanokimi.interop.loading import read_model
from nanokimi.interop.push import push_folder, require_pushable
from nanokimi.interop.receipt import RECEIPT, Comparison, NotCompared, write_receipt
from nanokimi.interop.stored import StoredModel
from nanokimi.model.transformer import Transformer

# What an engine may differ by before the export is called wrong. In fp32 only the order of sums differs;
# with fewer bits llama.cpp rounds activations too, which shows in single numbers but hardly in the loss.
LARGEST_DIFFERENCE = 1e-3
LARGEST_LOSS_DIFFERENCE = 0.05
# Errors that another target would not have.
BAD_PLACE = (EACCES, EPERM, EROFS, ENOENT, ENOTDIR, EISDIR, ENAMETOOLONG)


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
    print(f"{target}: {len(files)} files, {size / 1e6:,.1f} MB, {stored.dtype}\n{compared}")
    if push:
        print(push_folder(target, push, private=not public, log=log))
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
    print(f"{target}: {target.stat().st_size / 1e6:,.1f} MB, {dtype}\n{compared}")
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
    print(
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
    """Explains in one line why ``target`` cannot be written."""
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
