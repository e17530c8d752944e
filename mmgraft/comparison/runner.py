"""Run a comparison: every arm through its phases, each phase once, whatever kills it between.

An arm trains in a child process, as often as it takes, so that the time and the memory measured are
the training's own. The parent records every few seconds what the child has used, because a kill
gives no warning. A child that outlives its parent holds a lock, for which the next session waits.
"""

import ctypes
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from pydantic import BaseModel

from mmgraft.atomic import atomic_text
from mmgraft.comparison import files
from mmgraft.comparison.plan import ArmPlan, ComparisonPlan, make_graft
from mmgraft.comparison.report import write_comparison_report
from mmgraft.comparison.spec import Comparison, dump_comparison
from mmgraft.data.features import fill_cache, open_cache
from mmgraft.data.formats.indexed import Joined
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.evaluation.attention.laws import evaluate_laws
from mmgraft.evaluation.dialogues.evaluate import build_iit, evaluate_iit
from mmgraft.evaluation.generate.run_features import run_features
from mmgraft.evaluation.items.files import read_items
from mmgraft.evaluation.origin import described_record
from mmgraft.evaluation.report.about_run import METRICS, read_metrics
from mmgraft.evaluation.text import evaluate_text
from mmgraft.evaluation.vision import evaluate_vision
from mmgraft.frozen import Frozen
from mmgraft.grafts.registry import get_method
from mmgraft.inference import Answerer
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import local_tower
from mmgraft.progress import say
from mmgraft.recipes.source import dump_recipe
from mmgraft.runs.contents import RECIPE
from mmgraft.runs.results import Results, write_results
from mmgraft.training import checkpoint
from mmgraft.training.callbacks import text_change
from mmgraft.training.devices import default_workers
from mmgraft.training.run import VERSIONS
from mmgraft.training.stage_data import StageData
from mmgraft.version import __version__
from mmgraft.vision.towers.registry import load_tower

POLL_SECONDS, NOTE_SECONDS = 0.2, 10.0
_MIB = 1024 * 1024


class Ended(Frozen):
    """End of a child process.

    Attributes:
        code: Its exit code; negative: the signal that killed it.
        session: Its time and memory.
    """

    code: int
    session: files.Session


def check_platform() -> None:
    """Refuse where processes cannot be measured.

    Raises:
        UsageError: Not on Linux, macOS or another Unix.
    """
    if not hasattr(os, "wait4"):
        raise UsageError(
            "mmgraft compare measures its trainings by what Unix reports of a process; run it on "
            "Linux or macOS, or in WSL"
        )


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[IO[bytes]]:
    """Hold a lock file; a child that inherits the file holds it too, as long as it lives.

    Args:
        path: The file; made where it is missing, and left there.
        waiting: Called before waiting for another holder; None gives up instead.

    Raises:
        UsageError: Another process holds it, and ``waiting`` is None.
    """
    import fcntl  # Unix only

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise UsageError(
                    f"another process is at work in {path.parent}; wait for it, or stop it, or "
                    "give another folder with --out"
                ) from None
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def measured(
    command: Sequence[str], lock: IO[bytes], note: Callable[[files.Session], None]
) -> Ended:
    """Run a command to its end and measure it; its standard output is discarded.

    Ctrl-C reaches the child as well, which saves and ends; it is waited for.

    Args:
        command: The program and its arguments.
        lock: From :func:`locked`; the child holds it too.
        note: Called every few seconds with what was used so far.

    Raises:
        KeyboardInterrupt: After the child has ended, and ``note`` was called.
    """
    began, since = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    child = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(lock.fileno(),),
        preexec_fn=_end_with(os.getpid()) if sys.platform == "linux" else None,
    )
    peaks: list[float] = []
    interrupted, noted = False, since

    def session(cpu: float) -> files.Session:
        seconds, peak = time.monotonic() - since, max(peaks, default=None)
        return files.Session(began=began, seconds=seconds, cpu_seconds=cpu, peak_memory_mb=peak)

    while True:
        try:
            peaks += _peak(child.pid)
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - noted >= NOTE_SECONDS:
                noted = time.monotonic()
                note(session(_cpu(child.pid)))
            time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            interrupted = True  # the child got it too: it finishes its step and saves
    child.returncode = os.waitstatus_to_exitcode(status)
    if not peaks:  # ru_maxrss includes the parent's memory, where that is larger
        peaks = [usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / _MIB]
    ended = Ended(child.returncode, session(usage.ru_utime + usage.ru_stime))
    if interrupted:
        note(ended.session)
        raise KeyboardInterrupt
    return ended


