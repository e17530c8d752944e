"""Judge every causal LM of transformers with every method: `python -m tests.sweep`.

One process a type, with a limit of time and memory. Verdicts are added to a file of JSON lines as
they come, so a stopped sweep goes on where it was; `--types` judges those anew. At the end a table
is printed and, with `--page`, docs/architectures.md written.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests" / "support", ROOT / "tests", ROOT / "tests" / "sweep"):
    sys.path.insert(0, str(folder))
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

METHODS = ("iaa", "wings", "llava", "lora", "expert", "xattn")
SECONDS, GIBIBYTES = 120, 6
"""Processor time and memory of one type."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge what is asked for and is not judged yet; return 1 if anything fails."""
    options = parsed(arguments)
    warnings.filterwarnings("ignore")
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    every = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    known = {} if not options.results.is_file() else read(options.results)
    methods = options.methods
    new = [kind for kind in every if not set(methods) <= known.get(kind, {}).keys()]
    wanted = options.types or new
    unknown = sorted(set(wanted) - set(every))
    if unknown:
        raise SystemExit(f"no causal LM of transformers: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as folder:
        from tiny_towers import save_tower

        tower = Path(folder) / "tower"
        save_tower(tower, "clip", image_size=16)
        for verdict in judged(wanted, options.jobs, tower, methods):
            known[verdict["type"]] = {**known.get(verdict["type"], {}), **verdict}
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(verdict) + "\n")
            print(line(verdict), flush=True)
    from page import counts, write_page

    print(counts(known, every))
    if options.page:
        write_page(ROOT / "docs" / "architectures.md", known, every)
    return int(any("fails" in found for v in known.values() for found in methods_of(v).values()))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    reader = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    reader.add_argument("--types", nargs="*", help="these alone, judged anew")
    reader.add_argument("--methods", nargs="*", default=METHODS, help="these alone")
    reader.add_argument("--jobs", type=int, default=1, help="processes at a time")
    reader.add_argument("--results", type=Path, default=ROOT / ".sweep.jsonl")
    reader.add_argument("--page", action="store_true", help="write docs/architectures.md")
    return reader.parse_args(arguments)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last verdict on each type and method."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[str, dict[str, Any]] = {}
    for verdict in map(json.loads, lines):
        found.setdefault(verdict["type"], {}).update(verdict)
    return found


def judged(kinds: Sequence[str], jobs: int, tower: Path, methods: Sequence[str]) -> Any:
    """Yield the verdicts as they come, each from a process of its own."""
    from judging import share_tower

    share_tower(tower)
    waiting, running = list(kinds), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            kind = waiting.pop(0)
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reading)
                alone(kind, tower, writing, methods)
            os.close(writing)
            running[child] = (kind, reading)
        for child, (kind, reading) in list(running.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                del running[child]
                with os.fdopen(reading, encoding="utf-8") as pipe:
                    text = pipe.read()
                yield json.loads(text) if text else ended(kind, status, methods)
        time.sleep(0.05)


def alone(kind: str, tower: Path, writing: int, methods: Sequence[str]) -> None:
    """Judge one type in this process, and end it."""
    from judging import judge

    limit = GIBIBYTES << 30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    code = 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            verdict = judge(kind, tower, Path(folder), methods)
        with os.fdopen(writing, "w", encoding="utf-8") as pipe:
            pipe.write(json.dumps(verdict))
        code = 0
    finally:
        os._exit(code)


def ended(kind: str, status: int, methods: Sequence[str]) -> dict[str, Any]:
    """Return the verdict on a type whose process was ended, by time or by memory."""
    why = f"the process ended with {os.waitstatus_to_exitcode(status)}"
    return {"type": kind, **{name: {"fails": why} for name in methods}}


def methods_of(verdict: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {name: found for name, found in verdict.items() if isinstance(found, dict)}


def line(verdict: dict[str, Any]) -> str:
    parts = [f"{verdict['type']:24}"]
    for name, found in methods_of(verdict).items():
        word = "fails" if "fails" in found else next(iter(found))
        parts.append(f"{name} {word}" + ("" if word == "works" else f" [{found[word]}]"))
    return "  ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
