"""Tasks of lm-evaluation-harness on a grafted model, through the harness's own code.

Source: EleutherAI's lm-evaluation-harness (package ``lm-eval``): prompts, scoring and metrics are
its own. Here its models get the graft's forward, and its numbers get intervals, from what it says
of every document.
"""

import difflib
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmgraft.errors import MMGraftError, UsageError
from mmgraft.evaluation.metrics.intervals import Statistic, estimate, interval_of, paired, ratio
from mmgraft.frozen import Frozen
from mmgraft.model.workflow import TEXT_WORKFLOW
from mmgraft.progress import say
from mmgraft.runs.results import Score, SetResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mmgraft.inference import Answerer

#: Samples for metrics that are no function of sums (BLEU, F1), each computed anew.
RESAMPLES = 200


class Leaf(Frozen):
    """One task's numbers.

    Attributes:
        name: Of the task.
        file: Name of its data: a data set's id, or the names of local files.
        prompts: SHA-256 of all that was evaluated: prompts, options, settings and pixels.
        items: Documents.
        numbers: The harness's, by the metric's name (and the filter's, after a comma).
        values: One a document, by the same names; what their kind is the metric knows.
        aggregates: What turns values into the number.
    """

    name: str
    file: str
    prompts: str
    items: int
    numbers: dict[str, Any]
    values: dict[str, list[Any]]
    aggregates: dict[str, Callable[[list[Any]], Any]]

    @classmethod
    def of(cls, task: Any, found: dict[str, Any]) -> "Leaf":
        """Return what ``simple_evaluate`` found of a task."""
        from lm_eval.api.metrics import mean
        from lm_eval.api.model import hash_args

        name = task.task_name
        samples = found["samples"][name]
        values: dict[str, list[Any]] = {}
        digest = hashlib.sha256()
        for sample in samples:
            for metric in sample["metrics"]:
                values.setdefault(_key(metric, sample["filter"]), []).append(sample[metric])
            for arguments in sample["arguments"]:
                digest.update(hash_args(task.OUTPUT_TYPE, arguments).encode())
        numbers: dict[str, Any] = {}
        for key, number in found["results"][name].items():
            metric, comma, filtered = key.partition(",")
            if comma and _key(metric, filtered) in values:
                numbers[_key(metric, filtered)] = number
        known = task.aggregation()
        aggregates = {key: known.get(key.partition(",")[0], mean) for key in values}
        items = len({sample["doc_id"] for sample in samples})
        return cls(name, _file(task), digest.hexdigest(), items, numbers, values, aggregates)


def score_leaf(leaf: Leaf) -> dict[str, Score]:
    """Return a task's numbers with their intervals, those that are finite."""
    scores: dict[str, Score] = {}
    for key, number in leaf.numbers.items():
        if not _is_number(number):
            say(f"{leaf.name}: {key} is {number}, not a number, and left out")
            continue
        sums = _sums(leaf, key)
        if sums:
            scores[key] = _with_value(number, *sums)
        elif (ends := _resampled(leaf, key)) is not None:
            count, (low, high) = len(leaf.values[key]), ends
            scores[key] = Score(value=float(number), low=low, high=high, count=count, groups=count)
        else:
            say(f"{leaf.name}: {key} has no interval and is left out")
    return scores


def grouped(group: Any, leaves: Sequence[Leaf], found: dict[str, Any]) -> dict[str, Score]:
    """Return a group's numbers: means over its tasks, weighted where it says so."""
    scores: dict[str, Score] = {}
    for key, weighted in _group_keys(group, leaves):
        metric, comma, filtered = key.partition(",")
        number = found["results"][group.name].get(f"{metric},{filtered if comma else 'none'}")
        sums = _group_sums(leaves, key, weighted)
        if sums is None or not _is_number(number):
            say(f"{group.name}: {key} is no mean over documents; see its tasks")
            continue
        scores[key] = _with_value(number, *sums)
    return scores


