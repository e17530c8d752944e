"""Answers and scores of sets, one file a set, each kept as it comes: a resumed run goes on.

A file grows a line at a time and survives a kill. Its first line says what was evaluated on what:
the fingerprints of models, set and settings. A file whose first line differs is put aside, so that
no answer of another model is ever taken.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmgraft.atomic import free_name
from mmgraft.data.chat.answers import CLEANED
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.chat.template import source_of
from mmgraft.data.chat.turns import image_of
from mmgraft.data.images import is_data_uri, path_of
from mmgraft.errors import MMGraftError
from mmgraft.evaluation.generate.answers import answer
from mmgraft.evaluation.generate.run_features import Features
from mmgraft.evaluation.identity import Untouched
from mmgraft.evaluation.items.item import Item, with_images
from mmgraft.evaluation.likelihood.likelihood import score_choices
from mmgraft.evaluation.likelihood.perplexity import (
    TextScore,
    WindowScore,
    conversation,
    score_texts,
)
from mmgraft.evaluation.metrics.answers import ChoiceScore
from mmgraft.frozen import Frozen
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.workflow import TEXT_WORKFLOW
from mmgraft.progress import say, working
from mmgraft.runs.results import FOLDER as RESULTS
from mmgraft.vision.images import StoredImage

VERSION = 1
#: Inside the results of a run.
FOLDER = "predictions"

Row = dict[str, Any]
#: Called with processor and items, and with ``batch_size`` and ``on_result`` by name.
Compute = Callable[..., object]


class Kept(Frozen):
    """A graft, and its base where text is compared, whose answers and scores are all kept.

    Files lie in ``results/predictions/`` of the run; the base's beside them, or in a folder that
    several grafts of one base share.

    Attributes:
        model: The graft.
        processor: Its processor.
        run: Its folder.
        graft: What it is; see :func:`mmgraft.evaluation.origin.described_graft`.
        batch_size: Items a batch; a file that was begun with another one is continued.
        base: The untouched base; None where text is not compared.
        base_cache: Folder of the base's scores.
    """

    model: GraftedModel
    processor: GraftProcessor
    run: Path
    graft: Mapping[str, str]
    batch_size: int
    base: Untouched | None = None
    base_cache: Path | None = None

    def answers(
        self,
        name: str,
        items: Sequence[Item],
        workflow: str | None,
        max_new_tokens: int,
        features: Features | None = None,
    ) -> list[str]:
        """Return generated answers; see :func:`mmgraft.evaluation.generate.answers.answer`."""
        settings = {"max_new_tokens": max_new_tokens, "cleaned": CLEANED}
        run = partial(
            _answer, self.model, workflow=workflow, max_new_tokens=max_new_tokens, features=features
        )
        rows = self._rows(name, items, self._models(workflow), settings, run, _answer_row)
        found = [str(row["answer"]) for row in rows]
        if "" in found:
            say(
                f"{name}: {found.count('')} of {len(found)} answers are empty; where reasoning did "
                "not end, raise max_new_tokens or turn it off (--template-option)"
            )
        return found

    def choices(
        self,
        name: str,
        items: Sequence[Item],
        workflow: str,
        letters: bool = False,
        features: Features | None = None,
        *,
        chat: bool | None = None,
        same: bool = False,
        of_base: bool = False,
    ) -> list[ChoiceScore]:
        """Return log-probabilities of options; see ``choice.score_choices``.

        Args:
            name: Of the set.
            items: Its items.
            workflow: Of all rows.
            letters: Score "A", "B", ... instead of the options' texts.
            features: The tower's features of image files.
            chat: Of a set of text: apply the graft's template; else it is plain text.
            same: The base is known to give the same: what is kept of it is taken.
            of_base: Score the untouched base, on the same ids.
        """
        run: Compute = partial(
            score_choices,
            self._base.model if of_base else self.model,
            workflow=workflow,
            chat=chat is not False,
            letters=letters,
            features=features,
        )
        if same and self.base_cache is not None:
            known = self.choices(name, items, workflow, letters, chat=chat, of_base=True)
            run = partial(_copy, items, known)
        models = self._models(None if of_base else workflow, of_base, of_text=chat is not None)
        settings = {"letters": letters, **self._template(chat)}
        rows = self._rows(name, items, models, settings, run, choice_row)
        return list(map(read_choice_row, rows))

    def texts(
        self, name: str, items: Sequence[Item], chat: bool, same: bool, of_base: bool = False
    ) -> list[TextScore]:
        """Return the graft's scores of texts, with the base's of the same pass unless it is equal.

        Args:
            name: Of the set.
            items: Its items.
            chat: They are chats, whose answers are predicted.
            same: The base is known to give the same: what is kept of it is taken.
            of_base: Score the base alone.
        """
        beside = None if same or of_base or self.base is None else self.base.model
        model = self._base.model if of_base else self.model
        run: Compute = partial(score_texts, model, base=beside, chat=chat)
        if same and self.base_cache is not None:
            known = self.texts(name, items, chat, same=False, of_base=True)
            run = partial(_copy, items, known)
        with_base = of_base or beside is not None
        models = self._models(None if of_base else TEXT_WORKFLOW, with_base, of_text=True)
        rows = self._rows(name, items, models, self._template(chat), run, text_row, chat)
        return list(map(read_text_row, rows))

    def compared(self, items: Sequence[Item], chat: bool) -> list[TextScore]:
        """Score texts with graft and base, whatever is kept."""
        return score_texts(self.model, self.processor, items, base=self._base.model, chat=chat)

    def file(self, name: str) -> Path:
        """Return where a set's answers and scores lie."""
        return self.run / RESULTS / FOLDER / f"{name}.jsonl"

    def shown_file(self, name: str) -> str:
        """Return the same, relative to the run, as results name it."""
        return self.file(name).relative_to(self.run).as_posix()

    @property
    def numbers(self) -> dict[str, Any]:
        """Return what numbers are computed in, and the options of the chat template."""
        base = self.model.base
        quantized = getattr(base.config, "quantization_config", None) is not None
        return {
            "dtype": str(base.dtype).removeprefix("torch."),
            **({"weights": "quantized"} if quantized else {}),
            **({"template_options": options} if (options := self.processor.options) else {}),
        }

    # -- steps ----------------------------------------------------------------------------------

    def _rows(
        self,
        name: str,
        items: Sequence[Item],
        models: Mapping[str, Any],
        settings: Mapping[str, Any],
        run: Compute,
        to_row: Callable[[Item, Any], Row],
        with_answers: bool = False,
    ) -> list[Row]:
        """Return a row for every item; those that the file has are not computed again."""
        whole = [_as_evaluated(item, with_answers) for item in items]
        sha256 = fingerprint_items(whole)
        header = {
            **models,
            "set": {"name": name, "items": len(items), "sha256": sha256},
            "settings": {**settings, **self.numbers},
        }
        path = self.file(name)
        if "graft" not in models:
            path = (self.base_cache or path.parent) / f"{name}.base.jsonl"
        kept = Predictions(path, header)
        if kept.put_aside is not None:
            say(
                f"{path.name} was of another model, set or settings: it is "
                f"{kept.put_aside.name} now"
            )
        left = [item for item in items if item.id not in kept.done]
        before = len(items) - len(left)
        if before:
            say(f"{before} of {len(items)} answers are in {path.name}")
        with working(f"evaluating {name}") as work:

            def keep(indices: Sequence[int], found: Sequence[Any]) -> None:
                pairs = zip(indices, found, strict=True)
                kept.add(to_row(left[index], one) for index, one in pairs)
                work(len(kept.done), len(items))

            run(self.processor, left, batch_size=self.batch_size, on_result=keep)
        return [kept.done[item.id] for item in items]

    def _models(
        self, workflow: str | None, base: bool = False, of_text: bool = False
    ) -> dict[str, Any]:
        """Return the fingerprints of the models that read a set."""
        graft = self.graft["sha256"] if of_text else {**self.graft, "workflow": workflow}
        found: dict[str, Any] = {} if base and workflow is None else {"graft": graft}
        return {**found, "base": self._base.fingerprint} if base else found

    @property
    def _base(self) -> Untouched:
        assert self.base is not None
        return self.base

    def _template(self, chat: bool | None) -> dict[str, str]:
        """Return how a set of text is written, plain or by which template; None: it has images."""
        if chat is None:
            return {"by": "log-probability"}
        settings = {"workflow": TEXT_WORKFLOW}
        if chat:
            template = self.processor.template
            text = source_of(template, self.processor.tokenizer)
            written = json.dumps([template.kind, text, self.processor.options], default=str)
            settings["chat"] = hashlib.sha256(written.encode()).hexdigest()
        return settings


