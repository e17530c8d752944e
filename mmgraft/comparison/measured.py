"""Measurements of the arms: their results, and their kept answers scored item by item.

Scores of kept answers are computed again, so that differences between arms are paired.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmgraft.comparison.files import Phase, arm_folder, phases_done
from mmgraft.comparison.spec import Comparison
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.files import data_file, read_items, read_training_answers, set_sha256
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.kept import read_choice_row, read_predictions, read_text_row
from mmgraft.evaluation.likelihood.perplexity import measure_texts
from mmgraft.evaluation.metrics import scoring
from mmgraft.evaluation.metrics.intervals import Measured, over_seeds
from mmgraft.evaluation.report.words import direction
from mmgraft.frozen import Frozen
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.find import is_graft
from mmgraft.runs.results import Results, Score, Section, SetResult, measured

NO_IMAGE, PRIOR = "no_image", "prior"
#: Up to so many arms are compared each with each; more of them each with the best.
ALL_PAIRS = 5

_NEEDED = {
    "choice": {"answer", "sums", "tokens", "characters"},
    "perplexity": {"words", "bytes", "windows"},
}


class MeasuredArm(Frozen):
    """One arm.

    Attributes:
        name: Its name.
        description: The comparison's words for it.
        run: Its folder.
        record: What the graft is; None where the arm was not started.
        sections: What was measured, by section.
        done: Phases that are done.
        repeats: The arm that it repeats with another seed, if any.
    """

    name: str
    description: str
    run: Path
    record: GraftFile | None
    sections: dict[Section, Results]
    done: list[Phase]
    repeats: str | None = None

    @property
    def method(self) -> str | None:
        """Return the method's name; None where the arm was not started."""
        return None if self.record is None else self.record.method

    @property
    def base_trained(self) -> bool:
        """Return whether text may have changed."""
        return self.record is not None and self.record.base_trained

    @property
    def levels(self) -> str:
        """The levels of unchanged text that its method promises, such as ``E0 E1``."""
        promised = {} if self.record is None else self.record.promises.levels
        kept = [level for level, reason in promised.items() if not reason]
        return "-" if self.base_trained else " ".join(kept) or "-"

    @property
    def training(self) -> dict[str, Any]:
        """Return what the training cost; empty where it is not done."""
        section = self.sections.get("training")
        return {} if section is None else section.details

    @property
    def identity(self) -> dict[str, Any] | None:
        """The result of comparing its text workflow with the base."""
        section = self.sections.get("text")
        return None if section is None else section.identity

    def sets(self, section: Section) -> list[SetResult]:
        """Return the sets of a section; none where it was not measured."""
        found = self.sections.get(section)
        return [] if found is None else found.sets

    def set_named(self, section: Section, name: str) -> SetResult | None:
        """Return a set of a section by its name."""
        return next((one for one in self.sets(section) if one.name == name), None)


def read_arms(out: Path, comparison: Comparison) -> list[MeasuredArm]:
    """Read every arm in the comparison's order, as far as it has come.

    Raises:
        UsageError: A result or a phase's record is damaged.
    """
    arms = []
    for name, arm in comparison.all_arms().items():
        run = arm_folder(out, name)
        record = GraftFile.read(run) if is_graft(run) else None
        sections: dict[Section, Results] = {one.section: one for one in measured(run)}
        done = phases_done(run)
        arms.append(MeasuredArm(name, arm.description, run, record, sections, done, arm.repeats))
    return arms


def set_names(arms: Sequence[MeasuredArm], section: Section) -> list[str]:
    """Return the sets that any arm was evaluated on, in the order in which they were."""
    return list(dict.fromkeys(one.name for arm in arms for one in arm.sets(section)))


