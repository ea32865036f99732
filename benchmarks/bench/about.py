"""When, where and of what figures are."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]  # of the checkout
PACKAGES = ("torch", "transformers", "xllamacpp")


def about() -> dict[str, Any]:
    """Date, commit, processor, threads as torch takes them, versions; what is not installed is left out."""
    import torch

    hardware = {"cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit(), **hardware, **versions()}


def commit() -> str:
    """Of the checkout, ``-dirty`` when files differ from it; "" for a package without one."""
    if not (ROOT / ".git").exists():
        return ""
    git = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def processor() -> str:
    """Its name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def versions() -> dict[str, str]:
    """Python's, and those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