def _answer(
    model: GraftedModel, processor: GraftProcessor, items: Sequence[Item], **options: Any
) -> None:
    names, tools = [item.where for item in items], [item.tools for item in items]
    messages = [item.messages for item in items]
    answer(model, processor, messages, names=names, tools=tools, **options)


def _copy(
    items: Sequence[Item],
    known: Sequence[Any],
    processor: GraftProcessor,
    left: Sequence[Item],
    *,
    on_result: Callable[[Sequence[int], Sequence[Any]], None],
    **_: Any,
) -> None:
    """Take what is left from results that are known."""
    by_id = {item.id: one for item, one in zip(items, known, strict=True)}
    if left:
        on_result(range(len(left)), [by_id[item.id] for item in left])


def _as_evaluated(item: Item, with_answer: bool) -> Item:
    """Return an item whose messages are all that is evaluated: of a chat its answer, too."""
    if with_answer:
        return replace(item, messages=conversation(item))
    return replace(item, messages=item.messages or [{"role": "user", "content": item.question}])


# -- rows of the files --------------------------------------------------------------------------


def _answer_row(item: Item, text: str) -> Row:
    truth = list(item.answers) if item.box is None else list(item.box)
    return {"id": item.id, "question": item.question, "truth": truth, "answer": text}


def choice_row(item: Item, score: ChoiceScore) -> Row:
    """Return a line of a file of scored options."""
    return {
        **_answer_row(item, item.options[score.prediction()]),
        "sums": score.sums,
        "tokens": score.tokens,
        "characters": score.characters,
    }


