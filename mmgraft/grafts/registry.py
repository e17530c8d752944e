"""Find the methods: those built in, and any that an installed package brings.

A package brings a method with an entry point of the group ``mmgraft.methods`` that names a
``Method``:

    [project.entry-points."mmgraft.methods"]
    mymethod = "mypackage.method:METHOD"

Looking methods up imports no torch; only ``Method.load_graft`` does.
"""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from mmgraft.grafts.method import Method
from mmgraft.kinds import Broken, Kinds, Unfit

_BUILT_IN = (
    "grafts.iaa", "grafts.wings", "grafts.llava", "grafts.lora", "grafts.expert", "grafts.xattn",
    "published.wings",
)  # fmt: skip
#: Settings of a method that have become a method of their own, with the other settings.
_MOVED = {("wings", "variant", "official"): "wings-official"}

#: Settings that earlier files have and that say nothing where they have these values.
_GONE = {"wings": {"system_prompt_length": None, "image_token_length": None, "router_width": 4096}}


@cache
def built_in() -> tuple[Method, ...]:
    """Return mmgraft's own methods."""
    return tuple(importlib.import_module(f"mmgraft.{name}").METHOD for name in _BUILT_IN)


def _of_package(name: str, method: Any, origin: str) -> Method:
    if not isinstance(method, Method):
        raise Unfit(f"it is a {type(method).__name__}, not an mmgraft Method")
    if method.name != name:
        raise Unfit(f"the method calls itself {method.name!r}")
    default = method.config_class.model_fields.get("method")
    if default is None or default.default != method.name:
        raise Unfit(f"{method.config_class.__name__} needs the field method = {method.name!r}")
    return replace(method, origin=origin)


METHODS = Kinds(
    "method", "mmgraft.methods", _of_package, lambda: {one.name: one for one in built_in()}
)
get_method = METHODS.find


def methods() -> dict[str, Method]:
    """Return every usable method by name, the built-in ones first."""
    return METHODS.all()[0]


def broken_methods() -> list[Broken]:
    """Return what installed packages offer as methods and cannot be used, each with the reason."""
    return METHODS.all()[1]


def moved(method: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any], str | None]:
    """Return method and settings under their present names, and in a line what moved, if any did.

    Settings that the new method does not have are left out where they only say what the old one
    does by default.
    """
    settings = dict(config)
    for (old, key, value), new in _MOVED.items():
        if (method, settings.get(key)) == (old, value):
            before, now = (get_method(name).config_class.model_fields for name in (old, new))
            kept = {
                name: given
                for name, given in settings.items()
                if name != key
                and (name in now or name not in before or given != before[name].default)
            }
            note = f"method: {old} with {key}: {value} is method: {new} now"
            return new, {**kept, "method": new}, note
    gone = _GONE.get(method, {})
    kept = {k: v for k, v in settings.items() if k not in gone or v != gone[k]}
    return method, kept, None
