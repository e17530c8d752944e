"""Check what the benchmarks share: pairs in turn, an honest interval, a child's memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "pairs.py"


@pytest.fixture(scope="module")
def pairs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_pairs", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_is_first_changes_from_pair_to_pair(pairs: ModuleType) -> None:
    calls: list[str] = []
    now = iter(range(100))
    found = pairs.alternate(
        lambda: calls.append("a"), lambda: calls.append("b"), pairs=4, clock=lambda: next(now)
    )
    assert "".join(calls) == "ab" + "abbaabba"
    assert found.ours == found.theirs == [1] * 4


def test_the_ratio_is_that_of_each_pair(pairs: ModuleType) -> None:
    """A machine that slows down while it measures changes both times of a pair."""
    slow = [1.0, 2.0, 4.0, 8.0]
    found = pairs.Pairs([1.1 * s for s in slow], slow).ratio
    assert (found.low, found.median, found.high) == pytest.approx((1.1, 1.1, 1.1))


def test_an_interval_that_holds_the_limit_resolves_nothing(pairs: ModuleType) -> None:
    found = pairs.ratio([0.9, 0.95, 1.0, 1.05, 1.1] * 4)
    assert found.low < 1.0 < found.high
    assert found.below(1.0) is None
    assert found.below(1.2) is True
    assert found.below(0.8) is False
    assert found == pairs.ratio([0.9, 0.95, 1.0, 1.05, 1.1] * 4)
    other = found.inverse()
    assert (other.low, other.high) == pytest.approx((1 / found.high, 1 / found.low))


def test_a_peak_counts_what_is_gone_again(pairs: ModuleType) -> None:
    def work(size: int) -> dict[str, Any]:
        kept = torch.ones(4_000_000)  # before: not counted
        with pairs.Peak() as peak:
            for _ in range(3):
                torch.ones(size)
        return {"peak": peak.bytes, "kept": kept.nbytes}

    small, large = (pairs.in_child(work, size)["peak"] for size in (5_000_000, 10_000_000))
    assert 19e6 < small < 23e6  # the kernel counts pages by the dozen
    assert 39e6 < large < 43e6


def test_a_child_that_fails_says_why(pairs: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> dict[str, Any]:
        raise ValueError("no such thing")

    assert pairs.in_child(work) == {"error": "ValueError: no such thing"}
    assert "Traceback" in capfd.readouterr().err


def test_a_line_of_the_table(pairs: ModuleType) -> None:
    row = pairs.Row("a", "b", "1.3x", "1.2x", None)
    assert row.markdown() == "| a | b | 1.3x | 1.2x | not resolved |"
    assert row.markdown().count("|") == pairs.HEAD.splitlines()[0].count("|")
