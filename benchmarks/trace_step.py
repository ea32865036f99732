"""Which files and functions of the package one training step runs through.

    python benchmarks/trace_step.py                                       # a table of the files
    python benchmarks/trace_step.py --functions --output FILE.json        # their functions too; the record
    PYTHONPATH=../earlier python benchmarks/trace_step.py                 # those of another checkout

Two plain `train` runs on one process of the CPU are traced call by call, loader, metrics and progress included, from
the first call of the optimizer to the last one. One run has more steps than the other. A function belongs to the step
when the longer run calls it at least once more for every step that it has more. What is called less often (a line of
progress every 25 steps) or only before and after (the plot of all steps) does not belong.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import nanokimi

PACKAGE = Path(nanokimi.__file__).parent
SHORT, LONG = 8, 24  # steps


class Function(NamedTuple):
    """A function of the package, from its first to its last line, decorators and docstring included."""

    file: str
    first: int
    last: int
    name: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="debug")
    parser.add_argument("--functions", action="store_true", help="name the functions too")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where the record is kept")
    args = parser.parse_args()
    record = about() | {"preset": args.preset} | traced(args.preset)
    for file in record["files"]:
        print(
            f"{file['path']:40} {len(file['functions']):3} functions {file['lines']:4} of {file['file_lines']:4} lines"
        )
        if args.functions:
            print("    " + ", ".join(file["functions"]))
    print("{n_files} files of {file_lines} lines, {n_functions} functions of {lines} lines".format(**record["total"]))
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def about() -> dict[str, Any]:
    """The day, and the commit of the checkout that is traced."""
    git = ["git", "--no-optional-locks", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit}


def traced(preset: str) -> dict[str, Any]:
    """The files of a step with their functions, and the sums."""
    short, long = (calls_in(lambda steps=steps: train(preset, steps)) for steps in (SHORT, LONG))
    by_file: dict[str, list[Function]] = defaultdict(list)
    for function, calls in sorted(long.items()):
        if calls - short[function] >= LONG - SHORT:
            by_file[function.file].append(function)
    files = [summary(file, functions) for file, functions in by_file.items()]
    total = {"n_files": len(files), "n_functions": sum(len(file["functions"]) for file in files)}
    return {"files": files, "total": total | {key: sum(f[key] for f in files) for key in ("lines", "file_lines")}}


def summary(file: str, functions: list[Function]) -> dict[str, Any]:
    """What the record holds of a file."""
    lines = len({line for function in functions for line in range(function.first, function.last + 1)})
    return {
        "path": file,
        "functions": [function.name for function in functions],
        "lines": lines,
        "file_lines": len((PACKAGE / file).read_text(encoding="utf-8").splitlines()),
    }


def train(preset: str, steps: int) -> None:
    """A run of so many steps on a text of its own, without evaluation; it saves once, at its end."""
    from nanokimi.cli import main as run_command

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(2000)), encoding="utf-8")
        command = ["train", f"--preset={preset}", f"--data_path={text}", f"--output_dir={folder}/run"]
        command += [f"--max_steps={steps}", "--eval_interval=0", "--save_interval=0", "--compile=off", "--device=cpu"]
        if code := run_command(command):
            raise SystemExit(code)


def calls_in(work: Callable[[], object]) -> Counter[Function]:
    """How often ``work`` called each function between the optimizer's first and last call, in all threads."""
    from nanokimi import MuonClip

    # A counter for each thread: two of them adding to one could lose a call.
    by_thread: dict[int, Counter[tuple[str, int, str]]] = defaultdict(Counter)
    so_far: list[Counter[tuple[str, int, str]]] = []  # copies of them, made at the latest call of the optimizer
    steps = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal steps, so_far
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(f"{PACKAGE}/"):
            return
        if code.co_name == "step" and isinstance(frame.f_locals.get("self"), MuonClip):
            if steps == 0:
                by_thread.clear()
            so_far = [counter.copy() for counter in list(by_thread.values())]
            steps += 1
        by_thread[threading.get_ident()][code.co_filename, code.co_firstlineno, code.co_name] += 1

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    calls: Counter[Function] = Counter()
    for counter in so_far:
        for (file, line, name), number in counter.items():
            if function := function_at(file, line, name):
                calls[function] += number
    return calls


@cache
def function_at(file: str, line: int, name: str) -> Function | None:
    """The function that begins at ``line``; for a lambda or a comprehension the one around it, else None."""
    path = str(Path(file).relative_to(PACKAGE))
    around = [function for function in functions_in(file) if function.first <= line <= function.last]
    if not name.startswith("<"):
        around = [function for function in around if function.name.rpartition(".")[2] == name]
    if around:
        return max(around)._replace(file=path)
    return Function(path, line, line, name) if name == "<lambda>" else None


@cache
def functions_in(file: str) -> list[Function]:
    """All functions of a file, with the names of the classes and functions around them."""
    found = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = f"{prefix}{child.name}."
                if not isinstance(child, ast.ClassDef):
                    first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                    found.append(Function(file, first, child.end_lineno or first, inner[:-1]))
            visit(child, inner)

    visit(ast.parse(Path(file).read_text(encoding="utf-8")), "")
    return found


if __name__ == "__main__":
    main()
