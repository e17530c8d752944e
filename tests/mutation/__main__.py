"""Put small bugs in, one at a time, and see that tests fail: `python -m tests.mutation`.

By hand, not in CI: each bug runs the tests that are named with it, on a copy of the tree. What
prints "not found" wants a test.

    python -m tests.mutation                    all bugs, about twenty minutes of one core
    python -m tests.mutation --only trainer     those with the words in their file or description
    python -m tests.mutation --part 1/4         the first of four parts
    python -m tests.mutation --sound            the tests on the tree as it is: all must pass
    python -m tests.mutation --jobs 2           two at a time
    python -m tests.mutation --results FILE     each is noted there as it ends; what it says was
                                                found is not run again

The first bug of every module comes first, then the second, and so on: a run that was stopped has
looked everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.mutation.child import ROOT, run_tests
from tests.mutation.patches import PATCHES, Patch

LIMIT, STILL = 600.0, 300.0
"""Tests hang, which finds a bug too, after so many seconds of processor time, or where they used
less than one in so many seconds. How long they took decides nothing: the machine may be busy."""
FOUND = ("found", "hangs")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONDONTWRITEBYTECODE": "1",
}
LOADED = [
    "tests.mutation.child",
    "torch",
    "transformers",
    "transformers.trainer",
    "accelerate",
    "pytest",
    "hypothesis",
]
"""Imported once; every run of tests is a fork of the process that has them."""


class Ended(NamedTuple):
    """End of a run of tests: found, hangs, not found or broken; what failed; its time."""

    word: str
    by: str
    seconds: float


def copy_tree(folder: Path) -> None:
    """Copy the files that git knows, and link the environment."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    if (ROOT / ".venv").exists():
        (folder / ".venv").symlink_to((ROOT / ".venv").resolve())


def processor_time(session: int) -> float:
    """Seconds of processor time of all processes of a session, with those that they waited for."""
    seconds = 0.0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[3]) == session:
            seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return seconds


def hangs(child: multiprocessing.process.BaseProcess) -> bool:
    """Wait for a process and what it started, and say whether that would never end."""
    seen = 0.0
    while child.exitcode is None and seen <= LIMIT:
        before = seen
        child.join(STILL)
        seen = processor_time(child.pid or 0)
        if child.exitcode is None and seen - before < 1.0:
            return True
    return child.exitcode is None


class Trees:
    """Copies of the tree, one for each run of tests at a time.

    Args:
        folder: Where they are made.
        count: How many.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.forks = multiprocessing.get_context("forkserver")
        self.forks.set_forkserver_preload(LOADED)
        self.free: queue.Queue[Path] = queue.Queue()
        for number in range(count):
            tree = folder / str(number) / "tree"
            tree.mkdir(parents=True)
            copy_tree(tree)
            self.free.put(tree)

    def run(self, tests: str, patch: Patch | None = None) -> Ended:
        """Run tests on a tree, with a bug in it."""
        tree = self.free.get()
        file = tree / "mmgraft" / (patch.file if patch else "__init__.py")
        text = file.read_text(encoding="utf-8")
        if patch is not None:
            assert text.count(patch.old) == 1, f"{patch.file}: {patch.old!r}"
            file.write_text(text.replace(patch.old, patch.new), encoding="utf-8")
        try:
            return self._run(tree, tests)
        finally:
            file.write_text(text, encoding="utf-8")
            self.free.put(tree)

    def _run(self, tree: Path, tests: str) -> Ended:
        log, began = tree.parent / "log.txt", time.monotonic()
        child = self.forks.Process(target=run_tests, args=(str(tree), shlex.split(tests), str(log)))
        child.start()
        hung = hangs(child)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid or 0, signal.SIGKILL)  # also what a failed test left behind
        child.join()
        words = {0: "not found", 1: "found"}
        word = "hangs" if hung else words.get(child.exitcode or 0, "broken")
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
        failed = [line.split(" - ")[0] for line in said if line.startswith(("FAILED", "ERROR"))]
        by = failed[0].partition(" ")[2].removeprefix("tests/") if failed else "\n".join(said[-9:])
        return Ended(word, by, time.monotonic() - began)


class Results:
    """Results of earlier runs, in a file of one line a bug.

    Args:
        file: Where it stands; without, nothing is kept.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file and file.exists() else []
        self.known = {Patch(*line["bug"]): Ended(*line["ended"]) for line in map(json.loads, lines)}

    def left(self, patches: Iterable[Patch]) -> list[Patch]:
        """Those that were not found so far, those that were never put in first."""
        words = {one: self.known[one].word if one in self.known else "" for one in patches}
        return sorted(
            (one for one, word in words.items() if word not in FOUND), key=lambda one: words[one]
        )

    def note(self, patch: Patch, ended: Ended) -> None:
        """Keep how one ended, and print it."""
        self.known[patch] = ended
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"bug": patch, "ended": ended}) + "\n")
        by = patch.tests if ended.word == "not found" else ended.by
        what = f"{patch.what} ({patch.file})"
        print(f"{ended.word:9} {ended.seconds:4.0f} s  {what}  {by}", flush=True)


