"""The properties of tests/properties on many more random examples than the test suite has time for.

    nice python -m benchmarks.properties 100        # so many times as many; writes benchmarks/results/properties.json

The record holds, for every property, how many examples were drawn and how many of them failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.bench.results import ROOT, about

COUNTS = re.compile(r"(\d+) passing, (\d+) failing")


class Counts:
    """A plugin of pytest: what hypothesis says about each property."""

    def __init__(self) -> None:
        self.properties: dict[str, dict[str, int]] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        outcome = yield
        found = COUNTS.findall(getattr(item, "hypothesis_statistics", ""))  # of each phase of the search
        numbers = [(int(passing), int(failing)) for passing, failing in found]
        name = f"{Path(item.path).stem}: {item.name.removeprefix('test_').replace('_', ' ')}"
        failed = sum(failing for _, failing in numbers)
        self.properties[name] = {"examples": sum(map(sum, numbers)), "failed": max(failed, int(bool(outcome.excinfo)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("times", type=float, metavar="TIMES", help="as many examples as the suite draws, times this")
    times = parser.parse_args().times
    os.environ |= {"NANOKIMI_PROPERTIES": "long", "NANOKIMI_PROPERTIES_FACTOR": str(times)}
    counts, began = Counts(), time.monotonic()
    pytest.main(["tests/properties", "-p", "no:cacheprovider", "--timeout", "0"], plugins=[counts])
    found = counts.properties.values()
    totals = {"properties": len(found), **{name: sum(p[name] for p in found) for name in ("examples", "failed")}}
    record = about() | {"times": times, "seconds": round(time.monotonic() - began), **totals}
    path = ROOT / "benchmarks" / "results" / "properties.json"
    path.write_text(json.dumps(record | {"by_property": counts.properties}, indent=1) + "\n")
    print(f"{path}: {totals}")


if __name__ == "__main__":
    main()
