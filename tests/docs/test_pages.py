"""Check the pages without running them: links, names, the command reference."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

from console import read_blocks  # noqa: E402

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = set()
    for heading in _HEADING.findall(text):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(plain.strip().replace(" ", "-"))
    return found


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in _LINK.findall(text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_in_the_index() -> None:
    linked = set(_LINK.findall((DOCS / "index.md").read_text(encoding="utf-8")))
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= linked


@every_page
def test_shown_python_is_python_and_imports_what_there_is(page: Path) -> None:
    for block in read_blocks(page.read_text(encoding="utf-8"), page.name):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            if node.module.split(".")[0] != "mmgraft":
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block.line}: {node.module}.{alias.name}"


@every_page
def test_no_page_names_a_place_on_one_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.~])/(work|opt|tmp|root|home|Users)/", text)


def test_the_architecture_names_every_part_of_the_package() -> None:
    """A module that is new, or gone, must be told there."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    tree = next(block.text for block in read_blocks(text) if block.language == "text")
    told = set(re.findall(r"^  ([\w.]+)", tree, re.MULTILINE))
    parts = (ROOT / "mmgraft").iterdir()
    there = {
        part.name
        for part in parts
        if part.name not in ("__main__.py", "__pycache__")
        and (part.suffix == ".py" or (part / "__init__.py").is_file())
    }
    assert told == there


def test_the_command_reference_is_what_the_commands_say() -> None:
    from make_cli import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: python docs/make_cli.py"
