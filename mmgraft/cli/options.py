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

_LOADING = "How the model is loaded"
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", help="cuda, mps or cpu; else the first there is.", rich_help_panel=_LOADING
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="bfloat16, float32; default: as saved.", rich_help_panel=_LOADING),
]
QuantizationOption = Annotated[
    str | None,
    typer.Option("--quantization", help="nf4 holds the base in 4-bit.", rich_help_panel=_LOADING),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", help="Where the base lies, if it was moved.", rich_help_panel=_LOADING),
]
VerifyOption = Annotated[
    str,
    typer.Option(
        "--verify", help="How the base is checked: fast, full or off.", rich_help_panel=_LOADING
    ),
]
