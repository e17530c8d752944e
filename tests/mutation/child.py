"""Run tests of another tree in a forked process, which ends with their exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_tests(tree: str, tests: Sequence[str], log: str) -> None:
    """Run tests of a tree in this process, and end it with their exit code."""
    os.setsid()  # what it starts can be found, and ended with it
    os.chdir(tree)
    os.environ["PYTHONPATH"] = tree
    sys.path[:] = [tree, *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # those of the real tree
    import pytest

    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=line"]
    code = int(pytest.main([*options, *tests_of(tests)]))
    sys.stdout.flush()
    os._exit(code)


def tests_of(words: Sequence[str]) -> list[str]:
    """The words for pytest, files and folders of tests with where they lie."""
    options = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
    return [*(f"tests/{word}" for word in words[:options]), *words[options:]]
