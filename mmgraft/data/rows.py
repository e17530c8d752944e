"""The one row type: a conversation, and where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmgraft.data.chat.content import has_image


@dataclass(frozen=True)
class Row:
    """One conversation.

    Attributes:
        id: The source's own, else its position.
        messages: ``{"role", "content"}``, content a text or a list of text and image parts; an
            image is ``{"type": "image", "image": path or data URI}``, its path resolved.
        file: Where the row was read.
        place: Where in the file: "line 12" or "row 12", counted from 1.
        tools: For the chat template.
        layout: That it was read in, and why.
        images_first: Its images had no place, and were put before the first turn of a user.
    """

    id: str
    messages: Sequence[dict[str, Any]]
    file: str = ""
    place: str = ""
    tools: Sequence[Any] | None = None
    layout: str = ""
    images_first: bool = False

    @property
    def has_image(self) -> bool:
        """Return whether any message has an image part."""
        return has_image(self.messages)

    @property
    def where(self) -> str:
        """The row as an error names it: "train.json, row 12 (id abc)"."""
        place = ", ".join(part for part in (self.file, self.place) if part)
        return f"{place} (id {self.id})" if place else f"row {self.id}"
