"""Check what loading for a command does beside loading."""

from __future__ import annotations

import gc

import pytest

from mmgraft.cli.loading import uncollected


@pytest.fixture(autouse=True)
def _collector() -> object:
    yield
    gc.enable()


@pytest.mark.parametrize("before", [True, False])
def test_the_collector_rests_and_is_as_it_was_afterwards(before: bool) -> None:
    if not before:
        gc.disable()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled() == before


def test_a_model_that_cannot_be_loaded_leaves_it_running() -> None:
    with pytest.raises(ValueError, match="no model"), uncollected():
        raise ValueError("no model")
    assert gc.isenabled()
