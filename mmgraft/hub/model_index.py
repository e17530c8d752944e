"""Scores as the Hub's metadata has them: the `model-index` of a model card."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from mmgraft.evaluation.pages.words import interval, score_name
from mmgraft.evaluation.results import Results, SetResult

_TASKS = {"text": "text-generation", "iit": "image-text-to-text"}
_VISION_TASKS = {"caption": "image-to-text", "box": "image-text-to-text"}
_QUESTIONS = "visual-question-answering"


def model_index(name: str, sections: Sequence[Results]) -> list[dict[str, Any]]:
    """One entry for the model with a result for each set; empty where no set was scored.

    Args:
        name: The model's.
        sections: What was measured; attention and training have no place there.
    """
    results = [
        _result(one, _task(section.section, one))
        for section in sections
        if section.section in ("text", "vision", "iit")
        for one in section.sets
    ]
    results = [one for one in results if one["metrics"]]
    return [{"name": name, "results": results}] if results else []


def _task(section: str, one: SetResult) -> str:
    return _TASKS.get(section) or _VISION_TASKS.get(one.metric, _QUESTIONS)


def _result(one: SetResult, task: str) -> dict[str, Any]:
    metrics = [
        {
            "type": name,
            "value": round(score.value, 6),
            "name": f"{score_name(name)}, {score.count:,} items (95 % interval {interval(score)})",
        }
        for name, score in one.scores.items()
        if math.isfinite(score.value)
    ]
    slug = re.sub(r"[^a-z0-9]+", "-", one.name.lower()).strip("-")
    return {
        "task": {"type": task},
        "dataset": {"name": one.name, "type": slug},
        "metrics": metrics,
    }
