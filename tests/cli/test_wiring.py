"""Every option of every command reaches what the command calls.

A table: a command line with options off their defaults, the function that is called in the end, and
what it must be called with. An option that no line of the table has, fails the last test.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from mmgraft.cli.app import COMMANDS, _real_command
from mmgraft.grafts.expert.config import ExpertConfig
from mmgraft.grafts.iaa.config import IAAConfig
from mmgraft.grafts.lora.config import LoraConfig
from mmgraft.grafts.wings.config import WingsConfig
from mmgraft.grafts.xattn.config import XattnConfig
from mmgraft.vision.projectors.configs import MlpConfig
from wires import LOADING, READING, READS, SPEAKS, SPOKEN, Stop

TABLE: list[tuple[list[str], str, dict[str, Any]]] = [
    (
        [
            "train",
            "run",
            "--recipe",
            "r",
            "--data",
            "a=x",
            "--data",
            "y",
            "--images",
            "pics",
            "--read",
            "format=vqa",
            "--set",
            "seed=3",
            "--max-steps",
            "7",
            "--device",
            "mps",
            "--processes",
            "3",
            "--dry-run",
        ],
        "mmgraft.training.run.plan_training",
        {
            "run": Path("run"),
            "recipe": "r",
            "data": ["a=x", "y"],
            "images": "pics",
            "read": ["format=vqa"],
            "overrides": ["seed=3"],
            "max_steps": 7,
            "device": "mps",
            "count": 3,
            "resume": False,
            "restart": False,
        },
    ),
    (
        ["train", "run", "--resume"],
        "mmgraft.training.run.plan_training",
        {"resume": True, "restart": False},
    ),
    (
        ["train", "run", "--restart"],
        "mmgraft.training.run.plan_training",
        {"resume": False, "restart": True},
    ),
    (
        ["train", "run", "--processes", "2", "--max-steps", "7"],
        "mmgraft.cli.processes.launch",
        {"count": 2, "arguments": ["train", "run", "--max-steps", "7"]},
    ),
    (
        [
            "estimate",
            "t",
            "--base",
            "b",
            "--vision",
            "v",
            "--recipe",
            "r",
            "--set",
            "seed=3",
            "--length",
            "99",
            "--data",
            "x",
            "--images",
            "pics",
            "--read",
            "format=vqa",
            "--device",
            "cpu",
            "--processes",
            "4",
        ],
        "mmgraft.training.memory.request.read_request",
        {
            "target": "t",
            "base": "b",
            "vision": "v",
            "recipe": "r",
            "overrides": ["seed=3"],
            "length": 99,
            "data": ["x"],
            "images": "pics",
            "read": ["format=vqa"],
            "device": "cpu",
            "processes": 4,
        },
    ),
    (
        [
            "import",
            "x/y",
            "--out",
            "o",
            "--base",
            "x/b",
            "--layers",
            "1,2",
            "--tower",
            "t",
            "--revision",
            "v1",
            "--force",
            "--dry-run",
        ],
        "mmgraft.published.importer.import_checkpoint",
        {
            "source": "x/y",
            "out_dir": Path("o"),
            "base": "x/b",
            "layers": "1,2",
            "tower": "t",
            "revision": "v1",
            "force": True,
            "dry_run": True,
        },
    ),
    (
        ["inspect", "m", "--revision", "v1"],
        "mmgraft.model.files.summary.locate",
        {"name": "m", "revision": "v1"},
    ),
    (
        ["data", "prepare", "easy-vqa", "--out", "o", "--seed", "5", "--force", "--dry-run"],
        "mmgraft.demo.packaged.prepare",
        {"name": "easy-vqa", "out": Path("o"), "seed": 5, "force": True, "dry_run": True},
    ),
    (["data", "check", "rows.jsonl", *READING], "mmgraft.training.views.Selection", READS),
    (["data", "preview", "rows.jsonl", *READING], "mmgraft.training.views.Selection", READS),
    (
        ["demo", "--method", "wings", "--out", "o", "--seed", "5", "--hub"],
        "mmgraft.demo.run.DemoSettings",
        {"method": "wings", "out": Path("o"), "seed": 5, "hub": True},
    ),
    (
        ["demo", "--method", "wings", "--out", "o", "--seed", "5", "--hub", "--quick"],
        "mmgraft.demo.run.DemoSettings.quick",
        {"method": "wings", "out": Path("o"), "seed": 5, "hub": True},
    ),
    (
        ["export", "run", "--to", "graft", "--out", "o", "--dry-run"],
        "mmgraft.export.graft.export_graft",
        {"run": Path("run"), "out": Path("o"), "dry_run": True},
    ),
    (
        ["export", "run", "--to", "full", "--out", "o", "--base", "b"],
        "mmgraft.export.graft.export_full",
        {"run": Path("run"), "out": Path("o"), "base": "b", "dry_run": False},
    ),
    (
        ["export", "run", "--to", "llava", "--base", "b", "--dtype", "float16", "--dry-run"],
        "mmgraft.export.llava.export.export_llava",
        {
            "run": Path("run"),
            "out": Path("run-llava"),
            "base": "b",
            "dtype": "float16",
            "dry_run": True,
        },
    ),
    (
        ["export", "run", "--to", "mmproj", "--base", "b", "--outtype", "q8_0", "--dry-run"],
        "mmgraft.export.gguf.export.export_gguf",
        {
            "run": Path("run"),
            "out": Path("run-mmproj"),
            "kind": "mmproj",
            "base": "b",
            "outtype": "q8_0",
            "dry_run": True,
        },
    ),
    (
        ["export", "run", "--to", "vllm", "--also", "run", "--dtype", "float16", "--out", "o"],
        "mmgraft.export.vllm.export_vllm",
        {
            "runs": [Path("run"), Path("run")],
            "out": Path("o"),
            "dtype": "float16",
            "dry_run": False,
        },
    ),
    (
        ["export", "run", "--to", "graft", "--workflow", "grounding"],
        "mmgraft.export.folder.find_workflow",
        {"run": Path("run"), "name": "grounding"},
    ),
    (
        ["export", "run", "--to", "graft", "--out", "o", "--force"],
        "mmgraft.export.folder.check_folder",
        {"out": Path("o"), "run": Path("run"), "force": True},
    ),
    (
        ["push", "run", "--base-id", "a/b", "--vision-id", "a/v", "--license", "mit"],
        "mmgraft.hub.push.plan_push",
        {"run": Path("run"), "base_id": "a/b", "vision_id": "a/v", "license": "mit"},
    ),
    (
        ["recipes", "validate", "iaa", "--method", "wings"],
        "mmgraft.cli.recipes.load_recipe",
        {"method": "wings"},
    ),
    (["recipes", "ls", "--method", "nosuch"], "mmgraft.cli.recipes.get_method", {"name": "nosuch"}),
    (
        [
            "compare",
            "easy-vqa",
            "--out",
            "o",
            "--only",
            "a",
            "--only",
            "b",
            "--max-steps",
            "3",
            "--limit",
            "9",
            "--device",
            "mps",
        ],
        "mmgraft.comparison.plan.make_plan",
        {"out": Path("o"), "only": ["a", "b"], "max_steps": 3, "limit": 9, "device": "mps"},
    ),
    (
        ["compare", "easy-vqa", "--data", "a=x", "--images", "pics"],
        "mmgraft.comparison.spec.with_files",
        {"data": ["a=x"], "images": "pics"},
    ),
    (
        ["compare", "easy-vqa", "--set", "iaa:seed=3"],
        "mmgraft.comparison.spec.with_settings",
        {"settings": ["iaa:seed=3"]},
    ),
    (
        ["laws", "run", "rows.jsonl", "--images", "pics", "--limit", "9", "--seed", "5"],
        "mmgraft.evaluation.attention.laws.read_samples",
        {"path": Path("rows.jsonl"), "images": Path("pics"), "limit": 9, "seed": 5},
    ),
    (
        ["generate", "run", "rows.jsonl", "--out", "o.jsonl", "--images", "pics",
         "--read", "format=swift", "--limit", "9"],
        "mmgraft.recipes.source.entry_of",
        {"path": "rows.jsonl", "images": Path("pics"), "read": ["format=swift", "limit=9"]},
    ),
    (
        ["data", "convert", "rows.jsonl", "o.jsonl", "--to", "messages", "--image-data", "beside",
         "--images", "pics", "--read", "format=trl", "--read", "limit=3", "--force"],
        "mmgraft.recipes.source.entry_of",
        {"path": "rows.jsonl", "images": Path("pics"), "read": ["format=trl", "limit=3"]},
    ),
]  # fmt: skip


def relative(value: Any) -> Any:
    """A path below the current folder as a user writes it."""
    inside = isinstance(value, Path) and value.is_absolute() and value.is_relative_to(Path.cwd())
    return value.relative_to(Path.cwd()) if inside else value


@pytest.mark.parametrize(
    ("line", "target", "wanted"),
    TABLE,
    ids=lambda part: part[0] + part[-1] if isinstance(part, list) else "",
)
def test_options_reach_what_is_called(run: Path, cli, called, line, target, wanted) -> None:
    calls = called(target, Stop("that far"))
    ran = cli(*line)
    assert calls, ran.err
    assert ran.code == 2, ran.err
    found = {name: relative(calls[0].get(name)) for name in wanted}
    assert found == wanted


# -- grafts ------------------------------------------------------------------------------------


def test_graft(run: Path, cli, called) -> None:
    made = called("mmgraft.model.files.create.create_graft", Stop("that far"))
    line = [
        "graft",
        "x/b",
        "--method",
        "iaa",
        "--layers",
        "1,2",
        "--structure",
        "b",
        "--gate",
        "scalar",
        "--no-embedding",
        "--no-norm",
        "--no-head",
        "--vision",
        "some/tower",
        "--feature-layer",
        "0",
        "--projector",
        "mlp",
        "--projector-norm",
        "--projector-option",
        "hidden=6",
        "--projector-option",
        "init_scale=0.5",
        "--template",
        "plain",
        *SPOKEN,
        "--workflow",
        "see",
        "--out",
        "new",
        "--revision",
        "v1",
        "--verify",
        "full",
    ]
    cli(*line)
    given = made[0]
    spec, template = given.pop("vision"), given.pop("template")
    assert (spec.id, spec.feature_layer) == ("some/tower", 0)
    assert (template.kind, template.options) == ("plain", SPEAKS)
    config = IAAConfig(
        layers="1,2", structure="b", gate="scalar", embedding=False, norm=False, head=False
    )
    assert given == {
        "base": "x/b",
        "config": config,
        "folder": Path("new"),
        "workflow": "see",
        "projector": MlpConfig(norm=True, hidden=6, init_scale=0.5),
        "revision": "v1",
        "full_fingerprint": True,
        "dry_run": False,
    }
    cli("graft", "x/b", "--method", "iaa", "--layers", "1", "--untie", "--dry-run")
    assert made[1]["config"].untie
    assert made[1]["dry_run"]
    assert not made[1]["full_fingerprint"]
    assert made[1]["folder"] == Path("b-iaa")


def test_graft_of_another_method(run: Path, cli, called) -> None:
    made = called("mmgraft.model.files.create.create_graft", Stop("that far"))
    cli(
        "graft",
        "x/b",
        "--method",
        "wings",
        "--rank",
        "3",
        "--heads",
        "2",
        "--learners",
        "visual",
        "--max-length",
        "99",
        "--layers",
        "2,3",
    )
    wanted = WingsConfig(rank=3, heads=2, learners=["visual"], max_length=99, layers="2,3")
    assert made[0]["config"] == wanted
    of_code = ("--set", "system_prompt_length=2", "--set", "image_token_length=4")
    cli("graft", "x/b", "--method", "wings", "--variant", "official", *of_code)
    assert len(made) == 2
    official = made[1]["config"]
    assert (official.method, official.system_prompt_length) == ("wings-official", 2)
    cli("graft", "x/b", "--method", "wings", "--set", "rank=5")
    assert made[2]["config"].rank == 5
    more = ("--alpha", "7.5", "--dropout", "0.25", "--gate", "token", "--layers", "0,2")
    cli("graft", "x/b", "--method", "lora", "--targets", "feedforward", "--rank", "5", *more)
    wanted = {"targets": "feedforward", "rank": 5, "alpha": 7.5, "dropout": 0.25, "gate": "token"}
    assert made[3]["config"] == LoraConfig.model_validate({**wanted, "layers": "0,2"})
    more = ("--parts", "feedforward", "--rank", "6", "--image-positions", "shared")
    cli("graft", "x/b", "--method", "expert", "--layers", "every:4", *more)
    wanted = {"parts": ["feedforward"], "rank": 6, "image_positions": "shared", "layers": "every:4"}
    assert made[4]["config"] == ExpertConfig.model_validate(wanted)
    more = ("--attend", "all", "--feedforward", "none", "--heads", "2x8/1", "--gate", "linear")
    cli("graft", "x/b", "--method", "xattn", "--preset", "flamingo", "--layers", "spread:2", *more)
    wanted = {"attend": "all", "feedforward": "none", "heads": "2x8/1", "gate": "linear"}
    flamingo = {"layers": "spread:2", "layer_norm": True, "qk_norm": False, "preset": "flamingo"}
    assert made[5]["config"] == XattnConfig.model_validate({**flamingo, **wanted})


def test_graft_by_a_recipe(run: Path, cli, called) -> None:
    """The recipe's settings, where no option says otherwise."""
    made = called("mmgraft.model.files.create.create_graft", Stop("that far"))
    recipe = run / "recipe.yaml"
    recipe.write_text(
        "name: x\nmethod: iaa\nworkflow: own\ngraft:\n  vision: some/tower\n  feature_layer: -3\n"
        "  vision_options: {image_size: 32}\n"
        "  config: {layers: [2], gate: scalar, structure: b}\n"
        "  projector: {kind: mlp, norm: true, hidden: 7}\n"
        "stages: [{name: a, train: [projector], lr: 1.0}]\n"
    )
    cli("graft", "x/b", "--recipe", recipe)
    cli(
        "graft",
        "x/b",
        "--recipe",
        recipe,
        "--feature-layer",
        "1",
        "--workflow",
        "see",
        "--vision",
        "w",
        "--no-projector-norm",
        "--projector-option",
        "init_scale=0.5",
    )
    first, second = made
    assert first["config"] == IAAConfig(layers=[2], gate="scalar", structure="b")
    assert first["workflow"] == "own"
    assert (first["vision"].id, first["vision"].feature_layer) == ("some/tower", -3)
    assert first["projector"] == MlpConfig(norm=True, hidden=7)
    assert first["vision"].options == {"image_size": 32}
    assert second["workflow"] == "see"
    assert second["vision"].options == {}
    assert (second["vision"].name, second["vision"].feature_layer) == ("w", 1)
    assert second["projector"] == MlpConfig(norm=False, hidden=7, init_scale=0.5)


