"""Text after grafting: proved unchanged where the base is frozen, measured on any set of text."""

import time
from collections.abc import Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

from mmgraft.evaluation.identity import (
    PROMPTS,
    Untouched,
    base_trained,
    prove_levels,
    text_identity,
    untouched_base,
)
from mmgraft.evaluation.items.files import TEXT_CHOICE_PROMPT
from mmgraft.evaluation.kept import Kept
from mmgraft.evaluation.likelihood.perplexity import measure_texts
from mmgraft.evaluation.metrics import answers, intervals, scoring
from mmgraft.evaluation.origin import described_graft, section_of
from mmgraft.evaluation.report.score_tables import EQUAL, KL, WHERE
from mmgraft.evaluation.sets import EvaluatedSet, read_sets
from mmgraft.frozen import Frozen
from mmgraft.inference import Answerer
from mmgraft.model.workflow import TEXT_WORKFLOW
from mmgraft.progress import say
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.results import Results, Score, SetResult

BATCH_SIZE = 16

#: Setting for a set that is not evaluated as plain text.
CHAT = "chat, through the graft's template"

_CHECKED = 4  # items of each set that both models read, whatever is known
_CHARACTERS = 600  # of a text whose logits are compared bit for bit
_ROUNDING = 1e-6  # nats: what equal weights elsewhere in memory may differ by


def evaluate_text(
    answerer: Answerer,
    run: Path,
    specs: Sequence[SetSpec] = (),
    *,
    batch_size: int = BATCH_SIZE,
    untouched: str | Path | None = None,
    base_cache: Path | None = None,
) -> Results:
    """Compare a graft's text with its base's: logits bit for bit, then sets of text.

    Where the base is frozen and all logits compared are identical, a set is evaluated once, and
    both get its scores. Else graft and base are evaluated, and their difference is paired. A killed
    run is continued: scores are kept in ``results/predictions/`` of the run as they come.

    Args:
        answerer: The graft.
        run: Its folder.
        specs: Sets of text; none leaves the comparison of logits alone.
        batch_size: Items or windows a batch.
        untouched: Folder or Hub id of the base to compare with; see :func:`untouched_base`.
        base_cache: Folder that keeps the base's own scores for other grafts on it.

    Returns:
        Section ``text``; not yet written.

    Raises:
        UsageError: See :func:`read_sets`; a base that is not the recorded one.
        MMGraftError: The disk is full; what was scored is kept.
    """
    sets = read_sets(specs, "text")
    model, processor = answerer.model.eval(), answerer.processor
    base = untouched_base(model, run, untouched)
    graft = described_graft(model, run)
    prompts = [*PROMPTS, *(text for each in sets for text in _openings(each) if text.strip())]
    identity = _identity(answerer, base, prompts, graft)
    same = identity is not None and identity["identical"] and not identity["base_trained"]
    kept = Kept(model, processor, run, graft, batch_size, base, base_cache)
    measured = [_evaluate(kept, each, same) for each in sets]
    return section_of("text", graft, measured, identity=identity)


def _identity(
    answerer: Answerer, base: Untouched | None, prompts: Sequence[str], graft: dict[str, str]
) -> dict[str, Any] | None:
    """Compare logits with the untouched base's; None without one."""
    if base is None:
        say(
            "this graft's base was trained, and the one it was trained from is not there: text "
            "cannot be compared (name it as the untouched base)"
        )
        return None
    model = answerer.model
    report = text_identity(model, answerer.processor, base.model, base.tokenizer, prompts)
    where = f"{report.positions} positions of {report.prompts} prompts"
    say(
        f"text: the base's logits bit for bit, at {where}"
        if report.identical
        else f"text is not the base's: logits differ by up to {report.max_difference:.3g} at "
        f"{where}, first in {report.first_difference}"
    )
    levels = {}
    if not base_trained(model):
        levels = prove_levels(model, answerer.processor, base.model, prompts)
    for level, found in levels.items():
        same = "the base's bit for bit" if found.identical else (
            f"not the base's bit for bit: off by up to {found.max_difference:.3g}"
        )  # fmt: skip
        say(f"{level}, text {WHERE[level]}: {same}, at {found.positions} positions")
    return {
        **asdict(report),
        "levels": {level: asdict(found) for level, found in levels.items()},
        "base_trained": base_trained(model),
        "base_fingerprint": base.fingerprint,
        "graft_sha256": graft["sha256"],
    }


