"""The values of ``--dataset`` and ``--mix``: from settings to tokens to train on and tokens that are held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from nanokimi import console
from nanokimi.config import TrainConfig
from nanokimi.data.batch import TokenArray
from nanokimi.data.corpus import BPE_CHARACTERS, TRAINING, CachedText, Corpus, Log, StreamedText, TrainData
from nanokimi.data.documents import Text, short_hash
from nanokimi.data.formats import Format
from nanokimi.data.hub import FINEWEB, FINEWEB_CONFIG, HubDocuments, fetch_sample
from nanokimi.data.loader import MixLoader
from nanokimi.data.local import LocalDocuments
from nanokimi.data.tokenbin import TokenBin
from nanokimi.data.tokenizer import Tokenizer, bpe_size, load_tokenizer, train_bpe
from nanokimi.errors import UserError
from nanokimi.files import disk_errors_explained, require_writable

DATASETS = ("local", "localstreaming", "hfstreaming", "fineweb", "tokenbin")

Source = CachedText | StreamedText | TokenBin  # before its tokenizer is known


def open_corpus(
    config: TrainConfig,
    tokenizer_name: str,
    *,
    tokenizer: Tokenizer | None = None,
    named: bool = False,
    log: Log = print,
) -> Corpus:
    """Opens the source, or the mixture of sources, that ``config`` names.

    Args:
        config: its fields from ``dataset`` to ``encoding_errors``.
        tokenizer_name: ``bpe:N`` trains one on the training split; for the rest see ``load_tokenizer``.
        tokenizer: use this one, whatever ``tokenizer_name`` says (a checkpoint carries its own).
        named: the user chose ``tokenizer_name``: it wins over one that the source brings along.
        log: takes warnings, a line each.

    Raises:
        UserError: missing, empty, blank or undecodable data, an unknown tokenizer, nowhere to write a cache.
        RunError: the disk is full, the network failed.
    """
    shares = parse_mix(config)
    sources = {name: _source(part, log) for name, (_, part) in shares.items()}
    if tokenizer is None:
        tokenizer = choose_tokenizer(list(sources.values()), tokenizer_name, named=named)
    corpora = {name: source.open(tokenizer, log) for name, source in sources.items()}
    wanted = bpe_size(tokenizer.name)
    if wanted is not None and tokenizer.vocab_size < wanted:
        log(f"note: the text yields only {tokenizer.vocab_size} of the {wanted} entries of {tokenizer.name}")
    if not config.mix:
        return next(iter(corpora.values()))
    loaders = {name: (shares[name][0], corpus.train.loader) for name, corpus in corpora.items()}
    identity = short_hash([[name, shares[name][0], corpus.train.identity] for name, corpus in corpora.items()])
    train = TrainData(identity, partial(MixLoader, loaders))
    val = [corpus.val for corpus in corpora.values() if corpus.val is not None]
    val = val[:1] if config.val_path else val  # of sources that share one held-out file
    summary = "\n".join(f"{shares[name][0]:g} of {name}: {corpus.summary}" for name, corpus in corpora.items())
    return Corpus(tokenizer, train, TokenArray.joined(val) if val else None, summary)


def parse_mix(config: TrainConfig) -> dict[str, tuple[float, TrainConfig]]:
    """Weight and settings of every source of ``--mix a=0.7,b=0.3``; of the one source where there is no mixture.

    Each item is a path or a repository, with another ``--dataset`` in front where it is of another kind:
    ``tokenbin:data/books=0.3``, ``fineweb=0.5``.

    Raises:
        UserError: an item without a weight above 0, or one that is there twice.
    """
    if not config.mix:
        return {"": (1.0, config)}
    shares: dict[str, tuple[float, TrainConfig]] = {}
    for item in config.mix.split(","):
        name, equals, text = item.strip().rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not (equals and name and 0 < weight < float("inf")):
            raise UserError(f"--mix {item.strip()}: write it as PATH=WEIGHT with a weight above 0, as in a=0.7,b=0.3")
        if name in shares:
            raise UserError(f"--mix names {name} twice: add the weights up")
        kind, _, path = name.partition(":")
        if kind not in DATASETS:
            kind, path = config.dataset, name
        field = "data_path" if kind in ("local", "localstreaming", "tokenbin") else "hf_repo_name"
        values: dict[str, Any] = {"mix": "", "dataset": kind, field: path}
        if config.val_path and (kind == "tokenbin") != _is_tokens(config.val_path):
            values |= {"val_path": "", "val_fraction": 0.0}  # another source holds it out
        shares[name] = weight, dataclasses.replace(config, **values)
    if config.val_path and not any(part.val_path for _, part in shares.values()):
        raise UserError(f"--val_path {config.val_path}: no source of --mix is of its kind, text or tokens")
    return shares


def _is_tokens(path: str) -> bool:
    return path.endswith(".bin") or any(Path(path).glob("*.bin"))


def _source(config: TrainConfig, log: Log) -> Source:
    if config.dataset == "tokenbin":
        return TokenBin(config.data_path, config.val_path, config.val_fraction)
    config = with_sample(config, log)
    if config.dataset == "local":
        return CachedText(text_of(config, log))
    return StreamedText(text_of(config, log, split_up=True), config.val_tokens)


def text_of(config: TrainConfig, log: Log, *, split_up: bool = False) -> Text:
    """The documents that ``config`` names, local or of the hub, and what is held out; ``split_up``: in parts."""
    form = Format(config.text_column, config.encoding_errors)
    val = _local_documents(config.val_path, log, "--val_path", form=form) if config.val_path else None
    fraction = 0.0 if val else config.val_fraction
    if config.dataset in ("hfstreaming", "fineweb"):
        return Text(hub_documents(config, log), val, fraction, "--hf_repo_name", in_full=False)
    documents = _local_documents(config.data_path, log, form=form, split_up=split_up)
    if val is not None and any(a.samefile(b) for a in documents.files for b in val.files):
        raise UserError(f"--val_path {config.val_path} is the training text itself: name another file, or none")
    return Text(documents, val, fraction, in_full=not split_up)


def _local_documents(path: str | Path, log: Log, flag: str = "--data_path", **options: Any) -> LocalDocuments:
    """Documents of local files, after what the user should know of them."""
    documents = LocalDocuments(path, flag, **options)
    for note in documents.notes:
        log(f"note: {note}")
    return documents


def hub_documents(config: TrainConfig, log: Log) -> HubDocuments:
    """The rows of a hub data set that ``config`` names: the first ``--num_samples``, or all for 0."""
    default = config.dataset == "fineweb" and not config.hf_repo_name
    return HubDocuments(
        FINEWEB if default else config.hf_repo_name,
        config=config.hf_config or (FINEWEB_CONFIG if default else ""),
        split=config.hf_split,
        text_column=config.text_column,
        limit=config.num_samples,
        revision=config.hf_revision,
        log=log,
    )


def with_sample(config: TrainConfig, log: Log) -> TrainConfig:
    """The same settings, but a sample of FineWeb is a local text from here on: fetched, unless it is there."""
    if config.dataset != "fineweb" or config.streaming:
        return config
    chosen = [config.hf_repo_name, config.hf_config, config.hf_split, config.hf_revision, config.text_column]
    path = fetch_sample(config.num_samples, chosen, lambda: hub_documents(config, log))
    return dataclasses.replace(config, dataset="local", data_path=str(path), text_column="")


def choose_tokenizer(sources: Sequence[Source], name: str, *, named: bool) -> Tokenizer:
    """The tokenizer to use: what the user chose, else what a source brings along, else ``name``."""
    for source in sources:
        if isinstance(source, TokenBin) and not named and (found := source.find_tokenizer()) is not None:
            return found
    size = bpe_size(name)
    if size is None:
        return load_tokenizer(name)
    texts = []
    for source in sources:
        if isinstance(source, TokenBin):
            raise UserError(
                f"--data_path {source.path}: no tokenizer can be trained on tokens: put the tokenizer.json that made "
                "them beside them, or name it with --set tokenizer_name=..."
            )
        if len(sources) == 1:
            return source.train_bpe(size)
        texts.append(source.text.training_text(TRAINING, BPE_CHARACTERS))
    return train_bpe(chain.from_iterable(texts), size)


def train_tokenizer_on(path: str | Path, vocab_size: int, output: str | Path, *, val_fraction: float = 0.05) -> str:
    """Trains a byte-level BPE on local text and writes its ``tokenizer.json``; returns a line that says what.

    The share of the text that training holds out by default is not looked at here either. UserError if the text or the
    size cannot be used or ``output`` cannot be written, RunError if the disk is full.
    """
    output = Path(output)
    require_writable(output, example="tokenizer.json")
    text = Text(_local_documents(path, console.log, "FILE"), None, val_fraction, "FILE")
    tokenizer = train_bpe(text.training_text(TRAINING), vocab_size)
    with disk_errors_explained("tokenizer", output):
        tokenizer.save(output)
    return f"{output}: {tokenizer.vocab_size:,} entries; use it with --set tokenizer_name={output}"
