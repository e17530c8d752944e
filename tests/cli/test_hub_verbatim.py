"""The three commands as the README has them, in processes of their own, against a loopback Hub.

Tiny stand-ins of 28 layers are served under the real ids. What a user does next is tested too:
a fresh machine loads the pushed graft by its id, and what goes wrong there is told.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_fixtures import contents, talk_to
from hub_server import HubServer
from tiny import save_base, tiny_siglip_dir
from tiny_runs import make_rows
from waiting import LAST

pytestmark = pytest.mark.xdist_group("hub-verbatim")  # one worker: the way there is walked once

GRAFT = "mmgraft graft qwen2-7b --method iaa --layers 22,24"
TRAIN = "mmgraft train"
PUSH = "mmgraft push"

BASE_ID = "Qwen/Qwen2-7B-Instruct"
TOWER_ID = "google/siglip2-so400m-patch14-384"
PUSHED = "tester/qwen2-7b-iaa"
CHEAP = ["--max-steps", "2", "--set", "stages.*.accumulate=1"]
ROOT = Path(__file__).parents[2]


def words(command: str) -> list[str]:
    """Return what stands after `mmgraft` on a command line."""
    name, *rest = shlex.split(command)
    assert name == "mmgraft"
    return rest


@dataclass
class Journey:
    """A Hub, a user's folders, and what each command printed."""

    hub: HubServer
    root: Path
    base_commit: str
    empty: Any = None
    trained: Any = None
    pushed: str = ""

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def run(self) -> Path:
        return self.work / "qwen2-7b-iaa"

    @property
    def picture(self) -> Path:
        return self.root / "data" / "images" / "0.png"

    def env(self, home: str, **options: Any) -> dict[str, str]:
        return self.hub.env(self.root / home, **options)

    def mmgraft(self, *args: object) -> subprocess.CompletedProcess[str]:
        """The command in a process of its own, in the user's folder."""
        command = [sys.executable, "-m", "mmgraft", *map(str, args)]
        return subprocess.run(
            command,
            cwd=self.work,
            env=self.env("home"),
            capture_output=True,
            text=True,
            timeout=LAST,
        )


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    """Graft, train without data, train, push: each verbatim."""
    root = tmp_path_factory.mktemp("verbatim")
    save_base(
        root / "base", "qwen2", dtype=torch.bfloat16, num_hidden_layers=28, max_shard_size="200KB"
    )
    tiny_siglip_dir(root / "tower")
    rows = make_rows(root / "data")
    with HubServer() as hub:
        hub.add_model(TOWER_ID, root / "tower")
        way = Journey(hub, root, hub.add_model(BASE_ID, root / "base"))
        way.work.mkdir()
        made = way.mmgraft(*words(GRAFT))
        assert made.returncode == 0, made.stderr
        way.empty = way.mmgraft(*words(TRAIN))
        data = ["--data", rows, "--images", root / "data" / "images"]
        way.trained = way.mmgraft(*words(TRAIN), *data, *CHEAP)
        assert way.trained.returncode == 0, way.trained.stderr
        way.pushed = _on_a_terminal(way, words(PUSH), "y\n")
        yield way


def _on_a_terminal(way: Journey, args: list[str], answer: str) -> str:
    """Run a command whose input and output are a terminal; gives what it showed."""
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mmgraft", *args],
        cwd=way.work, env=way.env("home"), stdin=follower, stdout=follower, stderr=follower,
        start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    answered = False
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
        if not answered and b"[y/N]" in shown:
            os.write(leader, answer.encode())
            answered = True
    os.close(leader)
    text = shown.decode(errors="replace")
    assert process.wait(timeout=LAST) == 0, text
    assert answered, text
    return text


# The way there


def test_graft_writes_the_default_folder_with_the_method_s_recipe(journey: Journey) -> None:
    record = json.loads((journey.run / "graft_config.json").read_text())
    assert record["base"]["id"] == BASE_ID
    assert record["base"]["revision"] == journey.base_commit
    assert record["vision"]["id"] == TOWER_ID
    assert record["vision"]["revision"] == journey.hub.repos[TOWER_ID].sha
    assert record["config"]["layers"] in ("22,24", [22, 24])
    shipped = ROOT / "recipes" / "iaa.yaml"
    assert (journey.run / "recipe.yaml").read_text() == shipped.read_text()
    layers = {
        name.split(".")[2]
        for name in load_file(journey.run / "graft.safetensors")
        if name.startswith("graft.layers.")
    }
    assert len(layers) == 2


def test_train_without_data_says_exactly_what_to_set_and_what_to_give(journey: Journey) -> None:
    assert journey.empty.returncode == 2
    said = journey.empty.stderr
    assert "taking the only graft here, qwen2-7b-iaa" in said
    assert "`data[0].path`" in said
    assert f"{journey.run / 'recipe.yaml'}" in said
    assert f"mmgraft train {journey.run} --data FILE --images DIR" in said
    assert "Traceback" not in said


