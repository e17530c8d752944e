"""Kinds of something by name: built in, registered in this process, or of installed packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from mmgraft.errors import UsageError, did_you_mean

T = TypeVar("T")


class Unfit(ValueError):
    """What a package offers is not what its entry point promises; the message is the reason."""


@dataclass(frozen=True)
class Broken:
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


def origin_of(point: EntryPoint) -> str:
    """Return the name of the package that an entry point belongs to."""
    return point.dist.name if point.dist is not None else point.value


def load_point(point: EntryPoint, what: str, made_of: Callable[[str, Any], T]) -> T | Broken:
    """Load what an entry point offers, or say why it cannot be used.

    Args:
        point: The entry point.
        what: What it should offer, in words.
        made_of: Called with its name and its value; raises ``Unfit``.
    """
    try:
        return made_of(point.name, point.load())
    except Unfit as error:
        reason = str(error)
    except (Exception, SystemExit) as error:  # a package may fail in any way
        reason = f"{type(error).__name__}: {error}"
    return Broken(point.name, origin_of(point), reason, what)


class Kinds(Generic[T]):
    """A registry.

    Args:
        what: One kind, in words.
        group: Of entry points, whose names are kinds.
        made_of: Called with the name and the value that is registered or that an entry point names;
            raises ``Unfit``.
    """

    def __init__(self, what: str, group: str, made_of: Callable[[str, Any], T]) -> None:
        self.what, self.group, self.made_of = what, group, made_of
        self.known: dict[str, T] = {}

    def register(self, name: str, kind: Any) -> None:
        """Make a kind known in this process.

        Raises:
            UsageError: The name is taken, or it is no such kind.
        """
        if name in self.known:
            raise UsageError(f"The {self.what} '{name}' is already registered: use another name.")
        try:
            self.known[name] = self.made_of(name, kind)
        except Unfit as error:
            raise UsageError(f"The {self.what} '{name}' cannot be registered: {error}") from None

    def unregister(self, name: str) -> None:
        """Forget a registered kind; unknown ones are ignored."""
        self.known.pop(name, None)

    def names(self) -> list[str]:
        """Return all names."""
        return sorted({*self.known, *(point.name for point in entry_points(group=self.group))})

    def usable(self) -> tuple[dict[str, T], list[Broken]]:
        """Return all kinds by name, and what packages offer that cannot be used."""
        found, broken = dict(self.known), list[Broken]()
        for point in entry_points(group=self.group):
            kind = load_point(point, self.what, self.made_of)
            if point.name in found:
                kind = Broken(point.name, origin_of(point), "the name is taken", self.what)
            if isinstance(kind, Broken):
                broken.append(kind)
            else:
                found[point.name] = kind
        return dict(sorted(found.items())), broken

    def find(self, name: str) -> T:
        """Return a kind by name.

        Raises:
            UsageError: No such kind, with the nearest one; a broken one, with package and reason.
        """
        if name in self.known:
            return self.known[name]
        for point in entry_points(group=self.group, name=name):
            kind = load_point(point, self.what, self.made_of)
            if isinstance(kind, Broken):
                raise kind.error()
            return kind
        raise UsageError(f"Unknown {self.what} {name!r}; {did_you_mean(name, self.names())}")
