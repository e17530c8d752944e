"""The questions to a card compute at tiny size on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cuda_switches


def test_every_question_gives_its_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(sys, "argv", ["cuda_switches.py", "--tiny"])
    assert cuda_switches.main() == 0
    said = capsys.readouterr().out
    for row in ("decoding", "training", "causal", "with a mask", "the base alone", "Wings, r 64"):
        assert f"| {row} |" in said
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda_switches.py"])
    assert cuda_switches.main() == 2
    assert "`mmgraft env`" in capsys.readouterr().err
