"""A look at all rows before a training: how many, how long, and which of them are no good."""

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from mmgraft.data.batches.dataset import fitted
from mmgraft.data.chat.labels import answer_turns, supervise_row
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.chat.turns import images_of_all
from mmgraft.data.formats.indexed import facts_of
from mmgraft.data.images import check_image, is_data_uri, open_image
from mmgraft.data.rows import BadRow, Row
from mmgraft.errors import UsageError
from mmgraft.progress import counted
from mmgraft.vision.images import BadImage, Fault, StoredImage

#: Kinds of faults of a row; see ``BadRow``.
FAULTS = ("missing", "broken", "enormous", "outside", "empty", "row")

_KEPT = 10


@dataclass
class Report:
    """Findings in some rows.

    Attributes:
        rows: All, bad ones counted.
        layouts: Rows by the layout that each was read in, and why.
        text_rows: Rows without an image.
        bad: Rows that cannot be used, one fault each.
        images: Image parts of all rows.
        files: Different images among them.
        largest: Width, height and name of the image with most pixels.
        lengths: Positions of every row before a cut; empty without a tokenizer.
        image_positions: Of all rows.
        learned: Supervised tokens of all rows.
        longest: Positions and name of the longest rows.
        max_length: Where rows are cut.
        cut: Names of the rows that are longer.
        twice: Names of rows that say the same as an earlier one, and that one's.
        ids_twice: Ids that several rows have.
    """

    rows: int = 0
    layouts: Counter[str] = field(default_factory=Counter)
    text_rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    images: int = 0
    files: int = 0
    largest: tuple[int, int, str] | None = None
    lengths: "array[int]" = field(default_factory=lambda: array("L"))
    image_positions: int = 0
    learned: int = 0
    longest: list[tuple[int, str]] = field(default_factory=list)
    max_length: int | None = None
    cut: list[str] = field(default_factory=list)
    twice: list[tuple[str, str]] = field(default_factory=list)
    ids_twice: int = 0

    def faults(self) -> dict[str, int]:
        """Bad rows by what is wrong with them."""
        return {fault: sum(row.fault == fault for row in self.bad) for fault in FAULTS}

    def positions(self) -> dict[str, float] | None:
        """Shortest, median, mean, 95th percentile, longest and sum of all lengths."""
        if not self.lengths:
            return None
        ordered = sorted(self.lengths)
        count = len(ordered)
        return {
            "shortest": ordered[0],
            "median": median(ordered),
            "mean": sum(ordered) / count,
            "p95": ordered[-(-95 * count // 100) - 1],
            "longest": ordered[-1],
            "all": sum(ordered),
            "of_images": self.image_positions,
            "learned": self.learned,
        }

    def as_dict(self) -> dict[str, Any]:
        """As it is printed with --json."""
        names = ("width", "height", "file")
        largest = self.largest and dict(zip(names, self.largest, strict=True))
        return {
            "rows": self.rows,
            "layouts": self.layouts,
            "text_rows": self.text_rows,
            "bad": [row.as_dict() for row in self.bad],
            "faults": self.faults(),
            "images": self.images,
            "image_files": self.files,
            "largest_image": largest,
            "positions": self.positions(),
            "longest": [{"positions": count, "row": where} for count, where in self.longest],
            "max_length": self.max_length,
            "cut": self.cut,
            "duplicates": [{"row": row, "first": first} for row, first in self.twice],
            "ids_twice": self.ids_twice,
        }


@dataclass(eq=False)
class Checker:
    """Looks at rows one after another.

    Attributes:
        processor: For lengths; without one rows are not tokenised.
        max_length: Where rows are cut.
        skip_text: Rows without an image are counted and not looked at further.
        quick: Look at the two ends of an image instead of decoding it.
        positions: That the base has a table of; None where it has none, or is not known.
    """

    processor: GraftProcessor | None = None
    max_length: int | None = None
    skip_text: bool = False
    quick: bool = False
    positions: int | None = None
    _sound: set[bytes] = field(default_factory=set, init=False)
    _faulty: dict[bytes, tuple[str, Fault | None]] = field(default_factory=dict, init=False)

    def check(self, rows: Sequence[Row], unread: Sequence[BadRow] = ()) -> Report:
        """Look at all rows.

        Args:
            rows: That could be read.
            unread: That could not.
        """
        report = Report(
            rows=len(rows) + len(unread),
            text_rows=len(rows) - int(facts_of(rows).with_image.sum()),
            bad=list(unread),
            max_length=self.max_length,
        )
        shown: set[bytes] = set()
        measured = array("q")  # which rows have a length
        same = _Same(len(rows))
        for at, row in enumerate(counted("looking at rows", rows)):
            same.note(at, row)
            report.layouts[row.layout] += 1
            images = list(images_of_all(row.messages))
            shown.update(map(_key, images))
            report.images += len(images)
            if not images and self.skip_text:
                continue
            fault = "empty"
            try:
                answer_turns(row.messages, row.where)
                fault = "row"
                for image in images:
                    self._look(image, row.where, report)
                if self.processor is not None:
                    self._encode(row, report)
                    measured.append(at)
            except UsageError as error:
                if "hold nothing to learn" in str(error):
                    fault = "empty"
                report.bad.append(BadRow.of(row, error, fault))
        report.files = len(shown)
        lengths = np.array(report.lengths, dtype=np.int64)
        for place in np.argsort(-lengths, kind="stable")[:_KEPT].tolist():
            report.longest.append((int(lengths[place]), rows[measured[place]].where))
        same.report(rows, report)
        return report

    def _look(self, image: Any, where: str, report: Report) -> None:
        """Look at an image, once however many rows show it."""
        key = _key(image)
        if key not in self._sound and key not in self._faulty:
            try:
                # Each row adds its name.
                size = check_image(image, "") if self.quick else open_image(image, "").size
            except UsageError as error:  # what it holds on to may be an image
                self._faulty[key] = str(error), getattr(error, "fault", None)
            else:
                self._sound.add(key)
                largest = report.largest or (0, 0, "")
                if size[0] * size[1] > largest[0] * largest[1]:
                    name = str(image)
                    report.largest = (*size, "a data URI" if is_data_uri(name) else name)
        if key in self._faulty:
            reason, fault = self._faulty[key]
            raise BadImage(where + reason, fault) if fault else UsageError(where + reason)

    def _encode(self, row: Row, report: Report) -> None:
        assert self.processor is not None
        encoded = supervise_row(self.processor, row)
        if fitted(encoded, self.max_length, self.positions, row.where)[1]:
            report.cut.append(row.where)
        report.lengths.append(len(encoded))
        report.image_positions += sum(encoded.kinds)
        report.learned += sum(label != -100 for label in encoded.labels)


def _key(image: Any) -> bytes:
    """Return what tells images apart, in a few bytes: there may be millions."""
    return hashlib.blake2b(os.fsencode(str(image)), digest_size=12).digest()


class _Same:
    """Finds rows that say the same, and ids that come again, by eight bytes of each."""

    def __init__(self, rows: int) -> None:
        self.said, self.ids = np.zeros(rows, dtype=np.uint64), np.zeros(rows, dtype=np.uint64)

    def note(self, at: int, row: Row) -> None:
        text = json.dumps([list(row.messages), row.tools], sort_keys=True, default=_content)
        self.said[at], self.ids[at] = _hash(text), _hash(row.id)

    def report(self, rows: Sequence[Row], report: Report) -> None:
        _, first, of = np.unique(self.said, return_index=True, return_inverse=True)
        for at in np.flatnonzero(first[of] != np.arange(len(of))).tolist():
            report.twice.append((rows[at].where, rows[int(first[of[at]])].where))
        report.ids_twice = int((np.unique(self.ids, return_counts=True)[1] > 1).sum())


def _content(value: Any) -> str:
    """Return what a row shows, for JSON: an image inside another file by its bytes."""
    try:
        return value.digest() if isinstance(value, StoredImage) else str(value)
    except (OSError, EOFError):
        return str(value)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