def change_of(after: Sequence[Leaf], before: Sequence[Leaf], group: Any = None) -> dict[str, Score]:
    """Return paired differences, after minus before, of the metrics that are functions of sums.

    Raises:
        UsageError: The two did not get the same prompts.
    """
    if [leaf.prompts for leaf in after] != [leaf.prompts for leaf in before]:
        raise UsageError(
            f"task {after[0].name}: the graft and its base got different prompts; run it again"
        )
    changes: dict[str, Score] = {}
    keys = _group_keys(group, after) if group is not None else [(k, True) for k in after[0].numbers]
    for key, weighted in keys:
        if group is not None:
            one, two = (_group_sums(leaves, key, weighted) for leaves in (after, before))
        else:
            one, two = _sums(after[0], key), _sums(before[0], key)
        if one is not None and two is not None:
            changes[key] = paired(one[0], two[0], one[1])
    return changes


# -- steps --------------------------------------------------------------------------------------


def _with_value(number: Any, columns: np.ndarray, statistic: Statistic) -> Score:
    """Return the harness's own number with our interval."""
    return estimate(columns, statistic).model_copy(update={"value": float(number)})


def _key(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric},{filtered}"


def _file(task: Any) -> str:
    files = (task.get_config("dataset_kwargs") or {}).get("data_files")
    if files:
        listed = files.values() if isinstance(files, dict) else [files]
        flat = [one for some in listed for one in ([some] if isinstance(some, str) else some)]
        return ", ".join(Path(one).name for one in flat)
    path = str(task.get_config("dataset_path") or task.task_name)
    path = Path(path).name if Path(path).exists() else path
    name = task.get_config("dataset_name")
    return f"{path}:{name}" if name else path


def _is_number(number: Any) -> bool:
    try:
        return math.isfinite(float(number))
    except (TypeError, ValueError):
        return False


