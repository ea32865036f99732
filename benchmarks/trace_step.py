"""The package's files that one training step runs through: those with a function that is called at every step.

    python -m benchmarks.trace_step [--preset debug] [--lines]

Two plain `train` runs on one process, of which the second has more steps, are traced call by call, loader, metrics and
progress included. A function belongs to the step when its count of calls grows with the number of steps.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import nanokimi

PACKAGE = Path(nanokimi.__file__).parent
SHORT, LONG = 20, 40  # steps


def main() -> None:
    """Prints a line for each file, with the lines of its functions that take part, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="debug")
    parser.add_argument("--functions", action="store_true", help="name the functions too")
    args = parser.parse_args()
    short, long = calls_of_run(args.preset, SHORT), calls_of_run(args.preset, LONG)
    every_step = [code for code, calls in long.items() if calls - short[code] >= LONG - SHORT]
    by_file: dict[str, list[CodeType]] = {}
    for code in every_step:
        by_file.setdefault(code.co_filename, []).append(code)
    total = 0
    for name, codes in sorted(by_file.items()):
        lines = len(set().union(*(lines_of(code) for code in codes)))
        total += lines
        print(f"{Path(name).relative_to(PACKAGE)!s:40} {len(codes):3} functions {lines:4} lines")
        if args.functions:
            print("    " + ", ".join(sorted(code.co_name for code in codes)))
    print(f"{len(by_file)} files, {len(every_step)} functions of {total} lines")


def calls_of_run(preset: str, steps: int) -> Counter[CodeType]:
    """How often each function of the package was called by a run of so many steps."""
    from nanokimi.cli import main as nanokimi_main

    calls: Counter[CodeType] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and is_function(code):
            calls[code] += 1

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(2000)), encoding="utf-8")
        command = ["train", f"--preset={preset}", f"--data_path={text}", f"--output_dir={folder}/run"]
        command += [f"--max_steps={steps}", "--eval_interval=0", "--save_interval=0", "--compile=off", "--device=cpu"]
        sys.setprofile(count)
        try:
            assert nanokimi_main(command) == 0
        finally:
            sys.setprofile(None)
    return calls


def is_function(code: CodeType) -> bool:
    """Whether ``code`` is a function of its own, and no part of one such as a generator expression."""
    return not code.co_name.startswith("<")


def lines_of(code: CodeType) -> set[int]:
    """Line numbers of the function that ``code`` was compiled from, with its decorators and its docstring."""
    tree = ast.parse(Path(code.co_filename).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == code.co_name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if first <= code.co_firstlineno <= (node.end_lineno or first):
                return set(range(first, (node.end_lineno or first) + 1))
    return {code.co_firstlineno}


if __name__ == "__main__":
    main()
