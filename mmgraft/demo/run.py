"""The whole job on a small real model: graft, train, answer, chat, and prove text unchanged.

SmolLM2-135M-Instruct, EfficientNet-Lite2 and easy-VQA, on two CPU cores in under 15 minutes.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformers import TrainerCallback

from mmgraft.atomic import atomic_bytes, atomic_json, atomic_text
from mmgraft.data.rows import Row
from mmgraft.demo import easy_vqa
from mmgraft.demo.assets import DemoModels, check_packages, demo_models
from mmgraft.demo.draft import write_rows
from mmgraft.demo.easy_vqa import Question
from mmgraft.errors import UsageError
from mmgraft.evaluation.generate.answers import answer
from mmgraft.evaluation.generate.run_features import run_features
from mmgraft.evaluation.identity import IdentityReport, load_untouched, text_identity
from mmgraft.evaluation.metrics.answers import Prior, by_kind, exact
from mmgraft.evaluation.metrics.intervals import mean
from mmgraft.evaluation.report.sheets import Answer, SheetItem, draw_sheet, sheet_png
from mmgraft.frozen import Frozen
from mmgraft.grafts.registry import get_method
from mmgraft.inference import Answerer, Dialogue
from mmgraft.model.files.create import create_graft
from mmgraft.model.files.graft_file import CONFIG_NAME, GraftFile
from mmgraft.model.files.load import base_files
from mmgraft.progress import say
from mmgraft.recipes.recipe import Stage
from mmgraft.recipes.source import find_recipe, load_recipe, shipped_recipes
from mmgraft.runs.results import Score as Estimate
from mmgraft.training.devices import pick_device
from mmgraft.training.run import Display, StageResult, plan_training, train


class Score(Frozen):
    """Share of the test questions that were answered right.

    Attributes:
        overall: All of them, with an interval.
        kinds: The share for ``color``, ``shape`` and ``yes/no``.
    """

    overall: Estimate
    kinds: dict[str, float]


class Phase(Frozen):
    """A part of the demo and how long it took.

    Attributes:
        name: Name of the part.
        seconds: Time by the clock.
        cpu_seconds: Processor time of all threads: what it costs whatever else runs.
    """

    name: str
    seconds: float
    cpu_seconds: float


class Turn(Frozen):
    """One question and answer of the short chat; ``image`` is a file or None."""

    question: str
    answer: str
    image: str | None


@dataclass
class DemoReport:
    """Everything that the final table shows.

    Attributes:
        method: Method of the graft.
        base: Folder or Hub id.
        vision: Name of the tower.
        questions: Number of test questions, sampled with a fixed seed.
        question_only: The most frequent training answer to each question.
        before: The fresh graft.
        after: The trained one.
        identity: Text of the trained graft beside an untouched base.
        parameters: Number of the graft's parameters that were trained.
        base_parameters: Number of the base's parameters, none of which was.
        steps: Optimizer steps by stage.
        chat: A few turns.
        phases: The phases in order, with their time.
        seconds: Time of all phases, by the clock.
        cpu_seconds: Processor time of all phases.
        out: The run's folder.
        sheet: The contact sheet.
    """

    method: str
    base: str
    vision: str
    questions: int
    question_only: Score
    before: Score
    after: Score
    identity: IdentityReport
    parameters: int
    base_parameters: int
    steps: dict[str, int]
    out: str
    sheet: str
    chat: list[Turn] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return TypeAdapter(type(self)).dump_python(self)

    def results(self) -> dict[str, Any]:
        """Return the entries of the graft's record, which go into its model card."""
        return {
            f"easy-VQA test, {self.questions} questions": {
                "question only": str(self.question_only.overall),
                "before training": str(self.before.overall),
                "after training": str(self.after.overall),
            },
            "text logits identical to the base": "yes" if self.identity.identical else "no",
        }


QUESTIONS = 1000
#: Seed of the test questions: always the same ones, whatever the seed of a training.
DRAW_SEED = 2026
#: Largest number of tokens in an answer: two make the longest one, and one ends it.
ANSWER_TOKENS = 3
QUICK_STEPS, QUICK_QUESTIONS, QUICK_IMAGES = 2, 20, 24
ALIGN, TUNE = "align", "tune"


