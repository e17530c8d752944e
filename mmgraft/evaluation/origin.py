"""Origin of results: the graft and the software that every section of a run names."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mmgraft.evaluation.items.files import file_sha256
from mmgraft.evaluation.report.about_run import shown_name
from mmgraft.model.files.graft_file import CONFIG_NAME, WEIGHTS_NAME, GraftFile
from mmgraft.model.modeling import GraftedModel
from mmgraft.runs.packages import versions_of
from mmgraft.runs.results import Results, Section, SetResult
from mmgraft.version import __version__


def described_graft(model: GraftedModel, run: Path, workflow: str | None = None) -> dict[str, str]:
    """Return method, workflow, base, vision tower, and the SHA-256 of the graft's weights.

    Of a base or tower in a folder the folder's name: results are shown to others.
    """
    flow = model.workflow(workflow)
    return described_record(flow.record, run, flow.name)


def described_record(record: GraftFile, run: Path, workflow: str) -> dict[str, str]:
    """Return the same of a graft that is not loaded."""
    return {
        "method": record.method,
        "workflow": workflow,
        "base": shown_name(record.base.id),
        "vision": shown_name(record.vision.name),
        "sha256": weights_sha256(run),
    }


def section_of(
    section: Section, graft: dict[str, str], sets: list[SetResult], *packages: str, **more: Any
) -> Results:
    """Return a section of results with the software that measured it.

    Args:
        section: Its name.
        graft: From :func:`described_graft`.
        sets: What was measured.
        *packages: Whose versions are noted beside those of torch and transformers.
        **more: ``identity`` or ``details``.
    """
    return Results(
        section=section,
        mmgraft_version=__version__,
        versions=versions_of(["torch", "transformers", *packages]),
        graft=graft,
        sets=sets,
        **more,
    )


def weights_sha256(run: Path) -> str:
    """Return the SHA-256 of a run's config and weights, a trained base's too.

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