@dataclass
class SetAnswers:
    """The arms' answers to one set.

    Attributes:
        spec: The set.
        items: In the order of the file.
        groups: What the bootstrap resamples together, one a row of what was measured.
        texts: Each arm's answer to every item, in words; of perplexity there are none.
        measured: Each arm's answers, scored.
        no_image: The same without the image, of arms that were evaluated so.
        prior: The most frequent training answers, scored.
        missing: Why an arm is not among them.
        repeats: What an arm repeats with another seed, of arms that do.
    """

    spec: SetSpec
    items: list[Item]
    groups: list[str | int] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    measured: dict[str, Measured] = field(default_factory=dict)
    no_image: dict[str, Measured] = field(default_factory=dict)
    prior: Measured | None = None
    missing: dict[str, str] = field(default_factory=dict)
    repeats: dict[str, str] = field(default_factory=dict)

    @cached_property
    def seeds(self) -> dict[str, list[str]]:
        """The arms that answered, by what they repeat; one that repeats none is by itself."""
        found: dict[str, list[str]] = {}
        for arm in self.measured:
            found.setdefault(self.repeats.get(arm, arm), []).append(arm)
        return found

    @property
    def main(self) -> str:
        """The score that a table shows."""
        return next(iter(self.measured.values())).main

    @property
    def notes(self) -> list[str]:
        """Return which arms are left out, and why."""
        name = self.spec.name
        return [f"{name}: {arm} is left out of these: {why}" for arm, why in self.missing.items()]

    @cached_property
    def differences(self) -> list[tuple[str, str, Score]]:
        """First arm, second arm, and the first one's main score minus the second's.

        They are the later arm minus the earlier, or of many arms each minus the best. All seeds
        of an arm are taken together.
        """
        names = list(self.seeds)
        pairs = [(second, first) for first, second in itertools.combinations(names, 2)]
        if len(names) > ALL_PAIRS:
            sense = direction(self.main) or 1
            best = max(names, key=lambda name: sense * self.over_seeds(name).value)
            pairs = [(name, best) for name in names if name != best]
        return [(a, b, self.over_seeds(a, self._all(b))) for a, b in pairs]

    @cached_property
    def over_blind(self) -> list[tuple[str, str, Score]]:
        """Arm, blind score, and the arm's main score minus it, on the same items."""
        return [
            (arm, name, self.over_seeds(arm, blind))
            for arm, runs in self.seeds.items()
            for name, blind in (
                (PRIOR, [] if self.prior is None else [self.prior]),
                (NO_IMAGE, [self.no_image[one] for one in runs if one in self.no_image]),
            )
            if blind and self.main in blind[0].statistics
        ]

    @cached_property
    def kinds(self) -> dict[str, list[int]]:
        """The items of each kind, by index, kinds sorted."""
        named = sorted({one.kind for one in self.items if one.kind is not None})
        return {
            kind: [at for at, one in enumerate(self.items) if one.kind == kind] for kind in named
        }

    def over_seeds(self, arm: str, before: Sequence[Measured] = ()) -> Score:
        """Return an arm's main score over its seeds, or how it differs from others'."""
        return over_seeds(self._all(arm), before, self.groups)

    def of_kind(self, arm: str, kind: str) -> Score:
        """Return the same of the items of a kind."""
        chosen = self.kinds[kind]
        runs = [one.of(chosen) for one in self._all(arm)]
        return over_seeds(runs, groups=[self.groups[at] for at in chosen])

    def _all(self, arm: str) -> list[Measured]:
        return [self.measured[one] for one in self.seeds[arm]]


def read_answers(spec: SetSpec, arms: Sequence[MeasuredArm]) -> SetAnswers | None:
    """Read the answers of all arms that were evaluated on a set; None where none has kept any.

    Args:
        spec: The set, its paths absolute.
        arms: The arms of the comparison.

    Raises:
        UsageError: The set's file is missing, or cannot be read.
    """
    section: Section = "text" if spec.modality == "text" else "vision"
    results = [(arm, arm.set_named(section, spec.name)) for arm in arms]
    if not any(one is not None and one.predictions for _, one in results):
        return None
    items = read_items(spec)
    sha256 = set_sha256(spec, data_file(spec))
    repeats = {arm.name: arm.repeats for arm in arms if arm.repeats is not None}
    found = SetAnswers(spec, items, prior=_prior(spec, items), repeats=repeats)
    for arm, one in results:
        why = _why_missing(one, sha256)
        if one is None or one.predictions is None or why:
            found.missing[arm.name] = why
            continue
        rows = _rows(arm.run / one.predictions, spec, items)
        if rows is None:
            found.missing[arm.name] = "its answers are not complete"
            continue
        if spec.metric != "perplexity":
            found.texts[arm.name] = [str(row["answer"]) for row in rows]
        found.measured[arm.name], found.groups = _measure(spec, items, rows)
        file = f"{one.predictions.removesuffix('.jsonl')}.{NO_IMAGE}.jsonl"
        blind = _rows(arm.run / file, spec, items) if NO_IMAGE in one.blind else None
        if blind is not None:
            found.no_image[arm.name], _ = _measure(spec, items, blind)
    return found if found.measured else None


def _why_missing(one: SetResult | None, sha256: str) -> str:
    if one is None:
        return "it was not evaluated"
    if one.predictions is None:
        return "its answers were not kept"
    return "" if one.sha256 == sha256 else "the set's file has changed since"


def _rows(file: Path, spec: SetSpec, items: Sequence[Item]) -> list[dict[str, Any]] | None:
    """Return one row an item, in their order; None where one is missing or scored otherwise."""
    needed = _NEEDED.get(spec.metric, {"answer"})
    kept = {str(row["id"]): row for row in read_predictions(file) if needed <= row.keys()}
    return [kept[item.id] for item in items] if all(one.id in kept for one in items) else None


def _measure(
    spec: SetSpec, items: Sequence[Item], rows: Sequence[dict[str, Any]]
) -> tuple[Measured, list[str | int]]:
    """Return what the rows score, and the groups to resample."""
    if spec.metric == "perplexity":
        # Tokens and log-likelihood alone, because not every arm was measured beside its base.
        texts = [
            read_text_row({**row, "windows": [window[:2] for window in row["windows"]]})
            for row in rows
        ]
        return measure_texts(texts, together=scoring.groups_of(items) if spec.chat else None)
    groups: list[str | int] = [*scoring.groups_of(items)]
    if spec.metric != "choice":
        return scoring.measure_answers(spec, items, [str(row["answer"]) for row in rows]), groups
    return scoring.measure_choices(items, list(map(read_choice_row, rows))), groups


def _prior(spec: SetSpec, items: Sequence[Item]) -> Measured | None:
    if PRIOR not in spec.blind or spec.train is None:
        return None
    try:
        return scoring.measure_prior(spec, items, read_training_answers(spec))
    except UsageError:
        return None  # the file of training rows is gone; the score itself is in the results