class DemoSettings(Frozen):
    """Settings of a demo.

    Attributes:
        method: A method with a shipped recipe ``demo-METHOD``.
        out: Folder of the run; it must not exist, or be empty.
        seed: Seed of the graft's first values and of the order of rows.
        questions: Number of test questions.
        images: Number of training images, from the first; None takes all.
        max_steps: Largest number of steps a stage; None leaves it to the recipe.
        hub: Take the models from the Hub.
        recipe: Name or file of the recipe; None takes the method's shipped one.
    """

    method: str
    out: Path
    seed: int = 0
    questions: int = QUESTIONS
    images: int | None = None
    max_steps: int | None = None
    hub: bool = False
    recipe: str | Path | None = None

    @classmethod
    def quick(cls, method: str, out: Path, seed: int = 0, hub: bool = False) -> "DemoSettings":
        """Return settings for every phase, none of them long enough to learn anything."""
        return cls(method, out, seed, QUICK_QUESTIONS, QUICK_IMAGES, QUICK_STEPS, hub)


def run_demo(
    settings: DemoSettings, display: Display = lambda *_: (), models: DemoModels | None = None
) -> DemoReport:
    """Do the whole job and leave a trained run with its report.

    Args:
        settings: Method, folder and sizes.
        display: Makes the callbacks that show a stage's progress; see ``mmgraft.training.run``.
        models: Used instead of the demo's own.

    Returns:
        The report, also written as ``results/demo.json`` in the run.

    Raises:
        UsageError: An unknown method, a missing package, or a folder that is not empty.
        MMGraftError: A full disk, or the Hub cannot be reached.
    """
    return _Demo(settings, display).run(models)


def demo_methods() -> list[str]:
    """Return the methods that have a demo, by the shipped recipes ``demo-METHOD``."""
    return [name.removeprefix("demo-") for name in shipped_recipes() if name.startswith("demo-")]


def check_demo(settings: DemoSettings) -> None:
    """Check what can be checked before anything is loaded or written.

    Raises:
        UsageError: An unknown method, or a folder that is not empty.
    """
    if settings.method not in (known := demo_methods()):
        raise UsageError(f"the demo has no method {settings.method!r}: choose {', '.join(known)}")
    if settings.out.exists() and (
        not settings.out.is_dir() or next(settings.out.iterdir(), None) is not None
    ):
        raise UsageError(
            f"{settings.out} is not empty: remove it, or name another folder with --out"
        )


