"""Measure the start of commands: help, completion, and `mmgraft chat` on a saved graft.

    python benchmarks/start.py [--base FOLDER] [--pairs 5] [--clock processor|wall] [--json]

Help and completion are whole processes. `mmgraft chat` is timed from its process's start to its
first prompt, in turn with a process that loads the same bytes with transformers: base, tower, the
graft's tensors, tokenizer and image processor. Without `--base` a model of SmolLM2's shape is made.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pairs import Row, in_child, options, ratio, show

LIMIT, WITHIN = 0.35, 1.10
_READY = """
import os, time
os.write(1, f"\\nready {time.time()} {time.process_time()}\\n".encode())
os._exit(0)
"""
_OURS = """
import sys
from mmgraft.cli.app import run
run(["chat", sys.argv[1], "--device", "cpu"])
"""
_THEIRS = """
import sys
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel
base, tower, graft = sys.argv[1:]
held = [
    AutoModelForCausalLM.from_pretrained(base, dtype="auto"),
    CLIPVisionModel.from_pretrained(tower, dtype="auto"),
    load_file(graft),
    AutoTokenizer.from_pretrained(base),
    AutoImageProcessor.from_pretrained(tower),
]
"""
_HELP = """
import sys
from mmgraft.cli.app import run
run(["--help"])
loaded = {"torch", "transformers"} & set(sys.modules)
sys.exit(f"{loaded} imported" if loaded else 0)
"""


def main() -> int:
    """Measure, and print a row for each."""
    given = _options()
    program = [sys.executable, "-m", "mmgraft"]
    _run([sys.executable, "-c", _HELP])  # fails where torch was imported
    pressed = {"_MMGRAFT_COMPLETE": "complete_bash", "COMP_WORDS": "mmgraft gr", "COMP_CWORD": "1"}
    rows = [
        _quick("`mmgraft --help`", [*program, "--help"], {}, given),
        _quick("completion of a command", program, pressed, given),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = in_child(_make, folder, given.base)
        if "error" in made:
            raise SystemExit(made["error"])
        base = given.base or folder / "base"
        graft = folder / "run" / "graft.safetensors"
        begin = [sys.executable, "-c"]
        chat = [*begin, _OURS + _READY, str(folder / "run")]
        load = [*begin, _THEIRS + _READY, str(base), str(folder / "tower"), str(graft)]
        rows.append(_chat(chat, load, given, _bytes(base, folder)))
    return show(given, rows)


def _options() -> argparse.Namespace:
    parser = options(__doc__, pairs=5)
    parser.add_argument("--base", type=Path, help="folder of a base, instead of a random one")
    return parser.parse_args()


def _run(command: list[str], more: dict[str, str] | None = None) -> tuple[float, float]:
    """Run a command to its end, or till it is ready; gives wall and processor seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(more or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stderr[-2000:]}")
    wall, after = time.time() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    ready = done.stdout.rpartition("ready ")[2].split()
    if len(ready) == 2:
        return float(ready[0]) - start, float(ready[1])
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, spent


def _quick(what: str, command: list[str], more: dict[str, str], given: argparse.Namespace) -> Row:
    _run(command, more)
    which = 0 if given.clock == "wall" else 1
    times = [_run(command, more)[which] for _ in range(max(3, given.pairs))]
    seconds = statistics.median(times)
    return Row(
        what, "-", f"{seconds:.2f} s, no torch", "about 0.3 s", seconds <= LIMIT, {"all": times}
    )


def _chat(chat: list[str], load: list[str], given: argparse.Namespace, size: int) -> Row:
    which = 0 if given.clock == "wall" else 1
    ours, theirs = [], []
    for number in range(given.pairs + 1):  # the first pair fills the page cache
        turn = ((chat, ours), (load, theirs))
        for command, times in turn if number % 2 == 0 else reversed(turn):
            times.append(_run(command)[which])
    found = ratio([a / b for a, b in zip(ours[1:], theirs[1:], strict=True)])
    seconds = f"{statistics.median(ours[1:]):.2f} s against {statistics.median(theirs[1:]):.2f} s"
    return Row(
        "start of `mmgraft chat`",
        f"the same {size / 1e6:.0f} MB loaded with transformers",
        f"{found}x ({seconds})",
        f"at most {WITHIN}x",
        found.below(WITHIN),
        {"ours": ours[1:], "theirs": theirs[1:]},
    )


def _bytes(base: Path, folder: Path) -> int:
    files = [*base.glob("*.safetensors"), *folder.glob("tower/*.safetensors")]
    return sum(file.stat().st_size for file in [*files, folder / "run" / "graft.safetensors"])


def _make(folder: Path, base: Path | None) -> dict[str, Any]:
    import torch
    from folders import SMOLLM2, write_base, write_tower

    from mmgraft import IAAConfig
    from mmgraft.model.files.create import create_graft
    from mmgraft.vision.spec import VisionSpec

    tower = write_tower(folder / "tower", torch.bfloat16)
    base = base or write_base(folder / "base", SMOLLM2, torch.bfloat16)
    config = IAAConfig(layers=[14, 22], embedding=False, head=False)
    create_graft(str(base), VisionSpec(id=str(tower)), config, folder / "run")
    return {}


if __name__ == "__main__":
    sys.exit(main())
