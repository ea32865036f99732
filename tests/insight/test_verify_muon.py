"""The report itself can fail: each kind of breakage turns PASS into FAIL."""

from __future__ import annotations

import pytest
import torch

from nanokimi.insight import verify_muon
from nanokimi.optim import muonclip


def test_the_report_passes_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_muon.main() == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("PASS")
    assert "FAIL" not in printed


@pytest.mark.parametrize("broken", ["clip nothing", "clip values too", "no orthogonalisation"])
def test_a_broken_optimizer_fails_the_report(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if broken == "clip nothing":
        monkeypatch.setattr(muonclip, "qk_clip_", lambda layers, max_logits, tau: None)
    elif broken == "clip values too":
        healthy = muonclip.qk_clip_

        def too_much(layers: list, max_logits: torch.Tensor, tau: float) -> None:
            healthy(layers, max_logits, tau)
            for *_, key in layers:
                key.weight.mul_(0.99)  # the whole of wkv_b, values included

        monkeypatch.setattr(muonclip, "qk_clip_", too_much)
    else:
        monkeypatch.setattr(verify_muon, "newton_schulz", lambda g, dtype: g / g.norm(dim=(-2, -1), keepdim=True))
    assert verify_muon.main() == 1
    assert capsys.readouterr().out.rstrip().endswith("FAIL")
