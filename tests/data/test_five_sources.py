"""What holds for every value of ``--dataset``; the hub's are read from a loopback server by the real library."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_checks
from hub import LoopbackHub, fineweb, hub_environment, parquet_file, readme
from streams import write_json_lines, write_parquet, write_text
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from nanokimi.data.documents import Text
from nanokimi.data.local import LocalDocuments
from nanokimi.data.token_files import write_token_set
from nanokimi.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer

TESTS = Path(__file__).parent.parent
LETTERS = [chr(0x100 + i) for i in range(256)]  # two bytes of UTF-8 each
SOURCES: dict[str, dict[str, Any]] = {
    "local": {"dataset": "local", "data_path": "texts.txt"},
    "local, parquet": {"dataset": "local", "data_path": "texts.parquet"},
    "localstreaming": {"dataset": "localstreaming", "data_path": "texts.txt"},
    "localstreaming, compressed": {"dataset": "localstreaming", "data_path": "texts.jsonl.gz"},
    "hfstreaming": {"dataset": "hfstreaming", "hf_repo_name": "org/texts"},
    "hfstreaming, without limit": {"dataset": "hfstreaming", "hf_repo_name": "org/texts", "num_samples": 0},
    "fineweb": {"dataset": "fineweb"},
    "fineweb, streaming": {"dataset": "fineweb", "streaming": True, "num_samples": 0},
    "tokenbin": {"dataset": "tokenbin", "data_path": "texts-tokens"},
    "tokenbin, of another project": {"dataset": "tokenbin", "data_path": "texts-plain.bin"},
}


def random_texts() -> list[str]:
    rng = random.Random(0)
    return [f"{i} " + "".join(rng.choices("abcd \n", k=rng.randint(1, 90))) + "\n" for i in range(120)]


def noise() -> list[str]:
    """Letters that are each one token of ``noise_tokenizer``, every one as likely as any other."""
    rng = random.Random(1)
    return ["".join(rng.choices(LETTERS, k=2000)) + "\n" for _ in range(18)]


def noise_tokenizer() -> HFTokenizer:
    """256 letters as tokens of their own, and the bytes that nothing else is made of."""
    of_byte = {byte: character for character, byte in load_tokenizer("byte")._inner.get_vocab().items()}
    vocab = {of_byte[byte]: byte for byte in range(256)}
    merges = []
    for letter in LETTERS:
        first, second = (of_byte[byte] for byte in letter.encode())
        merges.append((first, second))
        vocab[first + second] = len(vocab)
    inner = HFTokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return inner


def write_everything(folder: Path, name: str, texts: list[str], tokenizer: Tokenizer) -> None:
    """``texts`` as every kind of local source."""
    write_text(folder / f"{name}.txt", texts)
    write_parquet(folder / f"{name}.parquet", texts)
    write_json_lines(folder / f"{name}.jsonl.gz", texts)
    text = Text(LocalDocuments(folder / f"{name}.txt"), fraction=0.0)
    write_token_set(text, tokenizer, folder / f"{name}-tokens", shard_tokens=2000)
    tokens = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eot_id)]
    np.array(tokens, "<u2").tofile(folder / f"{name}-plain.bin")


def repositories(texts: list[str]) -> dict[str, dict[str, bytes]]:
    """The same on the hub: in several files, and as FineWeb has them."""
    third = len(texts) // 3
    parts = [texts[:third], texts[third : 2 * third], texts[2 * third :]]
    files = {
        f"data/{i}.parquet": parquet_file({"text": part, "n": range(len(part))}, group_rows=7)
        for i, part in enumerate(parts)
    }
    return {"files": {**files, "README.md": readme({"default": "data/*"})}, "fineweb": fineweb(texts)}


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("sources")
    texts, letters = random_texts(), noise()
    noise_tokenizer().save(str(folder / "noise-tokenizer.json"))
    write_everything(folder, "texts", texts, load_tokenizer("byte"))
    write_everything(folder, "noise", letters, load_tokenizer(str(folder / "noise-tokenizer.json")))
    (folder / "texts.json").write_text(json.dumps(texts))
    (folder / "sources.json").write_text(json.dumps(SOURCES))
    of_texts, of_noise = repositories(texts), repositories(letters)
    served = {
        "org/texts": of_texts["files"],
        "org/noise": of_noise["files"],
        "HuggingFaceFW/fineweb": of_texts["fineweb"],
        "org/fineweb-noise": of_noise["fineweb"],
    }
    with LoopbackHub(served) as hub:
        paths = os.pathsep.join(map(str, [TESTS.parent, TESTS, TESTS / "data"]))
        environment = hub_environment(hub.url, folder / "hf") | {
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        done = subprocess.run(
            [sys.executable, source_checks.__file__, "."], cwd=folder, env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("check", ["resume", "ranks", "documents", "labels"])
def test_every_source(answers: dict[str, dict[str, str]], source: str, check: str) -> None:
    """See the function of that name in source_checks.py."""
    assert not answers[source][check], answers[source][check]


def test_labels_that_are_not_shifted_would_be_noticed(tmp_path: Path) -> None:
    noise_tokenizer().save(str(tmp_path / "noise-tokenizer.json"))
    write_text(tmp_path / "noise.txt", noise())
    values = {"dataset": "local", "data_path": str(tmp_path / "texts.txt")}
    with pytest.raises(AssertionError, match="the loss fell to"):
        source_checks.labels(tmp_path, values, unshifted=True)
