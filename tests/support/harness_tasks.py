"""Task files of lm-evaluation-harness with a few rows of their own; no network is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tiny_towers import picture

QUESTIONS = [
    ("What colour is the square?", ["blue", "a red circle", "no"], 0),
    ("Is there a dog in the picture?", ["yes", "no, there is no dog", "the lazy fox"], 2),
    ("How many images differ?", ["one", "two", "three and more"], 1),
    ("Does the dog mind?", ["not at all", "it jumps", "nothing"], 2),
    ("Who answers?", ["the assistant", "the user", "the system says so"], 0),
]
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 8,
    "One, two, three images.",
    "user asks and assistant answers; an <image> tag is only text here.",
]

_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "gold",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ],
}
_GENERATED = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6},
    "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
}

_FUNCTIONS = """
from PIL import Image


def images(doc):
    return [Image.open(path) for path in doc["images"]]


def right(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}
"""


def write_tasks(folder: Path) -> Path:
    """Tasks `tiny_choice`, `tiny_rolling`, `tiny_answer`, `tiny_seen` and groups of the first.

    `tiny_answer` and `tiny_seen` read the answers that :func:`write_answers` gave.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": q, "options": o, "gold": g} for q, o, g in QUESTIONS]
    write_task(folder, "tiny_choice", rows, **_CHOICE)
    write_task(folder, "tiny_choice_more", rows[:2], **_CHOICE)
    write_task(
        folder,
        "tiny_rolling",
        [{"page": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
        metric_list=[
            {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    )
    for name, weighted in (("tiny_pooled", True), ("tiny_means", False)):
        metric = {"metric": "acc", "weight_by_size": weighted}
        group = {"group": name, "task": ["tiny_choice", "tiny_choice_more"]}
        _write(folder / f"{name}.yaml", group | {"aggregate_metric_list": [metric]})
    (folder / "functions.py").write_text(_FUNCTIONS)
    write_answers(folder, [""] * len(QUESTIONS), [""] * len(SEEN))
    return folder


SEEN = [
    ("<image>\nWhat?", 1),
    ("<image>\nIs there a triangle in the picture? Say yes or no, please.", 1),
    ("One: <image>\nTwo: <image>\nHow do they differ?", 2),
]
"""Prompts with images, and how many."""


def write_answers(folder: Path, text: list[str], seen: list[str]) -> None:
    """Rows of `tiny_answer` and `tiny_seen`, with these for the right answers."""
    rows = [{"question": q, "answer": a} for (q, _, _), a in zip(QUESTIONS, text, strict=True)]
    more = "process_results: !function functions.right\n"
    write_task(
        folder, "tiny_answer", rows, more, doc_to_text="{{question}}", doc_to_target="answer",
        **_GENERATED,
    )  # fmt: skip
    rows = []
    for number, ((prompt, count), answer) in enumerate(zip(SEEN, seen, strict=True)):
        paths = [folder / f"{number}-{at}.png" for at in range(count)]
        for at, path in enumerate(paths):
            picture(which=(number + at) % 2).save(path)
        rows.append({"prompt": prompt, "images": [str(path) for path in paths], "answer": answer})
    more += "doc_to_image: !function functions.images\n"
    write_task(
        folder, "tiny_seen", rows, more, doc_to_text="{{prompt}}", doc_to_target="answer",
        **_GENERATED,
    )  # fmt: skip


def write_task(
    folder: Path, name: str, rows: list[dict[str, Any]], more: str = "", **config: Any
) -> Path:
    """One task on rows of its own; `more` is YAML as it is, for what names a function."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(data)}}
    config = {"task": name, "dataset_path": "json", "dataset_kwargs": files, **config}
    return _write(folder / f"{name}.yaml", {**config, "test_split": "test"}, more)


def _write(path: Path, config: dict[str, Any], more: str = "") -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False) + more)
    return path
