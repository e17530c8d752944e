"""Finds the methods: the three built in, and any that an installed package brings.

A package brings a method with an entry point of the group `mmgraft.methods` that names a `Method`:

    [project.entry-points."mmgraft.methods"]
    mymethod = "mypackage.method:METHOD"

Looking methods up imports no torch; only `Method.graft_class` does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mmgraft.errors import UsageError, did_you_mean
from mmgraft.grafts.iaa.config import IAAConfig
from mmgraft.grafts.llava.config import LlavaConfig
from mmgraft.grafts.wings.config import WingsConfig
from mmgraft.strict import StrictModel

ENTRY_POINT_GROUP = "mmgraft.methods"


@dataclass(frozen=True)
class Method:
    """One way of grafting sight onto a base.

    Attributes:
        name: the word in `--method`, in recipes and in `graft_config.json`.
        title: one line for people.
        paper: where it comes from, as an arXiv id or an address; empty for none.
        config_class: its settings; the field `method` holds `name`. Must import without torch.
        graft: where its graft class is, as "package.module:Class", or a callable that returns it.
        recipe: what `mmgraft graft` writes into a new run folder as its recipe, if anything: the
            file name of a shipped one, or the whole path of a file of the method's own package.
        origin: the package that brought it, filled in by the registry.
    """

    name: str
    title: str
    paper: str
    config_class: type[StrictModel]
    graft: str | Callable[[], type[Any]] = field(repr=False)
    recipe: str | None = None
    origin: str = "mmgraft"

    def load_graft(self) -> type[Any]:
        """The graft class, imported now (and torch with it).

        Raises:
            UsageError: when the class cannot be imported, naming the package to mend.
        """
        if not isinstance(self.graft, str):
            return self.graft()
        module_name, _, class_name = self.graft.partition(":")
        try:
            return getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"method {self.name!r} names {self.graft!r}, which cannot be loaded ({error}); "
                f"reinstall or mend the package {self.origin!r}"
            ) from error


BUILT_IN = (
    Method(
        name="iaa",
        title="decoder layers inserted after chosen base layers",
        paper="arXiv 2408.12902",
        config_class=IAAConfig,
        graft="mmgraft.grafts.iaa.graft:IAAGraft",
        recipe="iaa.yaml",
    ),
    Method(
        name="wings",
        title="low-rank learners beside the attention, weighed by a router",
        paper="arXiv 2406.03496",
        config_class=WingsConfig,
        graft="mmgraft.grafts.wings.graft:WingsGraft",
        recipe="wings.yaml",
    ),
    Method(
        name="llava",
        title="the projector alone, base frozen or trained: the baseline",
        paper="arXiv 2304.08485",
        config_class=LlavaConfig,
        graft="mmgraft.grafts.llava.graft:LlavaGraft",
        recipe="llava.yaml",
    ),
)


@dataclass(frozen=True)
class Broken:
    """A method that an installed package names but that cannot be used."""

    name: str
    origin: str
    reason: str


def methods() -> dict[str, Method]:
    """Every usable method by name, the built-in ones first."""
    return _discover()[0]


def broken_methods() -> list[Broken]:
    """Entry points that could not be used, with the reason; they never disturb the others."""
    return _discover()[1]


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        UsageError: for an unknown name, with the nearest known one; for a broken one, with why.
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
    found = {method.name: method for method in BUILT_IN}
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
    return Method(**{**vars(method), "origin": origin})


def parse_method_config(data: dict[str, Any], what: str = "graft config") -> StrictModel:
    """Build the config of whichever method `data["method"]` names.

    Raises:
        UsageError: for an unknown method, an unknown key or a wrong value.
    """
    name = data.get("method")
    if not isinstance(name, str):
        raise UsageError(f"{what}: 'method' is missing; set one of {', '.join(methods())}")
    return get_method(name).config_class.parse(data, what)
