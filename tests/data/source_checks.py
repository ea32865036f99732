"""The same questions put to every source; run in a process of its own, for which a loopback server is the hub.

python source_checks.py FOLDER    # answers in JSON: source -> check -> "" or what went wrong
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streams import LENGTH, corpus, inputs, loader, sequences, take

from nanokimi.config import ModelConfig, TrainConfig
from nanokimi.data.corpus import Corpus
from nanokimi.data.documents import is_blank
from nanokimi.data.loader import BatchLoader, merge_states, permutation
from nanokimi.data.sources import open_corpus
from nanokimi.data.stream import StreamLoader
from nanokimi.training.step import cross_entropy
from nanokimi.training.trainer import Trainer

STOPS = (0, 7, 40)
N_BATCHES = 60


def main(folder: Path) -> None:
    settings = json.loads((folder / "sources.json").read_text())
    answers = {
        name: {check.__name__: asked(check, folder, values) for check in (resume, ranks, documents, labels)}
        for name, values in settings.items()
    }
    print(json.dumps(answers))


def asked(check: Callable[..., None], folder: Path, values: dict[str, Any]) -> str:
    try:
        check(folder, values)
    except Exception:
        return traceback.format_exc()
    return ""


def opened(folder: Path, values: dict[str, Any]) -> Corpus:
    return corpus(**values, val_fraction=0.0)


def resume(folder: Path, values: dict[str, Any]) -> None:
    """After any number of batches the rest is the same to the bit, with any number of workers on both sides."""
    source = opened(folder, values)
    whole = take(loader(source), N_BATCHES)
    assert len({json.dumps(batch) for batch in whole}) > N_BATCHES // 2
    for before, after in ((0, 2), (2, 0)):
        for stop in STOPS:
            stopped = loader(source, num_workers=before)
            assert take(stopped, stop) == whole[:stop], (before, stop)
            resumed = loader(opened(folder, values), num_workers=after)
            resumed.load_state_dict(stopped.state_dict())
            rest = min(15, N_BATCHES - stop)
            assert take(resumed, rest) == whole[stop : stop + rest], (before, after, stop)


def ranks(folder: Path, values: dict[str, Any]) -> None:
    """On two ranks from where one stopped: the rest of the epoch, nothing of it lost or repeated."""
    source = opened(folder, values)
    for stop in STOPS:
        alone = loader(source, batch_size=1, shuffle_buffer=1)
        seen = sequences(take(alone, stop))
        state = merge_states([alone.state_dict()])
        both: list[Any] = [
            loader(source, batch_size=1, shuffle_buffer=1, rank=r, world_size=2, num_workers=2 * r) for r in range(2)
        ]
        for batches in both:
            batches.load_state_dict(state)
        in_lanes = isinstance(alone, StreamLoader) and alone.reader.n_lanes > 1
        if in_lanes:  # each rank has lanes of its own
            rest = [row for batches in both for row in rest_of_epoch(batches)]
            assert Counter([*seen, *rest]) == Counter(rest_of_epoch(loader(source, batch_size=1, shuffle_buffer=1)))
        else:  # every other sequence of one order
            rest = list(chain.from_iterable(zip(*(sequences(take(b, 50)) for b in both), strict=True)))
            whole = sequences(take(loader(source, batch_size=1, shuffle_buffer=1), stop + 100))
            assert [*seen, *rest] == whole, stop


def rest_of_epoch(batches: Any) -> list[tuple[int, ...]]:
    found = []
    for batch in batches:
        if batches.epoch:
            return found
        found.append(tuple(batch.rows()[0].tolist()))
    raise AssertionError


def documents(folder: Path, values: dict[str, Any]) -> None:
    """Every document once per epoch in what the batches decode to, with any number of workers."""
    texts = json.loads((folder / "texts.json").read_text())
    source = opened(folder, values)
    for num_workers in (0, 2):
        batches = loader(source, batch_size=1, shuffle_buffer=1, num_workers=num_workers)
        if isinstance(batches, BatchLoader):
            for epoch in range(2):
                n = len(batches.sequences)
                order = permutation(5, epoch, n).tolist()
                rows = dict(zip(order, inputs(islice(iter(batches), n)), strict=True))
                found = b"".join(rows[i] for i in range(n)).split(b"\xff")
                assert Counter(found[:-1]) == Counter(t.encode() for t in texts[: len(found) - 1])
                assert texts[len(found) - 1].encode().startswith(found[-1])  # what was cut is the last remainder
                assert sum(map(len, texts)) + len(texts) - n * LENGTH <= LENGTH
        elif batches.reader.n_lanes == 1:  # type: ignore[attr-defined]
            text = b"".join(inputs(islice(iter(batches), 600)))
            found = text.split(b"\xff")
            for epoch in range(2):
                of_epoch = found[epoch * len(texts) : (epoch + 1) * len(texts)]
                assert [document.decode() for document in of_epoch] == texts
        else:
            expected, in_lanes = reference_epoch(source)
            assert Counter(rest_of_epoch(batches)) == expected
            assert sorted(in_lanes) == sorted(texts)


def reference_epoch(source: Corpus) -> tuple[Counter[tuple[int, ...]], list[str]]:
    """The sequences of the first epoch, put together in the most obvious way; and the documents in them."""
    reader = loader(source).reader  # type: ignore[attr-defined]
    expected: Counter[tuple[int, ...]] = Counter()
    texts: list[str] = []
    for lane in range(reader.n_lanes):
        row: list[int] = []
        for part in reader.parts(lane, 0):
            text = ""
            for piece in reader.text.documents.read(int(part)):
                text += piece.text
                row += (
                    [] if is_blank(piece) else [*piece.text.encode(), *[source.tokenizer.eot_id] * piece.ends_document]
                )
                if piece.ends_document:
                    texts += [text] if text.strip() else []
                    text = ""
        expected += Counter(tuple(row[i : i + LENGTH + 1]) for i in range(0, len(row) - LENGTH, LENGTH))
    return expected, texts


def labels(folder: Path, values: dict[str, Any], *, unshifted: bool = False) -> None:
    """On uniformly random bytes nothing can be learned: the loss of an epoch stays at ln 256."""
    values = {name: v.replace("texts", "noise") if isinstance(v, str) else v for name, v in values.items()}
    if values["dataset"] == "fineweb":
        values |= {"hf_repo_name": "org/fineweb-noise", "hf_config": "sample-10BT"}
    config = TrainConfig(
        **values,
        preset="debug",
        val_fraction=0.0,
        batch_size=8,
        gradient_accumulation=1,
        warmup_steps=5,
        max_steps=70,
        schedule="constant",
        eval_interval=0,
        output_dir=str(folder),
        shuffle_buffer=64,
    )
    tokenizer_name = str(folder / "noise-tokenizer.json")
    source = open_corpus(config, tokenizer_name, named=True, log=lambda line: None)
    shape = ModelConfig.preset("debug", vocab_size=source.tokenizer.vocab_size, max_seq_length=64)
    trainer = Trainer(config, shape, source, torch.device("cpu"))
    if unshifted:
        trainer.step.objective = lambda model, batch: cross_entropy(model, batch._replace(labels=batch.tokens))
    batches = iter(trainer.batches)
    losses = [trainer._train_step(batches)["train_ce_loss"] for _ in range(config.max_steps)]
    smooth = np.convolve(losses, np.ones(10) / 10, "valid")
    assert losses[0] > math.log(256) + 0.3, "it begins at the logarithm of the whole vocabulary"
    assert smooth.min() >= math.log(256) - 0.02, f"the loss fell to {smooth.min():.3f}"
    assert smooth.min() < math.log(256) + 0.2, "it has learned what there is to learn: which tokens occur"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