def _end_with(parent: int) -> Callable[[], None]:
    """Ask Linux, in the child, for a Ctrl-C when the parent is gone, upon which it saves."""
    libc = ctypes.CDLL(None)

    def request() -> None:
        libc.prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return request


def _peak(pid: int) -> list[float]:
    """Return the peak resident memory of a process in MiB; nothing where there is no /proc."""
    with suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        lines = [line.split() for line in text.splitlines()]
        return [int(words[1]) / 1024 for words in lines if words[:1] == ["VmHWM:"]]
    return []


def _cpu(pid: int) -> float:
    """Return the processor time of a living process in seconds; 0 of one that has ended."""
    with suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system
    return 0.0


TRAINING_LOCK = ".training.lock"


def train_arm(arm: ArmPlan, record: files.PhaseRecord, device: str) -> files.PhaseRecord:
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

    def note(session: files.Session) -> None:
        files.write_phase(arm.run, record.after(session))

    with locked(arm.run / TRAINING_LOCK, waiting=wait) as lock:
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
    files.write_phase(arm.run, done)
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


def training_results(arm: ArmPlan, record: files.PhaseRecord, device: str) -> Results:
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
    features = files.read_phase(arm.run, "features")
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


def fill_features(arm: ArmPlan, device: str) -> None:
    """Compute the tower's features of an arm's images, in the precision of its training.

    Arms share them, and no arm's training time contains them.

    Args:
        arm: Its recipe keeps features in a folder; its run holds a graft.
        device: Where to compute.

    Raises:
        UsageError: An image that cannot be read, with its row, unless the recipe skips such rows.
    """
    recipe = arm.recipe
    assert isinstance(recipe.feature_cache, str)
    full = recipe.base == "full" or any(stage.precision == "fp32" for stage in recipe.stages)
    dtype = torch.float32 if full else torch.bfloat16
    tower = load_tower(local_tower(GraftFile.read(arm.run), arm.run), dtype=dtype, device=device)
    cache = open_cache(tower, Path(recipe.feature_cache))
    reader = StageData(recipe.on_bad_row)
    rows = Joined(
        [reader.rows(one.data or [], recipe.seed, one.image_share) for one in recipe.stages]
    )
    bad = [] if recipe.on_bad_row == "skip" else None
    count = fill_cache(cache, tower, rows, bad=bad, workers=default_workers(device))
    say(f"{arm.name}: features of {count} images are in {cache.folder}")
    if left_out := len({row.key for row in [*reader.bad, *(bad or [])]}):
        say(f"{arm.name}: {left_out} rows cannot be used; its training leaves them out")


def evaluate(
    phase: files.Phase, answerer: Answerer, plan: ComparisonPlan, arm: ArmPlan, **more: Any
) -> None:
    """Evaluate one section of an arm and write it into its results.

    Args:
        phase: ``text``, ``vision``, ``iit`` or ``laws``.
        answerer: The trained arm.
        plan: The comparison.
        arm: The arm.
        **more: ``batch_size``, unless the evaluation chooses it.

    Raises:
        UsageError: A set that cannot be evaluated; nothing is written.
    """
    spec, run = plan.comparison, arm.run
    modality = "text" if phase == "text" else "image"
    sets = [one for one in spec.evaluation if one.modality == modality]
    if phase == "text":
        shared = plan.out / files.BASE
        results = evaluate_text(answerer, run, sets, untouched=plan.base, base_cache=shared, **more)
    elif phase == "vision":
        results = evaluate_vision(answerer, run, sets, **more)
    elif phase == "iit":
        folder = _dialogues(answerer, plan)
        results = evaluate_iit(answerer, run, dialogues=folder, **more)
    else:
        assert spec.laws is not None
        items = read_items(spec.laws.items())
        results = evaluate_laws(
            answerer,
            items,
            run,
            file=Path(spec.laws.path),
            features=run_features(answerer.model, run, items),
            settings=spec.laws.model_dump(mode="json", exclude={"path", "images"}),
            **more,
        )
    write_results(run, results)


