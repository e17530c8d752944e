"""``mmgraft chat``."""

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmgraft.cli import options
from mmgraft.cli.console import note, print_json, show_error
from mmgraft.cli.loading import load_answerer
from mmgraft.errors import UsageError
from mmgraft.runs.find import find_run

if TYPE_CHECKING:
    from mmgraft.inference import Dialogue

_HELP = (
    "/image PATH shows an image with your next line, /clear forgets the dialogue, "
    "/help says this, /quit (or Ctrl-D) ends."
)

PromptArgument = Annotated[
    str | None, options.argument("Question to answer once; without one a dialogue begins.")
]


@options.with_options("json", options.ANSWERING)
def chat(
    run: options.RunArgument = None,
    prompt: PromptArgument = None,
    image: Annotated[list[str] | None, options.option("Image to show; may be repeated.")] = None,
    system: Annotated[str | None, options.option("--system", "System prompt.")] = None,
    workflow: options.WorkflowOption = None,
    max_new_tokens: options.MaxNewTokensOption = 256,
    temperature: options.TemperatureOption = 0.0,
    top_p: Annotated[
        float | None, options.option("Nucleus to sample from.", min=0.0, max=1.0)
    ] = None,
    json: options.JsonFlag = False,
    **loading: Any,
) -> None:
    """Talk with a grafted model. Without an image it is the base itself, word for word.

    /image PATH brings an image in at any turn, also into a dialogue that began as text.
    """
    run, prompt = _which(run, prompt)
    if json and prompt is None:
        raise UsageError("--json needs a prompt: mmgraft chat RUN 'What is this?' --json")
    answerer = load_answerer(run, **loading)
    dialogue = _dialogue(answerer, system, workflow, image or [])
    _warn_of_lacks(answerer)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    settings |= {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    if prompt is None:
        note(_HELP)
        _talk(dialogue, settings)
    elif json:
        print_json({"prompt": prompt, "answer": dialogue.say(prompt, **settings)})
    else:
        _say(dialogue, prompt, settings)


def _dialogue(
    answerer: Any, system: str | None, workflow: str | None, images: list[str]
) -> "Dialogue":
    from mmgraft.inference import Dialogue

    if workflow is not None and workflow != "text":
        answerer.model.workflow(workflow)
    dialogue = Dialogue(answerer, system=system, workflow=workflow)
    for one in images:
        dialogue.add_image(one)
    return dialogue


def _which(run: str | None, prompt: str | None) -> tuple[str, str | None]:
    """Return run and prompt; a lone argument that names no folder and no Hub id is the prompt."""
    if run is not None and prompt is None and not Path(run).expanduser().exists():
        words = run.strip().split()
        if len(words) != 1 or run.count("/") != 1:
            return str(find_run()), run
    return (str(find_run()), prompt) if run is None else (run, prompt)


def _talk(dialogue: "Dialogue", settings: dict[str, Any]) -> None:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        word, _, rest = line.partition(" ")
        try:
            if not line:
                continue
            if word in ("/quit", "/exit"):
                return
            if word == "/help":
                note(_HELP)
            elif word == "/clear":
                dialogue.clear()
            elif word == "/image":
                path = _dropped(rest.strip())
                dialogue.add_image(path)
                note(f"{path} goes with your next line")
            elif word.startswith("/") and word[1:].isalpha():
                note(f"no command {word}. {_HELP}")
            else:
                _say(dialogue, line, settings)
        except UsageError as error:
            show_error(str(error))


def _dropped(text: str) -> str:
    """Return the path in what a terminal writes for a file dropped on it: quoted, or escaped."""
    with suppress(ValueError):
        words = shlex.split(text)
        if len(words) == 1 and not Path(text).expanduser().exists():
            text = words[0]
    return os.path.expanduser(text)


def _say(dialogue: "Dialogue", text: str, settings: dict[str, Any]) -> None:
    """Hold one turn, and print the answer as it comes."""
    dialogue.say(text, on_text=lambda piece: typer.echo(piece, nl=False), **settings)
    typer.echo()


def _warn_of_lacks(answerer: Any) -> None:
    from mmgraft.model.files.summary import limits

    found = limits(answerer.model.workflow().record)
    if found:
        note("this graft does not promise that:")
    for promise, why in found.items():
        note(f"  {promise} ({why})")
