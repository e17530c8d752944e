"""A record of a file as a row: its turns by its layout, its images found.

Images that are listed beside turns are put in their places: at a part, at a word, or first.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from mmgraft.data.chat import turns as chat_turns
from mmgraft.data.formats.fields import Fields, as_list
from mmgraft.data.formats.layouts import Layout, Reading
from mmgraft.data.formats.record_files import once
from mmgraft.data.images import is_data_uri, path_of, refuse_web
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError, brief
from mmgraft.vision.images import BadImage, StoredImage, path_hint

#: Placeholder of an image in the texts of most layouts; beside content parts it is plain text.
WORD = "<image>"

#: Placeholders that other tools write for an image, a video or a sound.
_OTHER_WORDS = re.compile(
    r"\A\s*<\s?(?:image|img|video|audio)\s?/?>|<img>[^<]+</img>"  # in a text <img> may be HTML
    r"|<\|(?:image|img|vision|video|audio)[\w ]*\|>|\[img(?:-\d+)?\]|&lt;image&gt;"
    r"|<(?:image|img|video|audio)(?:[ _]?\d+|here|[ _](?:pad|placeholder|token|soft_token))>"
    r"|<start_of_(?:image|audio)>",
    re.IGNORECASE,
)

#: Rule by which ``WORD`` is an image. ``first``: always, and images without any word come before
#: the first turn of a user; ``parts``: never where any part is an image, else ``first`` where
#: images are listed; ``listed``: as ``parts``, but what may be either is refused.
Words = Literal["never", "always", "first", "parts", "listed"]

Turn = dict[str, Any]


def place_images(
    turns: Sequence[Turn], images: Sequence[Any], words: Words, where: str
) -> tuple[list[Turn], str]:
    """Put images where a row says that they stand.

    Args:
        turns: Role and content, a text or parts; a part ``{"type": "image"}`` takes an image.
        images: In their order.
        words: How words are read.
        where: Names the row in errors.

    Returns:
        New turns, and by what the images were placed: ``parts``, ``words``, or ``first``.

    Raises:
        UsageError: There are more or fewer places than images, or it is not clear which they are.
    """
    count = len(images)
    shown = list(chat_turns.images_of_all(turns))
    bare = shown.count(None)
    if not count and not bare and words not in ("always", "first"):
        return list(turns), "parts"
    split = [_split(turn, not shown) for turn in turns]
    said = sum(map(_is_bare, chain(*map(_parts, split)))) - bare
    if words == "listed" and said and shown and count in (said, said + bare):
        raise UsageError(
            f"{where}: {count} images are listed, {bare} parts may take one, and {WORD} occurs "
            f"{said} times; write format: messages in the recipe, where {WORD} is a text, or "
            "format: swift, where it is an image"
        )
    if words in ("listed", "parts"):
        words = "first" if count and not shown else "never"
    if words != "never" and not shown:
        _refuse_other(split, where)
    if words == "never" and bare >= count:
        return _filled(turns, images, where), "parts"
    if words == "first" and count and not said and not shown:
        return _filled(_with_first(turns, count, where), images, where), "first"
    if count != bare + (said if words != "never" else 0):
        takes = f"{bare} parts take one" if words == "never" else f"{WORD} occurs {said} times"
        raise UsageError(
            f"{where}: {count} images are listed, but {takes}; write one for each image, as "
            f'{{"type": "image"}} in messages, where {WORD} is a text, else as {WORD}'
        )
    return _filled(split, images, where), "words" if said else "parts"


def _refuse_other(turns: Sequence[Turn], where: str) -> None:
    """Refuse placeholders of other tools."""
    for turn in turns:
        if found := _OTHER_WORDS.search(chat_turns.text_of(turn.get("content"))):
            raise UsageError(
                f"{where}: {found[0]!r} stands in a text, and no image is put there; write {WORD} "
                "for each image, or format: messages in the recipe, where it is a text"
            )


def _parts(turn: Turn) -> list[Any]:
    content = turn.get("content")
    return content if isinstance(content, list) else []


def _is_bare(part: Any) -> bool:
    return chat_turns.is_image(part) and chat_turns.image_of(part) is None


def _split(turn: Turn, in_parts: bool) -> Turn:
    """Return a turn with a part for each word; in text parts only where none is an image."""
    content = turn.get("content")
    if isinstance(content, str) and WORD in content:
        texts: list[Any] = [{"type": "text", "text": content}]
    elif in_parts and isinstance(content, list):
        texts = content
    else:
        return turn
    made: list[Any] = []
    for part in texts:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or WORD not in text:
            made.append(part)
            continue
        for at, piece in enumerate(text.split(WORD)):
            made += [{"type": "image"}] if at else []
            made += [{"type": "text", "text": piece}] if piece else []
    return {**turn, "content": made}


def _with_first(turns: Sequence[Turn], count: int, where: str) -> list[Turn]:
    """Return turns with empty image parts before the first turn of a user."""
    for at, turn in enumerate(turns):
        if chat_turns.role_of(turn["role"], f"{where}, turn {at + 1}") == "user":
            said = turn.get("content") or []
            said = [{"type": "text", "text": said}] if isinstance(said, str) else said
            first = {**turn, "content": [{"type": "image"}] * count + said}
            return [*turns[:at], first, *turns[at + 1 :]]
    raise UsageError(f"{where}: {count} images are listed, but no turn of a user shows one; add it")


def _filled(turns: Sequence[Turn], images: Sequence[Any], where: str) -> list[Turn]:
    """Return turns in which each empty image part took its image, as far as there are any.

    Raises:
        UsageError: Its ``index`` names an image that another part takes.
    """
    order = [part.get("index") for part in chain(*map(_parts, turns)) if _is_bare(part)]
    if None not in order and order != [*range(len(order))]:
        if sorted(map(str, order)) != sorted(map(str, range(len(images)))):
            raise UsageError(f"{where}: image parts of index {order}; number them from 0 on")
        images = [images[int(at)] for at in order]
    queue = iter(images)
    filled = list(turns)
    for at, turn in enumerate(turns):
        if any(map(_is_bare, _parts(turn))):
            said = turn["content"]
            parts = [{**p, "image": next(queue, None)} if _is_bare(p) else p for p in said]
            filled[at] = {**turn, "content": parts}
    return filled


#: Characters; what is longer is hardly a path.
_LONGEST_NAME = 1000
_TURNS = ("messages", "conversations", "texts", "history")


_PLACED = {
    "words": f", {WORD} for each image",
    "first": ", its images before the first turn of a user",
    "parts": ", its images in parts",
}
_WORDS: dict[str, Words] = {"llava": "always", "messages": "listed", "trl": "parts"}


@dataclass
class RowReader:
    """Reads the records of one file.

    Attributes:
        file: Names them in errors.
        folder: That image paths start from, a whole path; None where there is none.
        reading: What the rows are.
        check_images: Refuse a row whose image file is missing now, not when it is used.
        images: Of the record, by name, where they lie beside it in a file of many; then its paths
            name these and no others.
    """

    file: str
    folder: str | None
    reading: Reading
    check_images: bool
    images: Mapping[str, StoredImage] | None = None

    def row(self, place: str, data: Any) -> Row:
        """Read one record as a row.

        Raises:
            UsageError: Naming file, row and what is wrong.
        """
        where = f"{self.file}, {place}"
        if not isinstance(data, dict):
            raise UsageError(
                f"{where}: a {type(data).__name__}, not an object; write a LLaVA row or messages"
            )
        data = _parsed(data, where)
        index = id_of(data, self.reading) or place.split()[-1]
        where = f"{where} (id {index})"
        chat_turns.check_text(data, where)
        layout = self.reading.layout(data, where)
        turns = layout.turns(data, where)
        name = self._name(layout, data)
        images = self._listed(data, turns, where)
        words = "never" if self.reading.format == "messages" else _WORDS.get(name, "first")
        placed, by = place_images(turns, images, words, where)
        messages = [self._message(turn, f"{where}, turn {at}") for at, turn in enumerate(placed, 1)]
        bare = not chat_turns.has_image(messages)
        chat_turns.refuse_unread(data, self.reading.read_keys(layout), where, files=bare)
        messages = chat_turns.with_system(messages, data, where)
        tools = chat_turns.tools_of(data, where)
        if name == "messages" and by != "parts":
            name = "swift"
        why = f"{name}: {layout.known_by}{_PLACED[by] if images else ''}"
        first = by == "first" and name not in ("cauldron", "vqa")  # which say nothing of places
        return Row(index, messages, self.file, place, tools, why, first)

    def _name(self, layout: Layout, data: Mapping[str, Any]) -> str:
        """Return the name of a row's layout; turns with role and content are ms-swift's."""
        if self.reading.format != "auto":
            return self.reading.format
        turns = data.get("conversations") or [{}]
        first = turns[0] if isinstance(turns, list) else turns
        return layout.names["llava" in layout.names and "role" in first]

    def _listed(self, data: Mapping[str, Any], turns: list[Any], where: str) -> list[Any]:
        """Return the images beside the turns; in a tar those of the sample, where none is named."""
        column = self.reading.columns.get("image")
        one, several = as_list(data.get("image")), as_list(data.get("images"))
        if one and several and one != several:
            raise UsageError(f"{where}: its 'image' and 'images' differ; write one of them")
        listed = one or several
        if column:
            fields = Fields({"image": column})
            if not self.images:
                fields.check(list(data), where, "this row has not")
            found = fields.get(data, "image")  # of several columns, a list
            several = [found] if column in data else found or []
            listed = [image for value in several for image in as_list(value)]
        if not listed and self.images and not any(chat_turns.images_of_all(turns)):
            return list(dict.fromkeys(self.images.values()))
        if any(not isinstance(image, str | StoredImage | Mapping) for image in listed):
            raise UsageError(f"{where}: the images beside the turns are not paths; write paths")
        return listed

    def _message(self, turn: dict[str, Any], at: str) -> dict[str, Any]:
        keys = (*chat_turns.TURN_KEYS, *chat_turns.TEMPLATE_KEYS)
        chat_turns.refuse_unread(turn, keys, at, files=True)
        turn = chat_turns.clean_turn(turn, at)
        content = turn.get("content")
        if isinstance(content, list):
            return {**turn, "content": [self._part(part, at) for part in content]}
        if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
            raise UsageError(f"{at}: 'content' is neither a text nor a list; write one of them")
        return turn

    def _part(self, part: Any, at: str) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if str(kind) in chat_turns.PART_KEYS:
            chat_turns.refuse_unread(part, chat_turns.PART_KEYS[str(kind)], at, files=True)
        if kind == "text" and isinstance(part.get("text"), str):
            return part
        if not chat_turns.is_image(part):
            raise UsageError(
                f"{at}: a content part of type {brief(repr(kind))}; write text or image parts"
            )
        if sum(map(bool, map(part.get, ("text", *chat_turns.IMAGE_KEYS)))) > 1:
            raise UsageError(f"{at}: an image part with text, or two images; write a part for each")
        image = chat_turns.image_of(part)
        if image is None:
            raise UsageError(
                f'{at}: an image part without an image; write "image": PATH in it, or one more '
                'path in the row\'s "images"'
            )
        return {"type": "image", "image": self.resolve(image, at)}

    def resolve(self, image: Any, where: str) -> str | StoredImage:
        """Resolve an image's path to a file inside the image folder; a data URI stays as it is.

        Raises:
            UsageError: It is no path, an address, outside of the folder, or missing.
        """
        image = _held(image, where)
        if isinstance(image, StoredImage):
            return image
        if not isinstance(image, str) or not image:
            raise UsageError(
                f"{where}: an image that is no path ({brief(repr(image))}); write its path"
            )
        if is_data_uri(image):
            return image
        refuse_web(image, where)
        if self.images is not None:
            if image not in self.images:
                there = ", ".join(dict.fromkeys(map(str, self.images.values()))) or "none"
                raise BadImage(
                    f"{where}: no image {brief(image)} lies beside this record ({there}); put it "
                    "into the shard under the record's own name, or leave the row out",
                    "missing",
                )
            return self.images[image]
        if self.folder is None:
            raise UsageError(
                f"{where}: the image is a path ({brief(image)}); give the folder that paths start "
                "from (images: in the recipe, --images)"
            )
        path = os.path.normpath(os.path.join(self.folder, path_of(image)))
        if os.path.commonpath([self.folder, path]) != self.folder:
            raise BadImage(
                f"{where}: the image {brief(image)} lies outside of the image folder "
                f"{self.folder}; set the image folder to one that holds it",
                "outside",
            )
        if self.check_images and not os.path.isfile(path):
            raise BadImage(
                f"{where}: image file not found: {brief(path)}; {_where_it_may_be(image)}",
                "missing",
            )
        return path


def id_of(data: dict[str, Any], reading: Reading) -> str | None:
    """Return what a record calls itself, as it can be written anywhere, or None."""
    found = data.get(reading.columns.get("id", "id"))
    return None if found is None else brief(found)


def _parsed(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the record with turns that are written as JSON text read."""
    texts = {key: data[key] for key in _TURNS if isinstance(data.get(key), str)}
    for key, text in texts.items():
        try:
            texts[key] = json.loads(text, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            reason = str(error).partition(":")[0]
            raise UsageError(
                f"{where}: its {key!r} is a text that is not JSON ({reason}); correct it"
            ) from None
    return {**data, **texts} if texts else data


def _held(image: Any, where: str) -> Any:
    """Return what stands for an image: of one of ``datasets`` its bytes or path; text as a URI."""
    if isinstance(image, Mapping):
        data, path = image.get("bytes"), image.get("path") or image.get("url")
        text = isinstance(data, str) and chat_turns.BASE64.fullmatch(data)
        if not text and not path:
            raise UsageError(
                f"{where}: without an image in it ({brief(repr(dict(image)))}); write its path, or "
                "its bytes in base64"
            )
        image = data if text else path
    if isinstance(image, str) and chat_turns.BASE64.fullmatch(image):
        return f"data:image;base64,{image}"
    return image


def _where_it_may_be(image: str) -> str:
    if len(image) > _LONGEST_NAME:
        return "an image's own bytes begin with data:image/png;base64, (or jpeg)"
    return f"set the folder that image paths start from{path_hint(image)}, or leave the row out"
