"""``nanokimi doctor`` says what is there and what will fail, and fails itself nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import locked_folder

from nanokimi.cli import main
from nanokimi.insight import doctor

pytestmark = pytest.mark.fault("B4")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SIDE", 160)


def test_a_machine_that_is_fine_is_described_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--output_dir", str(tmp_path / "new" / "run"), "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert {"Python", "torch", "processor", "output folder", "cache folder", "native decoder"} <= set(found)
    assert "examination" not in found
    assert "GiB free" in found["output folder"]["seen"]
    assert not list(tmp_path.iterdir()), "it leaves nothing"


def test_a_folder_that_cannot_be_written_is_a_failure_with_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--output_dir", str(locked_folder(tmp_path))]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("output folder"))
    assert "cannot be written" in line
    assert "--output_dir" in line


def test_an_examination_that_fails_is_a_line_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(doctor, "memory", lambda: doctor.folder("x", homeless(), ""))
    assert main(["doctor"]) == 0
    assert "home directory" in capsys.readouterr().out