def dialogue_settings(comparison: Comparison) -> dict[str, Any]:
    """Return what the dialogues of a comparison depend on, as plain data."""
    assert comparison.iit is not None
    sets = [] if comparison.iit.path is not None else comparison.choices
    return {
        "iit": comparison.iit.model_dump(mode="json"),
        "sets": [one.model_dump(mode="json", exclude_defaults=True) for one in sets],
    }


def _dialogues(answerer: Answerer, plan: ComparisonPlan) -> Path:
    """Return the folder of the dialogues, which the first arm builds for all.

    Its name depends on their settings. Another arm, such as one with a trained base, would find
    other questions alike and build other dialogues.
    """
    spec = plan.comparison
    assert spec.iit is not None
    if spec.iit.path is not None:
        return Path(spec.iit.path)
    text = json.dumps(dialogue_settings(spec), sort_keys=True)
    folder = plan.out / files.DIALOGUES / hashlib.sha256(text.encode()).hexdigest()[:12]
    if not folder.is_dir():
        own = spec.iit.model_dump(exclude={"path"})
        build_iit(answerer, spec.choices, folder, **own)
    return folder


LOCK = ".comparison.lock"
#: Keys of a recipe that may change between two sessions.
_NOT_OF_TRAINING = frozenset(
    {"name", "description", "evaluation", "feature_cache", "log_every", "workers", "tracking"}
)


class Compared(Frozen):
    """Result of a call.

    Attributes:
        out: The comparison's folder.
        arms: Phases that are done, by arm.
        reports: Files of the report; none after ``train_only``.
    """

    out: Path
    arms: dict[str, list[files.Phase]]
    reports: list[Path]


def compare(
    plan: ComparisonPlan, *, train_only: bool = False, batch_size: int | None = None
) -> Compared:
    """Run what is left of a comparison and write its report.

    A phase that is done is not done again, unless it is an evaluation whose settings have changed
    since; a training that was stopped goes on from its last checkpoint.

    Args:
        plan: From ``make_plan``.
        train_only: Leave evaluation and report to a later call.
        batch_size: Questions a batch; None leaves it to each evaluation.

    Raises:
        UsageError: Another process is at work there, or an arm was started with other settings.
        MMGraftError: A training or an evaluation failed; the same command goes on.
    """
    check_platform()
    for arm in plan.arms:
        if arm.name in plan.chosen:
            check_unchanged(plan, arm)
    plan.out.mkdir(parents=True, exist_ok=True)
    with locked(plan.out / LOCK):
        atomic_text(plan.out / files.COMPARISON, dump_comparison(plan.comparison))
        for number, arm in enumerate(plan.arms, start=1):
            if arm.name in plan.chosen:
                say(f"arm {arm.name} ({number} of {len(plan.arms)})")
                _Arm(plan, arm, batch_size).run(train_only)
                gc.collect()  # its model, before the next arm loads its own
        reports = [] if train_only else list(write_comparison_report(plan.out).values())
    return Compared(plan.out, {arm.name: files.phases_done(arm.run) for arm in plan.arms}, reports)


def settings_of(plan: ComparisonPlan, arm: ArmPlan, phase: files.Phase) -> dict[str, Any] | None:
    """Return what a phase depends on, as plain data; None where it has nothing to do."""
    spec = plan.comparison
    recipe = _plain(arm.recipe)
    if phase == "graft":
        vision = {"base": plan.base, "vision": _plain(plan.vision), "template": spec.template}
        return vision | {
            key: recipe[key] for key in ("method", "workflow", "graft", "seed") if key in recipe
        }
    if phase == "features":
        shared = arm.recipe.feature_cache == str(plan.out.resolve() / files.FEATURES)
        return {"data": [stage["data"] for stage in recipe["stages"]]} if shared else None
    if phase == "train":
        return {key: value for key, value in recipe.items() if key not in _NOT_OF_TRAINING}
    if phase == "laws":
        beside = get_method(arm.recipe.method).memory  # which that attention does not reach
        return None if spec.laws is None or beside else _plain(spec.laws)
    if phase == "iit":
        return None if spec.iit is None else dialogue_settings(spec)
    modality = "text" if phase == "text" else "image"
    sets = [_plain(one) for one in spec.evaluation if one.modality == modality]
    # The text section also proves identity, for which it needs no set.
    return {"sets": sets} if sets or phase == "text" else None


