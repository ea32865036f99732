"""How random examples are drawn, and the things that they are drawn about."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings

from nanokimi.config import PRESETS
from nanokimi.training.trainer import Trainer
from tests.properties.seam import Bench

# The suite draws the same examples each time; `python -m benchmarks.properties` others, and more of them.
common = settings(deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
settings.register_profile("suite", common, derandomize=True)
settings.register_profile("long", common, derandomize=False)
settings.load_profile(os.environ.get("NANOKIMI_PROPERTIES", "suite"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A folder with a text, a model in three formats, token files; and commands that take no longer than they must."""
    root = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in (("HOME", "home"), ("XDG_CACHE_HOME", "home/cache"), ("TMPDIR", "tmp")):
            (root / folder).mkdir(parents=True)
            patch.setenv(name, str(root / folder))
        patch.setattr(tempfile, "tempdir", str(root / "tmp"))
        patch.setattr(sys, "dont_write_bytecode", True)
        make_quick(patch, root)
        bench = Bench(root)
        bench.make()
        yield bench


def make_quick(patch: pytest.MonkeyPatch, root: Path) -> None:
    """One step is a run; pictures and the server are left out; what is tiny is smaller still."""
    patch.setattr(Trainer, "finished", lambda trainer: trainer.counters.step >= 1)
    patch.setattr("nanokimi.training.plots.plot_training", lambda *_, **__: None)
    patch.setattr("nanokimi.serve.server.run_serve", lambda options: 0)
    patch.setitem(PRESETS, "tiny", {**PRESETS["debug"], "tokenizer_name": "byte"})
    (root / "library").mkdir()
    (root / "library" / "module.py").write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:20_000])
    library = SimpleNamespace(get_path=lambda _: root / "library")
    patch.setattr("nanokimi.data.prepare.sysconfig", library)
    patch.setattr("nanokimi.data.prepare._topics", list)
