"""All that may stand in a row and in its turns: roles, keys, parts, tools and calls of tools.

Nothing that changes what a row means is dropped: it is read, or the row is refused. The parts of a
message, text and images, become one text.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmgraft.errors import UsageError, brief
from mmgraft.vision.images import StoredImage

#: ``{"role", "content": str | list of parts}``; other keys go to the chat template untouched.
Message = Mapping[str, Any]


#: Lists and objects in each other.
_DEEPEST = 100
#: Keys of an image part that may hold the image.
IMAGE_KEYS = ("image", "image_url", "path", "url")


def is_image(part: Any) -> bool:
    """Tell whether a content part is an image, in any of the spellings in use."""
    # A dict first: to ask for a Mapping takes ten times as long, and there are millions of parts.
    return isinstance(part, dict | Mapping) and part.get("type") in ("image", "image_url")


def image_of(part: Mapping[str, Any]) -> Any:
    """Return what an image part holds: a path, a data URI or a PIL image; None for an empty part.

    Read are ``{"type": "image", "image": X}`` (or ``path``, ``url``) and
    ``{"type": "image_url", "image_url": {"url": X}}``.
    """
    for key in IMAGE_KEYS:
        value = part.get(key)
        if isinstance(value, Mapping):
            value = value.get("url") or (value if value.get("bytes") or value.get("path") else None)
        if value is not None and value != "":
            return value
    return None


def has_image(messages: Iterable[Message]) -> bool:
    """Tell whether any message has an image part."""
    return any(True for _ in images_of_all(messages))


def images_of_all(messages: Iterable[Message]) -> Iterator[Any]:
    """Yield what the image parts of all messages hold, in order of appearance."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if is_image(part):
                yield image_of(part)


def answering(messages: Iterable[Message]) -> list[int]:
    """Return the turns in which the assistant says something, or calls a tool."""
    turns = [(at, one) for at, one in enumerate(messages) if one["role"] == "assistant"]
    return [at for at, t in turns if text_of(t.get("content")).strip() or t.get("tool_calls")]


def text_of(content: Any) -> str:
    """Return the text of a turn's content, which may be parts."""
    if isinstance(content, list | tuple):
        return "".join(str(one.get("text") or "") for one in content if isinstance(one, Mapping))
    return str(content or "")


def has_parts(messages: Iterable[Message]) -> bool:
    """Tell whether any message has a list of parts for its content."""
    return any(isinstance(message.get("content"), list | tuple) for message in messages)


def flatten(
    messages: Sequence[Message], sentinel: str, where: str = "the conversation"
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Write every list of parts as one text, each image as the sentinel.

    A newline is put between an image and the text part after it, unless that text begins with one;
    nothing else is added, so neighbouring texts are joined as they are. Content that is not a list
    is left alone.

    Returns:
        New messages, and what the image parts hold, in order of appearance.

    Raises:
        UsageError: For a part that is neither text nor image, and for an image part that holds
            nothing.
    """
    flat: list[dict[str, Any]] = []
    images: list[Any] = []
    for number, message in enumerate(messages, start=1):
        message = dict(message)
        if isinstance(message.get("content"), list | tuple):
            turn = f"{where}, turn {number}"
            message["content"] = _flatten_parts(message["content"], sentinel, images, turn)
        flat.append(message)
    return flat, images


def _flatten_parts(parts: Sequence[Any], sentinel: str, images: list[Any], turn: str) -> str:
    text, after_image = "", False
    for part in parts:
        if is_image(part):
            image = image_of(part)
            if image is None:
                raise UsageError(f'{turn}: an image part without an image; write "image": PATH')
            images.append(image)
            text += sentinel
            after_image = True
            continue
        piece = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(piece, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UsageError(f"{turn}: a content part of type {kind!r}; write text or image parts")
        if piece:
            text += "\n" + piece if after_image and piece[0] not in "\r\n" else piece
            after_image = False
    return text


def strings_in(value: Any) -> Iterator[str]:
    """Yield every text anywhere inside nested lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


#: The role that a turn's role or speaker stands for.
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "ipython", "observation"), "tool"),
    "system": "system",
    "developer": "developer",
}

