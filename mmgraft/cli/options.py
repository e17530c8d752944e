"""Options that several commands share, so that one word means one thing."""

import inspect
from collections.abc import Callable, Mapping
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


def given(kind: Any, *words: str, default: Any = None, **more: Any) -> tuple[Any, Any]:
    """Declare an option of a group for ``with_options``: its annotation and its default.

    Args:
        kind: Type of its value; it may also be None where that is the default.
        words: As ``option`` has them; without a flag it is the name in the group.
        default: What the command gets without it.
        more: As ``option`` has them.
    """
    return Annotated[kind | None if default is None else kind, option(*words, **more)], default


def with_options(
    before: str, more: Mapping[str, tuple[Any, Any]], without: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options that it takes as keywords, ``**more``.

    Args:
        before: Parameter that they stand before in the help.
        more: Annotation and default of each, by name; names that the command has are left out.
        without: One more to leave out.
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD

    def give(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = {n: one for n, one in signature.parameters.items() if one.kind != one.VAR_KEYWORD}
        made = [
            inspect.Parameter(name, kind, default=default, annotation=annotation)
            for name, (annotation, default) in more.items()
            if name not in own and name != without
        ]
        at = list(own).index(before)
        parameters = [*list(own.values())[:at], *made, *list(own.values())[at:]]
        command.__dict__["__signature__"] = signature.replace(parameters=parameters)
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return give


JsonFlag = Annotated[bool, option("--json", "Print the result as JSON on stdout.")]
DryRunFlag = Annotated[bool, option("--dry-run", "Say what would be done, and write nothing.")]
ForceFlag = Annotated[bool, option("--force", "Write into a folder that is not empty.")]
OverwriteFlag = Annotated[bool, option("--force", "Write over files that are there.")]
YesFlag = Annotated[bool, option("--yes", "-y", "Agree to every question.")]
RevisionOption = Annotated[str | None, option("--revision", "Commit, branch or tag on the Hub.")]
ImagesOption = Annotated[Path | None, option("--images", "Folder that image paths start from.")]

ReadOption = Annotated[
    list[str] | None,
    option("--read", "Key of a recipe's data entry: format=swift, columns.question=q."),
]

RunArgument = Annotated[
    str | None,
    argument("Folder or Hub id of the graft. Default: the one here, or the only one below."),
]

_ANSWERS = "How answers are generated"
MaxNewTokensOption = Annotated[
    int, option("--max-new-tokens", "Largest number of tokens in an answer.", min=1, panel=_ANSWERS)
]
TemperatureOption = Annotated[
    float, option("--temperature", "Temperature; 0 takes the likeliest.", min=0.0, panel=_ANSWERS)
]
WorkflowOption = Annotated[
    str | None,
    option("--workflow", "Workflow of all turns. Default: the graft's once it sees an image."),
]

TemplateOption = Annotated[
    list[str] | None,
    option("--template-option", "KEY=VALUE of the chat template; may be repeated."),
]


_LOADING = "How the model is loaded"
BaseOption = Annotated[
    str | None, option("--base", "Folder of the base, if it was moved.", panel=_LOADING)
]

#: Options of a command that loads a model; what ``load_answerer`` takes.
LOADING = {
    "device": given(str, "Device: cuda, mps, cpu; else the first found.", panel=_LOADING),
    "dtype": given(str, "Dtype: bfloat16, float32; default: as saved.", panel=_LOADING),
    "quantization": given(str, "Quantization: nf4, a base in 4-bit.", panel=_LOADING),
    "base": (BaseOption, None),
    "verify": given(str, "Check of the base: fast, full or off.", default="fast", panel=_LOADING),
    "revision": (RevisionOption, None),
    "template_option": (TemplateOption, None),
}

_REASONING = "--show-reasoning", "Show the reasoning before an answer, too."
#: Options of a command that answers with it, likewise.
ANSWERING = {
    "show_reasoning": given(bool, *_REASONING, default=False, panel=_ANSWERS),
    "seed": given(int, "Seed of sampling.", panel=_ANSWERS),
    **LOADING,
}
