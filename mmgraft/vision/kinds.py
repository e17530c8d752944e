"""Kinds of something by name: built in, registered in this process, or of installed packages."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from mmgraft.errors import UsageError, did_you_mean

T = TypeVar("T")


class Kinds(Generic[T]):
    """A registry.

    Args:
        what: One kind, in words.
        group: Of entry points, whose names are kinds.
        made_of: Called with the name and the value of an entry point.
    """

    def __init__(self, what: str, group: str, made_of: Callable[[str, Any], T]) -> None:
        self.what, self.group, self.made_of = what, group, made_of
        self.known: dict[str, T] = {}

    def register(self, name: str, kind: T) -> None:
        """Make a kind known in this process.

        Raises:
            UsageError: The name is taken.
        """
        if name in self.known:
            raise UsageError(f"The {self.what} '{name}' is already registered: use another name.")
        self.known[name] = kind

    def unregister(self, name: str) -> None:
        """Forget a registered kind; unknown ones are ignored."""
        self.known.pop(name, None)

    def names(self) -> list[str]:
        """Return all names."""
        return sorted({*self.known, *(point.name for point in entry_points(group=self.group))})

    def find(self, name: str) -> T:
        """Return a kind by name.

        Raises:
            UsageError: No such kind; names the nearest one.
        """
        if name in self.known:
            return self.known[name]
        for point in entry_points(group=self.group, name=name):
            return self.made_of(name, point.load())
        raise UsageError(f"Unknown {self.what} {name!r}; {did_you_mean(name, self.names())}")
