"""Tasks of lm-evaluation-harness, asked of a grafted model through the harness's own code.

Source: EleutherAI's lm-evaluation-harness (package `lm-eval`): prompts, scoring and metrics are its
own; here its models get the graft's forward and its numbers get intervals.
"""

from __future__ import annotations

import difflib
import hashlib
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.errors import MMGraftError, UsageError
from mmgraft.evaluation.lm_eval.scores import Leaf, change_of, grouped, score_leaf
from mmgraft.model.workflow import TEXT_WORKFLOW
from mmgraft.runs.results import Score, SetResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mmgraft.inference import Answerer

Announce = Callable[[str], None]
_NEAR = 5


def evaluate_harness(
    answerer: Answerer,
    tasks: Sequence[str],
    *,
    workflow: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool | None = None,
    include_path: str | Path | None = None,
    untouched: PreTrainedModel | None = None,
    announce: Announce = lambda message: None,
) -> list[SetResult]:
    """Run tasks by name.

    A set is a task, or a group whose own file says how its tasks are put together (their scores are
    its `kinds`); a tag, or a group that says nothing, gives a set for each of its tasks. The scores
    are the harness's numbers under the harness's names (`acc`, `acc_norm`, `word_perplexity`;
    `exact_match,flexible` where a filter has a name).

    Args:
        answerer: The model and its processor.
        tasks: Names of tasks, groups or tags, or paths of task files.
        workflow: Of all rows; by default ``text`` for tasks without images, the graft's for others.
        batch_size: Rows at a time.
        limit: First documents of each task.
        num_fewshot: Examples before each question, where the task does not fix their number.
        apply_chat_template: Whether prompts are chats. By default those with images are, since a
            graft learns them so, and text is asked bare, as the harness does.
        include_path: Folder of further task files, found at any depth.
        untouched: The base without a graft, of which text tasks are asked too.
        announce: Told what is done.

    Returns:
        Sets in the order of `tasks`; ``settings["workflow"]`` tells text from images.

    Raises:
        UsageError: The extra is missing; a task is unknown, not text or images, mixed, or not of
            this workflow; its file or data are not there; the harness refuses it.
        MMGraftError: A task's data could not be fetched.
    """
    require_harness()
    if not tasks:
        raise UsageError("no task to run; name at least one")
    if workflow not in (None, TEXT_WORKFLOW):
        answerer.model.workflow(workflow)
    names = list(dict.fromkeys(tasks))
    manager = _manager(names, include_path)
    loaded = {name: _load(manager, name) for name in names}
    kinds = {name: _workflow_of(answerer, name, loaded[name], workflow) for name in names}
    results: list[SetResult] = []
    for name in names:
        chosen = kinds[name]
        images = _has_images(loaded[name])
        chat = images if apply_chat_template is None else apply_chat_template
        if chat and not images and answerer.processor.template.kind == "plain":
            raise UsageError(
                f"task {name}: this graft's base has no chat template; leave the chat template out"
            )
        settings = {
            "harness": f"lm-eval {version('lm-eval')}",
            "workflow": chosen,
            "chat_template": chat,
            "batch_size": batch_size,
            "limit": limit,
        }
        given = {
            "limit": limit,
            "num_fewshot": num_fewshot,
            "apply_chat_template": chat,
            "task_manager": manager,
        }
        announce(f"lm-eval: {name}, workflow {chosen}")
        started = time.monotonic()
        after = _run(_model(answerer, chosen, batch_size, images, chat), name, loaded[name], given)
        before = None
        if untouched is not None and not images:
            from mmgraft.evaluation.lm_eval.models import plain_lm

            lm = plain_lm(untouched, answerer.processor, batch_size)
            before = _run(lm, name, loaded[name], given)
        seconds = time.monotonic() - started
        sets = _sets(name, loaded[name], after, before, settings, announce)
        results += [one.model_copy(update={"seconds": seconds / len(sets)}) for one in sets]
    return results


def require_harness() -> None:
    """Refuse tasks where the harness is not installed.

    Raises:
        UsageError: It is not; the message has the line that installs it.
    """
    if find_spec("lm_eval") is None:
        raise UsageError(
            "tasks of lm-evaluation-harness need a package more: pip install 'mmgraft[eval]'"
        )


def require_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> None:
    """Refuse tasks that the harness does not have, before anything is asked.

    Raises:
        UsageError: It is not installed; a task is unknown, and near ones are named.
    """
    require_harness()
    _manager(list(tasks), include_path)


# -- what to run --------------------------------------------------------------------------------


def _manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """The harness's index of tasks; its own fourteen thousand files only where they are needed."""
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
    """Whether an index holds a task, or a group and all its tasks; of a tag no index can say."""
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
        left = [
            str(path) for path in sorted(Path(include_path).rglob("*.yaml")) if path not in read
        ]
        if left:
            message += f"; it could not read a task in {', '.join(left[:_NEAR])}: see to that YAML"
    return message


