"""Whether two checkouts compute the same numbers, to the bit: training, decoding, exports and resumed runs.

    python -m benchmarks.same_numbers compare OLD_CHECKOUT NEW_CHECKOUT       # exit code 0: nothing differs
    python -m benchmarks.same_numbers compare OLD NEW --only "tiny fsdp" --steps 20 --output differences.json
    python -m benchmarks.same_numbers record CHECKOUT --output numbers.json   # digests of all numbers, to keep

Each side runs in processes of its own, in a temporary folder. Nothing is used but what has to stay as it is: the
command line, the public functions, two names for decoding (in whichever file of nanokimi.inference), and files. The old
side makes the text, the tokenizer and the checkpoints that both sides start from, so that old checkpoints are shown to
load, generate, export and resume.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Value = float | int | str | None
Seen = dict[str, dict[str, Value]]  # what a case saw: by column, by place in it (a step, the name of a weight)

FLAGS = ("clipped_gradient", "spike", "non_finite", "skipped")  # of a step, by numbers that are compared themselves
CORES = 2  # for one process, or shared by two ranks; more would change the order of sums

# What runs in a side's process begins with this; the first argument is the checkout.
IMPORTED = """
import sys
from pathlib import Path
import nanokimi
assert Path(nanokimi.__file__).is_relative_to(sys.argv[1]), f"imports {nanokimi.__file__}, not {sys.argv[1]}"
"""
COMMAND = "from nanokimi.cli import main\nsys.exit(main(sys.argv[2:]))"
DECODE = """
import hashlib, importlib, json, re, torch
from nanokimi import generate_tokens, load

