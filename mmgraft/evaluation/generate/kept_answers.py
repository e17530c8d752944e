"""A run's answers to sets, each kept as it comes: what is kept is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.evaluation.generate.answers import Features, ask
from mmgraft.evaluation.generate.predictions import FOLDER as PREDICTIONS
from mmgraft.evaluation.generate.predictions import Predictions, fingerprint_items
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.likelihood.choice import ChoiceScore, score_choices
from mmgraft.runs.results import FOLDER as RESULTS

if TYPE_CHECKING:
    from mmgraft.data.chat.processor import GraftProcessor
    from mmgraft.model.modeling import GraftedModel


@dataclass(frozen=True)
class KeptAnswers:
    """Asks a graft, and keeps what it says in `results/predictions/` of its run.

    Attributes:
        model: The graft.
        processor: Its processor.
        run: Its folder.
        graft: What it is; see :func:`mmgraft.evaluation.origin.described_graft`.
        batch_size: Questions at a time; answers of another one are gone on from.
        announce: Told what was found.
        progress: Told how many questions of a set are answered, and of how many.
    """

    model: GraftedModel
    processor: GraftProcessor
    run: Path
    graft: Mapping[str, str]
    batch_size: int
    announce: Callable[[str], None] = lambda text: None
    progress: Callable[[int, int], None] = lambda done, total: None

    def answers(
        self,
        name: str,
        items: Sequence[Item],
        workflow: str,
        max_new_tokens: int,
        features: Features | None = None,
    ) -> list[str]:
        """Generated answers; see :func:`mmgraft.evaluation.generate.answers.ask`."""
        kept = self._kept(name, items, workflow, {"max_new_tokens": max_new_tokens})
        return ask(
            self.model,
            self.processor,
            items,
            kept,
            batch_size=self.batch_size,
            max_new_tokens=max_new_tokens,
            features=features,
            workflow=workflow,
            progress=self.progress,
        )

    def choices(
        self,
        name: str,
        items: Sequence[Item],
        workflow: str,
        letters: bool = False,
        features: Features | None = None,
    ) -> list[ChoiceScore]:
        """Log-probabilities of options; see `choice.score_choices`."""
        kept = self._kept(name, items, workflow, {"by": "log-probability", "letters": letters})
        left = [item for item in items if item.id not in kept.done]
        before = len(items) - len(left)
        by_id = {item.id: item for item in items}
        score_choices(
            self.model,
            self.processor,
            left,
            workflow=workflow,
            letters=letters,
            batch_size=self.batch_size,
            features=features,
            on_result=lambda scores: kept.add(choice_row(by_id[one.id], one) for one in scores),
            progress=lambda done, _: self.progress(before + done, len(items)),
        )
        return [read_choice_row(kept.done[item.id]) for item in items]

    def file(self, name: str) -> Path:
        """Where a set's predictions lie."""
        return self.run / RESULTS / PREDICTIONS / f"{name}.jsonl"

    @property
    def numbers(self) -> dict[str, str]:
        """What numbers are computed in."""
        return numbers_of(self.model)

    def _kept(
        self, name: str, items: Sequence[Item], workflow: str, settings: Mapping[str, Any]
    ) -> Predictions:
        asked = {
            "graft": {**self.graft, "workflow": workflow},
            "set": {"name": name, "items": len(items), "sha256": fingerprint_items(items)},
            "settings": {**settings, **self.numbers},
        }
        kept = Predictions(self.file(name), asked)
        if kept.put_aside is not None:
            self.announce(
                f"{kept.path.name} was of another graft, set or settings: it is "
                f"{kept.put_aside.name} now"
            )
        elif kept.done:
            self.announce(f"{len(kept.done)} of {len(items)} answers are in {kept.path.name}")
        return kept


def numbers_of(model: GraftedModel) -> dict[str, str]:
    """What a graft's numbers are computed in."""
    base = model.base
    quantized = getattr(base.config, "quantization_config", None) is not None
    return {
        "dtype": str(base.dtype).removeprefix("torch."),
        **({"weights": "quantized"} if quantized else {}),
    }


def choice_row(item: Item, score: ChoiceScore) -> dict[str, Any]:
    """A line of a file of scored options."""
    return {
        "id": item.id,
        "question": item.question,
        "truth": list(item.answers),
        "answer": item.options[score.prediction()],
        "sums": score.sums,
        "tokens": score.tokens,
        "characters": score.characters,
    }


def read_choice_row(row: Mapping[str, Any]) -> ChoiceScore:
    """The scores that :func:`choice_row` wrote."""
    return ChoiceScore(row["id"], *(tuple(row[key]) for key in ("sums", "tokens", "characters")))
