"""Installed packages: where they lie and which version they are, found without importing them."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from mmgraft.frozen import Frozen


class Package(Frozen):
    """One package: its name for pip and the name it is imported by."""

    name: str
    module: str

    @property
    def folder(self) -> Path | None:
        """Folder where it is installed; None where it is not."""
        try:
            found = find_spec(self.module)
        except (ImportError, ValueError):
            return None
        folders = None if found is None else found.submodule_search_locations
        return Path(next(iter(folders))) if folders else None

    @property
    def version(self) -> str | None:
        """Version that is installed; None where it is not."""
        return installed_version(self.name)


def installed_version(name: str) -> str | None:
    """Return the version of an installed package; None where it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions_of(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    return {name: found for name in names if (found := installed_version(name)) is not None}
