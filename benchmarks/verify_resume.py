"""`nanokimi train --verify_resume` over every source of text, a mixture, and two ranks: what of it is equal to the bit.

    python -m benchmarks.verify_resume        # writes benchmarks/results/verify-resume.json

The preset `debug`, with evaluations, samples, QK-Clip at work and the spike guard. The hub is a server on loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bench.results import ROOT, about
from benchmarks.engines import NANOKIMI

sys.path.append(str(ROOT / "tests"))
from hub import LoopbackHub, fineweb, hub_environment

RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
ALONE = [*NANOKIMI, "train"]
COMMON = [
    "--preset=debug",
    "--device=cpu",
    "--set=max_seq_length=64",
    "--set=tokenizer_name=byte",
    "--warmup_steps=2",
    "--val_tokens=500",
    "--eval_interval=3",
    "--samples=2",
    "--sample_prompt=ab",
    "--qk_clip_tau=2",
    "--spike_guard",
    "--shuffle_buffer=16",
]
LOCAL, STREAM = "--data_path=text.txt", "--dataset=localstreaming"
CASES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "local": (ALONE, (LOCAL,)),
    "local, 2 workers, masked": (ALONE, (LOCAL, "--num_workers=2", "--mask_documents")),
    "localstreaming": (ALONE, (STREAM, LOCAL)),
    "localstreaming, 2 workers": (ALONE, (STREAM, LOCAL, "--num_workers=2")),
    "tokenbin": (ALONE, ("--dataset=tokenbin", "--data_path=tokens")),
    "hfstreaming": (ALONE, ("--dataset=hfstreaming", "--hf_repo_name=HuggingFaceFW/fineweb", "--num_samples=0")),
    "fineweb": (ALONE, ("--dataset=fineweb", "--num_samples=150")),
    "fineweb, streamed": (ALONE, ("--dataset=fineweb", "--streaming", "--num_samples=0")),
    "mixture": (ALONE, ("--mix=text.txt=0.5,localstreaming:text.txt=0.3,tokenbin:tokens=0.2",)),
    "two ranks, replicas": (RANKS, (LOCAL, "--parallel=ddp")),
    "two ranks, shards": (RANKS, (LOCAL, "--parallel=fsdp")),
    "two ranks, shards, a stream": (RANKS, (STREAM, LOCAL, "--parallel=fsdp")),
    "two ranks, experts apart": (RANKS, (LOCAL, "--parallel=fsdp", "--expert_parallel=2")),
    "two ranks, a mixture": (RANKS, ("--mix=text.txt=0.5,tokenbin:tokens=0.5", "--parallel=ddp")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="of each half (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name; nothing is written")
    args = parser.parse_args()
    cases = {name: case for name, case in CASES.items() if args.only in name}
    with tempfile.TemporaryDirectory() as work, LoopbackHub({"HuggingFaceFW/fineweb": fineweb(texts())}) as hub:
        os.environ |= hub_environment(hub.url, Path(work) / "hf") | {"XDG_CACHE_HOME": f"{work}/cache"}
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        os.chdir(work)
        Path("text.txt").write_text("\n<|endoftext|>\n".join(texts()))
        tokens = ["prepare", "tokens", "--set=tokenizer_name=byte", "--data_path=text.txt", "--output=tokens"]
        subprocess.run([*NANOKIMI, *tokens], check=True)
        found = {name: verified(name, [*case, *COMMON, *flags], args.steps) for name, (case, flags) in cases.items()}
    equal = all(case["exit code"] == 0 for case in found.values())
    if not args.only:
        path = ROOT / "benchmarks" / "results" / "verify-resume.json"
        path.write_text(json.dumps(about() | {"steps of each half": args.steps, "cases": found}, indent=1) + "\n")
    return int(not equal)


def texts() -> list[str]:
    """Documents of made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 8))) for _ in range(300)]
    return [" ".join(draw.choices(words, k=draw.randint(20, 200))) for _ in range(160)]


def verified(name: str, command: list[str], steps: int) -> dict[str, Any]:
    """What `--verify_resume` says of one command."""
    began = time.monotonic()
    done = subprocess.run([*command, f"--verify_resume={steps}"], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    print(f"{name}: exit code {done.returncode}", flush=True)
    lines = [line.strip() for line in done.stdout.splitlines()]
    return {"exit code": done.returncode, "said": lines, "seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    sys.exit(main())
