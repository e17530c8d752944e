"""``mmgraft demo``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mmgraft.cli.console import human_count, note, print_json, stderr, stdout, table
from mmgraft.cli.options import DryRunFlag, JsonFlag, option
from mmgraft.grafts.registry import built_in

if TYPE_CHECKING:
    from mmgraft.demo.run import DemoReport, DemoSettings

BUDGET_MINUTES = 15


_Hub = Annotated[bool, option("--hub", "Take both models from the Hub, not from packages.")]
_Quick = Annotated[bool, option("--quick", "Two steps a stage and 20 questions: does it run?")]

_FIRST = built_in()[0].name


def demo(
    method: Annotated[str, option("A method with a shipped recipe demo-METHOD.")] = _FIRST,
    out: Annotated[Path | None, option("--out", "Folder; ./demo-<method> when not given.")] = None,
    seed: Annotated[int, option("Seed of the graft's first values and the order of rows.")] = 0,
    hub: _Hub = False,
    quick: _Quick = False,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Do the whole job on a small real model: graft, train, answer, chat, and compare text.

    SmolLM2-135M-Instruct learns to answer easy-VQA's questions about images, on two CPU cores in
    under 15 minutes. No graphics card and, with the demo's packages installed, no network.
    """
    target = out or Path(f"demo-{method}")
    # Everything below loads torch.
    from mmgraft.demo.assets import check_packages
    from mmgraft.demo.run import DemoSettings, check_demo, run_demo
    from mmgraft.training.callbacks.progress import ProgressDisplay

    made = DemoSettings.quick if quick else DemoSettings
    settings = made(method, target, seed=seed, hub=hub)
    check_demo(settings)
    check_packages(hub)
    if dry_run:
        _plan(settings, json)
        return
    report = run_demo(settings, ProgressDisplay.on(stderr()))
    if json:
        print_json(report.as_dict())
        return
    show(report)


def _plan(settings: "DemoSettings", json: bool) -> None:
    from mmgraft.recipes.source import load_recipe

    recipe = load_recipe(f"demo-{settings.method}", method=settings.method)
    steps = {stage.name: settings.max_steps or stage.max_steps for stage in recipe.stages}
    if json:
        print_json({"out": str(settings.out), "recipe": recipe.name, "steps": steps})
        return
    listed = ", ".join(f"{name} ({count} steps)" for name, count in steps.items())
    note(
        f"would graft {settings.method} onto SmolLM2-135M-Instruct in {settings.out}, train it by "
        f"{recipe.name}: {listed}, and answer {settings.questions} test questions before and after"
    )


def show(report: "DemoReport") -> None:
    """Print the chat, the final table and what to do next."""
    out = stdout()
    for turn in report.chat:
        seen = f" [{Path(turn.image).name}]" if turn.image else ""
        out.print(f"> {turn.question}{seen}", markup=False)
        out.print(f"  {turn.answer}", markup=False)
    out.print()
    out.print(_accuracies(report))
    out.print()
    out.print(table(["what", "result"], _facts(report)))
    note(f"images with answers: {report.sheet}")
    note(f"talk to it: mmgraft chat {report.out} --image FILE 'what shape is in the image?'")


def _accuracies(report: "DemoReport") -> Any:
    rows = [
        ("question only", report.question_only),
        ("before training", report.before),
        ("after training", report.after),
    ]
    kinds = sorted(report.after.kinds)
    title = f"{report.method} on easy-VQA, {report.questions} test questions"
    return table(
        ["", "accuracy", "95 % interval", *kinds],
        [
            [
                name,
                f"{score.overall.value:.3f}",
                f"{score.overall.low:.3f} to {score.overall.high:.3f}",
                *(f"{score.kinds[kind]:.3f}" for kind in kinds),
            ]
            for name, score in rows
        ],
        title=title,
    )


def _facts(report: "DemoReport") -> list[list[str]]:
    from mmgraft.training.callbacks.progress import clock

    same = report.identity
    if same.identical:
        text = f"yes, bit for bit ({same.prompts} prompts, {same.positions} positions)"
    else:
        text = f"NO: {same.first_difference}, by up to {same.max_difference:g}"
    base = human_count(report.base_parameters)
    times = [[f"time: {phase.name}", clock(phase.seconds)] for phase in report.phases]
    cpu = f" ({clock(report.cpu_seconds)} of processor time)"
    over = report.seconds > BUDGET_MINUTES * 60
    late = f", over the {BUDGET_MINUTES} minutes it is meant to take" if over else ""
    return [
        ["text logits identical", text],
        ["parameters trained", f"{human_count(report.parameters)} (base: 0 of {base})"],
        ["steps", ", ".join(f"{name} {count}" for name, count in report.steps.items())],
        *times,
        ["time in all", clock(report.seconds) + cpu + late],
    ]
