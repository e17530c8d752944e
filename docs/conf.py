"""Settings of Sphinx: these pages and the reference in api/; `make docs` builds them."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from pydantic import BaseModel  # noqa: E402
from pygments.lexers.special import TextLexer  # noqa: E402

import mmgraft.grafts  # noqa: E402
import mmgraft.vision  # noqa: E402

project = "mmgraft"
author = "The mmgraft authors"
release = version = mmgraft.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns: list[str] = []

html_theme = "furo"
html_title = f"mmgraft {release}"
html_copy_source = False
html_show_sourcelink = False

myst_heading_anchors = 4  # the anchors that GitHub gives, which the pages link to
suppress_warnings = [
    "myst.header",  # a page may begin with a comment
    "ref.python",  # a type in a signature that two modules have
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {
    "members": True,
    "no-value": True,
    "exclude-members": "model_config, model_post_init",
}
napoleon_use_ivar = True
napoleon_numpy_docstring = False
default_role = "code"  # `name` in a docstring is code, as in the pages

for _module in (mmgraft, mmgraft.grafts, mmgraft.vision):  # names that are loaded when first used
    for _name in getattr(_module, "__all__", ()):
        setattr(_module, _name, getattr(_module, _name))

_SECTION = re.compile(r"^(To [^\n]+):\n\n((?:[-*] .+\n(?:  .+\n)*)+)", re.MULTILINE)
_PAGE = re.compile(r"^- \[[^\]]+\]\(([\w/-]+)\.md\)", re.MULTILINE)


def _contents(app: Any, name: str, source: list[str]) -> None:
    """Make the lists of the index the contents, so that they stand in one place."""
    if name != "index":
        return
    for title, pages in _SECTION.findall(source[0] + "\n"):
        names = "\n".join(_PAGE.findall(pages))
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{names}\n```\n"


def _is_settings(what: str, thing: Any) -> bool:
    return what == "class" and isinstance(thing, type) and issubclass(thing, BaseModel)


def _signature(app: Any, what: str, name: str, thing: Any, *_: Any) -> tuple[str, str] | None:
    """Leave out the signature of a pydantic class: its keys are listed below it."""
    return ("", "") if _is_settings(what, thing) else None


def _written(thing: Any) -> dict[str, str]:
    """Return the types of a class's attributes as its code has them."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    nodes = [node for node in tree.body[0].body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: ast.unparse(node.annotation).strip("'") for node in nodes}


def _types(app: Any, what: str, name: str, thing: Any, *_: Any) -> None:
    """Let napoleon show these types, and not the whole names of what they evaluate to."""
    if what == "class" and getattr(thing, "__module__", "").startswith("mmgraft."):
        thing.__annotations__ = _written(thing)


def _keys(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """List the keys of a pydantic class with type, default and description."""
    if not _is_settings(what, thing):
        return
    hints = _written(thing)
    for key, info in thing.model_fields.items():
        hint = hints.get(key, "").replace("`", "")
        shown = "required" if info.is_required() else f"default ``{info.get_default()!r}``"
        if info.default_factory is not None:
            shown = "default empty"
        kind = f"``{hint}``, " if hint else ""
        about = " ".join((info.description or "").split())
        lines += ["", f"- ``{key}`` ({kind}{shown}){': ' + about if about else ''}"]
    lines.append("")


def setup(app: Any) -> None:
    """Set Sphinx up."""
    app.add_lexer("csv", TextLexer)
    app.connect("source-read", _contents)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _types, priority=100)  # napoleon has 500
    app.connect("autodoc-process-docstring", _keys)
