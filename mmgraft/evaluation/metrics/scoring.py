"""A set's answers against what is right, by the set's metric. Free of torch."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from mmgraft.errors import UsageError
from mmgraft.evaluation.items.item import Box, Item
from mmgraft.evaluation.metrics import answers as answer_metrics
from mmgraft.evaluation.metrics.boxes import measure_boxes
from mmgraft.evaluation.metrics.captions import CiderD, measure_captions, words_of
from mmgraft.evaluation.metrics.intervals import Measured
from mmgraft.recipes.evaluation_set import Metric, SetSpec
from mmgraft.runs.results import Score

#: Largest number of tokens of an answer, unless the set gives one.
ANSWER_TOKENS: Mapping[Metric, int] = {
    "exact": 16, "vqa": 16, "vqa_v2": 16, "yes_no": 8, "caption": 64, "box": 48,
}  # fmt: skip

#: Scores of multiple choice: how the log-probability of an option's text is weighed.
BY: Mapping[str, answer_metrics.By] = {
    "accuracy": "sum", "accuracy_per_token": "token", "accuracy_per_character": "character",
}  # fmt: skip


def measure_answers(spec: SetSpec, items: Sequence[Item], answers: Sequence[str]) -> Measured:
    """Score texts by any metric but ``choice``.

    Args:
        spec: The set.
        items: Its items.
        answers: One text an item, in their order.

    Raises:
        UsageError: An item lacks what the metric needs; names file and row.
    """
    if spec.metric == "caption":
        return measure_captions(answers, _cider(items))
    if spec.metric == "yes_no":
        truth = [answer_metrics.truth_of(item.answers[0], item.where) for item in items]
        return answer_metrics.measure_yes_no(answers, truth)
    if spec.metric == "box" and spec.boxes is not None:
        boxes, sizes = zip(*map(box_and_size, items), strict=True)
        return measure_boxes(answers, boxes, sizes, spec.boxes)
    accuracy = _ACCURACIES.get(spec.metric)
    if accuracy is None:
        raise UsageError(f"set {spec.name!r}: {spec.metric} does not score answers in words")
    pairs = zip(answers, items, strict=True)
    return Measured.means(accuracy=[accuracy(said, item.answers) for said, item in pairs])


def box_and_size(item: Item) -> tuple[Box, tuple[int, int]]:
    """Return an item's box and the size of its image.

    Raises:
        UsageError: It has none; names file and row.
    """
    if item.box is None or item.size is None:
        raise UsageError(f"{item.where}: no box to compare with; name its column")
    return item.box, item.size


def measure_choices(
    items: Sequence[Item], scores: Sequence[answer_metrics.ChoiceScore]
) -> Measured:
    """Measure accuracy by log-probability: of an option's whole text, a token, and a character."""
    return Measured.means(
        **{
            name: [one.prediction(by) == item.gold for one, item in zip(scores, items, strict=True)]
            for name, by in BY.items()
        }
    )


def measure_prior(
    spec: SetSpec, items: Sequence[Item], seen: Iterable[tuple[str, str]]
) -> Measured:
    """Score the most frequent training answer to each question.

    In multiple choice the option is taken that was right most often after the same question, of
    those equal the one right most often after any, of those equal the first; ``accuracy`` is the
    only score.

    Args:
        spec: The set.
        items: Its items.
        seen: Questions and answers of training, at least one.
    """
    prior = answer_metrics.Prior(seen)
    if spec.metric != "choice":
        return measure_answers(spec, items, [prior(item.question) for item in items])
    right = [prior.option(item.question, item.options) == item.gold for item in items]
    return Measured.means(accuracy=right)


def scores_by_kind(measured: Measured, items: Sequence[Item]) -> dict[str, dict[str, Score]]:
    """Return the scores of each kind of item, in order of their names; none where there is none."""
    indices: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        if item.kind is not None:
            indices[item.kind].append(index)
    groups = groups_of(items)
    return {
        kind: measured.of(chosen).scores([groups[index] for index in chosen])
        for kind, chosen in sorted(indices.items())
    }


def groups_of(items: Sequence[Item]) -> list[str]:
    """Return what the bootstrap resamples together: items' groups; an item alone without one."""
    return [item.group if item.group is not None else item.id for item in items]


def _any(match: Callable[[str, str], bool]) -> Callable[[str, Sequence[str]], float]:
    return lambda said, answers: any(match(said, right) for right in answers)


_ACCURACIES: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "exact": _any(answer_metrics.exact),
    "vqa": _any(answer_metrics.vqa_match),
    "vqa_v2": answer_metrics.vqa_v2,
}


def _cider(items: Sequence[Item]) -> CiderD:
    for item in items:
        if not any(map(words_of, item.answers)):
            raise UsageError(f"{item.where}: no caption with a word in it; write one")
    if len(items) == 1:
        raise UsageError(
            f"{items[0].file}: CIDEr weighs words by how few items use them, and there is one; "
            "give at least two"
        )
    return CiderD([item.answers for item in items])
