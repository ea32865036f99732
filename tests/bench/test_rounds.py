"""Rounds: their order, what counts, who is left out; workers as processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench.rounds import Candidate, LeftOut, Worker, run_rounds


class Scripted:
    """Stands in for a worker: notes who was asked, fails when told to."""

    def __init__(self, name: str, asked: list[str], fails_at: int | None = None, loads: bool = True) -> None:
        self.name, self.asked, self.fails_at, self.loads = name, asked, fails_at, loads

    def load(self) -> None:
        if not self.loads:
            raise LeftOut("not installed")

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.asked.append(self.name)
        if self.asked.count(self.name) - 1 == self.fails_at:
            raise LeftOut("broke down")
        return {"seconds": float(self.asked.count(self.name)), "did": do, **arguments}


def candidate(name: str, asked: list[str], *, once: bool = False, **more: Any) -> Candidate:
    return Candidate(name, Scripted(name, asked, **more), "work", {"size": 3}, once=once)  # type: ignore[arg-type]


def test_candidates_alternate_forwards_and_backwards_and_the_first_round_does_not_count() -> None:
    asked: list[str] = []
    measured = run_rounds([candidate(name, asked) for name in "abc"], rounds=2)
    assert asked == list("abccbaabc")
    assert measured.values() == {"a": [2.0, 3.0], "b": [2.0, 3.0], "c": [2.0, 3.0]}
    assert measured.first("size") == {"a": 3, "b": 3, "c": 3}


def test_a_slow_candidate_is_asked_once_and_that_counts() -> None:
    asked: list[str] = []
    measured = run_rounds([candidate("a", asked), candidate("slow", asked, once=True)], rounds=3)
    assert asked.count("slow") == 1
    assert measured.values()["slow"] == [1.0]


def test_who_breaks_down_is_left_out_with_the_reason_and_the_others_go_on() -> None:
    asked: list[str] = []
    broken = [candidate("late", asked, fails_at=1), candidate("absent", asked, loads=False)]
    measured = run_rounds([candidate("a", asked), *broken], rounds=3)
    assert measured.missing == {"late": "broke down", "absent": "not installed"}
    assert list(measured.values()) == ["a"]
    assert len(measured.values()["a"]) == 3
    assert asked.count("late") == 2
    assert "absent" not in asked


def test_a_worker_answers_and_says_why_it_cannot() -> None:
    with Worker("roofs", {"quick": True, "device": "cpu", "threads": 1}, {}) as worker:
        assert worker.ask("about")["threads"] == 1
        answer = worker.ask("matrix_roof", dtype="fp32")
        assert answer["work"] == 2 * 256**3
        assert answer["seconds"] > 0
        with pytest.raises(LeftOut, match="KeyError: 'fp8'"):
            worker.ask("product", dtype="fp8", name="torch 256")
        assert worker.ask("about")["threads"] == 1  # it is still there


def test_a_peer_that_is_not_installed_is_left_out_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ModuleNotFoundError(\"No module named 'transformers'\")")
    settings = {"preset": "debug", "batch_size": 1, "context": 8, "device": "cpu", "threads": 1}
    with Worker("reference", settings, {"PYTHONPATH": str(tmp_path)}) as worker, pytest.raises(LeftOut) as caught:
        worker.load()
    assert str(caught.value) == "ModuleNotFoundError: No module named 'transformers'"


def test_a_worker_that_dies_is_left_out() -> None:
    with Worker("roofs", {"quick": True, "device": "cpu", "threads": 1}, {}) as worker:
        worker.load()
        worker._process.kill()
        with pytest.raises(LeftOut, match="its process ended with -9"):
            worker.ask("about")
