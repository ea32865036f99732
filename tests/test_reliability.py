"""docs/reliability.md: every fault has a test, and the page says which."""

from __future__ import annotations

from pathlib import Path

import pytest
from reliability import PAGE, Held, find_tests, page_with, read_faults, tables

NUMBERS = [number for faults in read_faults().values() for number in faults]


@pytest.mark.fault("B6")
def test_every_fault_has_a_test_and_every_marked_test_a_fault() -> None:
    tests = find_tests()
    assert [number for number in NUMBERS if number not in tests] == []
    assert sorted(tests.keys() - set(NUMBERS)) == []


def test_the_page_lists_the_tests_that_there_are() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page_with(tables()), "run `python -m tests.reliability`"
    assert page_with("nothing") != text


def test_marks_are_found_on_tests_on_parameters_and_in_lists(tmp_path: Path) -> None:
    source = """
CASES = [(1, 2), pytest.param(3, 4, marks=pytest.mark.fault("A2"))]
OTHERS = [pytest.param(9, marks=pytest.mark.fault(9))]

@pytest.mark.fault(12, 13)
def test_both(): ...

@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.fault(12))])
def test_one_case(): ...

@pytest.mark.parametrize("n", CASES)
def test_a_case_of_a_list(): ...

def test_none(): ...
"""
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "test_x.py").write_text(source)
    path = f"{tmp_path.name}/inner/test_x.py"
    both, case, listed = (Held(path, f"test_{name}") for name in ("both", "one_case", "a_case_of_a_list"))
    assert find_tests(tmp_path) == {"12": [both, case], "13": [both], "A2": [listed]}
