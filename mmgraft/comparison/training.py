"""Train one arm in a child process, as often as it takes, and record what it cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmgraft.comparison.child import Ended, locked, measured
from mmgraft.comparison.files import PhaseRecord, Session, read_phase, write_phase
from mmgraft.comparison.plan import ArmPlan
from mmgraft.errors import MMGraftError
from mmgraft.evaluation.origin import described_record
from mmgraft.evaluation.report.about_run import METRICS, read_metrics
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.progress import say
from mmgraft.runs.results import Results, write_results
from mmgraft.training import checkpoint
from mmgraft.training.callbacks import text_change
from mmgraft.training.run import VERSIONS
from mmgraft.version import __version__

LOCK = ".training.lock"


def train_arm(arm: ArmPlan, record: PhaseRecord, device: str) -> PhaseRecord:
    """Start or continue an arm's training, and record it as done.

    Args:
        arm: The arm; its run holds a graft and its recipe.
        record: The record of earlier sessions.
        device: Where it is trained.

    Raises:
        MMGraftError: The training failed; its messages went to standard error.
        KeyboardInterrupt: After it was saved.
    """

    def wait() -> None:
        say(f"{arm.name}: a training of an earlier session still runs; waiting for its end")

    def note(session: Session) -> None:
        write_phase(arm.run, record.after(session))

    with locked(arm.run / LOCK, waiting=wait) as lock:
        command = training_command(arm.run, device)
        if command is None:  # all stages are saved; the process was killed as it ended
            done = record.model_copy(update={"done": True})
        else:
            if "--resume" in command:
                say(f"{arm.name}: going on with a training that was stopped")
            ended = measured(command, lock, note)
            note(ended.session)
            _check(arm, ended)
            done = record.after(ended.session, done=True)
    write_results(arm.run, training_results(arm, done, device))
    write_phase(arm.run, done)
    return done


def training_command(run: Path, device: str) -> Sequence[str] | None:
    """Return the command that starts or continues a run; None where nothing is left to train."""
    command = [sys.executable, "-m", "mmgraft", "train", str(run), "--device", device, "--json"]
    progress = checkpoint.read_progress(run)
    if progress is None:
        return command
    finished, stages = progress["finished"], progress.get("stages", [])
    if stages and len(finished) >= len(stages) and not text_change.is_due(run):
        return None
    saved = finished or any((run / checkpoint.FOLDER).glob("*/checkpoint-*"))
    return [*command, "--resume"] if saved else command


def training_results(arm: ArmPlan, record: PhaseRecord, device: str) -> Results:
    """Return the section ``training``: what it cost and how it ended. See docs/comparing.md."""
    graft = GraftFile.read(arm.run)
    lines = read_metrics(arm.run / METRICS)
    losses = {line.get("stage"): line["loss"] for line in lines if "loss" in line}
    progress = checkpoint.read_progress(arm.run) or {}
    parameters: dict[str, int] = progress.get("trained_parameters", {})
    taken: dict[str, int] = progress.get("steps", {})
    stages: list[dict[str, Any]] = [
        {
            "name": stage.name,
            "trains": list(stage.trains),
            "rows": stage.rows,
            "rows_a_step": stage.rows_a_step,
            "steps": stage.steps or taken.get(stage.name),  # of packed rows it is known now
            "trained_parameters": parameters.get(stage.name),
            "final_loss": losses.get(stage.name),
        }
        for stage in arm.stages
    ]
    on_card = [line["memory_gb"] for line in lines if "memory_gb" in line and device != "cpu"]
    features = read_phase(arm.run, "features")
    return Results(
        section="training",
        mmgraft_version=__version__,
        versions=json.loads((arm.run / VERSIONS).read_text(encoding="utf-8")),
        graft=described_record(graft, arm.run, graft.workflow),
        details={
            "arm": arm.name,
            "recipe": arm.recipe.name,
            "device": device,
            "base_trained": graft.base_trained,
            "seconds": record.seconds,
            "cpu_seconds": record.cpu_seconds,
            "sessions": len(record.sessions),
            "feature_seconds": None if features is None else features.seconds,
            "peak_memory_mb": record.peak_memory_mb,
            "peak_card_memory_mb": max(on_card) * 1e9 / 2**20 if on_card else None,
            "trained_parameters": max(parameters.values(), default=None),
            "steps": {stage["name"]: stage["steps"] for stage in stages},
            "final_losses": {stage["name"]: stage["final_loss"] for stage in stages},
            "stages": stages,
        },
    )


def _check(arm: ArmPlan, ended: Ended) -> None:
    if ended.code == 0:
        return
    if ended.code < 0:
        why = f"was killed by signal {-ended.code} (9 is often too little memory)"
    elif ended.code == 130:
        why = "was stopped, and has saved"
    else:
        why = f"ended with code {ended.code}; its messages are above"
    raise MMGraftError(
        f"the training of arm {arm.name!r} {why}. The same command goes on where it stopped"
    )
