"""Messages as one text: by the tokenizer's chat template, as plain text, or by a template file."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, meta
from jinja2.exceptions import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from mmgraft.data.chat.turns import Message
from mmgraft.errors import UsageError, did_you_mean
from mmgraft.frozen import Frozen
from mmgraft.textfiles import read_text

_MARK = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
#: Variables that transformers and jinja give to a template.
_GIVEN = re.compile(
    "messages|tools|documents|add_generation_prompt|continue_final_message|"
    "raise_exception|strftime_now|range|namespace|dict"
)
_PROBE = "mmgraft probe"


class Template(Frozen):
    """Record of a graft's template.

    Attributes:
        kind: "chat" is the tokenizer's own, "plain" is the contents one after another, "file" is
            the jinja text of a file.
        text: The jinja text of kind "file", else None.
    """

    kind: Literal["chat", "plain", "file"] = "chat"
    text: str | None = None


def resolve_template(spec: str | None, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Turn what a user wrote into a template that this tokenizer can use.

    Args:
        spec: "chat" (also None), "plain", or the path of a jinja file.
        tokenizer: The base's.

    Raises:
        UsageError: "chat" for a tokenizer that has no template, a file that is missing or is not
            jinja.
    """
    if spec in (None, "chat"):
        if not tokenizer.chat_template:
            raise UsageError(
                "this base's tokenizer has no chat template; write `template: plain` (an image, "
                "then text), or `template:` with the path of a jinja file"
            )
        check_template(Template("chat"), tokenizer, {})
        return _tried(Template("chat"), tokenizer, "the base's chat template")
    if spec == "plain":
        return Template("plain")
    path, named = Path(spec), _named(tokenizer)
    if spec in named and not path.is_file():
        return _tried(Template("file", named[spec]), tokenizer, f"the base's template {spec}")
    if not path.is_file():
        known = ", ".join(["chat", "plain", *sorted(named)])
        raise UsageError(f"no template file {spec}; write {known} or the path of a jinja file")
    return _tried(Template("file", read_text(path)), tokenizer, str(spec))


def _tried(template: Template, tokenizer: PreTrainedTokenizerBase, name: str) -> Template:
    try:
        _apply(template, tokenizer, [{"role": "user", "content": _PROBE}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UsageError(
            f"{name}, line {error.lineno}: {error.message}; correct the template"
        ) from error
    except Exception:
        pass  # it may want other roles than the probe's; conversations are refused one by one
    return template


def _named(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, str]:
    """Return a tokenizer's templates by name; none where it has a single one."""
    own = tokenizer.chat_template
    return own if isinstance(own, Mapping) else {}


def check_template(
    template: Template, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> None:
    """Refuse options that a template does not know, and a template that is not chosen.

    Raises:
        UsageError: It names what there is to choose from.
    """
    named = _named(tokenizer)
    if template.kind == "chat" and named and "default" not in named:
        raise UsageError(
            f"the base's chat templates are called {', '.join(sorted(named))}, and none is the "
            "default; choose one: mmgraft graft --template NAME"
        )
    known = variables(template, tokenizer) if options else set[str]()
    for name in options:
        if name not in known:
            raise UsageError(
                f"template option {name!r}: the template has no such variable; "
                f"{did_you_mean(name, sorted(known))}"
            )


def variables(template: Template, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the variables of a template that a user may set, such as ``enable_thinking``."""
    source = _MARK.sub("", source_of(template, tokenizer))
    parser = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        found = meta.find_undeclared_variables(parser.parse(source))
    except TemplateSyntaxError:
        return set()  # it writes no conversation
    own = tokenizer.SPECIAL_TOKENS_ATTRIBUTES
    return {name for name in found if name not in own and not _GIVEN.fullmatch(name)}


def render(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    options: Mapping[str, Any] | None = None,
    sentinel: str | None = None,
    where: str = "the conversation",
) -> str:
    """Write a conversation as one text.

    Args:
        template: How to write it.
        tokenizer: The base's, or a copy of it.
        messages: With string contents, unless the template reads parts.
        tools: For the chat template.
        add_generation_prompt: End with the header of an answer; plain text has none.
        options: Variables of the chat template, such as ``enable_thinking``.
        sentinel: The text that stands for an image in ``messages``; plain text needs it.
        where: Names the row in an error.

    Raises:
        UsageError: Where the template refuses the conversation.
    """
    if template.kind == "plain":
        eos = tokenizer.eos_token
        return _plain(messages, tools, str(eos) if eos else None, sentinel, where)
    settings = {"add_generation_prompt": add_generation_prompt, **(options or {})}
    return str(apply(template, tokenizer, messages, where, tools=tools, tokenize=False, **settings))


def apply(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: str,
    **settings: Any,
) -> Any:
    """Call ``apply_chat_template`` with a chat template.

    Raises:
        UsageError: The template refuses the conversation.
    """
    try:
        return _apply(template, tokenizer, messages, **settings)
    except Exception as error:  # whatever a foreign template may raise
        raise UsageError(
            f"{where}: the chat template refuses this conversation: {error}; change its turns, or "
            "give another template"
        ) from error


def _apply(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    **settings: Any,
) -> Any:
    conversation: Any = list(messages)
    return tokenizer.apply_chat_template(conversation, chat_template=template.text, **settings)


def source_of(
    template: Template, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None = None
) -> str:
    """Return the jinja text that is used with these tools; empty for plain text."""
    if template.kind == "plain":
        return ""
    return tokenizer.get_chat_template(template.text, list(tools) if tools else None)


def marks_answers(source: str) -> bool:
    """Tell whether a template marks what the assistant writes with ``{% generation %}``."""
    return _MARK.search(source) is not None


def reads_parts(template: Template, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a chat template writes a list of text parts as it writes the same text."""
    if template.kind == "plain":
        return False
    turns = [
        {"role": "user", "content": one} for one in (_PROBE, [{"type": "text", "text": _PROBE}])
    ]
    try:
        text, other = (apply(template, tokenizer, [one], "", tokenize=False) for one in turns)
    except UsageError:
        return False
    return text == other


def _plain(
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    eos: str | None,
    sentinel: str | None,
    where: str,
) -> str:
    """Return the contents one after another; an answer ends with the end-of-sequence token.

    Two texts that would run into each other are kept apart: an answer by a space, any other turn by
    a newline. Nothing comes between an image and a caption.
    """
    text = ""
    for message in messages:
        if tools or message.get("tool_calls"):
            raise UsageError(f"{where}: plain text has no tools; use a chat template")
        content = str(message.get("content") or "")
        answer = message["role"] == "assistant"
        if _run_together(text, content, tuple(wall for wall in (sentinel, eos) if wall)):
            text += " " if answer else "\n"
        text += content
        if answer:
            if eos is None:
                raise UsageError(
                    f"{where}: plain text ends an answer with the end-of-sequence token, and this "
                    "tokenizer has none; give a template file"
                )
            text += eos
    return text


def _run_together(left: str, right: str, walls: tuple[str, ...]) -> bool:
    if not left or not right or left[-1].isspace() or right[0].isspace():
        return False
    return not (left.endswith(walls) or right.startswith(walls))