def _openings(each: EvaluatedSet) -> list[str]:
    """Return what the first items say, to compare logits on."""
    first = each.items[:_CHECKED]
    if each.plain_texts:
        return [item.question[:_CHARACTERS] for item in first]
    return [str(item.messages[-1]["content"]) for item in first]


class _Found(Frozen):
    """Measurements of a set: the graft's scores, the base's, and what to resample together."""

    measured: intervals.Measured
    before: intervals.Measured | None
    groups: Sequence[Any]
    settings: dict[str, Any]
    divergence: Score | None = None
    kinds: dict[str, dict[str, Score]] = field(default_factory=dict)


def _evaluate(kept: Kept, each: EvaluatedSet, same: bool) -> SetResult:
    """Evaluate one set: its scores, the base's, and how they differ.

    Args:
        kept: Models and store.
        each: The set.
        same: The base is known to give what the graft gives.
    """
    start, spec = time.monotonic(), each.spec
    found = (_texts if spec.metric == "perplexity" else _choices)(kept, each, same)
    before, groups = found.before, found.groups
    settings = {
        "asked": CHAT if spec.chat else "plain text, as in lm-evaluation-harness",
        "batch_size": kept.batch_size,
        "limit": spec.limit,
        "seed": None if spec.limit is None else spec.seed,
        **found.settings,
        **kept.numbers,
    }
    result = each.result(
        found.measured,
        groups,
        settings,
        base={} if before is None else before.scores(groups),
        change={} if before is None else found.measured.change(before, groups),
        kinds=found.kinds,
        predictions=kept.shown_file(spec.name),
    )
    if found.divergence is not None:
        result.scores[KL] = found.divergence
    shown = f"{result.main} {result.scores[result.main]}"
    if result.change:
        shown += f", less the base's {result.change[result.main]}"
    say(f"{spec.name}: {shown}")
    result.seconds = time.monotonic() - start
    return result


def _choices(kept: Kept, each: EvaluatedSet, same: bool) -> _Found:
    spec, items = each.spec, each.items
    letters = answers.shows_options(spec.prompt)
    found = kept.choices(spec.name, items, TEXT_WORKFLOW, letters, chat=spec.chat, same=same)
    measured = scoring.measure_choices(items, found)
    settings: dict[str, Any] = {
        "prompt": spec.prompt or ("{question}" if spec.chat else TEXT_CHOICE_PROMPT),
        "scored": "letters" if letters else "options",
    }
    before = measured if same else None
    if not same and kept.base is not None:
        theirs = kept.choices(
            spec.name, items, TEXT_WORKFLOW, letters, chat=spec.chat, of_base=True
        )
        before = scoring.measure_choices(items, theirs)
        pairs = zip(found, theirs, strict=True)
        alike = [one.prediction() == other.prediction() for one, other in pairs]
        settings["same_option_as_base"] = sum(alike) / len(alike)
    settings["base"] = _of_base(before, same)
    kinds = scoring.scores_by_kind(measured, items)
    return _Found(measured, before, scoring.groups_of(items), settings, kinds=kinds)


def _texts(kept: Kept, each: EvaluatedSet, same: bool) -> _Found:
    spec = each.spec
    divergence = None
    if same:  # KL on a few texts, where all logits are expected to be the base's
        few = measure_texts(kept.compared(each.items[: _CHECKED // 2], spec.chat))
        divergence = few[0].scores(few[1])[KL]
        same = divergence.value <= _ROUNDING
    found = kept.texts(spec.name, each.items, spec.chat, same)
    together = None if each.plain_texts else scoring.groups_of(each.items)
    measured, groups = measure_texts(found, together=together)
    before = measured if same else None
    if not same and kept.base is not None:
        before, _ = measure_texts(found, of_base=True, together=together)
        divergence = measured.scores(groups)[KL]
        width = before.columns.shape[1]
        measured = intervals.Measured(measured.columns[:, :width], before.statistics, measured.main)
    settings = {
        "prompt": (spec.prompt or "{question}") if spec.chat else None,
        "tokens": sum(window.tokens for one in found for window in one.windows),
        "base": _of_base(before, same),
    }
    return _Found(measured, before, groups, settings, divergence)


def _of_base(before: intervals.Measured | None, same: bool) -> str:
    return EQUAL if same else "not there" if before is None else "measured"