ROW_KEYS = ("messages", "conversations", "image", "images", "system", "tools")
TURN_KEYS = ("role", "from", "content", "value", "tool_calls")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
#: Keys of a turn that are the chat template's to read; see ``written.refuse_dropped``.
TEMPLATE_KEYS = ("name", "tool_call_id", *THOUGHTS)
PART_KEYS = {"text": ("type", "text")} | dict.fromkeys(
    ("image", "image_url"), ("type", *IMAGE_KEYS)
)

#: Words of keys that another trainer reads as part of what is said, shown, or learned.
_MEANS = re.compile(
    "system|sys?|developer|instruction|instruct|prompt|query|history|input|output|response|prefix|"
    "completion|chosen|rejected|reject|positive|negative|preference|margin|label|kto|weight|loss|"
    "masked|mask|trainable|training|train|learn|supervised|ignore|skip|exclude|partial|refusal|eot|"
    "video|vid|clip|audio|speech|sound|wav|frame|image|img|pic(?:ture)?|photo|visual|depth|media|"
    "medium|attachment|pixel|crop|object|region|segment|tool|function|call|document|doc|context|"
    "knowledge|passage|hint|preamble|persona|template|reasoning|rationale|thinking|thought|think|"
    "channel|recipient|repeat"
)
#: Last words of keys that say something about a row, such as ``image_id``.
_ABOUT = re.compile(
    "id|idx|index|type|kind|source|size|width|height|count|number|num|hash|sha256|md5|rating|score|"
    "min|max|length|category|format|formatting|license|token|language|dataset|version|model"
)
#: Keys whose values 1 and true are the rule here: the turn is supervised, in full.
_ON = ("loss", "train", "trainable", "training", "learn", "weight", "label", "supervised")
#: Keys whose values 0 and false are.
_OFF = ("ignore", "skip", "exclude", "mask", "masked", "partial", "prefix")
_MEDIA = re.compile(
    r".*\.(?:png|jpe?g|webp|gif|bmp|tiff?|heic|svg|pdf|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg|npy)"
    r"|data:(?:image|video|audio)/.*",
    re.IGNORECASE,
)
#: An image's bytes as text: how PNG, JPEG, GIF, WebP, BMP and TIFF begin. No name has no dot.
BASE64 = re.compile(
    r"(?:iVBORw0KGgoAAAANSUhEUg|/9j/|R0lGOD|UklGR|Qk|SUkqA|TU0AK)[A-Za-z0-9+/\s]{40,}={0,2}\s*"
)


def refuse_unread(
    data: Mapping[str, Any], read: Collection[str], where: str, files: bool = False
) -> None:
    """Refuse a key that changes what a row, a turn or a part means and that nobody here reads.

    A key means something by its words: ``rejected_response`` does, ``image_id`` and
    ``num_images`` are about the row, and so is every key without such a word (``id``, ``source``),
    but one that holds turns.
    It says nothing where its value is empty, where it is a weight of 1 or a loss that is true, and
    where its text stands in the turns anyway.

    Args:
        data: A record, a turn or a content part.
        read: The keys that are read.
        where: Names it in the error.
        files: Refuse any key but ``id`` that holds an image, or the name of its file.

    Raises:
        UsageError: For the first such key, by its name.
    """
    for key, value in data.items():
        if key in read or value is None or value in ("", [], {}):
            continue
        held = files and key != "id" and is_media(value)
        if not (held or _means(key) or _are_turns(value)):
            continue
        if (key in _ON and value in (1, True)) or (key in _OFF and value in (0, False)):
            continue
        turns = [data.get(name) for name in ("messages", "conversations")]
        if isinstance(value, str) and value.strip() in map(str.strip, strings_in(turns)):
            continue
        raise UsageError(
            f"{where}: {brief(repr(key))} is not read here ({brief(repr(value))}), and the row "
            "would mean something else without it; write it as turns or images, or take it out"
        )


def is_media(value: Any) -> bool:
    """Tell whether a value is an image, or names the file of an image, a video or a sound."""
    if isinstance(value, list | dict):
        return any(map(is_media, value.values() if isinstance(value, dict) else value))
    known = isinstance(value, str) and (_MEDIA.fullmatch(value) or BASE64.fullmatch(value))
    return bool(known) or isinstance(value, StoredImage)


def _are_turns(value: Any) -> bool:
    if isinstance(value, dict):
        return not {"role", "from"}.isdisjoint(value) and not {"content", "value"}.isdisjoint(value)
    return isinstance(value, list) and any(map(_are_turns, value))


