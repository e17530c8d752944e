"""Options that several commands share, so that one word means one thing."""

from __future__ import annotations

from typing import Annotated

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryRunFlag = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")
]
ForceFlag = Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")]
YesFlag = Annotated[bool, typer.Option("--yes", "-y", help="Agree to every question.")]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Commit, branch or tag on the Hub.")
]
