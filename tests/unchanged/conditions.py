"""The conditions that a recording was made under, and that bits depend on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "tokenizers")
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
_EXTENSIONS = ("avx", "amx", "fma", "sse4", "asimd", "sve", "bf16", "i8mm")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread while the block lasts: bits of a sum depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def present() -> dict[str, Any]:
    """The conditions here and now."""
    with one_thread():
        threads = torch.get_num_threads()
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor(),
        "threads": threads,
        "settings": {name: os.environ.get(name) for name in SETTINGS},
        "versions": {"python": platform.python_version(), **dict(map(_version, PACKAGES))},
    }


def _version(package: str) -> tuple[str, str | None]:
    try:
        return package, version(package)
    except PackageNotFoundError:
        return package, None


def _processor() -> dict[str, Any]:
    """Maker and instructions: the libraries below torch choose their kernels by both."""
    found: dict[str, Any] = {"vendor": None, "extensions": []}
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return found
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "vendor_id":
            found["vendor"] = value
        if name in ("flags", "Features"):
            known = [word for word in value.split() if word.startswith(_EXTENSIONS)]
            found["extensions"] = sorted(known)
    return found