class _Demo:
    def __init__(self, settings: DemoSettings, display: Display) -> None:
        check_demo(settings)
        self.settings = settings
        self.display = display
        self.phases: list[Phase] = []
        self.device = pick_device(None)
        self._since = time.monotonic(), time.process_time()

    def run(self, models: DemoModels | None) -> DemoReport:
        """Run all phases in order."""
        settings = self.settings
        if models is None:
            check_packages(settings.hub)
        root = easy_vqa.folder()
        train_set, test_set = easy_vqa.questions("train"), easy_vqa.questions("test")
        tested = easy_vqa.draw(test_set, settings.questions, DRAW_SEED)
        prior = Prior((question.text, question.answer) for question in train_set)
        self._took("data")
        models = models or demo_models(settings.hub)
        self._took("models")
        data = self._write_rows(train_set)
        self._graft(models)
        self._took("graft")
        answers, _ = self._answer(tested, root)
        before = _score(tested, answers)
        self._took("before training")
        stages = self._train(data, root)
        answers, answerer = self._answer(tested, root)
        after = _score(tested, answers)
        self._took("after training")
        identity = self._compare(answerer)
        self._took("text compared")
        chat = _chat(answerer, tested[0], root)
        sheet = self._sheet(tested, answers, root)
        self._took("chat and images")
        report = DemoReport(
            method=settings.method,
            base=models.base,
            vision=models.vision.name,
            questions=len(tested),
            question_only=_score(tested, [prior(question.text) for question in tested]),
            before=before,
            after=after,
            identity=identity,
            parameters=max(stage.trained_parameters for stage in stages),
            base_parameters=sum(p.numel() for p in answerer.model.base.parameters()),
            steps={stage.stage: stage.steps for stage in stages},
            out=str(settings.out),
            sheet=str(sheet),
            chat=chat,
            phases=self.phases,
            seconds=sum(phase.seconds for phase in self.phases),
            cpu_seconds=sum(phase.cpu_seconds for phase in self.phases),
        )
        self._record(report)
        return report

    # -- phases ---------------------------------------------------------------------------------

    def _took(self, name: str) -> None:
        """End a phase, which began where the one before it ended."""
        now = time.monotonic(), time.process_time()
        phase = Phase(name, now[0] - self._since[0], now[1] - self._since[1])
        self._since = now
        self.phases.append(phase)
        say(f"{name}: {phase.seconds:.0f} s")

    def _write_rows(self, found: Sequence[Question]) -> dict[str, Path]:
        """Write the rows of both stages: captions to align by, questions to tune by."""
        settings = self.settings
        if settings.images is not None:
            found = [question for question in found if question.number < settings.images]
        rows = {
            ALIGN: easy_vqa.caption_rows(found),
            TUNE: easy_vqa.question_rows(found, seed=settings.seed),
        }
        (settings.out / "data").mkdir(parents=True, exist_ok=True)
        files = {stage: settings.out / "data" / f"{stage}.jsonl" for stage in rows}
        for stage, file in files.items():
            write_rows(rows[stage], file)
        return files

    def _graft(self, models: DemoModels) -> None:
        settings = self.settings
        file = find_recipe(settings.recipe or f"demo-{settings.method}")
        recipe = load_recipe(file, method=settings.method)
        kind = get_method(settings.method)
        config = kind.config_class.parse(recipe.graft.config, f"settings of {recipe.name}")
        create_graft(
            models.base,
            models.vision,
            config,
            settings.out,
            projector=recipe.graft.projector,
            seed=settings.seed,
        )
        atomic_text(settings.out / "recipe.yaml", file.read_text(encoding="utf-8"))

    def _answer(self, tested: Sequence[Question], root: Path) -> tuple[list[str], Answerer]:
        """Return the answers of the run as it is now, and the loaded model."""
        answerer = Answerer.load(self.settings.out, device=self.device)
        rows = [
            Row(str(number), easy_vqa.prompt(question, root))
            for number, question in enumerate(tested, start=1)
        ]
        # The same cache as training's, so that no image passes through the tower twice.
        features = run_features(answerer.model, self.settings.out, rows)
        answers = answer(
            answerer.model,
            answerer.processor,
            [row.messages for row in rows],
            max_new_tokens=ANSWER_TOKENS,
            features=features,
        )
        return answers, answerer

    def _train(self, data: dict[str, Path], root: Path) -> list[StageResult]:
        gc.collect()  # the model that answered before training
        settings = self.settings
        plan = plan_training(
            settings.out,
            data=[f"{stage}={file}" for stage, file in data.items()],
            images=str(root),
            overrides=[f"seed={settings.seed}"],
            max_steps=settings.max_steps,
            device=self.device,
        )

        def display(stage: Stage, number: int, stages: int) -> Sequence[TrainerCallback]:
            if number > 1:
                self._took(f"training: {plan.stages[number - 2].name}")
            return self.display(stage, number, stages)

        results = train(plan, display=display)
        self._took(f"training: {plan.stages[-1].name}")
        return results

    def _compare(self, answerer: Answerer) -> IdentityReport:
        record = answerer.model.workflow().record
        folder = base_files(record, self.settings.out).path
        untouched, tokenizer = load_untouched(folder, answerer.model.base)
        return text_identity(answerer.model, answerer.processor, untouched, tokenizer)

    def _sheet(self, tested: Sequence[Question], answers: Sequence[str], root: Path) -> Path:
        shown = [
            SheetItem(
                root / question.image,
                question.text,
                question.answer,
                [Answer("", said, _right(question, said))],
            )
            for question, said in zip(tested[:24], answers, strict=False)
        ]
        path = self.settings.out / "results" / "contact_sheet.png"
        path.parent.mkdir(exist_ok=True)
        title = f"easy-VQA test images, {self.settings.method} on SmolLM2-135M-Instruct"
        atomic_bytes(path, sheet_png(draw_sheet(shown, columns=6, title=title)))
        return path

    def _record(self, report: DemoReport) -> None:
        out = self.settings.out
        atomic_json(out / "results" / "demo.json", report.as_dict())
        record = GraftFile.read(out).model_copy(update={"results": report.results()})
        atomic_text(out / CONFIG_NAME, record.dump())


def _right(question: Question, said: str) -> bool:
    return exact(said, question.answer)


def _score(tested: Sequence[Question], answers: Sequence[str]) -> Score:
    right = [_right(question, said) for question, said in zip(tested, answers, strict=True)]
    images = [question.number for question in tested]
    return Score(mean(right, groups=images), by_kind(right, [one.kind for one in tested]))


def _chat(answerer: Answerer, shown: Question, root: Path) -> list[Turn]:
    """Hold two turns about a test image, and one without an image, which the base answers."""
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    image = str(root / shown.image)
    seeing = Dialogue(answerer)
    seeing.add_image(image)
    turns = []
    for text, shows in (("what shape is in the image?", image), ("what color is the shape?", None)):
        turns.append(Turn(text, seeing.say(text, **settings), shows))
    text = "What is the capital of France?"
    turns.append(Turn(text, Dialogue(answerer).say(text, **settings), None))
    return turns
