"""The command line that both makers share."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

from mmgraft.demo.draft import Draft, write_set
from mmgraft.errors import MMGraftError

LICENCE_STAMPS = "GPL-2; not to be passed on without its notices"
LICENCE_GROUNDING = (
    "GPL-2 (stamps), CC0 and CC BY (photographs); not to be passed on without their notices"
)


def parser(description: str | None, name: str) -> ArgumentParser:
    """Return a parser with the options that every maker has."""
    made = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path(name), help=f"folder; default: ./{name}")
    made.add_argument("--seed", type=int, default=0, help="seed of everything that is chosen")
    made.add_argument("--force", action="store_true", help="write over files of the same names")
    made.set_defaults(name=name)
    return made


def write(given: Namespace, plan: Callable[[], Draft], licence: str) -> int:
    """Write a set and say what was written; return the exit code.

    Args:
        given: The parsed options. All but where to write go into the source file.
        plan: Reads the sources and plans the files.
        licence: Licence of the images, for the source file beside them.
    """
    options = {
        key: str(value)
        for key, value in vars(given).items()
        if key not in ("out", "seed", "force", "name") and value is not None
    }
    about = {"licence": licence, "seed": given.seed, "options": options}
    try:
        draft = plan()
        names = write_set(draft, given.out, given.name, about, given.force)
    except MMGraftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name in names:
        rows = f" ({draft.rows[name]:,} rows)" if name in draft.rows else ""
        print(f"wrote {given.out / name}{rows}")
    return 0
