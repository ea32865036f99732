"""What ``python -m benchmarks.bench`` is asked for: its flags, checked."""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench.results import ROOT
from nanokimi.config import ModelConfig
from nanokimi.errors import UserError

PARTS = ("roofs", "training", "optimizer", "memory", "prefill", "decoding", "growth", "formats")
BATCH_SIZES = {"nano-243m": 2, "tiny": 8, "debug": 2}
INSTRUCTIONS = {
    "native": {},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
SHORTEST = 8  # context of decoding
LONGEST_TRAINED = 1024


@dataclass(frozen=True)
class BenchArguments:
    """One run of the bench.

    Attributes:
        parts: some of PARTS, in that order.
        contexts: of decoding, ascending; the preset's context is widened to hold them.
        batch_size: of the training step; 0 takes the preset's.
        repeats: rounds that count, after one to warm up.
        threads: of every candidate; 0 takes what torch takes.
        instructions: one of INSTRUCTIONS: instruction sets that torch may use.
        checkpoint: of a trained model, for ``formats``; "" leaves the part out.
        output: JSON file; "" chooses a name.

    Raises:
        UserError: a value is out of range; the message names the flag.
    """

    preset: str = "nano-243m"
    parts: tuple[str, ...] = PARTS
    contexts: tuple[int, ...] = (128, 900, 8192)
    batch_size: int = 0
    repeats: int = 5
    device: str = "auto"
    threads: int = 0
    instructions: str = "native"
    checkpoint: str = ""
    output: str = ""

    def __post_init__(self) -> None:
        if self.preset not in BATCH_SIZES:
            raise UserError(f"--preset {self.preset}: the bench runs {', '.join(BATCH_SIZES)}")
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"--parts {part}: choose from {', '.join(PARTS)}")
        if not self.parts or not self.contexts:
            raise UserError(f"--{'contexts' if self.parts else 'parts'}: name at least one")
        if min(self.contexts) < SHORTEST:
            raise UserError(f"--contexts {min(self.contexts)}: must be {SHORTEST} or more")
        for name, low in (("batch_size", 0), ("repeats", 1), ("threads", 0)):
            if getattr(self, name) < low:
                raise UserError(f"--{name} must be {low} or more, got {getattr(self, name)}")
        if self.instructions not in INSTRUCTIONS:
            raise UserError(f"--instructions {self.instructions}: choose one of {', '.join(INSTRUCTIONS)}")
        if self.instructions == "avx2" and platform.machine() not in ("x86_64", "AMD64"):
            raise UserError(f"--instructions avx2: this is {platform.machine()}: leave it out")
        if self.checkpoint and not Path(self.checkpoint).is_file():
            raise UserError(f"--checkpoint {self.checkpoint}: no such file")
        if self.parts == ("formats",) and not self.checkpoint:
            raise UserError("--parts formats needs a trained model: name one with --checkpoint")

    @property
    def config(self) -> ModelConfig:
        """The preset's shape."""
        return ModelConfig.preset(self.preset)

    @property
    def rows(self) -> int:
        """B of the training step."""
        return self.batch_size or BATCH_SIZES[self.preset]

    @property
    def context(self) -> int:
        """T of the training step."""
        return min(LONGEST_TRAINED, self.config.max_seq_length)

    @property
    def environment(self) -> dict[str, str]:
        """Of every candidate's process."""
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if self.threads}
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # torch.compile's cache does not ask which instructions are allowed: what it holds for others would crash.
        own = {"TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"nanokimi-bench-{self.instructions}")}
        return {**INSTRUCTIONS[self.instructions], **threads, **quiet, **own}

    @property
    def path(self) -> Path:
        """Where the figures go: ``--output``, in a checkout ``benchmarks/results``, else here."""
        if self.output:
            return Path(self.output)
        results = ROOT / "benchmarks" / "results"
        folder = results if (ROOT / ".git").exists() and results.is_dir() else Path()
        return folder / f"bench-{self.preset}-{self.instructions}-{time.strftime('%Y-%m-%d')}.json"


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``bench_arguments``; their defaults are those of ``BenchArguments``."""
    default = BenchArguments()
    add = parser.add_argument
    add("--preset", default=default.preset, help=f"shape {{{','.join(BATCH_SIZES)}}} (%(default)s)")
    add("--parts", default=",".join(PARTS), metavar="PART,...", help="what to measure (%(default)s)")
    contexts = ",".join(map(str, default.contexts))
    add("--contexts", default=contexts, metavar="N,...", help="tokens in the cache of decoding (%(default)s)")
    add("--batch_size", "--batch-size", type=int, default=0, metavar="N", help="of the training step (the preset's)")
    add("--repeats", type=int, default=default.repeats, metavar="N", help="rounds that count (%(default)s)")
    add("--device", default=default.device, help="auto, cpu or cuda (%(default)s)")
    add("--threads", type=int, default=0, metavar="N", help="of every candidate; 0: as torch takes them (%(default)s)")
    about = f"instruction sets that torch may use {{{','.join(INSTRUCTIONS)}}} (%(default)s)"
    add("--instructions", default=default.instructions, help=about)
    add("--checkpoint", default="", metavar="FILE", help="a trained model, for what weights in fewer bits cost it")
    add("--output", default="", metavar="FILE.json", help="the figures; a picture goes beside them")


def bench_arguments(args: argparse.Namespace) -> BenchArguments:
    """What the flags ask for; UserError for a value that cannot be."""
    parts = {part.strip() for part in args.parts.split(",") if part.strip()}
    try:
        contexts = tuple(sorted({int(n) for n in args.contexts.split(",") if n.strip()}))
    except ValueError:
        raise UserError(f"--contexts {args.contexts}: takes whole numbers with commas between them") from None
    return BenchArguments(
        preset=args.preset,
        parts=tuple(p for p in PARTS if p in parts) + tuple(sorted(parts - set(PARTS))),
        contexts=contexts,
        batch_size=args.batch_size,
        repeats=args.repeats,
        device=args.device,
        threads=args.threads,
        instructions=args.instructions,
        checkpoint=args.checkpoint,
        output=args.output,
    )
