"""Documents of a data set on the Hugging Face hub: streamed by ``datasets``, or the first rows fetched once and kept.

A row is a document, a file a part. The streams of ``datasets`` find a row by reading everything before it again; in
parquet files, which most of the hub is, the row groups before it are skipped instead, by their counts in the footer.
Of a parquet file only the text column is fetched. Everything is read at the commit that was the newest when the data
set was opened; scripts in a repository are never executed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from nanokimi import console
from nanokimi.data.documents import START, Advance, Cursor, Piece, ignore, short_hash
from nanokimi.data.formats import MOST_RECORDS, column_types, parquet_batches, pick_text_column, pieces_of_row
from nanokimi.data.tokenizer import is_hub_name
from nanokimi.errors import RunError, UserError
from nanokimi.files import cache_home, disk_errors_explained, lock, sha256_of

FINEWEB = "HuggingFaceFW/fineweb"
FINEWEB_CONFIG = "sample-10BT"

RETRIES = 6
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0

_LISTED = 20
_ROWS = 128  # at a time: enough that the cost of a batch does not show, few enough for documents of many megabytes
# fsspec reads ahead by a block, 5 MiB unless told otherwise: that is the column next to the text.
_PARQUET_BLOCK_BYTES = 1 << 16
_PARQUET_BUFFER_BYTES = 1 << 22  # a request; without a limit a row group of a gigabyte is held in memory
_NETWORK = re.compile(r"(aiohttp|fsspec|http|httpcore2?|httpx2?|huggingface_hub|requests)\b")
_OFFLINE = "work offline with --dataset local, localstreaming or tokenbin (`nanokimi prepare stdlib` makes a text)"


class HubDocuments:
    """The rows of one split of a hub data set; pickles, and opens its streams where it is read.

    Args:
        repo: name of the repository, such as ``HuggingFaceFW/fineweb``.
        config: configuration; empty takes the only one or the one called ``default``.
        split: name of the split.
        text_column: column of strings; empty takes ``text`` or the only column of strings.
        revision: commit, branch or tag; empty takes the newest commit.
        limit: take exactly so many rows, or all if there are fewer, as one part; 0 takes everything, a part per file.
        log: told in one line of every connection that broke.

    Raises:
        UserError: no such data set, configuration, split or column, no access, or no network: with choices and flag.
    """

    n_bytes: int | None = None  # the hub does not say how much text there is

    def __init__(
        self,
        repo: str,
        *,
        config: str = "",
        split: str = "train",
        text_column: str = "",
        limit: int = 0,
        revision: str = "",
        log: Callable[[str], None] = console.log,
    ) -> None:
        if not is_hub_name(repo):
            problem = "not the name of a repository" if repo else "name a data set of the hub"
            raise UserError(f"--hf_repo_name {repo or '(empty)'}: {problem}: write owner/name, such as {FINEWEB}")
        _quiet_libraries()
        self.repo, self.split, self.limit, self._log = repo, split, limit, log
        try:
            self.commit = _find_commit(repo, revision or "main")
            self.config = _choose_config(repo, self.commit, config)
            self._open(text_column)
        except UserError:
            raise
        except Exception as error:  # besides the libraries' own errors, those of whichever HTTP client they use
            raise UserError(f"--hf_repo_name {repo}: {_problem(error)}") from error
        self.name = f"{repo} (config {self.config}, split {split})"
        self.n_parts = 1 if limit else self._n_files

    @property
    def identity(self) -> list[Any]:
        return [self.repo, self.commit, self.config, self.split, self.text_column, self.limit]

    def read(self, part: int, start: Cursor = START, advance: Advance = ignore) -> Iterator[Piece]:
        """The pieces of one part from ``start`` on; ``advance`` is told the UTF-8 bytes of every row's text.

        A connection that breaks is tried again from the same row, ``RETRIES`` times in a row with growing waits.
        """
        for row, text in enumerate(self._rows(part, start.at), start.at):
            advance(len(text.encode(errors="replace")))
            yield from pieces_of_row(text, start, Cursor(at=row), self.name)

    def _open(self, text_column: str) -> None:
        from datasets import load_dataset, load_dataset_builder
        from datasets.packaged_modules.parquet.parquet import ParquetConfig
        from pyarrow.dataset import ParquetFragmentScanOptions

        path = f"hf://datasets/{self.repo}"  # a folder of that name in the working directory is not meant
        builder = load_dataset_builder(path, self.config, revision=self.commit)
        files = builder.config.data_files or {}
        if self.split not in files:
            raise UserError(f"--hf_split {self.split}: {self.repo} has the splits {_listing([*map(str, files)])}")
        options: dict[str, Any] = {"split": self.split, "revision": self.commit, "streaming": True}
        is_parquet = isinstance(builder.config, ParquetConfig)
        if is_parquet:
            scan = {"pre_buffer": False, "use_buffered_stream": True, "buffer_size": _PARQUET_BUFFER_BYTES}
            options["fragment_scan_options"] = ParquetFragmentScanOptions(**scan)
            options |= {"batch_size": _ROWS, "storage_options": {"hf": {"block_size": _PARQUET_BLOCK_BYTES}}}
        stream = load_dataset(path, self.config, **options)
        self.text_column = _choose_column(stream, text_column, self.repo)
        if self.text_column not in ("text", text_column):
            self._log(f"note: {self.repo}: the text is {self.text_column!r}, the only column with text (--text_column)")
        if is_parquet:
            stream = load_dataset(path, self.config, columns=[self.text_column], **options)
        self._stream = stream.select_columns([self.text_column]).with_format("arrow")
        self._n_files: int = stream.num_shards
        files = [str(file) for file in files[self.split]]
        skips = is_parquet and len(files) == self._n_files and all(file.startswith("hf://") for file in files)
        self._parquet: list[str] = files if skips else []

    def _rows(self, part: int, row: int) -> Iterator[str]:
        """The texts of a part from ``row`` on, each once, also where the connection breaks."""
        failures, problem = 0, ""
        while not self.limit or row < self.limit:
            try:
                for text in islice(self._texts(part, row), self.limit - row if self.limit else None):
                    yield text or ""
                    row, failures, problem = row + 1, 0, ""
                return
            except Exception as error:  # of whichever library is lowest
                failures += 1
                self._judge(error, failures, repeated=problem == _brief(error), row=row)
                problem = _brief(error)
            wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (failures - 1))
            attempt = f"attempt {failures} of {RETRIES} in {wait:g} s"
            self._log(f"{self.name}: the connection broke at row {row} of part {part} ({problem}): {attempt}")
            time.sleep(wait)

    def _judge(self, error: Exception, failures: int, *, repeated: bool, row: int) -> None:
        """Raises what the user is told, unless the failure is one that may pass."""
        where, then, brief = (
            f"{self.name}: row {row}",
            "and go on from the last checkpoint with --resume",
            _brief(error),
        )
        if isinstance(error, FileNotFoundError) or _is_refused(error):
            raise RunError(f"{where}: the hub refuses the file ({brief}): run `hf auth login` {then}") from error
        if repeated and not _is_network(error):  # a short read may look like damaged data, but not twice
            raise UserError(f"{where}: the data cannot be read: {brief}") from error
        if failures > RETRIES:
            problem = f"the connection broke {failures} times ({brief})"
            raise RunError(f"{where}: {problem}: check the network {then}") from error

    def _texts(self, part: int, row: int) -> Iterator[str | None]:
        """The column of a part from ``row`` on, over one set of connections."""
        _quiet_libraries()
        if not self._parquet:
            stream = self._stream if self.limit else self._stream.shard(self._n_files, part)
            yield from self._column(stream.skip(row) if row else stream)
            return
        for file in range(self._n_files) if self.limit else [part]:
            if row:
                row = yield from _from_row(self._parquet[file], self.text_column, row)
            else:
                yield from self._column(self._stream.shard(self._n_files, file))

    def _column(self, stream: Any) -> Iterator[str | None]:
        for table in stream.iter(_ROWS):
            yield from table[self.text_column].to_pylist()


def _quiet_libraries() -> None:
    """Turns off their progress bars, logs and retries: ours tell the user, and go on at the row that broke."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("--hf_repo_name: hub data sets need the datasets library: pip install datasets") from error
    from huggingface_hub import utils

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    utils.logging.set_verbosity(logging.CRITICAL)
    settings = datasets.config
    settings.STREAMING_OPEN_MAX_RETRIES = settings.STREAMING_READ_MAX_RETRIES = 1
    settings.STREAMING_OPEN_RETRY_INTERVAL = settings.STREAMING_READ_RETRY_INTERVAL = 0
    settings.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = settings.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0