def _load(manager: Any, name: str) -> Any:
    """A task or group with its data, or the list of a tag's tasks."""
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
    if group is not None:
        return group
    return list(loaded["tasks"].values())


def _leaves(loaded: Any) -> list[Any]:
    return loaded if isinstance(loaded, list) else loaded.get_all_tasks()


def _has_images(loaded: Any) -> bool:
    return bool(getattr(_leaves(loaded)[0], "MULTIMODAL", False))


def _workflow_of(answerer: Answerer, name: str, loaded: Any, workflow: str | None) -> str:
    """The workflow of a task.

    Raises:
        UsageError: It cannot run these tasks.
    """
    leaves = _leaves(loaded)
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
    if len({bool(getattr(task, "MULTIMODAL", False)) for task in leaves}) > 1:
        raise UsageError(f"{name} has tasks with images and tasks without; name them one by one")
    if not _has_images(loaded):
        if workflow not in (None, TEXT_WORKFLOW):
            why = answerer.model.workflow(workflow).graft.promises.no_image
            if why:
                raise UsageError(
                    f"task {name} is text, which workflow {workflow!r} cannot answer ({why}); "
                    f"evaluate it with {TEXT_WORKFLOW}"
                )
        return workflow or TEXT_WORKFLOW
    if workflow == TEXT_WORKFLOW:
        raise UsageError(f"task {name} has images, and the text workflow sees none; leave it out")
    for task in leaves:
        if task.OUTPUT_TYPE != "generate_until":
            raise UsageError(
                f"task {task.task_name} scores options beside an image ({task.OUTPUT_TYPE}), which "
                "lm-eval's hf-multimodal cannot; use a set with `metric: choice` for that"
            )
    return workflow or answerer.model.default_workflow


def _model(answerer: Answerer, workflow: str, batch_size: int, images: bool, chat: bool) -> Any:
    from mmgraft.evaluation.lm_eval.models import ImageLM, TextLM

    if images:
        pads = not answerer.model.workflow(workflow).graft.promises.padding
        return ImageLM(answerer, workflow, batch_size if pads else 1, chat)
    return TextLM(answerer, workflow, batch_size)


def _run(lm: Any, name: str, loaded: Any, given: dict[str, Any]) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    tasks = list(loaded) if isinstance(loaded, list) else [loaded]
    try:
        # No standard errors: intervals are drawn from the samples, as everywhere in mmgraft.
        found: Any = simple_evaluate(
            model=lm, tasks=tasks, bootstrap_iters=0, log_samples=True, **given
        )
    except UsageError as error:
        raise UsageError(f"task {name}: {error}") from error
    except (AssertionError, ImportError, NotImplementedError, ValueError) as error:
        raise UsageError(
            f"task {name}: lm-eval refuses it ({type(error).__name__}: {error}); see to its task "
            "file"
        ) from error
    if found is None:
        raise UsageError("tasks run in one process; start mmgraft without a launcher")
    return dict(found)


# -- what came of it ----------------------------------------------------------------------------


def _sets(
    name: str,
    loaded: Any,
    after: dict[str, Any],
    before: dict[str, Any] | None,
    settings: dict[str, Any],
    announce: Announce,
) -> list[SetResult]:
    leaves = [Leaf.of(task, after) for task in _leaves(loaded)]
    bases = [Leaf.of(task, before) for task in _leaves(loaded)] if before is not None else []
    if not isinstance(loaded, list) and loaded.has_aggregation:
        scores = grouped(loaded, leaves, after, announce)
        base = grouped(loaded, bases, before, announce) if before is not None else {}
        change = change_of(leaves, bases, loaded) if before is not None else {}
        kinds = {leaf.name: score_leaf(leaf, announce) for leaf in leaves}
        if scores:
            return [_result(name, leaves, after, settings, scores, base, change, kinds)]
    results = []
    for number, leaf in enumerate(leaves):
        scores, base, change = score_leaf(leaf, announce), {}, {}
        if bases:
            base = score_leaf(bases[number], announce)
            change = change_of([leaf], [bases[number]])
        results.append(_result(leaf.name, [leaf], after, settings, scores, base, change, {}))
    return results


def _result(
    name: str,
    leaves: Sequence[Leaf],
    found: dict[str, Any],
    settings: dict[str, Any],
    scores: dict[str, Score],
    base: dict[str, Score],
    change: dict[str, Score],
    kinds: dict[str, dict[str, Score]],
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
        sha256=hashlib.sha256("".join(leaf.asked for leaf in leaves).encode()).hexdigest(),
        items=sum(leaf.items for leaf in leaves),
        scores=scores,
        base=base,
        change=change,
        kinds=kinds,
        settings=settings | more,
    )
