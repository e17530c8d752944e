"""The built pages: what they may not fetch, what the reference lists, and how they are built."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

from fetches import fetches, main  # noqa: E402

LOCAL = """<html><head><link rel="stylesheet" href="style.css"><script src="a.js"></script>
<link rel="canonical" href="https://example.org/"></head>
<body><a href="https://example.org/">elsewhere</a>
<img src="data:image/png;base64,AA=="></body></html>
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.html", '<script src="https://cdn.example.org/a.js"></script>'),
        ("a.html", '<link rel="stylesheet" href="//cdn.example.org/a.css">'),
        ("a.html", '<img alt="" src="http://example.org/badge.svg">'),
        ("a.html", "<style>@import 'https://example.org/a.css';</style>"),
        ("a.html", '<p style="background: url(https://example.org/a.png)">x</p>'),
        ("a.css", "@font-face { src: url('https://fonts.example.org/a.woff2'); }"),
    ],
)
def test_what_a_page_would_fetch_is_found(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "index.html").write_text(LOCAL, encoding="utf-8")
    assert list(fetches(tmp_path)) == []
    main(tmp_path)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert [found.split(":")[0] for found in fetches(tmp_path)] == [name]
    with pytest.raises(SystemExit, match="fetch from the network"):
        main(tmp_path)


def test_a_folder_without_pages_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no built pages"):
        main(tmp_path)


def documented() -> list[str]:
    pages = [page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md"))]
    return [name for page in pages for name in re.findall(r"^\.\. auto\w+:: (\S+)$", page, re.M)]


@pytest.mark.parametrize("name", documented())
def test_what_the_reference_lists_is_there(name: str) -> None:
    module, _, member = name.rpartition(".")
    if member[:1].isupper():
        assert hasattr(importlib.import_module(module), member)
    else:
        assert importlib.util.find_spec(name)


def test_the_reference_has_no_module_twice() -> None:
    assert len(documented()) == len(set(documented())) > 20


def test_ci_builds_the_pages() -> None:
    assert "make docs" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
