"""Put small bugs in, one at a time, and see that tests fail: `python -m tests.mutation`.

By hand, not in CI: each bug runs the tests that are named with it, on a copy of the tree. What
prints "not found" wants a test.

    python -m tests.mutation                    all bugs, about twenty minutes of one core
    python -m tests.mutation --only trainer     those with the word in their file or description
    python -m tests.mutation --part 1/4         the first of four parts
    python -m tests.mutation --sound            the tests on the tree as it is: all must pass
    python -m tests.mutation --jobs 2           two at a time
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import shlex
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.mutation.child import ROOT, run_tests
from tests.mutation.patches import PATCHES, Patch

LIMIT = 600.0  # seconds; a bug that hangs is found too
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
    """How a run of tests ended: found, not found or broken; the test that failed; its time."""

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
        child.join(LIMIT)
        code = child.exitcode
        if code is None:
            child.kill()
            child.join()
        words = {0: "not found", 1: "found", None: "found"}  # what hangs is found too
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
        failed = [line.split(" - ")[0] for line in said if line.startswith(("FAILED", "ERROR"))]
        by = failed[0].partition(" ")[2].removeprefix("tests/") if failed else "\n".join(said[-9:])
        return Ended(words.get(code, "broken"), by, time.monotonic() - began)


def main() -> int:
    """Run what was asked for; 0 where every bug is found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="a word of a file or a description")
    parser.add_argument("--part", default="1/1", help="2/4: the second of four parts")
    parser.add_argument("--jobs", type=int, default=1, help="runs of tests at a time")
    parser.add_argument("--sound", action="store_true", help="the tests without a bug")
    given = parser.parse_args()
    part, parts = map(int, given.part.split("/"))
    chosen = [one for one in PATCHES if given.only in f"{one.file} {one.what}"][part - 1 :: parts]
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="mmgraft-mutation-") as folder:
        trees = Trees(Path(folder), given.jobs)
        with ThreadPoolExecutor(given.jobs) as pool:
            if given.sound:
                every = sorted({one.tests for one in chosen})
                bad = [
                    f"{tests}: {ended.by}"
                    for tests, ended in zip(every, pool.map(trees.run, every), strict=True)
                    if ended.word != "not found"
                ]
                print(f"{len(every) - len(bad)} of {len(every)} pass", *bad, sep="\n  ")
                return int(bool(bad))
            counts: Counter[str] = Counter()
            runs = pool.map(lambda one: trees.run(one.tests, one), chosen)
            for number, (one, ended) in enumerate(zip(chosen, runs, strict=True), start=1):
                counts[ended.word] += 1
                by = ended.by if ended.word != "not found" else one.tests
                what = f"{one.what} ({one.file})"
                print(
                    f"{number:3}  {ended.word:9} {ended.seconds:4.0f} s  {what}  {by}", flush=True
                )
    print(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    return int(counts["found"] < len(chosen))


if __name__ == "__main__":
    raise SystemExit(main())