def check_unchanged(plan: ComparisonPlan, arm: ArmPlan) -> None:
    """Refuse to go on with an arm whose graft or training was started with other settings.

    Raises:
        UsageError: With the first key that differs and what to do.
    """
    phases: tuple[files.Phase, ...] = ("graft", "train")
    for phase in phases:
        record = files.read_phase(arm.run, phase)
        if record is None:
            continue
        difference = files.first_difference(record.settings, settings_of(plan, arm, phase))
        if difference is not None:
            raise UsageError(
                f"arm {arm.name!r} of {plan.out} was started with other settings ({difference}); "
                f"give another folder with --out, or remove {arm.run} to do this arm anew"
            )


@dataclass
class _Arm:
    """One arm on its way through the phases."""

    plan: ComparisonPlan
    arm: ArmPlan
    batch_size: int | None
    _answerer: Answerer | None = None

    def run(self, train_only: bool) -> None:
        """Do the phases that are left, in order."""
        for phase in files.PHASES:
            settings = settings_of(self.plan, self.arm, phase)
            record = files.read_phase(self.arm.run, phase)
            if settings is None or (record and record.done and record.settings == settings):
                continue
            if phase == "train":
                record = record or files.PhaseRecord(phase=phase, settings=settings)
                files.write_phase(self.arm.run, record)
                record = train_arm(self.arm, record, self.plan.device)
                say(f"{self.arm.name}: trained in {record.seconds:.0f} s")
            elif phase in ("graft", "features"):
                with self._session(files.PhaseRecord(phase=phase, settings=settings)):
                    self._prepare(phase)
            elif not train_only:
                self._evaluate(phase, settings, record)

    def _prepare(self, phase: files.Phase) -> None:
        arm = self.arm
        if phase == "features":
            fill_features(arm, self.plan.device)
            return
        arm.run.mkdir(parents=True, exist_ok=True)
        make_graft(self.plan, arm.recipe, arm.run)
        atomic_text(arm.run / RECIPE, dump_recipe(arm.recipe))

    def _evaluate(
        self, phase: files.Phase, settings: dict[str, Any], record: files.PhaseRecord | None
    ) -> None:
        name = self.arm.name
        if record is None or record.settings != settings:
            if record is not None and record.done:
                say(f"{name}: {phase} is evaluated anew, because its settings changed")
            record = files.PhaseRecord(phase=phase, settings=settings)
        with self._session(record):
            say(f"{name}: evaluating {phase}")
            more = {} if self.batch_size is None else {"batch_size": self.batch_size}
            answerer = self._loaded()
            evaluate(phase, answerer, self.plan, self.arm, **more)

    def _loaded(self) -> Answerer:
        """Return the trained arm, loaded when the first evaluation needs it."""
        if self._answerer is None:
            self._answerer = Answerer.load(self.arm.run, device=self.plan.device)
        return self._answerer

    @contextmanager
    def _session(self, record: files.PhaseRecord) -> Iterator[None]:
        """Time a phase of this process, and record it as done if it did not fail."""
        began = datetime.now(timezone.utc).isoformat(timespec="seconds")
        clock, cpu = time.monotonic(), time.process_time()
        done = False
        try:
            yield
            done = True
        finally:
            session = files.Session(
                began=began, seconds=time.monotonic() - clock, cpu_seconds=time.process_time() - cpu
            )
            files.write_phase(self.arm.run, record.after(session, done))


def _plain(model: BaseModel) -> dict[str, Any]:
    """Return what is set, as plain data: a key that a later mmgraft adds changes no old arm."""
    return model.model_dump(mode="json", exclude_defaults=True)
