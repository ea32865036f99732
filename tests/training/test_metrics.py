from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nanokimi.errors import RunError
from nanokimi.training.metrics import STEP_COLUMNS, MetricsLog


def one_step(**changes: object) -> dict[str, object]:
    values = {
        "train_ce_loss": 4.0, "train_aux_loss": 0.5, "learning_rate": 0.02, "grad_norm": 1.5, "tokens": 512,
        "tokens_per_second": 3000.0, "max_logit": [8.0, 9.0, 10.0], "clipped_heads": 0,
        "expert_load": [[0.5, 0.5], [0.25, 0.75]],
    }  # fmt: skip
    return values | changes


def read_strictly(text: str | bytes) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def log_of(folder: Path, steps: int) -> MetricsLog:
    log = MetricsLog(folder)
    for step in range(1, steps + 1):
        log.record(step, one_step(tokens=512 * step))
        if step % 2 == 0:
            log.record_validation(step, 3.0 / step, 2.0 / step)
    return log


def test_json_holds_parallel_lists_under_the_documented_names(tmp_path: Path) -> None:
    with closing(log_of(tmp_path, 5)) as log:
        log.write_json()
    history = read_strictly((tmp_path / "logs" / "training_metrics.json").read_bytes())
    assert list(history) == ["steps", *STEP_COLUMNS, "val_steps", "val_loss", "val_bits_per_byte"]
    assert {len(history[name]) for name in ("steps", *STEP_COLUMNS)} == {5}
    assert history["steps"] == [1, 2, 3, 4, 5]
    assert history["tokens"] == [512, 1024, 1536, 2048, 2560]
    assert (history["val_steps"], history["val_loss"], history["val_bits_per_byte"]) == (
        [2, 4],
        [1.5, 0.75],
        [1.0, 0.5],
    )
    assert history["expert_load"][0] == [[0.5, 0.5], [0.25, 0.75]]


def test_train_loss_is_cross_entropy_plus_auxiliary_loss(tmp_path: Path) -> None:
    with closing(log_of(tmp_path, 1)) as log:
        assert log.history()["train_loss"] == [4.5]


def test_non_finite_numbers_become_null_in_both_files(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path)) as log:
        log.record(1, one_step(train_ce_loss=math.nan, grad_norm=math.inf, max_logit=[1.0, -math.inf, 2.0]))
        log.record_validation(1, math.nan, math.inf)
        log.write_json()
    first, second = map(read_strictly, log.jsonl_path.read_text().splitlines())
    assert (first["train_loss"], first["grad_norm"], first["max_logit"]) == (None, None, [1.0, None, 2.0])
    assert second == {"val_step": 1, "val_loss": None, "val_bits_per_byte": None}
    assert read_strictly(log.json_path.read_bytes())["train_ce_loss"] == [None]


def test_a_skipped_step_stands_in_every_list(tmp_path: Path) -> None:
    with closing(log_of(tmp_path, 1)) as log:
        log.record(2, {"learning_rate": 0.02, "tokens": 1024})
        history = log.history()
    assert {len(history[name]) for name in ("steps", *STEP_COLUMNS)} == {2}
    assert (history["train_loss"], history["max_logit"][1], history["tokens"]) == ([4.5, None], None, [512, 1024])


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    with closing(log_of(tmp_path, 3)) as log:
        assert len(log.jsonl_path.read_text().splitlines()) == 4


def test_a_misspelt_column_is_refused(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path)) as log, pytest.raises(ValueError, match="gradnorm"):
        log.record(1, {"gradnorm": 1.0})


def test_a_resume_rewrites_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    with closing(log_of(tmp_path, 3)) as log:
        state = log.state()
        log.record(4, one_step(train_ce_loss=99.0))
    with log.jsonl_path.open("a") as file:
        file.write('{"step": 5, "tr')  # the line that a kill cut short
    with closing(MetricsLog(tmp_path, state=state)) as resumed:
        resumed.record(4, one_step())
        resumed.write_json()
    steps = [
        record["step"] for record in map(read_strictly, log.jsonl_path.read_text().splitlines()) if "step" in record
    ]
    assert steps == [1, 2, 3, 4]
    assert read_strictly(log.json_path.read_bytes())["train_ce_loss"] == [4.0] * 4
    assert [path.name for path in log.jsonl_path.parent.glob("*.jsonl*")] == ["training_metrics.jsonl"]


def test_a_restored_history_equals_the_one_saved(tmp_path: Path) -> None:
    with (
        closing(log_of(tmp_path / "first", 4)) as log,
        closing(MetricsLog(tmp_path / "second", state=log.state())) as restored,
    ):
        assert restored.history() == log.history()
        assert restored.jsonl_path.read_bytes() == log.jsonl_path.read_bytes()


def test_a_fresh_run_keeps_the_files_of_earlier_ones(tmp_path: Path) -> None:
    for steps in (1, 2, 3):
        log_of(tmp_path, steps).close()
    counts = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "logs").iterdir()}
    assert counts == {"training_metrics.jsonl.1": 1, "training_metrics.jsonl.2": 3, "training_metrics.jsonl": 4}


def test_a_resume_keeps_the_history_of_another_run(tmp_path: Path) -> None:
    with closing(log_of(tmp_path / "elsewhere", 2)) as other:
        state = other.state()
    with closing(MetricsLog(tmp_path)) as log:
        log.record(1, one_step(train_ce_loss=7.0))
    MetricsLog(tmp_path, state=state).close()
    kept = log.jsonl_path.with_name("training_metrics.jsonl.1")
    assert read_strictly(kept.read_text())["train_ce_loss"] == 7.0


def test_a_log_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"cannot write .*training_metrics\.jsonl.*--output_dir"):
        MetricsLog(tmp_path)
