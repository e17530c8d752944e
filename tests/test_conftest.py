"""The settings that every other test relies on."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


def outcome(folder: Path, **env: str) -> str:
    """Closing line of a run of one test that asks for the golden data."""
    (folder / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"))
    (folder / "test_one.py").write_text("def test_one(golden):\n    assert golden.is_absolute()\n")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MMGRAFT_")}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", str(folder)],
        cwd=folder,
        env={**clean, **env},
        check=False,
        capture_output=True,
        text=True,
    )
    return ran.stdout.splitlines()[-1]


def test_golden_data_are_optional_unless_required(tmp_path: Path) -> None:
    assert "1 skipped" in outcome(tmp_path)
    assert "1 error" in outcome(tmp_path, MMGRAFT_REQUIRE_GOLDEN="1")


def test_golden_data_that_are_named_must_be_there(tmp_path: Path) -> None:
    assert "1 error" in outcome(tmp_path, MMGRAFT_GOLDEN=str(tmp_path / "none"))
    for case in ("iaa", "wings"):
        (tmp_path / "golden" / case).mkdir(parents=True)
    assert "1 passed" in outcome(
        tmp_path, MMGRAFT_GOLDEN=str(tmp_path / "golden"), MMGRAFT_REQUIRE_GOLDEN="1"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is resident")
def test_a_module_that_leaves_too_much_in_memory_fails(tmp_path: Path) -> None:
    text = CONFTEST.read_text(encoding="utf-8")
    assert " = 2.0e9, 1.2e9, 1.0e8" in text
    for number, size, wanted in ((1, 1 << 28, "1 passed, 1 error"), (2, 1 << 20, "1 passed in")):
        folder = tmp_path / str(number)
        folder.mkdir()
        small = text.replace("= 2.0e9, 1.2e9, 1.0e8", "= 2.0e8, 1.0e8, 1.0")
        held = f"import os\n\nHELD = os.urandom({size})\n\n\ndef test_one():\n    pass\n"
        (folder / "conftest.py").write_text(small)
        (folder / "test_one.py").write_text(held)
        command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", str(folder)]
        ran = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
        assert wanted in ran.stdout.splitlines()[-1]


def test_no_test_can_reach_the_hub() -> None:
    from huggingface_hub import constants

    assert constants.is_offline_mode()


def test_what_transformers_calls_deprecated_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="use deprecated: `old` is deprecated"):
        logging.getLogger("transformers.models.any").warning("`old` is deprecated")
    with pytest.raises(FutureWarning):
        warnings.warn("`old` will go", FutureWarning, stacklevel=2)
