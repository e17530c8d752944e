"""What was measured, by which software: what every section of a run's results says of itself."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from mmgraft.evaluation.items.files import file_sha256
from mmgraft.evaluation.metrics.intervals import Estimate
from mmgraft.evaluation.report.about_run import shown_name
from mmgraft.model.files.graft_file import CONFIG_NAME, WEIGHTS_NAME
from mmgraft.runs.results import Score

if TYPE_CHECKING:
    from mmgraft.model.modeling import GraftedModel


def software(*packages: str) -> dict[str, str]:
    """Versions of torch, transformers and of further packages, those that are installed."""
    found = {}
    for name in ("torch", "transformers", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def described_graft(model: GraftedModel, run: Path, workflow: str | None = None) -> dict[str, str]:
    """Method, workflow, base, vision tower, and the SHA-256 of the graft's weights.

    Of a base or tower in a folder the folder's name: results are shown to others.
    """
    flow = model.workflow(workflow)
    record = flow.record
    return {
        "method": record.method,
        "workflow": flow.name,
        "base": shown_name(record.base.id),
        "vision": shown_name(record.vision.name),
        "sha256": weights_sha256(run),
    }


def weights_sha256(run: Path) -> str:
    """Of all weights that a run's folder holds, a trained base's too, and of its config.

    What training writes into the config beside the graft (recipe, results) does not count.
    """
    digest = hashlib.sha256()
    record = json.loads((run / CONFIG_NAME).read_text(encoding="utf-8"))
    for key in ("recipe", "results", "mmgraft_version"):
        record.pop(key, None)
    digest.update(json.dumps(record, sort_keys=True).encode())
    stem = Path(WEIGHTS_NAME).stem
    for path in sorted([*run.glob(f"{stem}*.safetensors"), *run.glob("base/*.safetensors")]):
        digest.update(f"{path.relative_to(run).as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def as_score(found: Estimate) -> Score:
    """An estimate as results keep it."""
    return Score(
        value=found.value, low=found.low, high=found.high, count=found.count, groups=found.groups
    )


def as_scores(found: dict[str, Estimate]) -> dict[str, Score]:
    """Estimates by name as results keep them."""
    return {name: as_score(one) for name, one in found.items()}
