"""Options reach the loading of a model, what it is asked, and evaluations; see test_wiring.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmgraft.recipes.evaluation_set import SetSpec
from wires import CPU, LOADED, LOADING, SPEAKS, SPOKEN, Stop

# -- models ------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, called) -> list[dict[str, Any]]:
    """Record the arguments of the loader of a model, and mark the device as picked."""
    monkeypatch.setattr("mmgraft.training.devices.pick_device", lambda name: f"on {name}")
    return called("mmgraft.inference.Answerer.load", Stop("that far"))


@pytest.mark.parametrize(
    ("line", "more"),
    [
        (
            ["chat", "run", "hello", "--revision", "v1", *SPOKEN],
            {"revision": "v1", "options": SPEAKS},
        ),
        (
            [
                "generate",
                "run",
                "ROWS",
                "--out",
                "o",
                "--images",
                "PICS",
                "--revision",
                "v1",
                *SPOKEN,
            ],
            {"revision": "v1", "options": SPEAKS},
        ),
        (
            ["laws", "run", "ROWS", "--images", "PICS", "--revision", "v1"],
            {"revision": "v1", "options": {}},
        ),
        (["eval", "run", "--text", *SPOKEN], {"revision": None, "options": SPEAKS}),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_how_a_model_is_loaded(run: Path, parts: Path, cli, loaded, line, more) -> None:
    places = {"ROWS": str(parts / "rows.jsonl"), "PICS": str(parts / "images")}
    ran = cli(*(places.get(word, word) for word in line), *LOADING)
    assert loaded, ran.err
    assert Path(loaded[0].pop("run")) == Path("run")
    assert loaded[0] == {**LOADED, **more}


class Fake:
    """A model that says how it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.reasoning = False
        self.model = SimpleNamespace(workflow=lambda name=None: SimpleNamespace(record=None))
        self.processor = SimpleNamespace(encode=lambda *_, **__: [0])

    def answers(
        self, prompts: Any, workflow: Any = None, tools: Any = None, **settings: Any
    ) -> list[str]:
        self.asked.append({"rows": len(prompts), "workflow": workflow, **settings})
        return ["yes"] * len(prompts)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr("mmgraft.inference.Answerer.load", lambda *_, **__: made)
    monkeypatch.setattr("mmgraft.model.files.summary.limits", lambda record: {})
    return made


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    given: list[int] = []
    monkeypatch.setattr("torch.manual_seed", given.append)
    return given


def test_generate(run: Path, parts: Path, cli, fake: Fake, seeds: list[int]) -> None:
    line = [
        "generate",
        "run",
        parts / "rows.jsonl",
        "--images",
        parts / "images",
        "--out",
        "o.jsonl",
    ]
    more = [
        "--batch-size",
        "5",
        "--max-new-tokens",
        "6",
        "--num-beams",
        "3",
        "--temperature",
        "0.7",
        "--seed",
        "11",
        "--workflow",
        "see",
        "--limit",
        "7",
    ]
    assert cli(*line, *more, *CPU).code == 0
    settings = {
        "workflow": "see",
        "max_new_tokens": 6,
        "num_beams": 3,
        "do_sample": True,
        "temperature": 0.7,
    }
    assert fake.asked == [{"rows": 5, **settings}, {"rows": 2, **settings}]
    assert seeds == [11]
    assert not fake.reasoning
    assert "is there already" in cli(*line, *CPU).err
    assert cli(*line, "--force", "--show-reasoning", *CPU).code == 0
    assert fake.reasoning
    assert not fake.asked[-1]["do_sample"]
    assert seeds == [11]


def test_chat(run: Path, parts: Path, cli, fake: Fake, seeds: list[int], monkeypatch) -> None:
    made: list[Any] = []

    class Dialogue:
        def __init__(self, answerer: Any, **given: Any) -> None:
            self.given, self.images, self.said = given, [], []
            made.append(self)

        def add_image(self, image: str) -> None:
            self.images.append(image)

        def say(self, text: str, on_text: Any = None, **settings: Any) -> str:
            self.said.append((text, settings))
            return "yes"

    monkeypatch.setattr("mmgraft.inference.Dialogue", Dialogue)
    line = [
        "chat",
        "run",
        "hello",
        "--image",
        "a.png",
        "--image",
        "b.png",
        "--system",
        "be brief",
        "--workflow",
        "see",
        "--max-new-tokens",
        "6",
    ]
    assert cli(*line, "--temperature", "0.7", "--top-p", "0.4", "--seed", "11", *CPU).code == 0
    assert not fake.reasoning
    assert cli(*line, "--json", "--show-reasoning", *CPU).code == 0
    assert fake.reasoning
    for one in made:
        assert one.given == {"system": "be brief", "workflow": "see"}
        assert one.images == ["a.png", "b.png"]
    warm, cold = (one.said[0] for one in made)
    assert warm == (
        "hello",
        {"max_new_tokens": 6, "do_sample": True, "temperature": 0.7, "top_p": 0.4},
    )
    assert cold == ("hello", {"max_new_tokens": 6, "do_sample": False})
    assert seeds == [11]


# -- evaluation --------------------------------------------------------------------------------


