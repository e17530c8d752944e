"""One row as the model sees it, in pieces that a person can read."""

from dataclasses import asdict
from itertools import groupby
from typing import Any, Literal

from mmgraft.data.batches.dataset import fitted
from mmgraft.data.chat.labels import supervise_row
from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.rows import Row
from mmgraft.frozen import Frozen

Kind = Literal["prompt", "learned", "image"]


class Piece(Frozen):
    """Neighbouring positions of one kind.

    Attributes:
        kind: "learned" is supervised, "prompt" only read, "image" one image's.
        text: As the tokenizer writes it; an image's path for an image.
        positions: How many.
    """

    kind: Kind
    text: str
    positions: int


class Preview(Frozen):
    """A row as it is trained on.

    Attributes:
        row: Its name.
        pieces: In order, up to where it is cut.
        whole: Positions before the cut.
    """

    row: str
    pieces: tuple[Piece, ...]
    whole: int

    def count(self, kind: Kind | None = None) -> int:
        """Positions of a kind, or all."""
        return sum(piece.positions for piece in self.pieces if kind in (None, piece.kind))

    def as_dict(self) -> dict[str, Any]:
        """As it is printed with --json."""
        return {
            "row": self.row,
            "positions": self.count(),
            "before_cut": self.whole,
            "learned": self.count("learned"),
            "of_images": self.count("image"),
            "pieces": [asdict(one) for one in self.pieces],
        }


def preview_row(
    processor: GraftProcessor, row: Row, max_length: int | None = None, positions: int | None = None
) -> Preview:
    """Tokenise a row as a training does, and put its positions together by what becomes of them.

    Raises:
        UsageError: For a row that cannot be trained on.
    """
    encoded = supervise_row(processor, row)
    whole = len(encoded)
    encoded, _ = fitted(encoded, max_length, positions, row.where)
    return Preview(row.where, tuple(_pieces(processor, encoded)), whole)


def _pieces(processor: GraftProcessor, encoded: Encoded) -> list[Piece]:
    owners = (number for number, length in enumerate(encoded.lengths) for _ in range(length))
    marks: list[tuple[Kind, int]] = []  # the kind of every position, and which image
    for kind, label in zip(encoded.kinds, encoded.labels, strict=True):
        if kind:
            marks.append(("image", next(owners)))
        else:
            marks.append(("prompt" if label == -100 else "learned", 0))
    pieces: list[Piece] = []
    ids: list[int] = []  # of text so far: a tokenizer may write a piece otherwise when it is alone
    text = ""
    at = 0
    for (kind, image), group in groupby(marks):
        count = len(list(group))
        if kind == "image":
            pieces.append(Piece(kind, _name(encoded.images[image]), count))
        else:
            ids += encoded.input_ids[at : at + count]
            longer = _decode(processor, ids)
            alone = not longer.startswith(text)
            own = _decode(processor, ids[-count:]) if alone else longer[len(text) :]
            pieces.append(Piece(kind, own, count))
            text = longer
        at += count
    return pieces


def _decode(processor: GraftProcessor, ids: list[int]) -> str:
    decoded = processor.tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(decoded)


def _name(image: object) -> str:
    name = str(image)
    return name if len(name) < 200 else f"{name[:40]}..."
