"""Every arm through its phases, each phase once, whatever kills the comparison between."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmgraft.comparison import runner
from mmgraft.comparison.files import (
    COMPARISON,
    Phase,
    PhaseRecord,
    arm_folder,
    read_comparison,
    read_phase,
    write_phase,
)
from mmgraft.comparison.plan import ArmPlan, ComparisonPlan, make_plan
from mmgraft.comparison.runner import LOCK, compare, locked, settings_of
from mmgraft.comparison.spec import load_comparison
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.runs.results import Results, read_results
from tiny_runs import losses
from waiting import wait_until

SEEN = {"name": "seen", "metric": "exact", "path": "rows.jsonl"}
READ = {"name": "read", "metric": "choice", "modality": "text", "path": "read.csv"}


EVALUATE = runner.evaluate
USUAL = {"shapes": None, "seed": 0}


class Steps:
    """Record of a comparison, with stand-ins for trainings and evaluations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, str]] = []
        self.fails: tuple[str, str] | None = None
        self.reports = 0
        monkeypatch.setattr(runner, "make_graft", lambda plan, recipe, run: self._graft(run))
        monkeypatch.setattr(runner, "train_arm", self._train)
        monkeypatch.setattr(runner, "evaluate", self._evaluate)
        monkeypatch.setattr(runner._Arm, "_loaded", lambda arm: None)
        monkeypatch.setattr(runner, "write_comparison_report", self._report)

    def _note(self, name: str, phase: str) -> None:
        if (name, phase) == self.fails:
            raise MMGraftError("it failed")
        self.done.append((name, phase))

    def _graft(self, run: Path) -> None:
        self._note(run.name, "graft")

    def _train(self, arm: ArmPlan, record: PhaseRecord, device: str) -> PhaseRecord:
        self._note(arm.name, "train")
        record = record.model_copy(update={"done": True})
        write_phase(arm.run, record)
        return record

    def _evaluate(self, phase: Phase, answerer, plan, arm: ArmPlan, **more) -> None:
        self._note(arm.name, phase)

    def _report(self, out: Path) -> dict[str, Path]:
        self.reports += 1
        return {"md": out / "report.md"}

    def taken(self) -> list[tuple[str, str]]:
        taken, self.done = self.done, []
        return taken


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


@pytest.fixture
def plan(write, tmp_path: Path):
    def make(only: tuple[str, ...] = (), **changes) -> ComparisonPlan:
        spec = load_comparison(write(**{"evaluation": [SEEN, READ], **changes}))
        return make_plan(spec, tmp_path / "out", only=only, device="cpu")

    return make


ALL = ["graft", "train", "text", "vision", "laws"]


def test_arms_go_one_after_another_and_nothing_is_done_twice(
    plan, steps: Steps, said: list[str]
) -> None:
    laws = {"path": "rows.jsonl"}
    done = compare(plan(laws=laws))
    assert steps.taken() == [(arm, phase) for arm in ("llava", "iaa") for phase in ALL]
    assert done.arms == {"llava": ALL, "iaa": ALL}
    assert done.reports == [plan(laws=laws).out / "report.md"]
    assert "arm iaa (2 of 2)" in said
    compare(plan(laws=laws))
    assert steps.taken() == []
    assert steps.reports == 2
    out = plan(laws=laws).out
    assert list(read_comparison(out).arms) == ["llava", "iaa"]


@pytest.mark.parametrize("phase", ALL)
def test_what_failed_is_done_again_and_nothing_else(plan, steps: Steps, phase: str) -> None:
    laws = {"path": "rows.jsonl"}
    steps.fails = ("iaa", phase)
    with pytest.raises(MMGraftError, match="it failed"):
        compare(plan(laws=laws))
    before = steps.taken()
    steps.fails = None
    compare(plan(laws=laws))
    assert [*before, *steps.taken()] == [(a, p) for a in ("llava", "iaa") for p in ALL]
    if phase in ("text", "vision", "laws"):
        record = read_phase(arm_folder(plan(laws=laws).out, "iaa"), phase)
        assert record is not None
        assert len(record.sessions) == 2, "the time of the session that failed counts"


def test_without_sets_there_is_nothing_to_measure_but_identity(plan, steps: Steps) -> None:
    compare(plan(evaluation=[], only=("iaa",)))
    assert steps.taken() == [("iaa", phase) for phase in ("graft", "train", "text")]


def test_training_can_go_first(plan, steps: Steps) -> None:
    done = compare(plan(), train_only=True)
    assert {phase for _, phase in steps.taken()} == {"graft", "train"}
    assert done.reports == []
    compare(plan())
    assert {phase for _, phase in steps.taken()} == {"text", "vision"}


def test_only_some_arms_and_later_the_others(plan, steps: Steps) -> None:
    done = compare(plan(only=("iaa",)))
    assert {name for name, _ in steps.taken()} == {"iaa"}
    assert done.arms["llava"] == []
    assert list(read_comparison(done.out).arms) == ["llava", "iaa"]
    compare(plan())
    assert {name for name, _ in steps.taken()} == {"llava"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"set": {"stages.tune.lr": 0.5}}, "stages.tune.lr: 0.001 before, 0.5 now"),
        ({"seed": 4}, "seed: "),
        ({"set": {"stages.tune.max_steps": 3}}, "stages.tune.max_steps: 2 before, 3 now"),
        ({"vision": {"id": "other"}}, "vision.id"),
    ],
)
def test_an_arm_that_was_started_otherwise_is_refused(plan, steps: Steps, changes, says) -> None:
    begun = plan()
    compare(begun, train_only=True)
    steps.taken()
    before = (begun.out / COMPARISON).read_text()
    with pytest.raises(UsageError) as caught:
        compare(plan(**changes))
    assert says in str(caught.value)
    assert f"remove {begun.out / 'arms' / 'llava'}" in str(caught.value)
    assert steps.taken() == []
    assert (begun.out / COMPARISON).read_text() == before


