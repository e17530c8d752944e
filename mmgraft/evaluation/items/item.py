"""The one item type of evaluation: a question, and what counts as its answer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmgraft.data.chat.turns import has_image, is_image
from mmgraft.frozen import Frozen

Box = tuple[float, float, float, float]


def with_images(message: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a message in which ``change`` made another part of each image part."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return dict(message)
    return {**message, "content": [change(one) if is_image(one) else one for one in content]}


class Item(Frozen):
    """One question of a set.

    Attributes:
        id: The source's own, else its position; unique in its set.
        messages: The conversation up to the question, ``{"role", "content"}`` with image parts
            whose paths are resolved; never an answer.
        question: The question alone, without images or options: what ``prior`` counts by.
        answers: What is right: one answer, the ten of VQAv2, or the references of a caption.
        options: Texts to choose from, for multiple choice.
        gold: Index of the right option.
        box: ``(x1, y1, x2, y2)`` in pixels of the image, for grounding.
        size: ``(width, height)`` of the image in pixels, for grounding.
        kind: A breakdown's class, such as ``color``.
        group: The bootstrap resamples items of one group together; by default an image's path.
        tools: For the chat template.
        file: Where the item was read.
        place: Where in the file: "line 12" or "row 12", counted from 1.
    """

    id: str
    messages: Sequence[Mapping[str, Any]]
    question: str
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    gold: int | None = None
    box: Box | None = None
    size: tuple[int, int] | None = None
    kind: str | None = None
    group: str | None = None
    tools: Sequence[Any] | None = None
    file: str = ""
    place: str = ""

    @property
    def has_image(self) -> bool:
        """True where a message has an image part."""
        return has_image(self.messages)

    @property
    def where(self) -> str:
        """The item as an error names it: "test.jsonl, line 12 (id abc)"."""
        place = ", ".join(part for part in (self.file, self.place) if part)
        return f"{place} (id {self.id})" if place else f"item {self.id}"