def find(name):
    folder = Path(nanokimi.__file__).parent / "inference"
    for path in sorted(folder.glob("*.py")):
        if re.search(rf"^(class|def) {name}\\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            return getattr(importlib.import_module(f"nanokimi.inference.{path.stem}"), name)
    raise SystemExit(f"no {name} in {folder}")

kind, slots = sys.argv[3], int(sys.argv[4])
model, tokenizer = load(sys.argv[2])
text = "def read(path: str) -> list[str]:\\n    with open(path, encoding='utf-8') as file:\\n        return list(file)"
prompts = [tokenizer.encode(text * 2)[begin:end] for begin, end in ((0, 40), (10, 27), (5, 64))[:slots]]
new, how = ("GraphDecoder", {"capture": False}) if kind == "graph" else ("new_decoder", {"kind": kind})
decoder = find(new)(model, slots=slots, **how)
seen = {"tokens": {}, "logits": {}}

def look(name, logits):
    seen["logits"][name] = hashlib.sha256(logits.float().contiguous().numpy().tobytes()).hexdigest()
    return int(logits.argmax())

with torch.inference_mode():
    last = {slot: look(f"prefill {slot}", decoder.prefill(slot, prompt)) for slot, prompt in enumerate(prompts)}
    for step in range(64):
        taking_part = [slot for slot in last if slot != 1 or step < 32]  # the middle one leaves early
        seen["tokens"] |= {f"{step}.{slot}": last[slot] for slot in taking_part}
        logits = decoder.step(taking_part, [last[slot] for slot in taking_part])
        last |= {slot: look(f"{step}.{slot}", row) for slot, row in zip(taking_part, logits)}
    look("whole prompt", model(torch.tensor([prompts[0]])))
for temperature in (0.0, 0.8):
    ids = generate_tokens(model, prompts[-1], max_tokens=64, temperature=temperature, seed=7, decoder=decoder)
    seen["tokens"] |= {f"temperature {temperature}, {number}": id for number, id in enumerate(ids)}
print(json.dumps(seen))
"""


@dataclass(frozen=True)
class Side:
    """A checkout, and the folder in which its processes run; paths are relative to it, and so equal on both sides."""

    checkout: Path
    folder: Path

    def call(self, *arguments: str, ranks: int = 1) -> str:
        """Runs Python with ``arguments``, the package taken from the checkout; returns what it printed."""
        # Threads that wait asleep and not busily change no number, and take a third of the time beside other work.
        more = {"PYTHONPATH": str(self.checkout), "OMP_NUM_THREADS": str(CORES // ranks), "OMP_WAIT_POLICY": "PASSIVE"}
        start = [sys.executable, *arguments]
        done = subprocess.run(start, env=os.environ | more, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def nanokimi(self, *arguments: str, script: str = COMMAND) -> str:
        """Runs the command, or another ``script``, once it is certain that the package is that of the checkout."""
        return self.call("-c", IMPORTED + script, str(self.checkout), *arguments)

    def train(self, output: str, *flags: str, ranks: int = 1) -> None:
        """A run of ``train.py``, under torchrun where there is more than one rank."""
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        self.call(*start, str(self.checkout / "train.py"), "--output_dir", output, *flags, ranks=ranks)


@dataclass(frozen=True)
class Given:
    """What both sides start from, made by ``side``, the old one, when a case first asks for it."""

    side: Side
    steps: int

    def flags(self, preset: str) -> list[str]:
        """Of every training run; sequences of ``tiny`` are shortened to save time."""
        often, seldom = str(max(1, self.steps // 3)), str(self.steps // 6)
        own = ["--set", "tokenizer_name=data/tokenizer.json", "--set", "max_seq_length=128"] if preset == "tiny" else []
        return [
            "--preset",
            preset,
            *own,
            "--data_path",
            "data/train.txt",
            "--device",
            "cpu",
            "--mixed_precision",
            "off",
            "--compile",
            "off",
            "--max_steps",
            str(self.steps),
            "--warmup_steps",
            seldom,
            "--eval_interval",
            often,
            "--save_interval",
            "0",
            "--val_tokens",
            "2048",
            "--batch_size",
            "4",
            "--gradient_accumulation",
            "1",
        ]

    def make_data(self, *others: Side, tokenizer: bool) -> None:
        """A text of many short documents, paragraphs of Python's library, and a tokenizer; a copy for each side."""
        data = self.side.folder / "data"
        self.side.nanokimi("prepare", "stdlib", "--output", "data/all.txt")
        modules = (data / "all.txt").read_text(encoding="utf-8").split("<|endoftext|>\n")
        paragraphs = [part for module in modules[::8] for part in re.split(r"\n\n+", module)]
        (data / "train.txt").write_text("\n<|endoftext|>\n".join(paragraphs), encoding="utf-8")
        if tokenizer:
            self.side.nanokimi("tokenizer", "train", "data/train.txt", "--output", "data/tokenizer.json")
        for other in others:
            shutil.copytree(data, other.folder / "data")

    def checkpoints(self, preset: str, *flags: str, ranks: int = 1) -> Path:
        """The folder of a run of the old side: ``latest.pt``, and what was saved in the middle of it."""
        output = f"given_{preset}_{ranks}"
        if not (self.side.folder / output).exists():
            middle = ("--save_interval", str(self.steps // 2))
            self.side.train(output, *self.flags(preset), *middle, *flags, ranks=ranks)
        return self.side.folder / output / "checkpoints"

    @property
    def tiny(self) -> str:
        return str(self.checkpoints("tiny") / "latest.pt")


def looked_at(run: Path) -> Seen:
    """The history of a run, its last weights and its last optimizer state."""
    seen = history(run / "logs" / "training_metrics.jsonl")
    content = torch.load(run / "checkpoints" / "latest.pt", map_location="cpu", weights_only=True)
    seen["weights"] = {canonical(name): digest(tensor) for name, tensor in content["model"].items()}
    if optimizer := content.get("optimizer"):
        # Parameters are numbered there, in an order that may change.
        tensors = sorted((key, digest(t)) for state in optimizer["state"].values() for key, t in state.items())
        seen["optimizer"] = {f"{key}.{number}": value for number, (key, value) in enumerate(tensors)}
    if folders := sorted((run / "checkpoints").glob("step_*")):
        seen["shards"] = shards(folders[-1])
    return seen


def history(path: Path) -> Seen:
    """The columns of a run's history but the speed, by step, or by step and places in a list.

    Those that only say something about others are left out: a side may be older than they are.
    """
    seen: Seen = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        step = record.get("step", record.get("val_step"))
        for column in [name for name in record if name not in ("step", "val_step", "tokens_per_second", *FLAGS)]:
            seen.setdefault(column, {}).update(flat(str(step), record[column]))
    return seen


def flat(place: str, value: Any) -> Iterator[tuple[str, Value]]:
    """Single values out of lists and dicts in each other, under the path to them."""
    if isinstance(value, (list, dict)):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(f"{place}.{name}", part)
    else:
        yield place, value


def shards(folder: Path) -> dict[str, Value]:
    """Every tensor of a sharded checkpoint; which rank writes what all of them have is of no account."""
    parts: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            parts.setdefault(canonical(name), []).append(digest(tensor))
    return {name: hashlib.sha256("".join(parts[name]).encode()).hexdigest() for name in sorted(parts)}


def canonical(name: str) -> str:
    """The name of a weight, whether the embedding is a parameter of its own or that of a module."""
    return re.sub(r"(^|\.)embed\.weight$", r"\1embed", name)


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of type, shape and bytes."""
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + values).hexdigest()


def files(folder: Path) -> dict[str, Value]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


Look = Callable[[Side, Given, str], Seen]  # the last is a name for a new folder
LAYOUTS = {"one": (), "ddp": ("--parallel", "ddp"), "fsdp": ("--parallel", "fsdp")}
# Ways through the code that the basic cases do not take, all with the preset debug.
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "exact meter": ("one", ("--qk_clip_tau", "0.5", "--qk_clip_meter", "exact")),
    "activation checkpointing": ("one", ("--activation_checkpointing",)),
    "bf16": ("one", ("--mixed_precision", "on")),
    "cosine, rms": ("one", ("--schedule", "cosine", "--adjust_lr_fn", "match_rms_adamw", "--learning_rate", "0.003")),
    "softmax": ("one", ("--set", "score_func=softmax", "--set", "norm_topk_prob=false")),
    "groups": ("one", ("--set", "n_expert_groups=4", "--set", "n_limited_groups=2")),
    "no q_lora": ("one", ("--set", "q_lora_rank=0", "--qk_clip_tau", "4.88")),
    "no q_lora, shards": ("fsdp", ("--set", "q_lora_rank=0", "--qk_clip_tau", "4.88")),
    "longer context": ("one", ("--set", "rope_factor=2.0", "--set", "original_seq_len=64")),
    "stream": ("ddp", ("--dataset", "localstreaming", "--shuffle_buffer", "16", "--mask_documents")),
    "mix": ("one", ("--mix", "data/train.txt=0.7,localstreaming:data/train.txt=0.3", "--mask_documents")),
    "worker": ("one", ("--num_workers", "1")),
    "experts apart": ("fsdp", ("--expert_parallel", "2")),
    "hybrid": ("fsdp", ("--replicate", "2")),
}


def all_cases() -> dict[str, Look]:
    cases: dict[str, Look] = {}
    for preset, layout, masked, parts in itertools.product(("debug", "tiny"), LAYOUTS, (False, True), (1, 4)):
        size = ("--batch_size", "4" if parts == 1 else "2", "--gradient_accumulation", str(parts))
        more = ("--mask_documents", "--qk_clip_tau", "0.5") if masked else ()  # so low that all heads are clipped
        name = f"{preset} {layout}, accumulation {parts}{', masked' if masked else ''}"
        cases[name] = partial(trained, preset, layout, (*size, *more))
    cases |= {f"debug {name}": partial(trained, "debug", *way) for name, way in WAYS.items()}
    cases["debug token files"] = tokens_trained
    kinds = "eager", "native", "graph"
    cases |= {f"decode {kind}, {slots} slots": partial(decoded, kind, slots) for kind in kinds for slots in (1, 3)}
    cases |= {"generate": generated, "eval": evaluated, "export hf f32 and import": exported_hf}
    cases |= {f"export gguf {dtype}": partial(exported_gguf, dtype) for dtype in ("f32", "q8_0")}
    saved = (("one", 1), ("fsdp", 2), ("fsdp", 1))
    return cases | {f"resume {layout} with {ranks}": partial(resumed, layout, ranks) for layout, ranks in saved}


def trained(preset: str, layout: str, flags: Sequence[str], side: Side, given: Given, output: str) -> Seen:
    ranks = 1 if layout == "one" else CORES
    side.train(output, *given.flags(preset), *LAYOUTS[layout], *flags, ranks=ranks)
    return looked_at(side.folder / output)


def tokens_trained(side: Side, given: Given, output: str) -> Seen:
    side.nanokimi("prepare", "tokens", "--preset", "debug", "--data_path", "data/train.txt", "--output", "data/tokens")
    seen = trained("debug", "one", ("--dataset", "tokenbin", "--data_path", "data/tokens"), side, given, output)
    return {"token files": files(side.folder / "data" / "tokens"), **seen}


def decoded(kind: str, slots: int, side: Side, given: Given, output: str) -> Seen:
    return dict(json.loads(side.nanokimi(given.tiny, kind, str(slots), script=DECODE)))


def generated(side: Side, given: Given, output: str) -> Seen:
    """What a user reads, from weights of every type."""
    drawn = ("--prompt", "def main(", "--max_tokens", "64", "--temperature", "0.8", "--seed", "7", "--device", "cpu")
    texts: dict[str, Value] = {}
    for way in ("eager fp32", "native fp32", "native bf16", "native fp16", "native int8"):
        decoder, weights = way.split()
        texts[way] = side.nanokimi("generate", given.tiny, *drawn, "--decoder", decoder, "--weights", weights)
    return {"text": texts}


def evaluated(side: Side, given: Given, output: str) -> Seen:
    side.nanokimi("eval", given.tiny, "--data_path", "data/train.txt", "--max_tokens", "4000", "--output", "eval.json")
    return {"scored": json.loads((side.folder / "eval.json").read_text())["texts"][0] | {"seconds": None}}


def exported_hf(side: Side, given: Given, output: str) -> Seen:
    """All files, and the weights that come back from them."""
    side.nanokimi("export", "hf", given.tiny, output, "--dtype", "f32", "--no_compare")
    side.nanokimi("import", "hf", output, "--output", f"{output}.pt")
    weights = torch.load(side.folder / f"{output}.pt", map_location="cpu", weights_only=True)["model"]
    return {"files": files(side.folder / output), "weights": {canonical(n): digest(t) for n, t in weights.items()}}


def exported_gguf(dtype: str, side: Side, given: Given, output: str) -> Seen:
    (side.folder / output).mkdir()
    side.nanokimi("export", "gguf", given.tiny, f"{output}/model.gguf", "--dtype", dtype, "--no_compare")
    return {"files": files(side.folder / output)}


def resumed(layout: str, ranks: int, side: Side, given: Given, output: str) -> Seen:
    """The second half of a run of the old side; the history is that of the whole run."""
    checkpoints = side.folder / output / "checkpoints"
    checkpoints.mkdir(parents=True)
    if layout == "one":
        shutil.copy(given.checkpoints("debug") / "previous.pt", checkpoints / "latest.pt")
    else:
        folder = given.checkpoints("debug", *LAYOUTS["fsdp"], ranks=CORES) / f"step_{given.steps // 2:08d}"
        shutil.copytree(folder, checkpoints / folder.name)
    side.train(output, "--resume", *(LAYOUTS[layout] if ranks > 1 else ()), ranks=ranks)
    return looked_at(side.folder / output)


def differences(old: Seen, new: Seen) -> list[str]:
    """A line for each column that differs: in how many places, by how much, and how it begins."""
    found = []
    for column in dict.fromkeys((*old, *new)):
        there, here = old.get(column, {}), new.get(column, {})
        pairs = {place: (there.get(place, "none"), here.get(place, "none")) for place in (there | here)}
        apart = {place: (a, b) for place, (a, b) in pairs.items() if exact(a) != exact(b)}
        sizes = [abs(a - b) for a, b in apart.values() if isinstance(a, (int, float)) and isinstance(b, (int, float))]
        for place, (a, b) in list(apart.items())[:1]:
            most = f"at most {max(sizes):.3g} apart, " if sizes else ""
            found.append(f"{column}: {len(apart)} of {len(pairs)} differ, {most}first {place}: {a!s:.300} | {b!s:.300}")
    return found


def exact(value: object) -> object:
    """Equal for the same bits alone."""
    return value.hex() if isinstance(value, float) else (type(value).__name__, value)


def attempt(look: Look, side: Side, given: Given, output: str) -> tuple[Seen, float]:
    """What the case saw, and the seconds it took; a failure is seen, too."""
    began = time.monotonic()
    try:
        seen = look(side, given, output)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        seen = {"failed": {side.folder.name: f"{type(error).__name__}: {error}"}}  # by side, so that two are not equal
    return seen, time.monotonic() - began


def kept(seen: Seen, seconds: float) -> dict[str, Any]:
    """What is recorded: a digest of all numbers, one of each column of digests, and how the loss began and ended."""
    groups: dict[str, list[Any]] = {}
    for column, values in seen.items():
        group = column if any(isinstance(value, str) for value in values.values()) else "numbers"
        groups.setdefault(group, []).extend((column, place, exact(values[place])) for place in sorted(values))
    found: dict[str, Any] = {name: hashlib.sha256(repr(group).encode()).hexdigest() for name, group in groups.items()}
    if losses := list(seen.get("train_ce_loss", {}).values()):
        found |= {"first_loss": losses[0], "last_loss": losses[-1]}
    return {**found, "count": sum(map(len, seen.values())), "seconds": round(seconds, 1)}


def about(checkout: Path) -> dict[str, Any]:
    git = ["git", "--no-optional-locks", "-C", str(checkout), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    cpu = ", ".join(set(re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")))
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit, "cpu": cpu, "cores": os.cpu_count(), **versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    record, compare = parts.add_parser("record"), parts.add_parser("compare")
    for part, sides in ((record, 1), (compare, 2)):
        part.add_argument("checkouts", type=Path, nargs=sides, metavar="CHECKOUT")
        part.add_argument("--output", type=Path, required=part is record, metavar="FILE.json")
        part.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name")
        part.add_argument("--steps", type=int, default=60, help="of each training run (default: %(default)s)")
    args = parser.parse_args()
    cases = {name: look for name, look in all_cases().items() if args.only in name}
    with tempfile.TemporaryDirectory() as folder:
        both = [Side(path.resolve(), Path(folder) / f"side_{n}") for n, path in enumerate(args.checkouts)]
        return run(cases, both, args.steps, args.output)


def run(cases: dict[str, Look], sides: Sequence[Side], steps: int, output: Path | None) -> int:
    """All cases on one side or on two; returns the exit code."""
    began, wrong = time.monotonic(), 0
    for side in sides:
        side.folder.mkdir()
        side.nanokimi(script="")  # that it imports its own package
    given = Given(sides[0], steps)
    given.make_data(*sides[1:], tokenizer=any(not name.startswith("debug ") for name in cases))  # debug reads bytes
    content: dict[str, Any] = {"about": [about(side.checkout) for side in sides], "steps": steps, "cases": {}}
    for name, look in cases.items():
        results = [attempt(look, side, given, re.sub(r"\W+", "_", name)) for side in sides]
        seen = [result[0] for result in results]
        content["cases"][name] = [kept(*result) for result in results]
        found = differences(seen[0], seen[-1])
        failed = [text for one in seen for text in one.get("failed", {}).values()]
        wrong += bool(found or failed)
        state = "FAILED" if failed else "DIFFERS" if found else "same" if len(sides) > 1 else "recorded"
        times = " + ".join(f"{seconds:.1f}" for _, seconds in results)
        print(f"{name}: {state}, {sum(map(len, seen[0].values()))} figures, {times} s", flush=True)
        if found or failed:
            content.setdefault("wrong", {})[name] = [str(text) for text in failed] or found
            print("\n".join(f"    {line}" for line in content["wrong"][name]), flush=True)
    content["seconds"] = round(time.monotonic() - began)
    if output is not None:
        output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(content['cases'])} cases, {wrong} of them wrong, {content['seconds']} s")
    return int(wrong > 0 or not content["cases"])


if __name__ == "__main__":
    sys.exit(main())
