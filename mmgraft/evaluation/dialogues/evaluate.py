"""Interleaved dialogues evaluated on a graft: built from multiple-choice sets, saved, and scored.

Source: the IIT benchmark of Wings (arXiv 2406.03496): dialogues in the shapes (T), (T,T), (T,T,T),
(T,T,V), (T,V) and (V), whose last question is scored. A run says from which sets they are built;
which questions are alike is read from the base's hidden states.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch

from mmgraft.anatomy import get_path
from mmgraft.data.batches.sequences import pad
from mmgraft.errors import UsageError
from mmgraft.evaluation.dialogues.dialogues import (
    ROWS,
    SHAPES,
    WORDS,
    Candidate,
    build_dialogues,
    buildable,
    is_made_of,
    read_dialogues,
    save_dialogues,
    title,
)
from mmgraft.evaluation.generate.run_features import run_features
from mmgraft.evaluation.items.files import data_file, read_items, set_sha256
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.kept import Kept
from mmgraft.evaluation.likelihood.likelihood import context_length
from mmgraft.evaluation.metrics.answers import read_choice, shows_options
from mmgraft.evaluation.metrics.intervals import Measured
from mmgraft.evaluation.metrics.scoring import groups_of
from mmgraft.evaluation.origin import described_graft, section_of
from mmgraft.evaluation.sets import EvaluatedSet
from mmgraft.evaluation.vision import NO_IMAGE, blind_workflow, measure_set
from mmgraft.inference import Answerer
from mmgraft.model.workflow import TEXT_WORKFLOW
from mmgraft.progress import counted, say
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.results import FOLDER as RESULTS
from mmgraft.runs.results import Results, SetResult

EMBEDDING = "mean of the base's last hidden states"
#: Dialogues a shape.
COUNT = 100

_LONGEST = 512  # ids of a question that are read for its meaning, from its end
_BATCH = 16  # questions read together; fixed, since rounding depends on it


def question_vectors(answerer: Answerer, questions: Sequence[str]) -> np.ndarray:
    """Return what questions mean to the base: the mean over tokens of its last hidden states.

    Args:
        answerer: The graft, whose base reads them in text mode and without a chat template.
        questions: Texts.

    Returns:
        ``(n, h)`` in fp32.
    """
    model, processor = answerer.model, answerer.processor
    ids = [
        list(processor.tokenizer(text or " ")["input_ids"])[-_LONGEST:] or [processor.pad_id]
        for text in questions
    ]
    trunk = get_path(model.base, model.anatomy.trunk_path)
    order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
    vectors: list[np.ndarray] = [np.empty(0)] * len(ids)
    for start in counted("reading questions, batches", range(0, len(order), _BATCH)):
        indices = order[start : start + _BATCH]
        rows = pad([ids[at] for at in indices], processor.pad_id, "right").to(model.device)
        mask = pad([[1] * len(ids[at]) for at in indices], 0, "right").to(model.device)
        with torch.no_grad(), model.text_only():
            states = trunk(input_ids=rows, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).float()  # (b, s, 1)
        means = (states.float() * weights).sum(1) / weights.sum(1)  # (b, h)
        for at, one in zip(indices, means.cpu().numpy(), strict=True):
            vectors[at] = one
    return np.stack(vectors)


def build_iit(
    answerer: Answerer,
    specs: Sequence[SetSpec],
    folder: Path,
    *,
    count: int = COUNT,
    shapes: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, list[Item]]:
    """Return the dialogues of a folder by shape, built and saved there where they are missing.

    Where a set's prompt shows the options with letters, the letters are the options. Questions too
    long for a dialogue of the longest shape are left out, and counted.

    Args:
        answerer: The graft, whose base says which questions are alike.
        specs: Sets; those of ``choice`` are used, by their modality.
        folder: Of the data set; see :mod:`mmgraft.evaluation.dialogues.dialogues`.
        count: Dialogues a shape.
        shapes: See :data:`SHAPES`. Default: all that the sets give.
        seed: Of the sample.

    Raises:
        UsageError: No multiple-choice set, sets too small for a shape, or changed rows.
    """
    chosen = [spec for spec in specs if spec.metric == "choice"]
    if not chosen:
        raise UsageError(
            "no multiple-choice set to build dialogues of; give at least one set with metric: "
            "choice (modality: text, or with images)"
        )
    made_of = {
        "seed": seed,
        "count": count,
        "shapes": None if shapes is None else list(shapes),
        "embedding": EMBEDDING,
        "base": _base_sha256(answerer),
        "sets": [_source(spec) for spec in chosen],
    }
    if not is_made_of(folder, made_of):
        longest = max(map(len, shapes or SHAPES))
        pools = _pools(answerer, chosen, longest)
        possible = list(shapes) if shapes is not None else _possible(pools)
        built = build_dialogues(pools, count, possible, seed)
        save_dialogues(folder, built, made_of)
        say(f"built {sum(map(len, built.values()))} dialogues in {folder}")
    return read_dialogues(folder)


def _possible(pools: Mapping[str, Sequence[Candidate]]) -> list[str]:
    """Return the shapes that the sets give."""
    sizes = {letter: len(pool) for letter, pool in pools.items()}
    possible = buildable(sizes)
    if left := [title(shape) for shape in SHAPES if shape not in possible]:
        say(
            f"no dialogues {', '.join(left)}: there are {sizes['T']} text and {sizes['V']} "
            "visual questions"
        )
    return possible


def _answerable(spec: SetSpec, items: Sequence[Item]) -> list[Item]:
    """Return items whose options are what may be answered: their texts, or the letters shown."""
    if not shows_options(spec.prompt):
        return list(items)
    return [replace(item, options=tuple(ascii_uppercase[: len(item.options)])) for item in items]


def _short(answerer: Answerer, items: Sequence[Item], parts: int) -> list[Item]:
    """Return items of which so many fit into what the base reads, each with its longest answer."""
    processor = answerer.processor
    most = context_length(answerer.model.base.config, processor.tokenizer) // parts
    kept = []
    for item in counted("tokenising questions", items):
        answer = {"role": "assistant", "content": max(item.options, key=len)}
        encoded = processor.encode([*item.messages, answer], False, item.tools, item.where)
        if len(encoded) <= most:
            kept.append(item)
    if len(kept) < len(items):
        say(
            f"{items[0].file}: {len(items) - len(kept)} of {len(items)} questions are left out, "
            f"which are longer than {most} positions, a dialogue's part of what the base reads"
        )
    return kept


def _pools(answerer: Answerer, specs: Sequence[SetSpec], parts: int) -> dict[str, list[Candidate]]:
    """Return candidates by letter, with vectors of length 1."""
    pools: dict[str, list[Candidate]] = {letter: [] for letter in WORDS}
    read = [(spec.name, _answerable(spec, read_items(spec))) for spec in specs]
    for name, items in [(name, _short(answerer, items, parts)) for name, items in read]:
        if not items:
            continue
        vectors = question_vectors(answerer, [item.question for item in items]).astype(np.float64)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        for item, vector in zip(items, vectors / np.maximum(lengths, 1e-12), strict=True):
            pools["V" if item.has_image else "T"].append(Candidate(name, item, vector))
    return pools


def _source(spec: SetSpec) -> dict[str, Any]:
    file = data_file(spec)
    keys = {"name", "modality", "prompt", "columns", "limit", "seed"}
    images = None if spec.images is None else Path(spec.images).name
    own = {"file": file.name, "sha256": set_sha256(spec, file), "images": images}
    return {**spec.model_dump(include=keys), **own}


def _base_sha256(answerer: Answerer) -> str:
    fingerprint = answerer.model.workflow().record.base.fingerprint
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


#: Largest number of tokens of a generated answer.
MAX_NEW_TOKENS = 16


def evaluate_iit(
    answerer: Answerer,
    run: Path,
    specs: Sequence[SetSpec] = (),
    *,
    dialogues: Path | None = None,
    count: int = COUNT,
    workflow: str | None = None,
    batch_size: int = 16,
) -> Results:
    """Score the last question of every dialogue, by log-probability and by a generated answer.

    Dialogues with an image are scored without it too, by log-probability: their blind score. A
    killed run is continued: what it scored and answered is kept in ``results/predictions/``.

    Args:
        answerer: The graft.
        run: Its folder.
        specs: Sets to build from; see :func:`build_iit`.
        dialogues: Folder of saved ones; default: ``results/iit`` of the run, built where missing.
        count: See :func:`build_iit`.
        workflow: Of dialogues with an image; by default the graft's. Others run ``text``.
        batch_size: Dialogues a batch.

    Returns:
        Section ``iit``, a set a shape; not yet written.

    Raises:
        UsageError: See :func:`build_iit`; a graft without the workflow; no such data set.
    """
    graft = described_graft(answerer.model, run, workflow)
    folder = dialogues or run / RESULTS / "iit"
    if dialogues is not None:
        found = read_dialogues(folder)
    else:
        found = build_iit(answerer, specs, folder, count=count)
    kept = Kept(answerer.model, answerer.processor, run, graft, batch_size)
    measured: dict[str, Measured] = {}
    sets: list[SetResult] = []
    for shape, items in found.items():
        say(f"{len(items)} dialogues {title(shape)}")
        spec = SetSpec(name=f"iit.{shape}", metric="choice")
        measured[shape], result = _evaluate(kept, shape, EvaluatedSet(spec, folder / ROWS, items))
        sets.append(result)
    details = {"against_the_question_alone": _against_alone(found, measured)}
    return section_of("iit", graft, sets, details=details)


def _evaluate(kept: Kept, shape: str, each: EvaluatedSet) -> tuple[Measured, SetResult]:
    """Evaluate the dialogues of one shape."""
    start, name, items = time.monotonic(), each.spec.name, each.items
    workflow = kept.graft["workflow"] if "V" in shape else TEXT_WORKFLOW
    features = run_features(kept.model, kept.run, items)
    chosen = measure_set(kept, each, workflow, features)
    answers = kept.answers(f"{name}.answers", items, workflow, MAX_NEW_TOKENS, features)
    measured, groups = chosen.beside(measure_generated(items, answers)), groups_of(items)
    blind = {}
    if "V" in shape:
        blindly = blind_workflow(kept.model, workflow)
        blind[NO_IMAGE] = measure_set(kept, each, blindly, blind=True).scores(groups)
    settings = {
        "workflow": workflow,
        "chance": round(float(np.mean([1 / len(item.options) for item in items])), 4),
        "max_new_tokens": MAX_NEW_TOKENS,
        "batch_size": kept.batch_size,
        **kept.numbers,
    }
    result = each.result(
        measured,
        groups,
        settings,
        blind=blind,
        predictions=kept.shown_file(name),
        seconds=time.monotonic() - start,
    )
    return measured, result.model_copy(update={"name": title(shape)})


def measure_generated(items: Sequence[Item], answers: Sequence[str]) -> Measured:
    """Measure generated answers to multiple choice.

    Args:
        items: Dialogues.
        answers: ``accuracy_generated`` takes the option that an answer names, and ``unread`` is the
            share of answers that name none, which are wrong.
    """
    named = [read_choice(answer, item.options) for item, answer in zip(items, answers, strict=True)]
    right = [index == item.gold for item, index in zip(items, named, strict=True)]
    return Measured.means(accuracy_generated=right, unread=[index is None for index in named])


def _against_alone(
    found: Mapping[str, Sequence[Item]], measured: Mapping[str, Measured]
) -> dict[str, Any]:
    """Return how the turns before a question change its scores: paired, the same last questions."""
    changes: dict[str, Any] = {}
    for shape in measured:
        alone = shape[-1]
        if shape == alone or alone not in measured:
            continue
        change = measured[shape].change(measured[alone], groups_of(found[shape]))
        changes[title(shape)] = {name: one.model_dump() for name, one in change.items()}
    return changes
