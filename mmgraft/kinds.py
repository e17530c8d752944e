"""Kinds of something by name: built in, registered in this process, or of installed packages."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from mmgraft.errors import UsageError, did_you_mean
from mmgraft.frozen import Frozen

T = TypeVar("T")


class Unfit(ValueError):
    """Error of an entry point that offers something unfit; the message is the reason."""


class Broken(Frozen):
    """Something that an installed package offers and that cannot be used."""

    name: str
    origin: str
    reason: str
    what: str = "method"

    def error(self) -> UsageError:
        """Make the error of a user who asks for it by name."""
        return UsageError(
            f"{self.what} {self.name!r} of the package {self.origin!r} is broken: {self.reason}; "
            f"mend or uninstall {self.origin!r}"
        )


@dataclass(eq=False)
class Kinds(Generic[T]):
    """A registry.

    Attributes:
        what: One kind, in words.
        group: Of entry points, whose names are kinds.
        made_of: Called with the name, with the value that is registered or that an entry point
            names, and with the package; raises ``Unfit``.
        built_in: Gives the kinds that come with mmgraft, when one is first needed.
    """

    what: str
    group: str
    made_of: Callable[[str, Any, str], T]
    built_in: Callable[[], Mapping[str, T]] = dict

    @cached_property
    def known(self) -> dict[str, T]:
        """Kinds that are built in or registered."""
        return dict(self.built_in())

    def register(self, name: str, kind: Any) -> None:
        """Make a kind known in this process.

        Raises:
            UsageError: The name is taken, or it is no such kind.
        """
        if name in self.known:
            raise UsageError(f"The {self.what} '{name}' is already registered: use another name.")
        try:
            self.known[name] = self.made_of(name, kind, "mmgraft")
        except Unfit as error:
            raise UsageError(f"The {self.what} '{name}' cannot be registered: {error}") from None

    def unregister(self, name: str) -> None:
        """Forget a registered kind; unknown ones are ignored."""
        self.known.pop(name, None)

    def all(self) -> tuple[dict[str, T], list[Broken]]:
        """Return all kinds by name, and what packages offer that cannot be used."""
        found, broken = dict(self.known), list[Broken]()
        for name, origin, kind in _offers(self, tuple(sys.path)):
            if name in found:
                owner = getattr(found[name], "origin", "mmgraft")
                kind = Broken(name, origin, f"the name is taken by {owner}", self.what)
            if isinstance(kind, Broken):
                broken.append(kind)
            else:
                found[name] = kind
        return found, broken

    def names(self) -> list[str]:
        """Return all names, those of broken kinds last."""
        found, broken = self.all()
        return list({**found, **{one.name: None for one in broken}})

    def find(self, name: str) -> T:
        """Return a kind by name.

        Raises:
            UsageError: No such kind, with the nearest one; a broken one, with package and reason.
        """
        if name in self.known:
            return self.known[name]
        found, broken = self.all()
        if name in found:
            return found[name]
        for one in broken:
            if one.name == name:
                raise one.error()
        raise UsageError(f"unknown {self.what} {name!r}; {did_you_mean(name, found)}")


@cache  # a look into every installed package
def _offers(kinds: Kinds[T], path: tuple[str, ...]) -> list[tuple[str, str, T | Broken]]:
    """Load what packages offer: name, package, and the kind or why it cannot be used."""
    found: list[tuple[str, str, T | Broken]] = []
    for point in entry_points(group=kinds.group):
        origin = point.dist.name if point.dist is not None else point.value
        try:
            kind = kinds.made_of(point.name, point.load(), origin)
        except (Exception, SystemExit) as error:  # a package may fail in any way
            reason = str(error) if isinstance(error, Unfit) else f"{type(error).__name__}: {error}"
            kind = Broken(point.name, origin, reason, kinds.what)
        found.append((point.name, origin, kind))
    return found
