"""Options that several commands share, so that one word means one thing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def option(*words: str, panel: str | None = None, **more: Any) -> Any:
    """Declare an option: its flags, then its help text.

    Args:
        words: One flag or more, and the help text at the end.
        panel: Heading below which the help shows it.
        more: Further arguments of ``typer.Option``, such as ``min``.
    """
    *flags, text = words
    return typer.Option(*flags, help=text, rich_help_panel=panel, **more)


def argument(text: str, **more: Any) -> Any:
    """Declare a positional argument by its help text."""
    return typer.Argument(help=text, **more)


JsonFlag = Annotated[bool, option("--json", "Print the result as JSON on stdout.")]
DryRunFlag = Annotated[bool, option("--dry-run", "Say what would be done, and write nothing.")]
ForceFlag = Annotated[bool, option("--force", "Write into a folder that is not empty.")]
OverwriteFlag = Annotated[bool, option("--force", "Write over files that are there.")]
YesFlag = Annotated[bool, option("--yes", "-y", "Agree to every question.")]
RevisionOption = Annotated[str | None, option("--revision", "Commit, branch or tag on the Hub.")]
ImagesOption = Annotated[Path | None, option("--images", "Folder that image paths start from.")]

RunArgument = Annotated[
    str | None,
    argument("Folder or Hub id of the graft. Default: the one here, or the only one below."),
]

_ANSWERS = "How answers are generated"
MaxNewTokensOption = Annotated[
    int, option("--max-new-tokens", "Largest number of tokens in an answer.", min=1, panel=_ANSWERS)
]
TemperatureOption = Annotated[
    float, option("--temperature", "0 takes the likeliest token.", min=0.0, panel=_ANSWERS)
]
SamplingSeedOption = Annotated[int | None, option("--seed", "Seed of sampling.", panel=_ANSWERS)]
WorkflowOption = Annotated[
    str | None,
    option("--workflow", "Workflow of all turns. Default: the graft's once it sees an image."),
]

_LOADING = "How the model is loaded"
DeviceOption = Annotated[
    str | None, option("--device", "cuda, mps or cpu; else the first there is.", panel=_LOADING)
]
DtypeOption = Annotated[
    str | None, option("--dtype", "bfloat16, float32; default: as saved.", panel=_LOADING)
]
QuantizationOption = Annotated[
    str | None, option("--quantization", "nf4 holds the base in 4-bit.", panel=_LOADING)
]
BaseOption = Annotated[
    str | None, option("--base", "Where the base lies, if it was moved.", panel=_LOADING)
]
VerifyOption = Annotated[
    str, option("--verify", "Check of the base: fast, full or off.", panel=_LOADING)
]