def test_eval(run: Path, cli, called, tmp_path: Path) -> None:
    (tmp_path / "sets.yaml").write_text(
        "evaluation:\n- {name: a, metric: exact, path: x.jsonl}\n"
        "- {name: b, metric: exact, path: y.jsonl, limit: 20}\n"
        "- {name: c, metric: exact, path: z.jsonl, limit: 3}\n"
    )
    checked = called("mmgraft.evaluation.evaluate.check", Stop("that far"))
    cli(
        "eval",
        "run",
        "--text",
        "--vision",
        "--iit",
        "--harness",
        "piqa,boolq",
        "--sets",
        "sets.yaml",
        "--only",
        "b",
        "--only",
        "c",
        "--limit",
        "5",
        "--include-path",
        "tasks",
        "--dialogues",
        "saved",
        "--dialogue-count",
        "9",
        "--untouched",
        "old",
        "--workflow",
        "see",
        "--batch-size",
        "3",
    )
    given = vars(checked[0]["evaluation"])
    specs = given.pop("specs")
    assert [(one.name, one.limit) for one in specs] == [("b", 5), ("c", 3)]
    assert given == {
        "run": Path("run"),
        "tasks": ("piqa", "boolq"),
        "text": True,
        "vision": True,
        "iit": True,
        "workflow": "see",
        "batch_size": 3,
        "limit": 5,
        "include_path": Path("tasks"),
        "dialogues": Path("saved"),
        "dialogue_count": 9,
        "untouched": "old",
    }
    cli(
        "eval",
        "run",
        "--data",
        "x.jsonl",
        "--metric",
        "box",
        "--images",
        "pics",
        "--train",
        "t.jsonl",
        "--name",
        "mine",
        "--prompt",
        "{question}?",
        "--boxes",
        "ten",
        "--column",
        "box=where",
        "--read",
        "subset=small",
        "--limit",
        "4",
    )
    assert list(checked[1]["evaluation"].specs) == [
        SetSpec(
            name="mine",
            path="x.jsonl",
            metric="box",
            images="pics",
            train="t.jsonl",
            prompt="{question}?",
            boxes="ten",
            columns={"box": "where"},
            subset="small",
            limit=4,
        )
    ]


def test_laws(run: Path, parts: Path, cli, called, fake: Fake) -> None:
    asked = called("mmgraft.evaluation.attention.laws.evaluate_laws", Stop("that far"))
    cli(
        "laws",
        "run",
        parts / "rows.jsonl",
        "--images",
        parts / "images",
        "--limit",
        "3",
        "--seed",
        "5",
        "--workflow",
        "see",
        "--batch-size",
        "2",
        "--out",
        "there",
        *CPU,
    )
    given = asked[0]
    assert (given["workflow"], given["batch_size"], len(given["samples"])) == ("see", 2, 3)
    assert given["settings"] == {"limit": 3, "seed": 5}
    chosen = called("mmgraft.evaluation.sets.choose_sets", Stop("that far"))
    cli("laws", "run", "--set", "b")
    assert chosen[0]["only"] == ["b"]


# -- serve -------------------------------------------------------------------------------------


def test_what_is_served_and_how(run: Path, parts: Path, cli, loaded, called, monkeypatch) -> None:
    """Every option of "serve" off its default."""
    shutil.copytree(run, run.parent / "other")
    options = ["--show-reasoning", "--cors", "--allow-urls", "--allow-files", str(parts)]
    line = [
        "serve",
        "run",
        "other",
        "--host",
        "127.0.0.2",
        "--port",
        "0",
        "--api-key",
        "k",
        *options,
    ]
    ran = cli(*line, "--revision", "v1", *LOADING, "--template-option", "a=1")
    assert loaded, ran.err
    assert {**LOADED, "revision": "v1", "options": {"a": 1}}.items() <= loaded[0].items()
    answerer = SimpleNamespace(reasoning=False)
    monkeypatch.setattr("mmgraft.inference.Answerer.load", lambda *_, **__: answerer)
    names = called("mmgraft.serving.app.serve_names", {"mm": None})
    built = called("mmgraft.serving.app.build_app", object())
    configs: list[dict[str, Any]] = []
    monkeypatch.setattr("uvicorn.Config", lambda app, **given: configs.append(given))
    sockets: list[Any] = []
    monkeypatch.setattr(
        "uvicorn.Server", lambda _: SimpleNamespace(run=lambda sockets: seen(sockets))
    )
    seen = sockets.extend
    ran = cli(*line, "--base", "elsewhere")
    assert ran.code == 0, ran.err
    assert names[0] == {"answerer": answerer, "others": ["other"], "base": "elsewhere"}
    assert answerer.reasoning
    allowed = built[0].pop("allowed")
    assert (allowed.urls, allowed.files) == (True, parts.resolve())
    assert built[0] == {"served": {"mm": None}, "key": "k", "cors": True}
    assert configs == [{"log_level": "warning", "timeout_graceful_shutdown": 5}]
    assert sockets[0].getsockname()[0] == "127.0.0.2"
    assert sockets[0].getsockname()[1] != 0
    sockets[0].close()
    monkeypatch.setenv("MMGRAFT_API_KEY", "kept")
    monkeypatch.setattr("mmgraft.cli.serve.find_run", lambda given: run)
    assert cli("serve", "--port", "0").code == 0, "the only graft here"
    assert built[1]["key"] == "kept"
    sockets[1].close()
