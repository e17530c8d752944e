"""Shared parts of the benchmarks: alternating pairs, memory of a child, and the printed row.

Two things are timed in turn in one process, the first one of a pair changing places from pair to
pair, so that whatever else the machine does falls on both. What counts is the ratio inside each
pair: their median, with a bootstrap interval of 95 %. The clock is the processor time of this
process, or the wall clock (`--clock wall`).

Memory is measured in a forked process, which has nothing but the imports of its parent:

    def work() -> dict[str, Any]:
        model = ...                         # what is not to be counted
        with Peak() as peak:
            step(model)
        return {"peak": peak.bytes}

    answer = in_child(work)

A script ends with `show(options, rows, details)`: a Markdown table, or JSON with `--json`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PAIRS = 20
DRAWS = 2000


@dataclass(frozen=True)
class Ratio:
    """A median of ratios and its 95 % interval."""

    median: float
    low: float
    high: float
    pairs: int

    def below(self, limit: float) -> bool | None:
        """Return True if the ratio is below `limit`; `None` where the interval holds both."""
        if self.high < limit:
            return True
        return False if self.low > limit else None

    def inverse(self) -> Ratio:
        """Return the inverse ratio of the same pairs: times faster."""
        return Ratio(1 / self.median, 1 / self.high, 1 / self.low, self.pairs)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Pairs:
    """Seconds of two things, measured in turn."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> Ratio:
        """Ours over theirs: below 1 is faster."""
        return ratio([a / b for a, b in zip(self.ours, self.theirs, strict=True)])

    @property
    def seconds(self) -> tuple[float, float]:
        """The medians of both."""
        return statistics.median(self.ours), statistics.median(self.theirs)


def ratio(ratios: Sequence[float], seed: int = 0) -> Ratio:
    """The median of `ratios` and its percentile bootstrap interval."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(DRAWS))
    low, high = medians[round(0.025 * DRAWS)], medians[round(0.975 * DRAWS) - 1]
    return Ratio(statistics.median(ratios), low, high, len(ratios))


def alternate(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    pairs: int = PAIRS,
    warm: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> Pairs:
    """Time both in turn, `pairs` times; the first `warm` calls of each are not counted."""
    for _ in range(warm):
        ours()
        theirs()
    times: tuple[list[float], list[float]] = ([], [])
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(pairs):
            gc.collect()
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                work = (ours, theirs)[which]
                start = clock()
                work()
                times[which].append(clock() - start)
    finally:
        if collecting:
            gc.enable()
    return Pairs(*times)


class Peak:
    """Resident memory that a `with` block takes at most above what there was before it, in bytes.

    Memory that malloc holds without use is given back first, so that the block's own counts.
    """

    bytes: int = 0
    before: int = 0

    def __enter__(self) -> Peak:
        gc.collect()
        give_back_free_memory()
        self.before = resident()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
        except OSError as error:
            raise SystemExit(f"{error}: peaks are measured on Linux alone") from None
        return self

    def restart(self) -> int:
        """Count from now on, above the same beginning; gives the peak until now."""
        earlier = max(0, _status("VmHWM") - self.before)
        give_back_free_memory()
        Path("/proc/self/clear_refs").write_text("5")
        return earlier

    def __exit__(self, *_: object) -> None:
        self.bytes = max(0, _status("VmHWM") - self.before)


def resident() -> int:
    """Resident memory of this process, in bytes."""
    return _status("VmRSS")


def give_back_free_memory() -> None:
    """Return malloc's spare memory to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def own_pages_for_large_tensors(size: int = 1 << 20) -> None:
    """Tensors of `size` bytes or more are given back to the system when they are freed.

    Without it malloc raises that size as it goes, up to 32 MB, and keeps what was freed: peaks then
    depend on what ran before. Slower, so it is for memory alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, size)  # M_MMAP_THRESHOLD
        mallopt(-1, size)  # M_TRIM_THRESHOLD


def in_child(work: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the JSON of `work` run in a forked process; `error` where it failed.

    Import everything, and call `torch.set_num_threads(1)`, before: threads do not survive a fork.
    """
    sys.stdout.flush()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        try:
            own_pages_for_large_tensors()
            answer = work(*args, **kwargs)
        except BaseException as error:  # whatever it is, the table says it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        with os.fdopen(send, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the process was ended"}


@dataclass(frozen=True)
class Row:
    """A line of the table: `reached` is `None` where the measurement does not resolve it."""

    what: str
    against: str
    measured: str
    to_reach: str
    reached: bool | None
    values: dict[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """The line."""
        word = {True: "yes", False: "no", None: "not resolved"}[self.reached]
        word = "-" if self.to_reach == "reported" and self.reached is None else word
        return f"| {self.what} | {self.against} | {self.measured} | {self.to_reach} | {word} |"


HEAD = "| what | against | measured | to reach | reached |\n|---|---|---|---|---|"


def options(doc: str | None, *, pairs: int | None = PAIRS) -> argparse.ArgumentParser:
    """A parser with what all scripts take; `pairs=None` for one that times nothing."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    if pairs is not None:
        parser.add_argument("--pairs", type=int, default=pairs, help="alternating pairs")
        parser.add_argument("--clock", choices=("processor", "wall"), default="processor")
    return parser


def clock(options: argparse.Namespace) -> Callable[[], float]:
    """The clock that was asked for."""
    return time.perf_counter if options.clock == "wall" else time.process_time


def machine(threads: int | None = None) -> dict[str, Any]:
    """Describe the machine of the measurements."""
    import torch
    import transformers

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "threads": torch.get_num_threads() if threads is None else threads,
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine_line(threads: int | None = None) -> str:
    """The same in one line."""
    found = machine(threads)
    return (
        f"{found['processor']}, {found['cores']} cores, {found['memory_gb']} GB; "
        f"{found['threads']} thread(s), load {found['load']}; {found['system']}, "
        f"Python {found['python']}, torch {found['torch']}, transformers {found['transformers']}"
    )


def show(
    options: argparse.Namespace, rows: Sequence[Row], details: dict[str, Any] | None = None
) -> int:
    """Print rows (and `details` in JSON); the exit code: 1 where a number was missed."""
    if options.json:
        report = {
            "benchmark": Path(sys.argv[0]).stem,
            "machine": machine(options.threads),
            "rows": [asdict(row) for row in rows],
            "details": details or {},
        }
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        lines = [machine_line(options.threads), "", HEAD, *(row.markdown() for row in rows)]
        sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    return 1 if any(row.reached is False for row in rows) else 0


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _status(name: str) -> int:
    for line in _lines("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {name} in /proc/self/status: memory is measured on Linux alone")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
