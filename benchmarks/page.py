"""Runs the benchmarks one after another and writes their tables into docs/benchmarks.md.

    python benchmarks/page.py [RESULTS] [--only graft_large] [--again] [--write] [--list]

Each result is kept as JSON in the folder RESULTS (`benchmark-results`), so that a run that was
stopped goes on where it was; `--again` measures anew. `--write` puts what is there into the page;
without it the tables are printed. `--only` is a script's name, or a measurement's; it may be
repeated. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured -->", "<!-- end of what was measured -->"
_WORDS = {True: "yes", False: "**no**", None: "not resolved"}


@dataclass(frozen=True)
class Measurement:
    """One call of a script: `name` is its file among the results."""

    section: str
    script: str
    arguments: tuple[str, ...] = ()
    suffix: str = ""

    @property
    def name(self) -> str:
        return self.script + self.suffix


_WINGS, _IAA, _FILES = "Wings", "IAA, LLaVA and the loss", "Files, starts and memory"
_SWITCHES = "Switches of a recipe"
MEASUREMENTS = (
    Measurement(_WINGS, "wings_router"),
    Measurement(_WINGS, "wings_step"),
    Measurement(_WINGS, "wings_decoding"),
    Measurement(_IAA, "text_workflow"),
    Measurement(_IAA, "text_cache"),
    Measurement(_IAA, "image_workflow"),
    *(
        Measurement(_IAA, "training_step", ("--case", case), f"-{case}")
        for case in ("llava", "iaa", "own")
    ),
    Measurement(_IAA, "loss_memory"),
    Measurement(_FILES, "graft_large"),
    Measurement(_FILES, "four_bit"),
    Measurement(_FILES, "features"),
    Measurement(_FILES, "start"),
    Measurement(_FILES, "rows_memory"),
    Measurement(_SWITCHES, "switches"),
    Measurement(_SWITCHES, "batching_rows"),
)


def main() -> int:
    """Measure what is missing, then print or write the tables; 1 where a script failed."""
    given = _options()
    chosen = [one for one in MEASUREMENTS if not given.only or _named(one, given.only)]
    if not chosen:
        sys.stderr.write(f"nothing is called {' or '.join(given.only)}; see --list\n")
        return 2
    if given.list:
        sys.stdout.write("".join(f"{one.name:22s}{one.section}\n" for one in chosen))
        return 0
    given.results.mkdir(parents=True, exist_ok=True)
    failed = [one.name for one in chosen if not _measured(one, given)]
    text = tables(given.results, MEASUREMENTS)
    if given.write:
        PAGE.write_text(placed(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    else:
        sys.stdout.write(text)
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=Path("benchmark-results"))
    parser.add_argument("--only", action="append", help="a script or a measurement")
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    parser.add_argument("--write", action="store_true", help="write the page")
    parser.add_argument("--no-run", action="store_true", help="take what is there")
    parser.add_argument("--list", action="store_true", help="name the measurements and stop")
    return parser.parse_args()


def _named(one: Measurement, names: Sequence[str]) -> bool:
    return one.script in names or one.name in names


def _measured(one: Measurement, given: argparse.Namespace) -> bool:
    """Return True if there is a result; measure it now where there was none."""
    file = given.results / f"{one.name}.json"
    if given.no_run or (file.is_file() and not given.again):
        return True
    sys.stderr.write(f"{one.name} ...\n")
    script = str(HERE / f"{one.script}.py")
    if one.script == "rows_memory":  # prints its own table as it goes
        asked = [sys.executable, script, "--json", str(file)]
        return subprocess.run(asked, stdout=subprocess.DEVNULL, check=False).returncode in (0, 1)
    asked = [sys.executable, script, "--json", *one.arguments]
    done = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=False)
    try:
        report = json.loads(done.stdout[done.stdout.index("{\n") :])  # trainers print before it
    except ValueError:
        return False
    file.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return True


def tables(results: Path, measurements: Iterable[Measurement]) -> str:
    """The Markdown of every section whose results are there."""
    parts: list[str] = []
    machines: dict[str, None] = {}
    section = ""
    for one in measurements:
        file = results / f"{one.name}.json"
        if not file.is_file():
            continue
        report = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(report, list):
            report = {"rows": _rows_of_a_million(report)}
        else:
            machines[_machine(report["machine"])] = None
        if one.section != section:
            section = one.section
            head = "| what | against | measured | to reach | reached |\n|---|---|---|---|---|"
            parts.append(f"\n## {section}\n\n{head}")
        parts += [_line(row) for row in report["rows"]]
    where = " ".join(f"{line}." for line in machines)
    return f"\nMachine: {where}\n" + "\n".join(parts) + "\n\n" if parts else "\n"


def placed(page: str, text: str) -> str:
    """The page with this text between its marks.

    Raises:
        SystemExit: The page has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} lacks the marks {BEGIN} and {END}; put them where tables belong")
    return f"{before}{begin}\n{text}{end}{after}"


def _line(row: dict[str, Any]) -> str:
    word = "-" if row["to_reach"] == "reported" else _WORDS[row["reached"]]
    cells = [row[key] for key in ("what", "against", "measured", "to_reach")]
    return f"| {' | '.join(cells)} | {word} |"


def _machine(found: dict[str, Any]) -> str:
    return (
        f"{found['processor']}, {found['cores']} cores, {found['memory_gb']} GB, "
        f"{found['threads']} thread(s), {found['system']}, Python {found['python']}, "
        f"torch {found['torch']}, transformers {found['transformers']}"
    )


def _rows_of_a_million(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "what": f"{one['rows']:,} rows, {one['kind']} of {one['size'] / 1e6:.0f} MB: opened, "
            "mixed, ordered, read from",
            "against": "the process before",
            "measured": f"{one['read'] / 1e6:.0f} MB above (peak {one['peak'] / 1e6:.0f} MB)",
            "to_reach": "at most 150 MB",
            "reached": one["read"] <= 150e6 * max(1, one["rows"] / 1e6),
        }
        for one in found
    ]


if __name__ == "__main__":
    sys.exit(main())
