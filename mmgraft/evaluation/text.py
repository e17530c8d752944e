"""What a graft leaves of text: proved where the base is frozen, measured on any set of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft import __version__
from mmgraft.errors import UsageError
from mmgraft.evaluation.identity import PROMPTS, text_identity
from mmgraft.evaluation.items.files import TEXT_CHOICE_PROMPT, data_file, file_sha256, read_items
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.likelihood.choice import shows_options
from mmgraft.evaluation.likelihood.kept_scores import KeptScores
from mmgraft.evaluation.likelihood.perplexity import measure_texts
from mmgraft.evaluation.metrics.measured import Measured
from mmgraft.evaluation.metrics.scoring import groups_of, measure_choices, scores_by_kind
from mmgraft.evaluation.origin import as_score, as_scores, described_graft, software
from mmgraft.evaluation.untouched import Untouched, base_trained, untouched_base
from mmgraft.recipes.evaluation_set import TEXT_METRICS, SetSpec
from mmgraft.runs.results import Results, Score, SetResult

if TYPE_CHECKING:
    from mmgraft.inference import Answerer

BATCH_SIZE = 16
EQUAL = "equal by identity"
"""What settings say of a base whose scores are the graft's own."""

CHAT = "chat, through the graft's template"
"""What settings say of a set that is not asked as plain text."""

_CHECKED = 4  # items of each set that are asked of both, whatever is known
_CHARACTERS = 600  # of a text whose logits are compared bit for bit
_ROUNDING = 1e-6  # nats: what equal weights at other places of the memory may differ by
Announce = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TextSet:
    """A set that was read and can be measured."""

    spec: SetSpec
    file: Path
    items: list[Item]

    def opening(self) -> list[str]:
        """What the first items say, to compare logits on."""
        first = self.items[:_CHECKED]
        if self.plain_texts:
            return [item.question[:_CHARACTERS] for item in first]
        return [str(item.messages[-1]["content"]) for item in first]

    @property
    def plain_texts(self) -> bool:
        """Whether items are texts, and not questions with answers."""
        return self.spec.metric == "perplexity" and not self.spec.chat


def read_text_sets(specs: Sequence[SetSpec], root: Path | None = None) -> list[TextSet]:
    """Read and check sets before a model is asked anything.

    Raises:
        UsageError: A set with images, two of one name, or what :func:`read_items` refuses.
    """
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two sets are called {twice[0]!r}; give each its own name")
    for spec in specs:
        if spec.modality != "text" or spec.metric not in TEXT_METRICS:
            raise UsageError(f"set {spec.name!r} has images; ask it with --vision")
    found = [TextSet(spec, data_file(spec, root), read_items(spec, root)) for spec in specs]
    for each in found:
        for item in each.items:
            if not each.spec.chat and len(item.messages) > 1:
                raise UsageError(
                    f"{item.where}: several turns, and plain text is one question by itself; write "
                    "chat: true"
                )
    return found


def evaluate_text(
    answerer: Answerer,
    run: Path,
    specs: Sequence[SetSpec] = (),
    *,
    batch_size: int = BATCH_SIZE,
    root: Path | None = None,
    untouched: str | Path | None = None,
    base_cache: Path | None = None,
    announce: Announce = lambda text: None,
    progress: Progress = lambda done, total: None,
) -> Results:
    """Compare a graft's text with its base's: logits bit for bit, then sets of text.

    Where the base is frozen and all logits compared are identical, a set is asked once, and both
    get its scores. Else graft and base are asked, and their difference is paired. Goes on where a
    killed run stopped: scores lie in `results/predictions/` of the run as they come.

    Args:
        answerer: The graft.
        run: Its folder.
        specs: Sets of text, of metric `choice` or `perplexity`; none leaves the comparison of
            logits alone.
        batch_size: Items or windows at a time.
        root: What relative paths of sets start from.
        untouched: Where the base lies that text is compared with, or its Hub id; by default the
            graft's, or the one that a trained base was trained from.
        base_cache: Folder that keeps the base's own scores for other grafts on it.
        announce: Told in sentences what is done.
        progress: Told how many items of a set are scored, and of how many.

    Returns:
        Section `text`; not yet written.

    Raises:
        UsageError: See :func:`read_text_sets`; a base that is not the recorded one.
        MMGraftError: The disk is full; what was scored is kept.
    """
    sets = read_text_sets(specs, root)
    model, processor = answerer.model.eval(), answerer.processor
    base = untouched_base(model, run, untouched)
    graft = described_graft(model, run)
    identity: dict[str, Any] | None = None
    if base is None:
        announce(
            "this graft's base was trained, and the one it was trained from is not there: text "
            "cannot be compared (name it as the untouched base)"
        )
    else:
        prompts = [*PROMPTS, *(text for each in sets for text in each.opening() if text.strip())]
        report = text_identity(model, processor, base.model, base.tokenizer, prompts)
        identity = {
            **report.as_dict(),
            "base_trained": base_trained(model),
            "base_fingerprint": base.fingerprint,
            "graft_sha256": graft["sha256"],
        }
        announce(_in_words(identity))
    same = identity is not None and identity["identical"] and not identity["base_trained"]
    kept = KeptScores(
        model, processor, run, graft["sha256"], base, base_cache, batch_size, announce, progress
    )
    measurer = _Measurer(kept, base, same, announce)
    return Results(
        section="text",
        mmgraft_version=__version__,
        versions=software(),
        graft=graft,
        identity=identity,
        sets=[measurer.evaluate(each) for each in sets],
    )