def _sums(leaf: Leaf, key: str) -> tuple[np.ndarray, Statistic] | None:
    """Return columns and statistic of a metric that is a function of sums; None where it is not."""
    from lm_eval.api import metrics

    statistics: dict[Any, tuple[bool, Statistic]] = {
        metrics.mean: (False, ratio),
        metrics.perplexity: (False, lambda sums: np.exp(-ratio(sums))),
        metrics.weighted_perplexity: (True, lambda sums: np.exp(-ratio(sums))),
        metrics.bits_per_byte: (True, lambda sums: -ratio(sums) / math.log(2)),
    }
    weighted, statistic = statistics.get(leaf.aggregates[key], (False, None))
    if statistic is None:
        return None
    try:
        table = np.asarray(leaf.values[key], dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if table.shape != ((len(table), 2) if weighted else (len(table),)):
        return None
    return (table if weighted else np.stack([table, np.ones_like(table)], axis=-1)), statistic


def _group_keys(group: Any, leaves: Sequence[Leaf]) -> list[tuple[str, bool]]:
    """Return the metrics a group puts together, and whether tasks count by their documents."""
    keys: list[tuple[str, bool]] = []
    for wanted in group.aggregate_metric_list or ():
        for key in dict.fromkeys(key for leaf in leaves for key in leaf.numbers):
            metric, _, filtered = key.partition(",")
            listed = wanted.filter_list is None or (filtered or "none") in wanted.filter_list
            if metric == wanted.metric and listed:
                keys.append((key, bool(wanted.weight_by_size)))
    return keys


def _group_sums(
    leaves: Sequence[Leaf], key: str, weighted: bool
) -> tuple[np.ndarray, Statistic] | None:
    """Return two columns a task ``(documents, 2 tasks)``, and the mean over all or over tasks."""
    from lm_eval.api.metrics import mean

    tables = []
    for leaf in leaves:
        sums = _sums(leaf, key) if key in leaf.numbers else None
        if sums is None or leaf.aggregates[key] is not mean:
            return None
        tables.append(sums[0])
    if weighted:
        return np.concatenate(tables), ratio
    count = len(tables)
    wide = np.zeros((sum(map(len, tables)), 2 * count))
    start = 0
    for number, table in enumerate(tables):
        wide[start : start + len(table), 2 * number : 2 * number + 2] = table
        start += len(table)

    def mean_of_means(sums: np.ndarray) -> np.ndarray:
        pairs = sums.reshape(*sums.shape[:-1], count, 2)
        there = pairs[..., 1] > 0  # a small task may be missing from a sample
        return (ratio(pairs) * there).sum(-1) / there.sum(-1)

    return wide, mean_of_means


def _resampled(leaf: Leaf, key: str) -> tuple[float, float] | None:
    """Return the interval of any metric, by computing it for samples of the documents."""
    values, aggregate = leaf.values[key], leaf.aggregates[key]
    rng = np.random.default_rng(0)
    found: list[float] = []
    for _ in range(RESAMPLES):
        sample = [values[at] for at in rng.integers(len(values), size=len(values))]
        try:
            number = float(aggregate(sample))
        except (ArithmeticError, TypeError, ValueError):
            continue  # a sample that the metric is not made for, such as one of a single class
        if math.isfinite(number):
            found.append(number)
    return interval_of(found) if found else None


_NEAR = 5


class _Task(Frozen):
    """A task, a group that says how its tasks are put together, or the list of a tag's tasks."""

    name: str
    loaded: Any
    leaves: list[Any]
    images: bool
    workflow: str


def evaluate_harness(
    answerer: "Answerer",
    tasks: Sequence[str],
    *,
    workflow: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    include_path: str | Path | None = None,
    untouched: "PreTrainedModel | None" = None,
) -> list[SetResult]:
    """Run tasks by name.

    A set is a task, or a group whose own file says how its tasks are put together (their scores are
    its ``kinds``); a tag, or a group that says nothing, gives a set for each of its tasks. Scores
    have the harness's names. Prompts with images are chats; text is bare, as the harness has it.

    Args:
        answerer: The model and its processor.
        tasks: Names of tasks, groups or tags, or paths of task files.
        workflow: Of all rows; by default ``text`` for tasks without images, else the graft's.
        batch_size: Rows a batch.
        limit: First documents of each task.
        include_path: Folder of further task files, found at any depth.
        untouched: The base without a graft, which text tasks are run on, too.

    Raises:
        UsageError: The extra is missing; a task is unknown, cannot run, or is refused.
        MMGraftError: A task's data could not be fetched.
    """
    manager = require_tasks(tasks, include_path)
    if workflow not in (None, TEXT_WORKFLOW):
        answerer.model.workflow(workflow)  # says which there are
    names = dict.fromkeys(tasks)
    loaded = [_task(answerer, name, _load(manager, name), workflow) for name in names]
    results: list[SetResult] = []
    for task in loaded:
        say(f"lm-eval: {task.name}, workflow {task.workflow}")
        started = time.monotonic()
        given = {"limit": limit, "apply_chat_template": task.images, "task_manager": manager}
        after = _run(_model(answerer, task, batch_size), task, given)
        before = None
        if untouched is not None and not task.images:
            before = _run(_model(answerer, task, batch_size, untouched), task, given)
        seconds = time.monotonic() - started
        settings = {"batch_size": batch_size, "limit": limit}
        sets = _sets(task, after, before, settings)
        results += [one.model_copy(update={"seconds": seconds / len(sets)}) for one in sets]
    return results


def require_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """Return the harness's index of tasks, before a model is loaded.

    Raises:
        UsageError: The harness is not installed, the message has the line that installs it; no
            task, or one that is unknown, and near ones are named.
    """
    if find_spec("lm_eval") is None:
        raise UsageError(
            "tasks of lm-evaluation-harness need a package more: pip install 'mmgraft[eval]'"
        )
    if not tasks:
        raise UsageError("no task to run; name at least one")
    return _manager(list(tasks), include_path)


# -- what to run --------------------------------------------------------------------------------


def _manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """Return the harness's index of tasks; its own files only where needed."""
    from lm_eval.tasks import TaskManager

    given = None
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise UsageError(f"there is no folder {include_path} of task files; name one that is")
        given = str(include_path)
    mine = TaskManager(include_path=given, include_defaults=False)
    wanted = [name for name in names if not Path(name).is_file()]
    if all(_whole(mine.task_index, name) for name in wanted):
        return mine
    manager = TaskManager(include_path=given)
    for name in wanted:
        if name not in manager.all_tasks:
            raise UsageError(_unknown(name, manager.all_tasks, mine, given))
    return manager


def _whole(index: dict[str, Any], name: str) -> bool:
    """Return whether an index holds a task, or a group and all its tasks."""
    entry = index.get(name)
    if entry is None or entry.cfg is None:
        return False
    members = entry.cfg.get("task")
    if isinstance(members, str):
        return True
    return all(isinstance(one, str) and _whole(index, one) for one in members or ())


def _unknown(name: str, known: Sequence[str], mine: Any, include_path: str | None) -> str:
    near = difflib.get_close_matches(name, known, n=_NEAR, cutoff=0.6)
    near += [one for one in known if name.lower() in one.lower() and one not in near]
    hint = f"near ones: {', '.join(near[:_NEAR])}" if near else "`lm-eval ls tasks` lists them"
    message = f"lm-eval has no task, group or tag {name!r}; {hint}"
    if include_path is not None:
        read = {entry.yaml_path for entry in mine.task_index.values()}
        files = sorted(Path(include_path).rglob("*.yaml"))
        left = [str(path) for path in files if path not in read]
        if left:
            message += f"; it could not read a task in {', '.join(left[:_NEAR])}: see to that YAML"
    return message


def _load(manager: Any, name: str) -> Any:
    """Load a task or group with its data, or the list of a tag's tasks."""
    try:
        loaded = manager.load([name])
    except FileNotFoundError as error:
        raise UsageError(f"task {name}: {error}; see to dataset_path and data_files") from error
    except OSError as error:
        raise MMGraftError(
            f"task {name}: its data could not be fetched ({error}); try again online, or write a "
            "task file that reads a local file"
        ) from error
    except (ImportError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"task {name}: lm-eval cannot load it ({type(error).__name__}: {error}); see to its "
            "task file and its data"
        ) from error
    group = loaded.get("groups", {}).get(name)
    return group if group is not None else list(loaded["tasks"].values())


def _task(answerer: "Answerer", name: str, loaded: Any, workflow: str | None) -> _Task:
    """Check what was loaded, and choose its workflow.

    Raises:
        UsageError: No workflow can run these tasks, or not the one that is given.
    """
    leaves = loaded if isinstance(loaded, list) else loaded.get_all_tasks()
    if not leaves:
        raise UsageError(f"{name} has no task in it; name another")
    for task in leaves:
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(
                f"task {task.task_name} runs code that the model writes, which mmgraft does not do;"
                " leave it out"
            )
        if task.get_config("doc_to_audio"):
            raise UsageError(f"task {task.task_name} has sound, and a graft sees; leave it out")
    kinds = {bool(getattr(task, "MULTIMODAL", False)) for task in leaves}
    if len(kinds) > 1:
        raise UsageError(f"{name} has tasks with images and tasks without; name them one by one")
    images = kinds.pop()
    if images:
        _refuse_images(name, leaves, workflow)
    elif workflow not in (None, TEXT_WORKFLOW) and (
        why := answerer.model.workflow(workflow).graft.promises.no_image
    ):
        raise UsageError(
            f"task {name} is text, which workflow {workflow!r} cannot answer ({why}); "
            f"evaluate it with {TEXT_WORKFLOW}"
        )
    default = answerer.model.default_workflow if images else TEXT_WORKFLOW
    return _Task(name, loaded, leaves, images, workflow or default)


def _refuse_images(name: str, leaves: Sequence[Any], workflow: str | None) -> None:
    if workflow == TEXT_WORKFLOW:
        raise UsageError(f"task {name} has images, and the text workflow sees none; leave it out")
    for task in leaves:
        if task.OUTPUT_TYPE != "generate_until":
            raise UsageError(
                f"task {task.task_name} scores options beside an image ({task.OUTPUT_TYPE}), which "
                "lm-eval's hf-multimodal cannot; use a set with `metric: choice` for that"
            )


def _model(
    answerer: "Answerer", task: _Task, batch_size: int, untouched: "PreTrainedModel | None" = None
) -> Any:
    """Return the harness's model of the graft, or of the untouched base."""
    from mmgraft.evaluation.lm_eval.models import ImageLM, TextLM, plain_lm

    if untouched is not None:
        return plain_lm(untouched, answerer.processor, batch_size)
    if not task.images:
        return TextLM(answerer, task.workflow, batch_size)
    pads = not answerer.model.workflow(task.workflow).graft.promises.padding
    return ImageLM(answerer, task.workflow, batch_size if pads else 1)


def _run(lm: Any, task: _Task, given: dict[str, Any]) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    tasks = list(task.loaded) if isinstance(task.loaded, list) else [task.loaded]
    try:
        # No standard errors: intervals are resampled from the samples, as everywhere in mmgraft.
        found: Any = simple_evaluate(
            model=lm, tasks=tasks, bootstrap_iters=0, log_samples=True, **given
        )
    except UsageError as error:
        raise UsageError(f"task {task.name}: {error}") from error
    except (AssertionError, ImportError, NotImplementedError, ValueError) as error:
        raise UsageError(
            f"task {task.name}: lm-eval refuses it ({type(error).__name__}: {error}); see to its "
            "task file"
        ) from error
    if found is None:
        raise UsageError("tasks run in one process; start mmgraft without a launcher")
    return dict(found)


# -- what came of it ----------------------------------------------------------------------------


def _sets(
    task: _Task, after: dict[str, Any], before: dict[str, Any] | None, settings: dict[str, Any]
) -> list[SetResult]:
    settings = {
        "harness": f"lm-eval {version('lm-eval')}",
        "workflow": task.workflow,
        "chat_template": task.images,
        **settings,
    }
    leaves = [Leaf.of(one, after) for one in task.leaves]
    bases = None if before is None else [Leaf.of(one, before) for one in task.leaves]
    group = task.loaded
    if not isinstance(group, list) and group.has_aggregation:
        scores = grouped(group, leaves, after)
        compared: dict[str, dict[str, Score]] = {}
        if bases is not None and before is not None:
            compared["base"] = grouped(group, bases, before)
            compared["change"] = change_of(leaves, bases, group)
        kinds = {leaf.name: score_leaf(leaf) for leaf in leaves}
        if scores:
            return [_result(task.name, leaves, after, settings, scores, kinds=kinds, **compared)]
    results = []
    for number, leaf in enumerate(leaves):
        scores, compared = score_leaf(leaf), {}
        if bases is not None:
            compared["base"] = score_leaf(bases[number])
            compared["change"] = change_of([leaf], [bases[number]])
        results.append(_result(leaf.name, [leaf], after, settings, scores, **compared))
    return results


def _result(
    name: str,
    leaves: Sequence[Leaf],
    found: dict[str, Any],
    settings: dict[str, Any],
    scores: dict[str, Score],
    **compared: Any,
) -> SetResult:
    if not scores:
        raise UsageError(f"task {name}: none of its metrics is a number; leave it out")
    main = next(iter(scores))
    shots = sorted({found["n-shot"][leaf.name] for leaf in leaves})
    more = {
        "num_fewshot": shots[0] if len(shots) == 1 else shots,
        "task_version": found["versions"].get(name, found["versions"].get(leaves[0].name)),
        "higher_is_better": found["higher_is_better"].get(leaves[0].name, {}),
    }
    return SetResult(
        name=name,
        metric=main.partition(",")[0],
        main=main,
        file=leaves[0].file if len(leaves) == 1 else name,
        sha256=hashlib.sha256("".join(leaf.prompts for leaf in leaves).encode()).hexdigest(),
        items=sum(leaf.items for leaf in leaves),
        scores=scores,
        settings=settings | more,
        **compared,
    )
