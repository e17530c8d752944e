"""Scores of text items, a graft's and its base's, each kept as it comes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.data.chat.template import source_of
from mmgraft.evaluation.generate.kept_answers import choice_row, numbers_of, read_choice_row
from mmgraft.evaluation.generate.predictions import FOLDER as PREDICTIONS
from mmgraft.evaluation.generate.predictions import Predictions, fingerprint_items
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.likelihood.choice import ChoiceScore, score_choices
from mmgraft.evaluation.likelihood.perplexity import (
    TextScore,
    WindowScore,
    conversation,
    score_texts,
)
from mmgraft.model.workflow import TEXT_WORKFLOW
from mmgraft.runs.results import FOLDER as RESULTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mmgraft.data.chat.processor import GraftProcessor
    from mmgraft.evaluation.untouched import Untouched
    from mmgraft.model.modeling import GraftedModel

_BASE = "base"


@dataclass(frozen=True)
class KeptScores:
    """Asks a graft and its base about text, and keeps what it finds.

    A graft's scores lie in `results/predictions/` of its run; those of its base beside them, or in
    a folder that several grafts of one base share.

    Attributes:
        model: The graft.
        processor: Its processor.
        run: Its folder.
        graft: SHA-256 of its weights.
        base: The untouched base; None where it is not there.
        base_cache: Folder of the base's scores.
        batch_size: Items or windows at a time.
        announce: Told what was found.
        progress: Told how many items of a set are scored, and of how many.
    """

    model: GraftedModel
    processor: GraftProcessor
    run: Path
    graft: str
    base: Untouched | None = None
    base_cache: Path | None = None
    batch_size: int = 16
    announce: Callable[[str], None] = lambda text: None
    progress: Callable[[int, int], None] = lambda done, total: None

    def choices(
        self, name: str, items: Sequence[Item], letters: bool, same: bool, chat: bool = False
    ) -> list[ChoiceScore]:
        """The graft's scores of options.

        Args:
            name: Of the set.
            items: Its items.
            letters: See :func:`mmgraft.evaluation.likelihood.choice.score_choices`.
            same: The base is known to give the same: what is kept of it is taken.
            chat: Ask through the graft's template; else as plain text.
        """
        settings = {"letters": letters, **self._chat(chat)}
        kept = self._kept(name, items, settings, {"graft": self.graft})
        if same and self.base_cache is not None:
            known = self.base_choices(name, items, letters, chat)
            _add(kept, items, (choice_row(*pair) for pair in zip(items, known, strict=True)))
        return self._choices(self.model, kept, items, letters, chat)

    def base_choices(
        self, name: str, items: Sequence[Item], letters: bool, chat: bool = False
    ) -> list[ChoiceScore]:
        """The base's scores of options, asked the same ids."""
        base = self._base
        settings = {"letters": letters, **self._chat(chat)}
        kept = self._kept(name, items, settings, {_BASE: base.fingerprint})
        return self._choices(base.model, kept, items, letters, chat)

    def texts(
        self, name: str, items: Sequence[Item], same: bool, chat: bool = False
    ) -> list[TextScore]:
        """The graft's scores of texts, and in the same pass the base's unless it is the same.

        Args:
            name: Of the set.
            items: Its items.
            same: The base is known to give the same: what is kept of it is taken.
            chat: They are chats, whose answers are predicted.
        """
        settings, whole = self._chat(chat), _chats(items) if chat else items
        if self.base is None or same:
            kept = self._kept(name, whole, settings, {"graft": self.graft})
            if same and self.base_cache is not None:
                known = self._base_texts(name, items, chat)
                _add(kept, items, map(_text_row, known))
            return self._texts(self.model, None, kept, items, chat)
        asked = {"graft": self.graft, _BASE: self._base.fingerprint}
        kept = self._kept(name, whole, settings, asked)
        return self._texts(self.model, self._base.model, kept, items, chat)

    def compared(self, items: Sequence[Item], chat: bool = False) -> list[TextScore]:
        """Texts asked of both, whatever is kept."""
        return score_texts(self.model, self.processor, items, base=self._base.model, chat=chat)

    def file(self, name: str, of_base: bool = False) -> Path:
        """Where a set's scores lie."""
        if not of_base:
            return self.run / RESULTS / PREDICTIONS / f"{name}.jsonl"
        folder = self.base_cache or self.run / RESULTS / PREDICTIONS
        return folder / f"{name}.{_BASE}.jsonl"

    @property
    def numbers(self) -> dict[str, str]:
        """What numbers are computed in."""
        return numbers_of(self.model)

    # -- asking ---------------------------------------------------------------------------------

    @property
    def _base(self) -> Untouched:
        assert self.base is not None
        return self.base

    def _chat(self, chat: bool) -> dict[str, str]:
        """What chats depend on beside their items: the template, as a digest."""
        if not chat:
            return {}  # as it was recorded before there were chats
        template = self.processor.template
        text = source_of(template, self.processor.tokenizer)
        written = json.dumps([template.kind, text, self.processor.options], default=str)
        return {"chat": hashlib.sha256(written.encode()).hexdigest()}

    def _base_texts(self, name: str, items: Sequence[Item], chat: bool) -> list[TextScore]:
        whole = _chats(items) if chat else items
        kept = self._kept(name, whole, self._chat(chat), {_BASE: self._base.fingerprint})
        return self._texts(self._base.model, None, kept, items, chat)

    def _choices(
        self,
        model: GraftedModel | PreTrainedModel,
        kept: Predictions,
        items: Sequence[Item],
        letters: bool,
        chat: bool,
    ) -> list[ChoiceScore]:
        left = [item for item in items if item.id not in kept.done]
        by_id = {item.id: item for item in left}
        score_choices(
            model,
            self.processor,
            left,
            workflow=TEXT_WORKFLOW,
            chat=chat,
            letters=letters,
            batch_size=self.batch_size,
            on_result=lambda scores: kept.add(choice_row(by_id[one.id], one) for one in scores),
            progress=self._progress(len(items) - len(left), len(items)),
        )
        return [read_choice_row(kept.done[item.id]) for item in items]

    def _texts(
        self,
        model: GraftedModel | PreTrainedModel,
        base: PreTrainedModel | None,
        kept: Predictions,
        items: Sequence[Item],
        chat: bool,
    ) -> list[TextScore]:
        left = [item for item in items if item.id not in kept.done]
        score_texts(
            model,
            self.processor,
            left,
            base=base,
            batch_size=self.batch_size,
            chat=chat,
            on_result=lambda score: kept.add([_text_row(score)]),
            progress=self._progress(len(items) - len(left), len(items)),
        )
        return [_text(kept.done[item.id]) for item in items]

    def _progress(self, before: int, total: int) -> Callable[[int, int], None]:
        return lambda done, _: self.progress(before + done, total)

    def _kept(
        self,
        name: str,
        items: Sequence[Item],
        settings: Mapping[str, Any],
        asked: Mapping[str, str],
    ) -> Predictions:
        plain = [
            replace(item, messages=item.messages or [{"role": "user", "content": item.question}])
            for item in items
        ]
        path = self.file(name, of_base="graft" not in asked)
        kept = Predictions(
            path,
            {
                **asked,
                "set": {"name": name, "items": len(items), "sha256": fingerprint_items(plain)},
                "settings": {"workflow": TEXT_WORKFLOW, **settings, **self.numbers},
            },
        )
        if kept.put_aside is not None:
            self.announce(
                f"{path.name} was of another model, set or settings: it is "
                f"{kept.put_aside.name} now"
            )
        elif kept.done:
            self.announce(f"{len(kept.done)} of {len(items)} scores are in {path.name}")
        return kept


def _chats(items: Sequence[Item]) -> list[Item]:
    """Items whose messages have the answer too, for it is part of what is asked."""
    return [replace(item, messages=conversation(item)) for item in items]


def _add(kept: Predictions, items: Sequence[Item], rows: Iterable[dict[str, Any]]) -> None:
    """Add the rows of all items that are not there."""
    new = [row for item, row in zip(items, rows, strict=True) if item.id not in kept.done]
    if new:
        kept.add(new)


# -- lines of the files -------------------------------------------------------------------------


def _text_row(score: TextScore) -> dict[str, Any]:
    """A text's line; each window is tokens, log-likelihood, the base's, KL."""
    return {
        "id": score.id,
        "words": score.words,
        "bytes": score.bytes,
        "windows": [astuple(window) for window in score.windows],
    }


def _text(row: Mapping[str, Any]) -> TextScore:
    windows = tuple(WindowScore(*window) for window in row["windows"])
    return TextScore(row["id"], row["words"], row["bytes"], windows)