def read_choice_row(row: Mapping[str, Any]) -> ChoiceScore:
    """Read the scores that :func:`choice_row` wrote."""
    return ChoiceScore(row["id"], *(tuple(row[key]) for key in ("sums", "tokens", "characters")))


def text_row(item: Item, score: TextScore) -> Row:
    """Return a text's line; each window is tokens, log-likelihood, the base's, KL."""
    windows = [astuple(window) for window in score.windows]
    return {"id": item.id, "words": score.words, "bytes": score.bytes, "windows": windows}


def read_text_row(row: Mapping[str, Any]) -> TextScore:
    """Read the scores that :func:`text_row` wrote."""
    windows = tuple(WindowScore(*window) for window in row["windows"])
    return TextScore(row["id"], row["words"], row["bytes"], windows)


# -- files --------------------------------------------------------------------------------------


class Predictions:
    """A jsonl of one object an item.

    Args:
        path: The file; its folder is made.
        header: What is evaluated on what, plain data; see :func:`fingerprint_items`.

    Attributes:
        done: Objects found in the file and added since, by id.
        put_aside: Where a file of other items or another model was moved to.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[str, Row] = {}
        self.put_aside: Path | None = None
        self._header = {"mmgraft_predictions": VERSION, **json.loads(json.dumps(header))}
        self._begun = path.is_file() and self._take_in()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append objects, each with its ``id``, and flush them onto the disk.

        Raises:
            MMGraftError: The disk is full or cannot be written to; what was there stays.
        """
        new = [dict(row) for row in rows]
        lines = new if self._begun else [self._header, *new]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MMGraftError(
                f"could not write {self.path} ({error}); the answers before are kept. Make room "
                "and run the command again: it goes on from there"
            ) from error
        self._begun = True
        self.done.update((str(row["id"]), row) for row in new)

    def _take_in(self) -> bool:
        """Read what an earlier run wrote, and cut off a line that it did not finish."""
        header, found, whole = _read(self.path)
        if header is None:
            self.path.unlink()
            return False
        if header != self._header:
            self.put_aside = free_name(self.path)
            self.path.replace(self.put_aside)
            return False
        self.done = found
        if whole < self.path.stat().st_size:
            with self.path.open("rb+") as file:
                file.truncate(whole)
        return True


def read_predictions(path: Path) -> list[Row]:
    """Read the objects of a file of predictions, without its first line and a half line."""
    return list(_read(path)[1].values()) if path.is_file() else []


def fingerprint_items(items: Sequence[Item]) -> str:
    """Return the SHA-256 of ids, messages, options and the bytes of images, not their paths."""
    digest = hashlib.sha256()
    images: dict[str, str] = {}
    for item in items:
        messages = [
            with_images(one, lambda part: _digest(image_of(part), images)) for one in item.messages
        ]
        read = [item.id, messages, item.options, *([item.tools] if item.tools else ())]
        digest.update(json.dumps(read, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()


def _digest(image: Any, known: dict[str, str]) -> str:
    """Return the SHA-256 of an image's bytes, of the text that holds it, or of its pixels."""
    if isinstance(image, StoredImage):
        return image.digest()
    if not isinstance(image, str):
        return hashlib.sha256(image.tobytes()).hexdigest()
    if image not in known:
        own = is_data_uri(image)
        data = image.encode() if own else Path(path_of(image)).read_bytes()
        known[image] = hashlib.sha256(data).hexdigest()
    return known[image]


def _read(path: Path) -> tuple[Row | None, dict[str, Row], int]:
    """Return header, objects by id, and the bytes up to the end of the last whole line."""
    header: Row | None = None
    found: dict[str, Row] = {}
    whole = 0
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line.decode()) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict) or (header is not None and "id" not in row):
                break  # from here on nothing can be trusted
            if header is None:
                header = row
            else:
                found[str(row["id"])] = row
            whole += len(line)
    return header, found, whole