def _in_words(identity: dict[str, Any]) -> str:
    where = f"{identity['positions']} positions of {identity['prompts']} prompts"
    if identity["identical"]:
        return f"text: the base's logits bit for bit, at {where}"
    return (
        f"text is not the base's: logits differ by up to {identity['max_difference']:.3g} at "
        f"{where}, first in {identity['first_difference']}"
    )


@dataclass(frozen=True)
class _Measurer:
    """Measures set after set."""

    kept: KeptScores
    base: Untouched | None
    same: bool  # the base is known to give what the graft gives
    announce: Announce

    def evaluate(self, each: TextSet) -> SetResult:
        """One set's scores, the base's, and how they differ."""
        start = time.monotonic()
        result = self._texts(each) if each.spec.metric == "perplexity" else self._choices(each)
        settings = {
            "asked": CHAT if each.spec.chat else "plain text, as in lm-evaluation-harness",
            "batch_size": self.kept.batch_size,
            "limit": each.spec.limit,
            "seed": None if each.spec.limit is None else each.spec.seed,
            **result.settings,
            **self.kept.numbers,
        }
        shown = f"{result.main} {result.scores[result.main]}"
        if result.change:
            shown += f", less the base's {result.change[result.main]}"
        self.announce(f"{each.spec.name}: {shown}")
        given = {name: value for name, value in settings.items() if value is not None}
        seconds = time.monotonic() - start
        return result.model_copy(update={"settings": given, "seconds": seconds})

    def _choices(self, each: TextSet) -> SetResult:
        spec, items = each.spec, each.items
        letters = shows_options(spec.prompt)
        found = self.kept.choices(spec.name, items, letters, self.same, spec.chat)
        measured = measure_choices(items, found)
        settings: dict[str, Any] = {
            "prompt": spec.prompt or ("{question}" if spec.chat else TEXT_CHOICE_PROMPT),
            "scored": "letters" if letters else "options",
        }
        before = measured if self.same else None
        if not self.same and self.base is not None:
            theirs = self.kept.base_choices(spec.name, items, letters, spec.chat)
            before = measure_choices(items, theirs)
            alike = [
                one.prediction() == other.prediction()
                for one, other in zip(found, theirs, strict=True)
            ]
            settings["same_option_as_base"] = sum(alike) / len(alike)
        settings["base"] = _of_base(before, self.same)
        kinds = scores_by_kind(measured, items)
        return self._result(each, measured, before, groups_of(items), kinds, settings)

    def _texts(self, each: TextSet) -> SetResult:
        divergence = self._divergence(each) if self.same else None
        same = divergence is not None and divergence.value <= _ROUNDING
        found = self.kept.texts(each.spec.name, each.items, same, each.spec.chat)
        together = None if each.plain_texts else groups_of(each.items)
        measured, groups = measure_texts(found, together=together)
        before = measured if same else None
        if not same and self.base is not None:
            before, _ = measure_texts(found, of_base=True, together=together)
            divergence = as_score(measured.scores(groups)["kl_to_base"])
            width = before.columns.shape[1]
            measured = Measured(measured.columns[:, :width], before.statistics, measured.main)
        settings = {
            "prompt": (each.spec.prompt or "{question}") if each.spec.chat else None,
            "tokens": sum(window.tokens for one in found for window in one.windows),
            "base": _of_base(before, same),
        }
        result = self._result(each, measured, before, groups, {}, settings)
        if divergence is None:
            return result
        return result.model_copy(update={"scores": {**result.scores, "kl_to_base": divergence}})

    def _divergence(self, each: TextSet) -> Score:
        """KL to the base on a few texts, where all logits are expected to be the base's."""
        compared = self.kept.compared(each.items[: _CHECKED // 2], each.spec.chat)
        measured, groups = measure_texts(compared)
        return as_score(measured.scores(groups)["kl_to_base"])

    def _result(
        self,
        each: TextSet,
        measured: Measured,
        before: Measured | None,
        groups: Sequence[Any],
        kinds: dict[str, dict[str, Score]],
        settings: dict[str, Any],
    ) -> SetResult:
        base = {} if before is None else as_scores(before.scores(groups))
        change = {} if before is None else as_scores(measured.change(before, groups))
        return SetResult(
            name=each.spec.name,
            metric=each.spec.metric,
            main=measured.main,
            file=each.file.name,
            sha256=file_sha256(each.file),
            items=len(each.items),
            scores=as_scores(measured.scores(groups)),
            base=base,
            change=change,
            kinds=kinds,
            settings=settings,
            predictions=self.kept.file(each.spec.name).relative_to(self.kept.run).as_posix(),
        )


def _of_base(before: Measured | None, same: bool) -> str:
    return EQUAL if same else "not there" if before is None else "measured"