def test_what_changes_no_training_may_change(plan, steps: Steps) -> None:
    compare(plan(), train_only=True)
    steps.taken()
    compare(plan(set={"log_every": 7}), train_only=True)
    assert steps.taken() == []


def test_sets_that_changed_are_evaluated_again_and_no_others(
    plan, steps: Steps, said: list[str]
) -> None:
    compare(plan(only=("iaa",)))
    steps.taken()
    more = [{**SEEN, "limit": 3}, READ]
    compare(plan(only=("iaa",), evaluation=more))
    assert steps.taken() == [("iaa", "vision")]
    assert any("vision is evaluated anew" in text for text in said)


def test_a_set_that_is_added_later_trains_nothing_anew(plan, steps: Steps) -> None:
    """Arms that are trained, and evaluated or not, are evaluated on what the recipe has now."""
    compare(plan(only=("iaa",)))
    compare(plan(), train_only=True)
    steps.taken()
    chat = {"name": "chat", "metric": "perplexity", "chat": True, "path": "read.csv"}
    done = compare(plan(evaluation=[SEEN, READ, chat]))
    evaluated = [("llava", "text"), ("llava", "vision"), ("iaa", "text")]
    assert steps.taken() == evaluated, "iaa was evaluated on the images before"
    assert [one.name for one in read_comparison(done.out).evaluation] == ["seen", "read", "chat"]


def test_a_new_key_of_a_later_mmgraft_is_no_change(plan, steps: Steps) -> None:
    """Settings at their defaults are not recorded, so that a key may be added later."""
    made = plan()
    found = settings_of(made, made.arms[0], "train")
    assert found is not None
    assert "quantization" not in found
    assert "betas" not in found["stages"][0]
    assert found["stages"][0]["lr"] == 1e-3


def test_all_arms_have_the_dialogues_that_the_first_one_built(
    plan, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    given: list[tuple[str, Path]] = []

    def build(answerer, specs, folder: Path, **settings) -> None:
        assert [one.name for one in specs] == ["read"]
        assert settings == {"count": 3 if built else 2, **USUAL}
        folder.mkdir(parents=True)
        built.append(folder)

    def evaluate(answerer, run: Path, *, dialogues: Path, **_) -> Results:
        given.append((run.name, dialogues))
        return Results(section="iit", mmgraft_version="0")

    monkeypatch.setattr(runner, "build_iit", build)
    monkeypatch.setattr(runner, "evaluate_iit", evaluate)

    def evaluate_dialogues(phase: Phase, *rest, **more) -> None:
        if phase == "iit":
            EVALUATE(phase, *rest, **more)

    monkeypatch.setattr(runner, "evaluate", evaluate_dialogues)
    compare(plan(iit={"count": 2}))
    assert len(built) == 1
    assert given == [("llava", built[0]), ("iaa", built[0])]
    compare(plan(iit={"count": 2}))
    assert len(given) == 2
    compare(plan(iit={"count": 3}))
    assert len(set(built)) == 2
    assert given[2:] == [("llava", built[1]), ("iaa", built[1])]


def test_two_comparisons_in_one_folder_are_refused(plan, steps: Steps) -> None:
    made = plan()
    busy = pytest.raises(UsageError, match="--out")
    with locked(made.out / LOCK), busy:
        compare(made)
    assert steps.taken() == []


CALL = """
import sys
from mmgraft.cli.app import run
from mmgraft.comparison import runner
runner.evaluate = lambda *_, **more: None
runner._Arm._loaded = lambda arm: None
runner.write_comparison_report = lambda out: {}
sys.exit(run(["compare", sys.argv[1], "--out", sys.argv[2], "--device", "cpu"]))
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_goes_on(write, tmp_path: Path) -> None:
    """A real comparison in a process of its own, killed while its second arm trains."""
    file = write(set={"stages.tune.max_steps": 20, "save_every": 2, "feature_cache": True})
    out = tmp_path / "out"
    command = [sys.executable, "-c", CALL, str(file), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    pattern = "arms/iaa/checkpoints/*/checkpoint-*"
    wait_until(lambda: list(out.glob(pattern)) or process.poll() is not None, "a checkpoint")
    process.kill()
    process.wait()
    first = out / "arms/llava/graft.safetensors"
    before = first.stat().st_mtime_ns
    last = subprocess.run(command, capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr
    for name in ("llava", "iaa"):
        run = arm_folder(out, name)
        assert [step for _, step, _ in losses(run)] == list(range(1, 21))
        record = read_phase(run, "train")
        assert record is not None
        assert record.done
        section = read_results(run, "training")
        assert section is not None
        assert section.details["steps"] == {"tune": 20}
    assert first.stat().st_mtime_ns == before
