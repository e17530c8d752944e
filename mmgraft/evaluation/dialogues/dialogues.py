"""Interleaved dialogues (IIT): questions with and without images joined by what they mean.

The benchmark of Wings (arXiv 2406.03496) scores the last of several questions in six
shapes. Its data were never released; these are built from any multiple-choice sets. Free of torch.

They are kept as a data set: a folder with ``dialogues.jsonl``, its images, and their sources.
Every line is a row that can be trained on, whose last turn is the right answer, and an item that
can be evaluated: ``options``, ``answer`` (its number from 0), ``kind`` (the shape), ``group`` (what
the last question is about) and ``from`` (set and id of every question).
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmgraft.atomic import atomic_folder, atomic_json, atomic_text
from mmgraft.data.chat.turns import image_of
from mmgraft.data.images import is_data_uri
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.files import file_sha256, read_items
from mmgraft.evaluation.items.item import Item, with_images
from mmgraft.frozen import Frozen
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.textfiles import read_json

VERSION = 1
ROWS = "dialogues.jsonl"
RECORD = "dataset.json"
IMAGES = "images"


def save_dialogues(
    folder: Path, built: "Mapping[str, Sequence[Dialogue]]", made_of: Mapping[str, Any]
) -> None:
    """Write the data set; what stood in the folder stays until it is whole.

    Args:
        folder: Of the data set.
        built: Dialogues by shape.
        made_of: Seed, sources with their SHA-256 and what else decides the dialogues; plain data.

    Raises:
        MMGraftError: The disk is full or cannot be written to.
    """

    def write(fresh: Path) -> None:
        names: dict[str, str] = {}
        lines = [
            json.dumps(_row(dialogue, fresh / IMAGES, names), ensure_ascii=False)
            for dialogues in built.values()
            for dialogue in dialogues
        ]
        atomic_text(fresh / ROWS, "".join(line + "\n" for line in lines))
        record = {
            "mmgraft_dialogues": VERSION,
            "made_of": dict(made_of),
            "shapes": {shape: len(dialogues) for shape, dialogues in built.items()},
            "sha256": file_sha256(fresh / ROWS),
        }
        atomic_json(fresh / RECORD, record)

    atomic_folder(folder, write)


def is_made_of(folder: Path, made_of: Mapping[str, Any]) -> bool:
    """Return whether the folder holds the dialogues that building them again would give.

    Raises:
        UsageError: Its rows are not those that were saved.
    """
    record = _record(folder)
    return record is not None and record.get("made_of") == json.loads(json.dumps(made_of))


def read_dialogues(folder: Path) -> dict[str, list[Item]]:
    """Read the items of a saved data set by shape, the last question of each to be scored.

    Raises:
        UsageError: There is none, its rows are not those that were saved, or an image is missing.
    """
    record = _record(folder)
    if record is None:
        raise UsageError(f"no dialogues in {folder}; build them with: mmgraft eval RUN --iit")
    seeing = any("V" in shape for shape in record["shapes"])
    spec = SetSpec(
        name="iit",
        path=str(folder / ROWS),
        metric="choice",
        modality="image" if seeing else "text",
        prompt=None if seeing else "{question}",  # as it stands
    )
    found: dict[str, list[Item]] = {shape: [] for shape in record["shapes"]}
    for item in read_items(spec):
        found[str(item.kind)].append(item)
    return found


def _record(folder: Path) -> dict[str, Any] | None:
    path, rows = folder / RECORD, folder / ROWS
    if not path.is_file():
        return None
    record = read_json(path, "remove the folder to build them again")
    whole = record.get("mmgraft_dialogues") == VERSION
    if not whole or not rows.is_file() or file_sha256(rows) != record["sha256"]:
        raise UsageError(
            f"{folder} does not hold the dialogues that were saved there: {ROWS} was changed, or "
            f"{RECORD} is damaged or of another version; remove the folder to build them again"
        )
    return record


def _row(dialogue: "Dialogue", images: Path, names: dict[str, str]) -> dict[str, Any]:
    last = dialogue.last
    turns = [*dialogue.messages(), answer_turn(last)]
    return {
        "id": dialogue.id,
        "messages": [_with_copies(turn, images, names) for turn in turns],
        "options": list(last.options),
        "answer": last.gold,
        "kind": dialogue.shape,
        "group": hashlib.sha256((last.group or last.id).encode()).hexdigest()[:16],
        "from": [{"set": part.set, "id": part.item.id} for part in dialogue.parts],
    }


def _with_copies(turn: Mapping[str, Any], folder: Path, names: dict[str, str]) -> dict[str, Any]:
    """Return a turn whose images lie in a folder, each once, named by what they hold."""

    def copied(part: Any) -> dict[str, Any]:
        path = os.fspath(image_of(part))
        if path not in names:
            names[path] = path if is_data_uri(path) else _copied(Path(path), folder)
        return {"type": "image", "image": names[path]}

    return with_images(turn, copied)


def _copied(path: Path, folder: Path) -> str:
    name = file_sha256(path)[:16] + path.suffix.lower()
    folder.mkdir(exist_ok=True)
    shutil.copyfile(path, folder / name)
    return f"{IMAGES}/{name}"


#: A letter a question: T of text, V with an image. The last one is scored.
SHAPES = ("T", "TT", "TTT", "TTV", "TV", "V")

WORDS = {"T": "text", "V": "visual"}
_DIGITS = 6  # of a cosine: less is noise of the machine, and ties go to the first in the set


class Candidate(Frozen):
    """A question that can be part of a dialogue.

    Attributes:
        set: Name of its set.
        item: With options and the right one.
        vector: Its embedding, ``(h,)`` of length 1.
    """

    set: str
    item: Item
    vector: np.ndarray


class Dialogue(Frozen):
    """Questions in their order, all but the last of them answered.

    Attributes:
        id: Shape and number, such as ``TTV-3``; one number has the same last question in every
            shape that ends with the same letter.
        shape: One of :data:`SHAPES`.
        parts: The questions.
    """

    id: str
    shape: str
    parts: tuple[Candidate, ...]

    @property
    def last(self) -> Item:
        """The question that is scored."""
        return self.parts[-1].item

    def messages(self) -> list[Mapping[str, Any]]:
        """Return the conversation up to the last question, earlier ones with their answers."""
        turns: list[Mapping[str, Any]] = []
        for part in self.parts[:-1]:
            turns += [*_turns(part.item, first=not turns), answer_turn(part.item)]
        return [*turns, *_turns(self.last, first=not turns)]


def answer_turn(item: Item) -> dict[str, str]:
    """Return the right answer of an item as a turn."""
    assert item.gold is not None
    return {"role": "assistant", "content": item.options[item.gold]}


def title(shape: str) -> str:
    """Return a shape as the paper writes it: ``(T,T,V)``."""
    return f"({','.join(shape)})"


def buildable(counts: Mapping[str, int]) -> list[str]:
    """Return the shapes for which there are enough questions of every kind."""
    return [
        shape
        for shape in SHAPES
        if all(counts.get(letter, 0) >= shape.count(letter) for letter in shape)
    ]


def build_dialogues(
    pools: Mapping[str, Sequence[Candidate]],
    count: int,
    shapes: Sequence[str] = SHAPES,
    seed: int = 0,
) -> dict[str, list[Dialogue]]:
    """Build dialogues of each shape.

    The last questions are sampled by a seed, the same for every shape with the same last letter, so
    that what stands before them is all that differs. Each gets, of the questions not yet used
    in the shape, the most similar by cosine, the most similar one right before it. In a shape no
    question is used twice, and none has the words of the last.

    Args:
        pools: Candidates by letter: ``T`` and ``V``.
        count: Dialogues a shape; fewer where the sets have too few questions for all shapes.
        shapes: Which ones; see :data:`SHAPES`. Others of T and V work alike.
        seed: Of the sample.

    Raises:
        UsageError: An unknown letter, or not enough questions for one dialogue of a shape.
    """
    for shape in shapes:
        if not shape or set(shape) - set(WORDS):
            raise UsageError(f"no dialogue of shape {shape!r}; choose from {', '.join(SHAPES)}")
        for letter in WORDS:
            if len(pools.get(letter, ())) < shape.count(letter):
                raise UsageError(
                    f"a dialogue {title(shape)} has {shape.count(letter)} {WORDS[letter]} "
                    f"questions, and there are {len(pools.get(letter, ()))}; give a larger "
                    "multiple-choice set, or leave the shape out"
                )
    order = {letter: _shuffled(len(pools.get(letter, ())), letter, seed) for letter in WORDS}
    built = {}
    for shape in shapes:
        alike = [one for one in shapes if one[-1] == shape[-1]]
        most = min(
            len(pools[letter]) // one.count(letter)
            for one in alike
            for letter in dict.fromkeys(one)
        )
        lasts = order[shape[-1]][: min(count, most)]
        built[shape] = _of_shape(shape, pools, lasts)
    return built


def _of_shape(
    shape: str, pools: Mapping[str, Sequence[Candidate]], lasts: Sequence[int]
) -> list[Dialogue]:
    letter = shape[-1]
    scored = [pools[letter][index] for index in lasts]
    free: dict[str, np.ndarray] = {}
    near: dict[str, np.ndarray] = {}
    for one in dict.fromkeys(shape[:-1]):
        free[one] = np.ones(len(pools[one]), dtype=bool)
        vectors = np.stack([part.vector for part in pools[one]])  # (n, h)
        near[one] = np.round(np.stack([part.vector for part in scored]) @ vectors.T, _DIGITS)
    if letter in free:
        free[letter][list(lasts)] = False
    dialogues = []
    for number, last in enumerate(scored):
        before: list[Candidate] = []
        for one in reversed(shape[:-1]):
            index = _nearest(near[one][number], free[one], pools[one], last.item)
            if index is None:
                raise UsageError(
                    f"no {WORDS[one]} question is left to stand before {last.item.where} in a "
                    f"dialogue {title(shape)}: others have the same words; give a set with more "
                    "different questions, or build fewer dialogues"
                )
            free[one][index] = False
            before.insert(0, pools[one][index])
        dialogues.append(Dialogue(f"{shape}-{number + 1}", shape, (*before, last)))
    return dialogues


def _nearest(
    near: np.ndarray, free: np.ndarray, pool: Sequence[Candidate], last: Item
) -> int | None:
    """Return the most similar candidate that is free and has other words; of equals the first."""
    words, order = last.question.split(), np.argsort(-near, kind="stable")
    others = (at for at in order if free[at] and pool[at].item.question.split() != words)
    return next(map(int, others), None)


def _shuffled(count: int, letter: str, seed: int) -> list[int]:
    indices = list(range(count))
    random.Random(f"{letter} {seed}").shuffle(indices)
    return indices


def _turns(item: Item, first: bool) -> list[Mapping[str, Any]]:
    """Return the turns of an item; a system prompt stands first in a dialogue or nowhere."""
    return [turn for turn in item.messages if first or turn.get("role") != "system"]
