"""Large pages: asked for, and nothing else changes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from nanokimi.native.build import prefer_huge_pages


def huge_kilobytes() -> int:
    found = re.search(r"^AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux is asked")
def test_a_large_tensor_moves_into_huge_pages_and_keeps_its_values() -> None:
    tensor = torch.arange(16_000_000)
    expected, before = tensor.clone(), huge_kilobytes()
    if not prefer_huge_pages(tensor):
        pytest.skip("this system has no huge pages to give, or does not move memory into them")
    assert huge_kilobytes() - before >= tensor.nbytes // 1024 - 2 * 2048
    assert torch.equal(tensor, expected)


def test_a_tensor_smaller_than_a_page_is_left_alone() -> None:
    assert not prefer_huge_pages(torch.zeros(1000))
