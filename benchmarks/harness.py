"""One model scored in three ways: `nanokimi eval`, lm-evaluation-harness through our adapter, its own `hf` model.

    python -m benchmarks.harness runs/demo/checkpoints/final.pt        # writes benchmarks/results/harness-DATE.json

Two local tasks of modules of the standard library: bits per byte of whole files, and which of four lines comes next.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bench.results import ROOT, about
from benchmarks.engines import NANOKIMI

MODULES = ("calendar", "configparser", "csv", "fractions", "shelve", "textwrap")
QUESTIONS, BEFORE = 150, 12  # lines in front of each question
TASKS: dict[str, dict[str, Any]] = {
    "next_line": {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "modules": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint")
    model = parser.parse_args().model.absolute()
    with tempfile.TemporaryDirectory() as work:
        os.environ["HF_DATASETS_CACHE"] = f"{work}/cache"
        os.chdir(work)
        write_tasks()
        subprocess.run([*NANOKIMI, "export", "hf", str(model), "hf"], check=True)
        found = {"eval": by_command(model), "adapter": by_harness("nanokimi", f"checkpoint={model},device=cpu")}
        found["hf"] = by_harness("hf", "pretrained=hf,dtype=float32", device="cpu")
    for name, figures in found.items():
        print(name, json.dumps(figures), file=sys.stderr)
    path = ROOT / "benchmarks" / "results" / time.strftime("harness-%Y-%m-%d.json")
    path.write_text(json.dumps({"/".join(model.parts[-3:]): about() | {"figures": found}}, indent=1) + "\n")


def write_tasks() -> None:
    """The data as JSON lines and the tasks as YAML, of which JSON is a part."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = {name: (library / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
    data = {"modules": [{"text": text} for text in texts.values()], "next_line": questions(list(texts.values()))}
    Path("tasks").mkdir()
    for name, task in TASKS.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data[name]))
        files = {"test": f"{name}.jsonl"}
        content = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        Path(f"tasks/{name}.yaml").write_text(json.dumps({**content, **task}))


def questions(texts: list[str]) -> list[dict[str, Any]]:
    """Some lines of a module, the one behind them and three from elsewhere, in any order."""
    draw = random.Random(0)
    asked = []
    while len(asked) < QUESTIONS:
        lines = [line for line in draw.choice(texts).splitlines() if len(line.strip()) > 8]
        at = draw.randrange(BEFORE, len(lines))
        choices = [line.strip() for line in (lines[at], *draw.sample(lines, 3))]
        if len(set(choices)) == 4:
            order = draw.sample(range(4), 4)
            question = "\n".join(lines[at - BEFORE : at]) + "\n"
            asked.append({"question": question, "choices": [choices[i] for i in order], "answer": order.index(0)})
    return asked


def by_command(model: Path) -> dict[str, float]:
    flags = ["--data_path", "modules.jsonl", "--tasks", "next_line.jsonl", "--output", "eval.json", "--device", "cpu"]
    subprocess.run([*NANOKIMI, "eval", str(model), *flags], check=True)
    written = json.loads(Path("eval.json").read_text())
    (text,), (file,) = written["texts"], written["files"]
    return {"bits_per_byte": text["bits_per_byte"], "acc": file["acc"], "acc_norm": file["acc_norm"]}


def by_harness(name: str, arguments: str, **more: Any) -> dict[str, float]:
    import lm_eval

    import nanokimi.insight.harness  # registers the model nanokimi

    assert nanokimi.insight.harness
    manager = lm_eval.tasks.TaskManager(include_path="tasks", include_defaults=False)
    results = lm_eval.simple_evaluate(name, arguments, tasks=list(TASKS), task_manager=manager, batch_size=8, **more)
    modules, lines = (results["results"][task] for task in ("modules", "next_line"))
    return {
        "bits_per_byte": modules["bits_per_byte,none"],
        "acc": lines["acc,none"],
        "acc_norm": lines["acc_norm,none"],
    }


if __name__ == "__main__":
    main()