def _means(key: str) -> bool:
    words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", key)
    words = [re.sub(r"(?<!s)s$", "", word.lower()) for word in words]
    about = re.match(r"(?:num|n|has)(?=[_A-Z])", key) or not words or _ABOUT.fullmatch(words[-1])
    return not about and any(map(_MEANS.fullmatch, words))


def role_of(role: Any, where: str) -> str:
    """Return the role that a turn's role stands for.

    Raises:
        UsageError: None does.
    """
    found = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if found is None:
        raise UsageError(
            f"{where}: the role {brief(repr(role))} is not known; write one of {', '.join(ROLES)}"
        )
    return found


def tools_of(data: Mapping[str, Any], where: str) -> list[Any] | None:
    """Return the tools of a record, also where they are written as JSON text.

    Raises:
        UsageError: They are no list of objects.
    """
    tools = _parsed(data.get("tools"))
    if tools in (None, "", [], {}):
        return None
    if not isinstance(tools, list) or not all(isinstance(one, dict) for one in tools):
        raise UsageError(
            f"{where}: 'tools' is {brief(repr(tools))}; write a list of objects, each a JSON schema"
        )
    return tools


def with_system(
    messages: list[dict[str, Any]], data: Mapping[str, Any], where: str
) -> list[dict[str, Any]]:
    """Return the turns with the system prompt that stands beside them.

    Raises:
        UsageError: It is no text, or a system turn says something else.
    """
    system = data.get("system")
    there = [turn.get("content") for turn in messages if turn["role"] == "system"]
    if system in (None, "", *there):
        return messages
    if there or not isinstance(system, str):
        raise UsageError(
            f"{where}: 'system' beside the turns is {brief(repr(system))}; write a text, and no "
            "other system turn"
        )
    return [{"role": "system", "content": system}, *messages]


def check_text(data: Any, where: str) -> None:
    """Refuse what JSON can write and no tokenizer reads: half characters, endless nesting.

    Raises:
        UsageError: It names the half character, or how deep the lists are.
    """
    left: list[tuple[Any, int]] = [(data, 0)]
    while left:
        value, depth = left.pop()
        if isinstance(value, str):
            try:
                if not value.isascii():
                    value.encode()
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"{where}: half a character ({value[error.start]!a}) in its text; write "
                    "the whole one, or leave it out"
                ) from None
        elif isinstance(value, dict | list):
            if depth == _DEEPEST:
                raise UsageError(f"{where}: more than {_DEEPEST} lists in lists; write a row")
            inner = [*value, *value.values()] if isinstance(value, dict) else value
            left += [(one, depth + 1) for one in inner]


def clean(messages: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    """Return turns with known roles, calls whose arguments are objects, reasoning under its names.

    Raises:
        UsageError: An unknown role, calls that are no calls, or as ``check_text``.
    """
    check_text(messages, where)
    made = [clean_turn(turn, f"{where}, turn {at}") for at, turn in enumerate(messages, start=1)]
    for turn in made:  # as newer versions of transformers do it
        said = next((turn[key] for key in THOUGHTS if turn.get(key)), None)
        turn |= {"thinking": said, "reasoning_content": said} if said else {}
    return made


def clean_turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return one turn as ``clean`` does; without ``tool_calls`` where there are none."""
    made = {**turn, "role": role_of(turn.get("role"), where)}
    calls = _parsed(made.pop("tool_calls", None))
    if calls in (None, "", [], {}):
        return made
    if not isinstance(calls, list | tuple) or made["role"] != "assistant":
        raise UsageError(
            f"{where}: 'tool_calls' is a list of calls in a turn of the assistant; correct the turn"
        )
    return {**made, "tool_calls": [_call(call, where) for call in calls]}


def _call(call: Any, where: str) -> dict[str, Any]:
    given = call if isinstance(call, Mapping) else {}
    inner = given.get("function", given)
    arguments = _parsed(inner.get("arguments")) or {} if isinstance(inner, Mapping) else None
    if not isinstance(arguments, Mapping) or not isinstance(inner.get("name"), str):
        raise UsageError(
            f"{where}: {brief(repr(call))} is no call of a tool; write "
            '{"function": {"name": ..., "arguments": {...}}}'
        )
    inner = {**inner, "arguments": dict(arguments)}
    return {**given, "function": inner} if "function" in given else inner


def _parsed(value: Any) -> Any:
    """Return what a text of JSON says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
