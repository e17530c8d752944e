"""Lists what built pages would fetch from the network when they are opened; none is right.

python docs/fetches.py FOLDER

Links that a reader may click are not meant: scripts, styles, images, fonts and frames are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

_REMOTE = re.compile(r"\s*(https?:)?//", re.IGNORECASE)
_CSS = re.compile(r"""(?:url\(|@import)\s*["']?([^"')\s;]+)""", re.IGNORECASE)
_LOADED = {"src", "srcset", "data", "poster"}
_LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "manifest"}


class _Page(HTMLParser):
    """Collects the addresses of what a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        loaded = [named[name] for name in _LOADED & named.keys()]
        if tag == "link" and _LINKS & set(named.get("rel", "").lower().split()):
            loaded.append(named.get("href", ""))
        loaded += _CSS.findall(named.get("style", ""))
        self.found += [address for address in loaded if _REMOTE.match(address)]
        self._in_style = tag == "style"

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.found += [address for address in _CSS.findall(data) if _REMOTE.match(address)]


def fetches(folder: Path) -> Iterator[str]:
    """Yield ``file: address`` for all that pages and styles below a folder would fetch."""
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".html", ".css", ".svg"):
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".css":
            found = [address for address in _CSS.findall(text) if _REMOTE.match(address)]
        else:
            page = _Page()
            page.feed(text)
            found = page.found
        for address in found:
            yield f"{path.relative_to(folder)}: {address}"


def main(folder: Path) -> None:
    """End with an error that names all that would be fetched."""
    if not (folder / "index.html").is_file():
        raise SystemExit(f"no built pages in {folder}; build them with: make docs")
    if found := list(fetches(folder)):
        raise SystemExit("\n".join(["the pages fetch from the network:", *found]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
