"""Text that is streamed: whole runs, what is held out, and memory that does not grow with the text."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from streams import LENGTH, corpus, inputs, loader, plain, small_pieces, write_json_lines, write_parquet, write_text

from nanokimi import checkpoint
from nanokimi.cli import main
from nanokimi.config import TrainConfig
from nanokimi.data import documents, local, stream
from nanokimi.data.corpus import Corpus
from nanokimi.data.sources import open_corpus
from nanokimi.data.tokenizer import Tokenizer
from nanokimi.training import trainer

CHILD = """
import sys
from nanokimi.cli import main
from nanokimi.data import documents, local, stream
from nanokimi.training import plots
plots.plot_training = lambda *args, **options: None
local.PART_BYTES, documents.PIECE_BYTES, stream.CHUNK_CHARACTERS = 600, 300, 400
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def cut_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small_pieces(monkeypatch)
    monkeypatch.setattr(
        "nanokimi.training.plots.plot_training", lambda *args, **options: None
    )  # it takes half a second


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents in which no stretch of a line comes twice."""
    rng = random.Random(seed)
    return [
        "".join(f"{seed}.{i}.{j} " + "word " * rng.randint(0, 3) + "\n" for j in range(rng.randint(1, 20)))
        for i in range(count)
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_text(tmp_path / "train.txt", texts(150))
    return tmp_path / "train.txt"


def flags(path: Path, output: Path, *more: str) -> list[str]:
    quick = ["--preset", "debug", "--warmup_steps", "2", "--save_interval", "0", "--eval_interval", "0"]
    quick += ["--set", "max_seq_length=24", "--shuffle_buffer", "16", "--output_dir", str(output)]
    return ["train", "--dataset", "localstreaming", "--data_path", str(path), *quick, *more]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which a command is refused, beside what is said about progress and the open source."""
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    (line,) = (x for x in said if not x.startswith(("reading ", "tokenising ", "training on a stream of ")))
    return line


def history(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "logs" / "training_metrics.json").read_text())
    return content


def final(output: Path) -> dict[str, Any]:
    return checkpoint.read(output / "checkpoints" / "final.pt")


# ---- whole runs ---------------------------------------------------------------------------------


