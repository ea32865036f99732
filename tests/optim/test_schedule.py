from __future__ import annotations

import itertools

import pytest

from nanokimi.optim.schedule import lr_factor


def curve(schedule: str, steps: int = 100, warmup: int = 10, decay: float = 0.4) -> list[float]:
    return [lr_factor(schedule, s, s / steps, warmup_steps=warmup, decay_fraction=decay) for s in range(steps)]


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_warm_up_is_linear_from_the_first_step(schedule: str) -> None:
    values = curve(schedule)
    assert values[0] == pytest.approx(0.1, rel=0.01)
    assert all(b > a for a, b in itertools.pairwise(values[:10]))


def test_wsd_is_level_and_then_falls_linearly_to_zero() -> None:
    values = curve("wsd")
    assert set(values[9:61]) == {1.0}
    assert values[80] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.025)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert curve("cosine")[50] == pytest.approx(0.5)


def test_constant_stays() -> None:
    assert set(curve("constant")[9:]) == {1.0}


def test_no_warm_up_starts_at_the_peak() -> None:
    assert curve("constant", warmup=0)[0] == 1.0