def test_graft_is_not_forced_by_default(run: Path, cli, called) -> None:
    made = called("mmgraft.model.files.create.create_graft", Stop("that far"))
    line = ("graft", "x/b", "--method", "iaa", "--layers", "1", "--out", run)
    assert "is not empty" in cli(*line).err
    cli(*line, "--force")
    assert len(made) == 1


# -- the rest ----------------------------------------------------------------------------------


def test_compare(run: Path, cli, called) -> None:
    planned = called("mmgraft.comparison.plan.make_plan", Stop("that far"))
    cli("compare", "easy-vqa", "--base", "b", "--vision", "v", "--root", "r", "--seed", "5")
    found = planned[0]["comparison"]
    assert (found.base, found.vision, found.root, found.seed) == ("b", "v", "r", 5)
    plan = SimpleNamespace(out=Path("o"))
    called("mmgraft.comparison.plan.make_plan", plan)
    ran = called("mmgraft.comparison.runner.compare", Stop("that far"))
    cli("compare", "easy-vqa", "--train-only", "--batch-size", "3", "--json")
    assert (ran[0]["train_only"], ran[0]["batch_size"]) == (True, 3)


def test_push(run: Path, cli, called, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SimpleNamespace(warnings=[], all_files=lambda repo_id: [])
    target = SimpleNamespace(repo_id="me/mine", revision=None, private=True, warnings=[], record=1)
    called("mmgraft.hub.push.plan_push", plan)
    monkeypatch.setattr("mmgraft.cli.push.replace", lambda plan, record: plan)
    found = called("mmgraft.hub.push.find_target", target)
    asked = called("mmgraft.cli.push.confirm", False)
    sent = called("mmgraft.hub.push.send", Stop("that far"))
    line = ["push", "run", "--repo-id", "me/mine", "--private"]
    cli(*line)
    assert not list(asked[0].values())[1]
    assert not sent
    called("mmgraft.cli.push.confirm", True)
    cli(*line, "--yes")
    assert (found[0]["repo_id"], found[0]["private"]) == ("me/mine", True)
    assert sent[0]["private"]


def test_data(run: Path, cli, called) -> None:
    view = SimpleNamespace(entries=[], processor=1, max_length=2, skip_text=True, positions=3)
    called("mmgraft.training.views.views", [view])
    checker = called("mmgraft.data.checking.Checker", Stop("that far"))
    for more in ([], ["--quick"]):
        cli("data", "check", "rows.jsonl", *more)
    assert [one["quick"] for one in checker] == [False, True]
    names = ("processor", "max_length", "skip_text", "positions")
    assert [checker[0][name] for name in names] == [1, 2, True, 3]
    shown = called("mmgraft.data.formats.sources.row_at", Stop("that far"))
    cli("data", "preview", "rows.jsonl", "--run", "run", "--row", "4")
    assert shown[0]["number"] == 4


# -- nothing is left out -----------------------------------------------------------------------

ELSEWHERE = {
    "json": "test_processes.py and each command's own tests read what it prints",
    "dry_run": "each command's own tests compare folders before and after",
    "recipes cp": "test_recipes.py",
}
"""Options that no function is called with, and where they are tested."""


def commands() -> Iterator[tuple[str, click.Command]]:
    for name, command in COMMANDS.items():
        made = _real_command(name, command)
        inner = getattr(made, "commands", None)
        if inner is not None:
            yield from ((f"{name} {own}", one) for own, one in inner.items())
        else:
            yield name, made


@pytest.mark.parametrize(
    ("name", "command"), commands(), ids=lambda part: part if isinstance(part, str) else ""
)
def test_every_option_is_tried(name: str, command: click.Command) -> None:
    """A new option fails here until a line above has it."""
    here = Path(__file__).parent
    files = [*here.glob("test_wiring*.py"), here.parent / "serving" / "test_with_vllm.py"]
    text = "\n\n\n".join(file.read_text(encoding="utf-8") for file in files)
    if name in ELSEWHERE:
        return
    shared = {"data check": READING, "data preview": READING, "graft": SPOKEN}.get(name, [])
    if name in ("chat", "generate", "laws", "eval", "serve"):
        shared = LOADING if name == "laws" else [*LOADING, *SPOKEN]
    words = f'"{name.split()[-1]}"'
    sections = [part for part in text.split("\n\n\n") if words in part]
    tried = " ".join(sections) + " ".join(f'"{word}"' for word in shared)
    checked = 0
    for option in command.params:
        if option.param_type_name == "option" and option.name not in (*ELSEWHERE, "help"):
            checked += 1
            flags = [*option.opts, *option.secondary_opts]
            assert any(f'"{flag}"' in tried for flag in flags), f"{name}: {flags}"
    assert checked or name in BARE


BARE = {"data ls", "env", "methods", "recipes cp", "recipes show"}
"""Commands without an option of their own."""