@pytest.mark.fault(68)
@pytest.mark.parametrize(("before", "after"), [("0", "2"), ("2", "0")])
def test_kill_9_and_resume_equal_the_uninterrupted_run_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    """Weights, optimizer, losses, and the position with the contents of the shuffle buffer."""
    for module, name, value in ((local, "PART_BYTES", 600), (documents, "PIECE_BYTES", 300)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(stream, "CHUNK_CHARACTERS", 400)
    path, whole, broken = tmp_path / "train.txt", tmp_path / "whole", tmp_path / "broken"
    write_text(path, texts(40))
    options = ("--max_steps", "24", "--batch_size", "8", "--save_interval", "4", "--eval_interval", "8")
    command = [sys.executable, "-c", CHILD, *flags(path, broken, *options, "--num_workers", before)]
    killed = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log, deadline = broken / "logs" / "training_metrics.jsonl", time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < 6:
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.kill()  # its workers live on for some seconds, which must not be in the way
    assert killed.wait() == -signal.SIGKILL
    saved = checkpoint.read(broken / "checkpoints" / "latest.pt")
    assert 4 <= saved["counters"]["step"] < 24
    assert saved["data"]["ranks"][0]["buffer"].shape == (15, LENGTH + 1)
    assert len(saved["data"]["ranks"][0]["lanes"]) == 8
    assert main(flags(path, whole, *options)) == 0
    assert main(["train", "--resume", "--output_dir", str(broken), "--num_workers", after]) == 0
    one, two = final(whole), final(broken)
    assert min(lane[0] for lane in one["data"]["ranks"][0]["lanes"].values()) > 0, "the run went round"
    for part in ("model", "optimizer", "data", "random", "tokenizer"):
        assert plain(one[part]) == plain(two[part]), part
    assert one["counters"] | {"seconds": 0} == two["counters"] | {"seconds": 0}
    assert history(whole) | {"tokens_per_second": 0} == history(broken) | {"tokens_per_second": 0}
    assert history(whole)["val_steps"] == [8, 16, 24]


@pytest.mark.fault(12)
def test_the_resume_of_an_edited_text_is_refused(
    tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, before = tmp_path / "run", path.read_text()
    assert main(flags(path, output, "--max_steps", "1")) == 0
    resume = ["train", "--resume", "--output_dir", str(output), "--max_steps", "2"]
    path.write_text(before.replace("word", "Word"))
    assert "was trained on another text than the settings give now" in refused(capsys, resume)
    assert final(output)["counters"]["step"] == 1
    assert main([*resume, "--override", "data_path"]) == 0
    assert final(output)["counters"]["step"] == 2


@pytest.mark.fault(24)
def test_a_resume_under_another_context_or_kind_of_source_is_refused(
    tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main(flags(path, output, "--max_steps", "1")) == 0
    resume = ["train", "--resume", "--output_dir", str(output), "--max_steps", "2"]
    longer = refused(capsys, [*resume, "--set", "max_seq_length=48"])
    assert "max_seq_length (saved 24, now 48)" in longer
    assert "dataset (saved 'localstreaming', now 'local')" in refused(capsys, [*resume, "--dataset", "local"])
    assert main([*resume, "--dataset", "local", "--override", "dataset"]) == 0


def test_a_bpe_is_that_of_a_local_run_and_is_kept_for_the_resume(tmp_path: Path, path: Path) -> None:
    output = tmp_path / "run"
    assert main(flags(path, output, "--set", "tokenizer_name=bpe:300", "--max_steps", "2")) == 0
    content = final(output)
    whole = open_corpus(TrainConfig(data_path=str(path)), "bpe:300", log=lambda line: None)
    assert Tokenizer.from_state(content["tokenizer"]).fingerprint == whole.tokenizer.fingerprint
    assert content["model"]["embed.weight"].shape[0] == 300
    assert main(["train", "--resume", "--output_dir", str(output), "--max_steps", "3"]) == 0
    assert final(output)["tokenizer"] == content["tokenizer"]


def test_a_bpe_of_a_long_text_is_made_of_its_beginning(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanokimi.data.corpus.BPE_CHARACTERS", 2000)
    streamed, whole = (
        open_corpus(TrainConfig(dataset=dataset, data_path=str(path)), "bpe:400", log=lambda line: None)
        for dataset in ("localstreaming", "local")
    )
    assert 257 < streamed.tokenizer.vocab_size < whole.tokenizer.vocab_size


# ---- what is held out ---------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    "txt": write_text,
    "jsonl": lambda path, wanted: write_json_lines(path, [*wanted]),
    "parquet": lambda path, wanted: write_parquet(path, [*wanted]),
}


def held_out(source: Corpus) -> list[int]:
    assert source.val is not None
    return source.val.read(0, len(source.val)).tolist()


def an_epoch(source: Corpus) -> bytes:
    """What a run sees in its first epoch and a little beyond; 0xFF stands for ends of text."""
    batches: Any = loader(source, batch_size=1, shuffle_buffer=1)
    found = []
    for sequence in inputs(iter(batches)):
        found.append(sequence)
        if batches.epoch:
            return b"".join(found)
    raise AssertionError


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(("count", "rule"), [(150, "by hash"), (20, "the last 0.1 of the text"), (1, "the last 0.1")])
def test_the_held_out_part_is_that_of_a_local_run_and_never_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, count: int, rule: str
) -> None:
    monkeypatch.setattr(stream, "LANES", 1)
    wanted = texts(count) if count > 1 else ["".join(texts(40))]
    path = tmp_path / f"t.{suffix}"
    WRITERS[suffix](path, wanted)
    whole = corpus(data_path=path, val_fraction=0.1)
    streamed = corpus(dataset="localstreaming", data_path=path, val_fraction=0.1, val_tokens=0)
    assert held_out(streamed) == held_out(whole)
    assert rule in streamed.summary
    assert rule in whole.summary
    trained = an_epoch(streamed)
    lines = bytes(t for t in held_out(streamed) if t < 256).decode().splitlines(keepends=True)
    assert len(lines) > 10
    assert not [line for line in lines if line.encode() in trained]
    kept = [line for document in wanted for line in document.splitlines(keepends=True) if line not in lines]
    assert not [line for line in kept[:-2] if line.encode() not in trained], "and all else is, but for the last rest"


def test_no_batch_of_many_epochs_and_lanes_holds_a_held_out_document(path: Path) -> None:
    source = corpus(dataset="localstreaming", data_path=path, val_fraction=0.2, val_tokens=0)
    apart = bytes(t if t < 256 else 0xFF for t in held_out(source)).split(b"\xff")[:-1]
    starts = {document.split(b" ")[0] + b" " for document in apart}  # such as "0.17.0 "
    assert len(starts) > 15
    seen = b"|".join(inputs(islice(iter(loader(source)), 1500)))
    assert not [start for start in starts if b"\xff" + start in seen or b"\n" + start in seen]
    assert b"\xff0.0.0 " in seen or b"\xff0.1.0 " in seen


def test_evaluations_take_no_more_held_out_tokens_than_asked_for(path: Path) -> None:
    rows = [
        held_out(corpus(dataset="localstreaming", data_path=path, val_fraction=0.3, val_tokens=n)) for n in (100, 0)
    ]
    assert rows[0] == rows[1][:101]
    assert len(rows[1]) > 500


def test_held_out_documents_of_their_own_are_evaluated(tmp_path: Path, path: Path) -> None:
    val, output = tmp_path / "val.jsonl", tmp_path / "run"
    write_json_lines(val, ["held out\n", "", "as well\n" * 30])
    assert main(flags(path, output, "--val_path", str(val), "--max_steps", "2", "--eval_interval", "1")) == 0
    assert history(output)["val_steps"] == [1, 2]
    source = corpus(dataset="localstreaming", data_path=path, val_path=val)
    assert bytes(t if t < 256 else 0xFF for t in held_out(source)) == b"held out\n\xff" + b"as well\n" * 30 + b"\xff"
    assert f"held out (in {val})" in source.summary


@pytest.mark.fault(41)
def test_the_training_text_may_not_be_its_own_held_out_text(
    tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, flags(path, tmp_path / "run", "--val_path", str(path)))
    assert f"--val_path {path} is the training text itself" in line


def test_with_no_share_nothing_is_held_out_or_evaluated(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    monkeypatch.setattr(trainer, "evaluate", None)
    assert main(flags(path, output, "--val_fraction", "0", "--max_steps", "2", "--eval_interval", "1")) == 0
    assert history(output)["val_steps"] == []
    monkeypatch.setattr(stream, "LANES", 1)
    source = corpus(dataset="localstreaming", data_path=path, val_fraction=0.0)
    assert source.val is None
    assert sorted(an_epoch(source).split(b"\xff")[:150]) == sorted(text.encode() for text in texts(150))


@pytest.mark.fault(41)
def test_a_share_that_holds_out_nothing_is_one_line(
    tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, flags(path, tmp_path / "run", "--val_fraction", "1e-9"))
    assert f"--val_fraction 1e-09 holds out no document of {path}: choose another share" in line


# ---- memory -------------------------------------------------------------------------------------

PEAKS = """
import json, sys
from itertools import islice
from nanokimi.config import TrainConfig
from nanokimi.data.loader import LoaderOptions
from nanokimi.data.sources import open_corpus

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

found = []
for path in sys.argv[1:]:
    config = TrainConfig(dataset="localstreaming", data_path=path)
    source = open_corpus(config, "byte", log=lambda line: None)
    n_tokens = sum(batch.rows().numel() for batch in islice(iter(source.train.loader(LoaderOptions(128, 8, 5))), 30))
    found.append([n_tokens, peak()])
print(json.dumps(found))
"""


@pytest.mark.fault(11)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """64 MB in many documents, in one document, in one line, and compressed, against 4 MB; in MB.

    The small ones are plain and compressed: what reads compressed files takes tens of MB to import.
    """
    rng, block = random.Random(0), 1 << 20
    lines = [json.dumps({"text": rng.randbytes(500).hex()}).encode() + b"\n" for _ in range(block // 1000)]
    document = b"".join(rng.randbytes(40).hex().encode() + b"\n" for _ in range(block // 81))
    separated = (document[: block // 8] + b"<|endoftext|>\n") * 8
    files = {
        "small.txt": separated * 4,
        "small.jsonl.gz": gzip.compress(b"".join(lines), 1) * 4,
        "large.txt": separated * 64,
        "document.txt": document * 64,
        "line.txt": document.replace(b"\n", b" ") * 64,
        "rows.jsonl": b"".join(lines) * 64,
        "rows.jsonl.gz": gzip.compress(b"".join(lines), 1) * 64,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    arguments = [str(tmp_path / name) for name in files]
    done = subprocess.run([sys.executable, "-c", PEAKS, *arguments], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    found = dict(zip(files, json.loads(done.stdout), strict=True))
    assert all(n_tokens == 30 * 8 * 129 for n_tokens, _ in found.values())
    small = found["small.jsonl.gz"][1]
    grown = {name: peak - small for name, (_, peak) in found.items() if not name.startswith("small")}
    assert max(grown.values()) < 40, grown
