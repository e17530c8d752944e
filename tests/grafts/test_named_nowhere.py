"""No file outside a method's folder knows a method by its name."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import mmgraft
from mmgraft.grafts.registry import built_in

ROOT = Path(mmgraft.__file__).parent
NAMES = re.compile(rf"\b({'|'.join(method.name for method in built_in())}|official)\b", re.I)
CONFIGS = re.compile("|".join(method.config_class.__name__ for method in built_in()))
MAY = ("__init__.py", "published/", "grafts/registry.py", "cli/", "demo/", "export/", "data/")
"""Where names are imports, help, or the format and the model class that are called LLaVA too."""


def named(path: Path) -> list[str]:
    """Strings that are a method's name, and names of its classes."""
    text = path.read_text(encoding="utf-8")
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        word = token.string.strip("\"'")
        is_name = token.type == tokenize.STRING and NAMES.fullmatch(word)
        if is_name or (token.type == tokenize.NAME and CONFIGS.fullmatch(word)):
            found.append(f"{path.relative_to(ROOT)}:{token.start[0]}: {word}")
    return found


def test_a_method_is_a_folder() -> None:
    own = tuple(f"grafts/{method.name}/" for method in built_in())
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith((*MAY, *own)):
            found += named(path)
    assert [one for one in found if not one.endswith(": llava") or "formats" in one] == []


def test_the_look_finds_names(tmp_path: Path) -> None:
    for text in ('x = "wings"', "from mmgraft import IAAConfig", 'y == "official"'):
        path = ROOT / "not_there.py"
        assert NAMES.search(text) or CONFIGS.search(text), path
