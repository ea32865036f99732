"""One byte flipped in every region of every file, beside checkpoints, that this program wrote and a run reads.

    python -m benchmarks.flipped_bytes     # writes benchmarks/results/flipped-bytes.json

A run of the ``debug`` preset reads a token folder, a text with its cache of tokens and tokenizer, an exported folder,
or the weights of a checkpoint. After each flip the command must name the damage in one line (exit code 2), make what is
damaged anew, or end with the numbers of the undamaged run, to the bit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.bench.results import ROOT, about
from benchmarks.nothing_lost import SMALL, end_of, quiet

RESULTS = ROOT / "benchmarks" / "results" / "flipped-bytes.json"
TINY = ("--preset", "debug", "--set", "max_seq_length=16", *(x for value in SMALL for x in ("--set", value)))
RUN = ("--max_steps", "1", "--warmup_steps", "0", "--eval_interval", "0", "--batch_size", "1")


class Reader:
    """A run of its own that reads ``files``, which earlier commands have written below ``work``."""

    def __init__(self, work: Path, flags: tuple[str, ...], files: list[Path]) -> None:
        self.work, self.flags, self.files = work, flags, files
        code, said, self.end = self.run()
        assert code == 0, said

    def run(self) -> tuple[int, str, str]:
        """Exit code, what was said, and all numbers at the end."""
        output = self.work / "reads"
        shutil.rmtree(output, ignore_errors=True)
        code, said = quiet(["train", *self.flags, *RUN, "--output_dir", str(output)])
        return code, said, end_of(output)

    def judge(self, path: Path) -> str:
        """What became of a flip in ``path``."""
        bad = path.read_bytes()
        code, said, end = self.run()
        if code == 2:
            line = said.splitlines()[-1]
            assert path.name in line or path.parent.name in line, (path, line)
            return "named"
        assert (code, end) == (0, self.end), (path, said)
        return "harmless" if path.exists() and path.read_bytes() == bad else "made anew"


def token_folder(work: Path) -> Reader:
    """What ``nanokimi prepare tokens`` writes."""
    folder = work / "tokens"
    text = written_text(work)
    wanted = ["--data_path", str(text), "--set", "tokenizer_name=bpe:300", "--output", str(folder)]
    assert quiet(["prepare", "tokens", "--preset", "debug", *wanted])[0] == 0
    flags = (*TINY, "--dataset", "tokenbin", "--data_path", str(folder))
    return Reader(work, flags, sorted(path for path in folder.iterdir() if path.is_file()))


def caches(work: Path) -> Reader:
    """The tokens of a text and the tokenizer that was trained on it, kept for the next run."""
    text = written_text(work)
    flags = (*TINY, "--data_path", str(text), "--set", "tokenizer_name=bpe:300")
    Reader(work, flags, [])
    cache = next(path for path in work.iterdir() if path.name.startswith(text.name) and path.is_dir())
    return Reader(work, flags, sorted(path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"))


def exported(work: Path) -> Reader:
    """What ``nanokimi export hf`` writes, begun from."""
    checkpoint, folder = trained(work), work / "exported"
    code, said = quiet(["export", "hf", str(checkpoint), str(folder)])
    assert code == 0, said
    flags = ("--init_from", str(folder), "--data_path", str(work / "train.txt"))
    return Reader(work, flags, sorted(path for path in folder.iterdir() if path.suffix != ".md"))


def begun_from(work: Path) -> Reader:
    """A checkpoint whose weights a new run begins with: there is none before it that could be taken."""
    checkpoint = trained(work)
    return Reader(work, ("--init_from", str(checkpoint), "--data_path", str(work / "train.txt")), [checkpoint])


KINDS: dict[str, Callable[[Path], Reader]] = {
    "token folder": token_folder,
    "caches": caches,
    "exported folder": exported,
    "weights to begin with": begun_from,
}


def written_text(work: Path) -> Path:
    path = work / "train.txt"
    path.write_text(Path(shutil.__file__).read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


def trained(work: Path) -> Path:
    """The last checkpoint of a short run."""
    flags = [*TINY, *RUN, "--data_path", str(written_text(work)), "--output_dir", str(work / "made")]
    assert quiet(["train", *flags])[0] == 0
    return work / "made" / "checkpoints" / "final.pt"


def positions(size: int, regions: int) -> Iterator[int]:
    """Where bytes are flipped: at the start of each of ``regions`` parts, and at the end."""
    yield from range(0, size, max(1, size // regions))
    yield size - 1


def flips(reader: Reader, regions: int) -> Counter[str]:
    """How many flips were named, mended by making the file anew, or harmless."""
    count: Counter[str] = Counter()
    for path in reader.files:
        good = path.read_bytes()
        for position in sorted(set(positions(len(good), regions))):
            bad = bytearray(good)
            bad[position] ^= 1 << position % 7
            path.unlink(missing_ok=True)
            path.write_bytes(bad)
            count[f"{path.name}: {reader.judge(path)}"] += 1
        path.write_bytes(good)
        assert reader.run()[2] == reader.end, path
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regions", type=int, default=100, help="of each file")
    parser.add_argument("--only", choices=tuple(KINDS), nargs="*", default=tuple(KINDS))
    options = parser.parse_args()
    record = {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as work:
            record[name] = flips(KINDS[name](Path(work)), options.regions)
        print(name, json.dumps(record[name]), flush=True)
    if set(options.only) == set(KINDS):
        RESULTS.write_text(json.dumps(about() | {"silently accepted": 0, "kinds": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
