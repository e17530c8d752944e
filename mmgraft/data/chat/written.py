"""Conversations of which a chat template would leave something out; they are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmgraft.data.chat.transcript import Transcript, unused_marker
from mmgraft.data.chat.turns import THOUGHTS
from mmgraft.errors import UsageError

_THINKS = {"reasoning_content", "thinking"}
_TEXTS = ("content", *_THINKS)


def refuse_dropped(transcript: Transcript) -> None:
    """Refuse a conversation of which the template leaves something out.

    Looked for are the content of every turn, its calls of tools, its reasoning, and the tools. What
    is written of one conversation is written of all whose turns are of the same kinds.

    Raises:
        UsageError: It names the turn and what is left out.
    """
    turns = [(t["role"], *(key for key, value in t.items() if value)) for t in transcript.messages]
    kinds = (bool(transcript.tools), *turns)
    if kinds in transcript.copies.written:
        return
    for lacks in _dropped(transcript):
        raise UsageError(
            f"{transcript.where}{lacks}; take it out, or graft with a template that does "
            "(--template FILE.jinja)"
        )
    transcript.copies.written.add(kinds)


def _dropped(transcript: Transcript) -> Iterator[str]:
    text = transcript.render()
    if transcript.tools and replace(transcript, tools=None).render() == text:
        yield ": the chat template does not write the row's 'tools'"
    marker = unused_marker(text)
    turns = list(enumerate(transcript.messages, start=1))
    try:
        marked = transcript.render([_marked(turn, f"{marker}{at}") for at, turn in turns])
    except UsageError:
        return  # the template reads what the turns say
    reads = re.search(rf"[.'\"](?:{'|'.join(THOUGHTS)})\b", transcript.source)
    for at, turn in turns:
        written = {key for key in (*_TEXTS, "tool_calls") if f"{marker}{at}{key};" in marked}
        if written & _THINKS or (reads and at < len(turns)):  # of earlier turns it may go
            written |= _THINKS
        for key in ("content", "reasoning_content", "tool_calls"):
            if key not in written and str(turn.get(key) or "").strip():
                yield (
                    f", turn {at}: the chat template does not write the {key!r} of this turn of "
                    f"the {turn['role']}"
                )


def _marked(turn: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """Return a turn with marks in its texts and in the names of its calls."""
    made = _with_calls(turn, lambda call: {"name": f"{call['name']}{mark}tool_calls;"})
    texts = [key for key in _TEXTS if str(made.get(key) or "").strip()]
    return {**made, **{key: f"{made[key]}{mark}{key};" for key in texts}}


def takes_text(transcript: Transcript) -> bool:
    """Tell whether the template takes the arguments of calls as JSON text, not as objects.

    It does where it cannot write objects, or writes them as Python does.
    """
    calls = [call for turn in transcript.messages for call in turn.get("tool_calls") or ()]
    given = [call.get("function", call)["arguments"] for call in calls]
    try:
        text = transcript.render() if given else ""
    except UsageError:
        return True  # what else is wrong is said of the text
    return any(one and repr(one) in text for one in given)


def with_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return turns whose calls have JSON text for arguments."""

    def changed(call: dict[str, Any]) -> dict[str, Any]:
        return {"arguments": json.dumps(call["arguments"], ensure_ascii=False)}

    return [_with_calls(turn, changed) for turn in messages]


def _with_calls(
    turn: Mapping[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Return a turn whose calls of tools have something changed."""
    calls = []
    for call in turn.get("tool_calls") or ():
        inner = call.get("function", call)
        inner = {**inner, **change(inner)}
        calls.append({**call, "function": inner} if "function" in call else inner)
    return {**turn, "tool_calls": calls} if calls else dict(turn)
