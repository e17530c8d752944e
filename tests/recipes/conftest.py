"""One tiny base and tower a session; every test gets its own run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_runs import make_parts


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def dropout_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2, whose dropout draws random numbers where a module trains."""
    return make_parts(tmp_path_factory.mktemp("gpt2"), "gpt2")
