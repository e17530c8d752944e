"""No file of a model brings code that runs, and nobody is asked to let it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import mmgraft

PACKAGE = Path(mmgraft.__file__).parent


def calls() -> list[tuple[str, ast.Call]]:
    """Every call of transformers that may load a class by what a file names."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                name = owner.id if isinstance(owner, ast.Name) else ""
                named = re.fullmatch(r"Auto(?!HfQuantizer)\w+", name)
                if named and node.func.attr in ("from_pretrained", "from_config"):
                    found.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", node))
    return found


def test_every_call_forbids_it_outright() -> None:
    """Without the argument transformers asks on a terminal, and runs the code after a ``y``."""
    assert len(calls()) > 8
    for where, call in calls():
        given = {one.arg: one.value for one in call.keywords}
        trust = given.get("trust_remote_code")
        if trust is None and None in given:  # handed on in **source
            assert "gguf" in where, where
            continue
        assert isinstance(trust, ast.Constant), where
        assert trust.value is False, where
