"""Find the methods: those built in, and any that an installed package brings.

A package brings a method with an entry point of the group ``mmgraft.methods`` that names a
``Method``:

    [project.entry-points."mmgraft.methods"]
    mymethod = "mypackage.method:METHOD"

Looking methods up imports no torch; only ``Method.load_graft`` does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mmgraft.errors import UsageError, did_you_mean
from mmgraft.grafts.method import Method

ENTRY_POINT_GROUP = "mmgraft.methods"
_BUILT_IN = ("grafts.iaa", "grafts.wings", "grafts.llava", "grafts.lora", "published.wings")
_MOVED = {("wings", "variant", "official"): "wings-official"}
"""What a method's setting with a value has become: a method of its own, with the other settings."""

_GONE = {"wings": {"system_prompt_length": None, "image_token_length": None, "router_width": 4096}}
"""Settings that earlier files have and that say nothing where they have these values."""


@cache
def built_in() -> tuple[Method, ...]:
    """Return mmgraft's own methods."""
    return tuple(importlib.import_module(f"mmgraft.{name}").METHOD for name in _BUILT_IN)


@dataclass(frozen=True)
class Broken:
    """A method that an installed package names but that cannot be used."""

    name: str
    origin: str
    reason: str


def methods() -> dict[str, Method]:
    """Return every usable method by name, the built-in ones first."""
    return _discover()[0]


def broken_methods() -> list[Broken]:
    """Return the entry points that could not be used, each with the reason."""
    return _discover()[1]


def get_method(name: str) -> Method:
    """Return the method called ``name``.

    Raises:
        UsageError: An unknown name, with the nearest known one; a broken one, with the reason.
    """
    usable, broken = _discover()
    if name in usable:
        return usable[name]
    for one in broken:
        if one.name == name:
            raise UsageError(
                f"method {name!r} of the package {one.origin!r} is broken: {one.reason}; "
                f"mend or uninstall {one.origin!r}"
            )
    raise UsageError(f"unknown method {name!r}; {did_you_mean(name, usable)}")


def _discover() -> tuple[dict[str, Method], list[Broken]]:
    return _discover_in(tuple(sys.path))


@cache  # a look into every installed package
def _discover_in(path: tuple[str, ...]) -> tuple[dict[str, Method], list[Broken]]:
    found = {method.name: method for method in built_in()}
    broken: list[Broken] = []
    for point in entry_points(group=ENTRY_POINT_GROUP):
        result = _load(point, found)
        if isinstance(result, Broken):
            broken.append(result)
        else:
            found[result.name] = result
    return found, broken


def _load(point: EntryPoint, found: dict[str, Method]) -> Method | Broken:
    origin = point.dist.name if point.dist is not None else point.value

    def refuse(reason: str) -> Broken:
        return Broken(point.name, origin, reason)

    try:
        method = point.load()
    except Exception as error:  # a plugin may fail in any way; the rest must go on
        return refuse(f"{type(error).__name__}: {error}")
    if not isinstance(method, Method):
        return refuse(f"{point.value} is a {type(method).__name__}, not an mmgraft Method")
    if method.name != point.name:
        return refuse(f"its entry point is called {point.name!r}, but the method {method.name!r}")
    if method.name in found:
        return refuse(f"the name is taken by {found[method.name].origin}")
    default = method.config_class.model_fields.get("method")
    if default is None or default.default != method.name:
        return refuse(f"{method.config_class.__name__} needs the field method = {method.name!r}")
    return replace(method, origin=origin)


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