def by_turns(patches: Iterable[Patch]) -> list[Patch]:
    """The first of every module, the second of every module, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for one in patches:
        turns.append((seen[one.file], one))
        seen[one.file] += 1
    return [one for _, one in sorted(turns, key=lambda turn: turn[0])]


def table(chosen: Iterable[Patch], known: dict[Patch, Ended]) -> str:
    """Count the found ones of every package."""
    counts: dict[str, Counter[str]] = {}
    for one in chosen:
        word = known[one].word if one in known else "not run"
        counts.setdefault(one.file.partition("/")[0], Counter())[word] += 1
    every = sum(counts.values(), Counter[str]())
    rows = [*sorted(counts.items()), ("all", every)]
    return "\n".join(
        f"{name:15} {count.total():4}  "
        + ", ".join(f"{number} {word}" for word, number in sorted(count.items()))
        for name, count in rows
    )


def sound(trees: Trees, pool: ThreadPoolExecutor, chosen: Iterable[Patch]) -> int:
    """Run the tests without a bug; 0 where all pass."""
    every = sorted({one.tests for one in chosen})
    bad = 0
    for tests, ended in zip(every, pool.map(trees.run, every), strict=True):
        if ended.word != "not found":
            bad += 1
            print(f"{tests}: {ended.by}", flush=True)
    print(f"{len(every) - bad} of {len(every)} pass")
    return int(bool(bad))


def main() -> int:
    """Run what was asked for; 0 where every bug is found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="a pattern of a file and a description")
    parser.add_argument("--part", default="1/1", help="2/4: the second of four parts")
    parser.add_argument("--jobs", type=int, default=1, help="runs of tests at a time")
    parser.add_argument("--results", type=Path, help="a file that keeps what was found")
    parser.add_argument("--sound", action="store_true", help="the tests without a bug")
    given = parser.parse_args()
    part, parts = map(int, given.part.split("/"))
    matching = [one for one in PATCHES if re.search(given.only, f"{one.file} {one.what}")]
    chosen = by_turns(matching)[part - 1 :: parts]
    results = Results(given.results)
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="mmgraft-mutation-") as folder:
        trees = Trees(Path(folder), given.jobs)
        with ThreadPoolExecutor(given.jobs) as pool:
            if given.sound:
                return sound(trees, pool, chosen)
            left = results.left(chosen)
            for one, ended in zip(
                left, pool.map(lambda one: trees.run(one.tests, one), left), strict=True
            ):
                results.note(one, ended)
    print(table(chosen, results.known))
    return int(any(results.known[one].word not in FOUND for one in chosen))


if __name__ == "__main__":
    raise SystemExit(main())