def _find_commit(repo: str, revision: str) -> str:
    """The commit of ``revision``; one quick request, which fails where later ones would be repeated for minutes."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        found = get_hf_file_metadata(hf_hub_url(repo, "README.md", repo_type="dataset", revision=revision)).commit_hash
    except EntryNotFoundError as error:
        response = getattr(error, "response", None)  # a repository without a README has a commit as well
        found = response.headers.get("X-Repo-Commit") if response is not None else None
    return found or revision


def _choose_config(repo: str, commit: str, config: str) -> str:
    from datasets import get_dataset_config_names

    names = [str(name) for name in get_dataset_config_names(f"hf://datasets/{repo}", revision=commit)]
    if config and config not in names:
        raise UserError(f"--hf_config {config}: {repo} has the configurations {_listing(names)}")
    if not config and len(names) > 1 and "default" not in names:
        raise UserError(f"{repo}: name one of its {len(names)} configurations with --hf_config: {_listing(names)}")
    return config or (names[0] if len(names) == 1 else "default")


def _choose_column(stream: Any, wanted: str, repo: str) -> str:
    """The column of text; where no types are declared, by those of the first rows, in which nulls count for nothing."""
    features = stream.features
    types = column_types(features.arrow_schema) if features else {}
    if not types or "null" in types.values():
        types |= _types_of_rows(stream)
    column = pick_text_column(types, wanted, repo)
    if types[column] not in ("string", "null"):
        strings = ", ".join(name for name, kind in types.items() if kind == "string") or "none"
        raise UserError(f"--text_column {column}: {repo} has {types[column]} there; columns of strings: {strings}")
    return column


def _types_of_rows(stream: Any) -> dict[str, str]:
    """The type of every column, by the first rows: as many as it takes until it is known, up to ``MOST_RECORDS``."""
    types: dict[str, str] = {}
    for table in islice(stream.with_format("arrow").iter(_ROWS), -(-MOST_RECORDS // _ROWS)):
        for name, kind in column_types(table.schema).items():
            kind = "null" if table[name].null_count == len(table) else kind
            types[name] = types.get(name, "null") if kind == "null" else kind
        if "null" not in types.values():
            break
    return types


def _from_row(path: str, column: str, row: int) -> Generator[str | None, None, int]:
    """A column of a parquet file from ``row`` on; returns how many of the rows to skip come after its end."""
    import pyarrow as pa
    from huggingface_hub import HfFileSystem
    from pyarrow.parquet import ParquetFile

    with HfFileSystem(block_size=_PARQUET_BLOCK_BYTES).open(path) as raw:
        file = ParquetFile(raw, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False)
        for _, texts in parquet_batches(file, column, row, _ROWS):
            yield from texts.cast(pa.large_string()).to_pylist()
    return max(0, row - int(file.metadata.num_rows))


# ---- a sample that is kept -----------------------------------------------------------------------


def fetch_sample(limit: int, key: list[Any], open_hub: Callable[[], HubDocuments]) -> Path:
    """The first rows of a data set as JSON lines, in the user's cache; without a network when they are there already.

    A try that was cut off goes on after its last whole row.

    Args:
        key: everything that the user said about them, but for their number ``limit``.
        open_hub: called only when rows have to be fetched.

    Raises:
        UserError: no such data set, or no network and nothing in the cache.
        RunError: the network failed for good, the disk is full.
    """
    if not limit:
        raise UserError("--num_samples 0 takes all of the data set: add --streaming, or say how many documents to take")
    folder, stem = cache_home() / "hub", short_hash([*key, limit])
    if path := _whole_sample(folder, stem):
        return path
    documents = open_hub()
    with disk_errors_explained("sample", folder / f"{stem}.jsonl"):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{stem}-{short_hash(documents.identity)}.part"
        with unfinished.open("a+b") as file:
            lock(file.fileno(), wait=True)  # a second run waits for the first
            path = _whole_sample(folder, stem)
            if path is None:
                _fetch(documents, file)
                os.fsync(file.fileno())
                path = folder / f"{stem}-{sha256_of(unfinished)[:16]}.jsonl"
                unfinished.rename(path)
    return path


def _whole_sample(folder: Path, stem: str) -> Path | None:
    """The sample that was fetched before; one that does not match the checksum in its name is told and left out."""
    without_checksum = folder / f"{stem}.jsonl"  # of an earlier version
    for path in [without_checksum, *sorted(folder.glob(f"{stem}-*.jsonl"))]:
        if path.is_file():
            if path in (without_checksum, folder / f"{stem}-{sha256_of(path)[:16]}.jsonl"):
                return path
            console.log(f"note: {path}: damaged: it is fetched again")
    return None


def _fetch(documents: HubDocuments, file: IO[bytes]) -> None:
    file.seek(0)
    whole = [len(line) for line in file if line.endswith(b"\n")]
    file.truncate(sum(whole))
    text = ""
    with console.progress_bar(f"fetching {documents.name}", None, done=sum(whole)) as advance:
        for piece in documents.read(0, Cursor(at=len(whole)), advance):
            text += piece.text
            if piece.ends_document:
                file.write(json.dumps({"text": text}).encode() + b"\n")
                text = ""
    file.flush()


# ---- what went wrong -----------------------------------------------------------------------------


def _is_refused(error: Exception) -> bool:
    return getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404)


def _is_network(error: Exception) -> bool:
    if type(error) is OSError and error.errno is None:  # what pyarrow says of damaged files
        return False
    return isinstance(error, OSError) or bool(_NETWORK.match(type(error).__module__))


def _brief(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"[:200] if first else type(error).__name__


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _problem(error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, RevisionNotFoundError):
        return "it has no such commit, branch or tag: check --hf_revision"
    if isinstance(error, GatedRepoError):
        return "gated: accept its terms on the hub and run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError | DatasetNotFoundError) or _is_refused(error):
        return "no such data set, or it is private: check the name or run `hf auth login`"
    if "scripts are no longer supported" in str(error):
        return "it is made by a script of its own, which is not executed: take a data set of parquet or jsonl files"
    if isinstance(error, FileNotFoundError):
        return f"it holds no files that can be read as rows ({_brief(error)}): take one of parquet or jsonl files"
    if _is_network(error):
        return f"the Hugging Face hub cannot be reached: {_brief(error)}; {_OFFLINE}"
    return f"it cannot be opened as a data set: {_brief(error)}"
