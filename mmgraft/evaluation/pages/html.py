"""A page as one HTML file: nothing is fetched, nothing runs, pictures are inside unless marked."""

from __future__ import annotations

import base64
import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from mmgraft.evaluation.pages.page import Page

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def render_html(page: Page) -> str:
    """The page. Every text is escaped; a picture is a data URI where it is embedded."""
    style = _source("page.css")
    return _environment().from_string(_source("page.html.jinja")).render(page=page, style=style)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters.update(inline=inline, data_uri=_data_uri, size=png_size)
    environment.tests["block"] = lambda block, kind: type(block).__name__ == kind
    return environment


def inline(text: str) -> Markup:
    """Escaped, with what stands between backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header, so that a page does not jump as it opens."""
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _source(name: str) -> str:
    return files("mmgraft.evaluation.pages").joinpath(name).read_text(encoding="utf-8")
