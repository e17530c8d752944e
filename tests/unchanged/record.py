"""Record anew what the code does: `python tests/unchanged/record.py`, from the repository's root.

For a change that is meant to give other results, which the changelog then says. Takes some minutes
of one core. Names of recordings (`training golden templates files`) record these alone.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # this checkout's code, whatever is installed

import conftest  # noqa: E402, F401  (what it sets must be set before torch is loaded)

NAMES = ("training", "golden", "templates", "files")


def main(names: list[str]) -> int:
    """Make the recordings, then put them all in the place of the earlier ones."""
    from unchanged import comparing, conditions, golden_logits
    from unchanged.changed import CHANGED_FILES

    present = conditions.present()
    if unknown := [name for name in names if name not in NAMES]:
        print(f"no recording is called {unknown[0]}: choose among {', '.join(NAMES)}")
        return 2
    if "golden" in (names or ["golden"]) and not golden_logits.there():
        print("MMGRAFT_GOLDEN is not set: name the folder of the golden checkpoints")
        return 2
    if names and present != comparing.read("made_with"):
        print("the other recordings were made under other conditions: record all of them")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        recorders = _recorders(Path(folder).resolve())
        made = {name: recorders[name]() for name in names or recorders}
    comparing.RECORDED.mkdir(exist_ok=True)
    for name, recording in {**made, "made_with": present}.items():
        file = comparing.RECORDED / f"{name}.json"
        file.write_text(comparing.dump(recording), encoding="utf-8")
    print("recorded; say in CHANGELOG.md what has changed, and why")
    if CHANGED_FILES and "files" in made:
        print("CHANGED_FILES in tests/unchanged/changed.py can be emptied")
    return 0


def _recorders(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    from unchanged import golden_logits, templates, training, written
    from unchanged.parts import make_parts

    parts = make_parts(folder / "parts")
    places = {name: folder / name for name in ("training", "golden", "files")}
    return {
        "templates": lambda: _all(templates.CASES, templates.record),
        "golden": lambda: _all(
            golden_logits.cases(), lambda case: golden_logits.record(places["golden"], case)
        ),
        "files": lambda: _all(
            written.CASES, lambda case: written.record(parts, places["files"], case)
        ),
        "training": lambda: _all(
            training.CASES, lambda case: training.record(parts, places["training"], case)
        ),
    }


def _all(cases: Any, record: Callable[[str], Any]) -> dict[str, Any]:
    found = {}
    for case in cases:
        began = time.monotonic()
        found[case] = record(case)
        print(f"{case}: {time.monotonic() - began:.1f} s", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
