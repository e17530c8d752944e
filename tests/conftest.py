"""Settings of every test: no hub, one thread a worker, and the golden data."""

from __future__ import annotations

import ctypes
import functools
import gc
import logging
import os
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

HERE = Path(__file__).resolve().parent

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# oneDNN keeps the code of 1,024 shapes of bf16 products, half a megabyte each.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("NO_COLOR", "1")  # help texts and tables are compared as plain text

# A machine that runs several test processes is slow at times: no example is failed for its time.
hypothesis.settings.register_profile("mmgraft", deadline=None)
hypothesis.settings.load_profile("mmgraft")

for folder in (HERE, HERE / "support"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


# They run in an environment of their own: `make engines`.
collect_ignore = [] if os.environ.get("MMGRAFT_ENGINES") == "1" else ["engines"]

_MMAP_THRESHOLD = -3  # of malloc.h


class _RefuseDeprecated(logging.Handler):
    """Fails the test in which transformers logs that something it was asked for is deprecated."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message.lower():
            raise AssertionError(f"transformers calls this use deprecated: {message}")


def pytest_configure(config: pytest.Config) -> None:
    """Watch transformers' log, which is where most of its deprecations are announced."""
    logging.getLogger("transformers").addHandler(_RefuseDeprecated())
    if sys.platform == "linux":  # memory of large tensors goes back at once, and leaves no holes
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; torch is imported only if such a test is there."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in needing:
        item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take what is there now, modules and tests, out of what the cycle collector looks through.

    It looks through everything only when a quarter of everything is new: models by the hundred.
    """
    gc.collect()
    gc.freeze()


def _seed(name: str) -> None:
    """Start the generators of random numbers from `name`, where their module is there."""
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """Give each fixture the same random numbers wherever and after whatever it is made."""
    _seed(f"{fixturedef.baseid}::{fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Give each test the same random numbers in any order and in any process."""
    _seed(item.nodeid)


@pytest.fixture(autouse=True)
def _positions_of_an_image(request: pytest.FixtureRequest) -> None:
    """Make rows of ``grafting`` as the method takes them that a test is parametrized with."""
    if "grafting" in sys.modules:
        given = getattr(request.node, "callspec", None)
        method = given.params.get("method") if given else None
        sys.modules["grafting"].takes(method if isinstance(method, str) else None)


LIMIT, CLEANED_FROM, GROWN = 2.0e9, 1.2e9, 1.0e8
"""Bytes that a worker may hold at the end of a module; from which it is cleaned, and again when it
has grown by so many."""

_cleaned = [0.0]


def resident() -> float:
    """Bytes of this process in memory that no other shares; 0 where the system does not say it."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024.0
    return 0.0


def clean() -> None:
    """Empty the caches of the tests, collect what nothing refers to, and give back free pages."""
    for module in list(sys.modules.values()):
        if str(getattr(module, "__file__", None) or "").startswith(str(HERE)):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
    gc.collect()
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)  # only Linux says what is resident


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Collect the messages of ``mmgraft.progress.say`` while the test lasts."""
    texts: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    log, kept = logging.getLogger("mmgraft"), Kept(logging.INFO)
    log.addHandler(kept)
    with caplog.at_level(logging.INFO, "mmgraft"):
        yield texts
    log.removeHandler(kept)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collect pairs of steps done and steps in all, as a progress bar gets them."""
    from mmgraft.progress import Work

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(Work, "__call__", lambda work, *at: seen.append(at))
    return seen


@pytest.fixture(scope="module", autouse=True)
def _memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the module at whose end this worker holds more than it may."""
    yield
    if resident() > max(CLEANED_FROM, _cleaned[0] + GROWN):
        clean()
        _cleaned[0] = resident()
    held = resident()
    assert held < LIMIT, f"{held / 1e9:.2f} GB are held after {request.node.name}"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of logits that the published implementations produced.

    MMGRAFT_GOLDEN names it. Without it parity tests are skipped, or fail if
    MMGRAFT_REQUIRE_GOLDEN=1.
    """
    named = os.environ.get("MMGRAFT_GOLDEN")
    if not named:
        if os.environ.get("MMGRAFT_REQUIRE_GOLDEN") == "1":
            pytest.fail("MMGRAFT_REQUIRE_GOLDEN=1 but MMGRAFT_GOLDEN is not set")
        pytest.skip("MMGRAFT_GOLDEN is not set")
    folder = Path(named).resolve()
    if not (folder / "iaa").is_dir() or not (folder / "wings").is_dir():
        pytest.fail(f"MMGRAFT_GOLDEN={folder} has no folders iaa and wings")
    return folder


class Ran(NamedTuple):
    """Result of a command: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run one command line in this process: `cli("inspect", folder, "--json")`."""

    def call(*args: object) -> Ran:
        from mmgraft.cli.app import run

        capsys.readouterr()
        code = run([str(arg) for arg in args])
        return Ran(code, *capsys.readouterr())

    return call