def test_train_by_the_run_s_recipe_takes_the_only_graft_here(journey: Journey) -> None:
    said = journey.trained.stderr
    assert "taking the only graft here, qwen2-7b-iaa" in said
    lines = [json.loads(line) for line in (journey.run / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"align", "instruct"}
    assert json.loads((journey.run / "graft_config.json").read_text())["recipe"]["name"] == "iaa"
    assert not list((journey.run / "checkpoints").glob("*-*"))


def test_push_asks_on_a_terminal_and_takes_the_user_s_name(journey: Journey) -> None:
    assert "taking the only graft here, qwen2-7b-iaa" in journey.pushed
    assert f"to the new public {PUSHED}? [y/N]" in journey.pushed
    assert f"{journey.hub.url}/{PUSHED}" in journey.pushed
    names = set(journey.hub.repos[PUSHED].names)
    assert {
        "README.md",
        "config.json",
        "graft_config.json",
        "graft.safetensors",
        "recipe.yaml",
    } <= names
    assert not [name for name in names if "checkpoint" in name or name.endswith(".jsonl")]
    card = journey.hub.repos[PUSHED].read("README.md").decode()
    assert BASE_ID in card
    assert "22" in card


# A fresh machine

FRESH = """
import json, sys
import torch
from mmgraft import GraftedModel
from mmgraft.cli.app import run

repo, picture, out = sys.argv[1:]
assert run(["inspect", repo, "--json"]) == 0
assert run(["chat", repo, "what is it", "--image", picture, "--max-new-tokens", "4"]) == 0
from test_hub_verbatim import logits
torch.save(logits(repo, picture), out)
"""


def logits(source: str | Path, picture: str | Path) -> dict[str, torch.Tensor]:
    """Logits of an image row and of a text row, from strings on."""
    from mmgraft.inference import Answerer

    loaded = Answerer.load(source)
    image = {"type": "image", "image": str(picture)}
    question = {"type": "text", "text": "which colour is it?"}
    chats = {
        "image": [{"role": "user", "content": [image, question]}],
        "text": [{"role": "user", "content": "an <image> tag, what is that?"}],
    }
    found = {}
    for name, chat in chats.items():
        with torch.no_grad():
            found[name] = loaded.model(**loaded.processor([chat], padding_side="left")).logits
    return found


@pytest.fixture(scope="module")
def fresh(journey: Journey) -> tuple[str, dict[str, torch.Tensor]]:
    """Load the id in a process with an empty home: what it printed, and its logits."""
    place = journey.root / "elsewhere"
    place.mkdir()
    here = Path(__file__).parent
    env = journey.env("fresh_home", token=False)
    env["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent / "support"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", FRESH, PUSHED, str(journey.picture), "logits.pt"],
        cwd=place, env=env, capture_output=True, text=True, timeout=LAST,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, torch.load(place / "logits.pt")


@pytest.fixture
def online(journey: Journey, monkeypatch: pytest.MonkeyPatch) -> Journey:
    """This process talks to the journey's Hub, logged in, from the user's folder."""
    talk_to(journey.hub, journey.root / "home", monkeypatch)
    monkeypatch.chdir(journey.work)
    return journey


def test_a_fresh_process_computes_what_the_run_does(online: Journey, fresh) -> None:
    here = logits(online.run, online.picture)
    for name, there in fresh[1].items():
        assert torch.equal(here[name], there), name


def test_its_text_is_the_untouched_base_s(online: Journey, fresh) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(online.root / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(online.root / "base")
    chat = [{"role": "user", "content": "an <image> tag, what is that?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(base(**inputs).logits, fresh[1]["text"])


def test_training_moved_what_an_image_row_says(online: Journey, fresh, cli, tmp_path) -> None:
    """Else the equality above would hold for a graft whose weights were lost on the way."""
    made = cli("graft", "qwen2-7b", "--method", "iaa", "--layers", "22,24", "--out", tmp_path / "g")
    assert made.code == 0, made.err
    assert not torch.equal(logits(tmp_path / "g", online.picture)["image"], fresh[1]["image"])


def test_inspect_and_chat_take_the_id(fresh) -> None:
    shown, end = json.JSONDecoder().raw_decode(fresh[0])
    assert shown["method"] == "iaa"
    assert shown["base"] == BASE_ID
    assert fresh[0][end:].strip()


# With no argument


def test_in_the_graft_s_own_folder(online: Journey, cli, monkeypatch) -> None:
    monkeypatch.chdir(online.run)
    ran = cli("push", "--dry-run")
    assert ran.code == 0, ran.err
    assert "taking the graft in the current folder, qwen2-7b-iaa" in ran.err
    ran = cli("train")
    assert ran.code == 2
    assert "taking the graft in the current folder, qwen2-7b-iaa" in ran.err
    assert "--restart" in ran.err


@pytest.mark.parametrize("command", ["train", "push"])
def test_two_grafts_here_are_no_choice(
    online: Journey, cli, tmp_path, monkeypatch, command
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "graft_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    ran = cli(command)
    assert ran.code == 2
    assert "name one of:\n  a\n  b" in ran.err


# What goes wrong


def test_push_without_a_token(online: Journey, cli, monkeypatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before, asked = contents(online.run), len(online.hub.requests)
    ran = cli("push", "--yes")
    assert ran.code == 2
    assert "hf auth login" in ran.err
    assert contents(online.run) == before
    assert len(online.hub.requests) == asked


@pytest.mark.parametrize("when", ["asking", "uploading", "committing"])
def test_the_network_goes_in_the_middle_of_a_push(online: Journey, cli, when: str) -> None:
    hub = online.hub
    before = contents(online.run)
    head = hub.repos[PUSHED].sha
    name = f"other-{when}"
    if when == "asking":
        hub.fail_after(-1)
    elif when == "uploading":
        hub.fail_after(20_000)  # of some 60 kB of weights
    else:
        hub.drop_connection_on("/commit/")
    try:
        ran = cli("push", "--yes", "--repo-id", name)
    finally:
        hub.restore()
    assert ran.code == 1
    assert "run the same command again" in ran.err
    assert "Traceback" not in ran.err
    assert contents(online.run) == before
    assert hub.repos[PUSHED].sha == head
    left = hub.repos.get(f"tester/{name}")
    assert left is None or "graft.safetensors" not in left.names
    again = cli("push", "--yes", "--repo-id", name)
    assert again.code == 0, again.err
    assert hub.repos[f"tester/{name}"].read("graft.safetensors") == before["graft.safetensors"]


def _change_one_tensor(base: Path, target: Path) -> str:
    """A copy of a base with the same config and one tensor changed; gives its name."""
    shutil.copytree(base, target)
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.22.mlp.up_proj.weight"
    tensors = load_file(target / index[name])
    tensors[name][3, 5] += 0.5
    save_file(tensors, target / index[name], metadata={"format": "pt"})
    return name


@pytest.fixture(scope="module")
def tuned(journey: Journey) -> str:
    """The base's repository got a second commit, and a fine-tune has the same config."""
    target = journey.root / "tuned"
    name = _change_one_tensor(journey.root / "base", target)
    journey.hub.add_model("somebody/fine-tune", target)
    journey.hub.add_model(BASE_ID, target)
    return name


def test_a_second_commit_of_the_base_is_not_taken(online: Journey, tuned: str, cli) -> None:
    """The record names a commit, which is still there."""
    ran = cli("chat", PUSHED, "hello", "--max-new-tokens", "2")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("named", [BASE_ID, "somebody/fine-tune"])
def test_another_base_is_refused_by_its_tensor(online: Journey, tuned: str, cli, named) -> None:
    ran = cli("chat", PUSHED, "hello", "--base", named)
    assert ran.code == 2
    assert f"tensor '{tuned}' holds other values" in ran.err
    assert named in ran.err


def test_a_base_that_changed_under_its_name_is_refused(
    online: Journey, tuned: str, cli, tmp_path
) -> None:
    """A record without a commit takes the newest one."""
    run = tmp_path / "run"
    shutil.copytree(online.run, run)
    record = json.loads((run / "graft_config.json").read_text())
    record["base"]["revision"] = None
    (run / "graft_config.json").write_text(json.dumps(record))
    before = contents(run)
    data = ["--data", online.root / "data" / "rows.jsonl", "--images", online.picture.parent]
    for command in (["chat", run, "hello"], ["train", run, "--restart", *data, *CHEAP]):
        ran = cli(*command)
        assert ran.code == 2, ran.err
        assert f"tensor '{tuned}' holds other values" in ran.err
        assert "Traceback" not in ran.err
    after = contents(run)
    assert {name: after.get(name) for name in before} == before


def test_the_base_is_gone_from_the_hub(online: Journey, cli, tmp_path, monkeypatch) -> None:
    gone = online.hub.repos.pop(BASE_ID)
    try:
        talk_to(online.hub, tmp_path / "home", monkeypatch)
        ran = cli("chat", PUSHED, "hello")
    finally:
        online.hub.repos[BASE_ID] = gone
    assert ran.code == 2
    assert BASE_ID in ran.err


def test_the_network_is_gone_while_the_base_is_fetched(
    online: Journey, cli, tmp_path, monkeypatch
) -> None:
    online.hub.drop_connection_on(f"/{BASE_ID}/")
    try:
        talk_to(online.hub, tmp_path / "home", monkeypatch)
        ran = cli("chat", PUSHED, "hello")
    finally:
        online.hub.restore()
    assert ran.code == 1
    assert "run the command again" in ran.err
    assert "Traceback" not in ran.err
