"""Medians, ratios, intervals, exponents, and the file."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest

from benchmarks.bench.report import amount, comparison_lines
from benchmarks.bench.results import Results, compared, curve, exponent, ratio_interval


def test_ratios_and_rates_and_roofs_come_from_medians() -> None:
    values = {"ours": [1.0, 2.0, 9.0], "theirs": [3.0, 8.0, 4.0]}
    found = compared("x", values, ours="ours", work={"ours": 10.0}, roofs={"ours": 0.5, "theirs": 0.5})
    ours, theirs = found["rows"]
    assert (ours["median"], ours["ratio"], ours["rate"], ours["roof"]) == (2.0, 1.0, 5.0, 0.25)
    assert (theirs["median"], theirs["ratio"], theirs["roof"]) == (4.0, 2.0, 0.125)
    assert "rate" not in theirs


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    draw, covered = random.Random(0), 0
    for _ in range(2000):
        load = [draw.lognormvariate(0, 0.5) for _ in range(12)]  # hits both alike
        ours = [shared * draw.lognormvariate(0, 0.1) for shared in load]
        theirs = [1.5 * shared * draw.lognormvariate(0, 0.1) for shared in load]
        interval = ratio_interval(theirs, ours)
        assert interval is not None
        covered += interval[0] <= 1.5 <= interval[1]
    assert 0.95 <= covered / 2000 <= 0.98


def test_few_rounds_give_the_extremes_and_unequal_ones_no_interval() -> None:
    assert ratio_interval([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == [1.0, 3.0]
    assert ratio_interval([2.0], [1.0]) is None
    assert ratio_interval([2.0, 2.0], [1.0, 1.0, 1.0]) is None


def test_an_exponent_is_the_power_that_points_grow_with() -> None:
    assert exponent([(x, 3.0 * x**1.7) for x in (1.0, 2.0, 5.0, 16.0)]) == pytest.approx(1.7)
    found = curve("x", "context", [{"x": 1, "seconds": 1.0, "bytes": 5.0}, {"x": 4, "seconds": 16.0, "bytes": 5.0}])
    assert found["slopes"] == {"seconds": pytest.approx(2.0), "bytes": pytest.approx(0.0)}
    assert curve("x", "context", [{"x": 1, "seconds": 1.0}])["slopes"] == {}
    nothing = [{"x": x, "seconds": 1.0, "bytes": 0} for x in (1, 2)]
    assert curve("x", "context", nothing)["slopes"] == {"seconds": pytest.approx(0.0)}


def test_the_file_is_whole_after_every_finding(tmp_path: Path) -> None:
    results = Results(tmp_path / "bench.json", {"preset": "debug"})
    results.add("training", comparison=compared("x", {"ours": [1.0]}, ours="ours", missing={"theirs": "not here"}))
    content = json.loads(results.path.read_text())
    assert content["complete"] is False
    assert content["about"] == {"preset": "debug"}
    assert content["parts"]["training"]["comparisons"][0]["missing"] == [{"name": "theirs", "why": "not here"}]
    results.add("training", curve=curve("y", "batch", []))
    assert json.loads(results.path.read_text())["parts"]["training"]["curves"][0]["title"] == "y"


def test_a_table_names_ratio_interval_share_and_who_is_missing() -> None:
    values = {"ours": [1.0, 1.0], "theirs": [2.0, 2.5]}
    lines = comparison_lines(
        compared("title", values, ours="ours", roofs={"theirs": 0.9}, notes={"theirs": "slow"}, missing={"x": "no x"})
    )
    assert lines[0] == "title"
    assert "2.25 x [2, 2.5]" in lines[2]
    assert "40.0% of the roof" in lines[2]
    assert lines[3:] == ["  theirs: slow", "  x is left out: no x"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.5, "s", "1.5 s"),
        (0.0123, "s", "12.3 ms"),
        (4e-6, "s", "4 us"),
        (5.4e9, "B", "5.4 GB"),
        (1500.0, "s", "1,500 s"),
    ],
)
def test_amounts_have_units_that_suit_them(value: float, unit: str, text: str) -> None:
    assert amount(value, unit) == text


def test_the_median_of_a_row_is_the_median_of_its_values() -> None:
    taken = [0.3, 0.1, 0.2, 0.4]
    assert compared("x", {"a": taken}, ours="a")["rows"][0]["median"] == statistics.median(taken)
