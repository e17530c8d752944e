"""Tests on a make-believe CUDA card, where there can be one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pretend_cuda import WHY_NOT, Card, pretend_cuda


@pytest.fixture(autouse=True)
def possible() -> None:
    if WHY_NOT:
        pytest.skip(f"no make-believe card: {WHY_NOT}")


@pytest.fixture
def card(possible: None) -> Iterator[Card]:
    with pretend_cuda() as seen:
        yield seen
