"""Writes the tables of docs/reliability.md: every fault of faults.toml, and the tests that are marked with its number.

python -m tests.reliability
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TESTS = Path(__file__).parent
FAULTS, PAGE = TESTS / "faults.toml", TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- made by `python -m tests.reliability` -->", "<!-- to here -->"


class Held(NamedTuple):
    """A test function, by the path of its file from the root of the repository."""

    path: str
    name: str

    def __str__(self) -> str:
        return f"[{self.name.removeprefix('test_').replace('_', ' ')}](../{self.path})"


def read_faults() -> dict[str, dict[str, tuple[str, str]]]:
    """By area and number: the fault, and what happens then."""
    areas = tomllib.loads(FAULTS.read_text(encoding="utf-8"))
    return {area: {number: (what, then) for number, (what, then) in faults.items()} for area, faults in areas.items()}


def find_tests(folder: Path = TESTS) -> dict[str, list[Held]]:
    """The tests below ``folder`` by the numbers with which ``@pytest.mark.fault`` marks them or their parameters."""
    found: dict[str, list[Held]] = defaultdict(list)
    for path in sorted(folder.rglob("test_*.py")):
        for name, number in _marked(ast.parse(path.read_text(encoding="utf-8"))):
            test = Held(path.relative_to(folder.parent).as_posix(), name)
            if test not in found[number]:
                found[number].append(test)
    return dict(found)


def _marked(module: ast.Module) -> Iterator[tuple[str, str]]:
    """The test functions of a module with their numbers, also those of the whole module or of a list that it names."""
    lists = {
        target.id: list(_numbers(statement))
        for statement in module.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    for test in ast.walk(module):
        if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
            yield from ((test.name, number) for number in lists.get("pytestmark", []))
            for part in (part for decorator in test.decorator_list for part in ast.walk(decorator)):
                numbers = lists.get(part.id, []) if isinstance(part, ast.Name) else _numbers_of(part)
                yield from ((test.name, number) for number in numbers)


def _numbers(tree: ast.AST) -> Iterator[str]:
    for part in ast.walk(tree):
        yield from _numbers_of(part)


def _numbers_of(node: ast.AST) -> list[str]:
    """The arguments of a call of ``pytest.mark.fault``; ValueError unless they are written out."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
        return [str(ast.literal_eval(argument)) for argument in node.args]
    return []


def tables() -> str:
    """A heading and a table for each area."""
    tests = find_tests()
    lines = []
    for area, faults in read_faults().items():
        lines += ["", f"### {area}", "", "| fault | what | then | held by |", "|---|---|---|---|"]
        for number, (what, then) in faults.items():
            lines.append(f"| {number} | {what} | {then} | {'; '.join(map(str, tests.get(number, [])))} |")
    return "\n".join([*lines, "", ""])


def page_with(made: str) -> str:
    """The page with ``made`` between its two comments."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + "\n" + made + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page_with(tables()), encoding="utf-8")
