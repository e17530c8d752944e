"""Count lines of code: without blank lines, comments and docstrings.

    python tests/support/lines_of_code.py

``make lint`` prints the numbers of mmgraft/, plugins/ and examples/ beside each other, so that
moving code is not mistaken for deleting it.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COUNTED = ("mmgraft", "plugins", "examples")
LIMIT = 29_600
"""Largest number of lines in mmgraft/; 29,600 is the aim once all engines are built."""


def lines_of_code(text: str) -> int:
    """Return the number of lines of code in a Python file's text."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body:
            continue
        first = body[0]
        value = first.value if isinstance(first, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            left_out.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return sum(
        number not in left_out and bool(line.strip()) and not line.strip().startswith("#")
        for number, line in enumerate(text.splitlines(), start=1)
    )


def lines_below(folder: Path) -> int:
    """Return the number of lines of code in all Python files below a folder."""
    return sum(lines_of_code(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py"))


def main() -> None:
    """Print the numbers."""
    found = {name: lines_below(ROOT / name) for name in COUNTED if (ROOT / name).is_dir()}
    print("lines of code:", ", ".join(f"{name}/ {count:,}" for name, count in found.items()))


if __name__ == "__main__":
    main()
