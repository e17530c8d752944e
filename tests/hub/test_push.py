"""Pushing over real HTTP: what goes, what stays, and what is left when it fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hub_fixtures import contents, make_record, make_run
from hub_server import HubServer
from hub_store import Blob
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.grafts.registry import get_method
from mmgraft.hub.card import MARKER
from mmgraft.hub.push import find_target, plan_push, send
from mmgraft.model.files.graft_file import BaseReference, GraftFile
from mmgraft.model.files.summary import graft_parts
from mmgraft.runs.contents import UploadFile
from mmgraft.runs.results import write_results
from mmgraft.vision.projectors.configs import QFormerConfig
from mmgraft.vision.spec import VisionSpec
from report_example import text_section, vision_section
from tiny_exports import make_graft

SENT = [
    "README.md",
    "graft.safetensors",
    "graft_config.json",
    "recipe.yaml",
    "results.json",
    "tokenizer.json",
]


def push(
    run: Path,
    repo_id: str | None = None,
    private: bool = False,
    warn: Callable[[str], None] = lambda text: None,
    **options: str,
) -> str:
    """Push as the command does."""
    plan = plan_push(run, **options)
    target = find_target(plan, repo_id, private)
    for warning in (*plan.warnings, *target.warnings):
        warn(warning)
    return send(plan, target, private)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "my-iaa")


def test_sends_what_belongs_and_nothing_else(hub: HubServer, run: Path) -> None:
    url = push(run)
    repo = hub.repos["tester/my-iaa"]
    assert url == f"{hub.url}/tester/my-iaa"
    assert repo.names == [".gitattributes", *SENT]
    for name in SENT:
        assert repo.read(name) == (run / name).read_bytes(), name
    assert not repo.private
    assert len(repo.commits) == 2  # the Hub's own first one, and ours


def test_pushing_again_without_a_change_makes_no_commit(hub: HubServer, run: Path) -> None:
    push(run)
    before = hub.repos["tester/my-iaa"].sha
    push(run)
    assert hub.repos["tester/my-iaa"].sha == before


def test_files_of_an_earlier_push_go_others_stay(hub: HubServer, run: Path) -> None:
    push(run)
    repo = hub.repos["tester/my-iaa"]
    old = {"graft-0-00001-of-00002.safetensors": Blob(b"x"), "base/config.json": Blob(b"{}")}
    repo.commit("by hand", {**old, "picture.jpg": Blob(b"jpg"), "LICENSE": Blob(b"mine")})
    push(run)
    assert repo.names == sorted([".gitattributes", "LICENSE", "picture.jpg", *SENT])


def test_shards_go_with_their_index(hub: HubServer, run: Path) -> None:
    names = [f"graft-0-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        shutil.copy(run / "graft.safetensors", run / name)
    weight_map = {"a": names[0], "b": names[1]}
    (run / "graft.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    push(run)
    # A single file beside an index is what loading reads, so it is what is sent.
    assert names[0] not in hub.repos["tester/my-iaa"].names
    (run / "graft.safetensors").unlink()
    push(run)
    sent = hub.repos["tester/my-iaa"].names
    assert [name for name in sent if name.startswith("graft")] == [
        *names,
        "graft.safetensors.index.json",
        "graft_config.json",
    ]
    (run / names[1]).unlink()
    with pytest.raises(UsageError, match=f"lacks {names[1]}"):
        push(run)


@pytest.mark.parametrize("damage", ["short", "garbage", "empty", "missing"])
def test_damaged_weights_never_reach_the_hub(hub: HubServer, run: Path, damage: str) -> None:
    file = run / "graft.safetensors"
    data = file.read_bytes()
    file.write_bytes({"short": data[:-1], "garbage": b"x" * 99}.get(damage, b""))
    if damage == "missing":
        file.unlink()
    with pytest.raises(UsageError, match=r"graft.safetensors cannot be read .*nothing was pushed"):
        push(run)
    assert hub.requests == []


def test_a_damaged_config_never_reaches_the_hub(hub: HubServer, run: Path) -> None:
    (run / "graft_config.json").write_text("{")
    with pytest.raises(UsageError, match="corrupt"):
        push(run)
    assert hub.requests == []


def test_no_token(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="hf auth login") as caught:
        push(run)
    assert caught.value.exit_code == 2
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert push(run)


def test_a_refused_token_and_somebody_elses_name(
    hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as wrong:
        wrong.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(UsageError, match=r"refuses the token .*hf auth login"):
            push(run)
    with pytest.raises(UsageError, match="not allowed with this token"):
        push(run, repo_id="acme/mine")
    assert hub.repos == {}


def test_offline_is_wrong_use(hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        push(run)


# The network goes away


@pytest.mark.parametrize("where", ["large file", "commit", "create", "whoami"])
def test_the_network_dies(hub: HubServer, run: Path, where: str) -> None:
    push(run, "tester/old")
    old = hub.repos["tester/old"].sha
    shutil.copy(make_run(run.parent / "other", size=80) / "graft.safetensors", run)
    before = contents(run)
    if where == "large file":
        hub.fail_after(30_000)  # of the 100 kB that the weights have
    else:
        hub.drop_connection_on({"commit": "/commit/", "create": "/repos/create"}.get(where, where))
    name = "tester/new" if where == "create" else "old"
    with pytest.raises(MMGraftError, match="run the same command again") as caught:
        push(run, name)
    assert caught.value.exit_code == 1
    assert contents(run) == before
    assert hub.repos["tester/old"].sha == old
    assert "tester/new" not in hub.repos
    hub.restore()
    push(run, name)
    pushed = hub.repos["tester/new" if where == "create" else "tester/old"]
    assert pushed.read("graft.safetensors") == before["graft.safetensors"]


def test_another_push_in_between_is_noticed(hub: HubServer, run: Path) -> None:
    push(run)
    (run / "results.json").write_text("{}")
    plan = plan_push(run)
    target = find_target(plan)
    theirs = hub.repos["tester/my-iaa"].commit("theirs", {"new.txt": Blob(b"x")})
    with pytest.raises(MMGraftError, match="somebody pushed at the same time"):
        send(plan, target)
    assert hub.repos["tester/my-iaa"].sha == theirs


# The base and the tower


def test_a_base_on_this_machine_is_refused(hub: HubServer, tmp_path: Path) -> None:
    base = tmp_path / "tiny-base"
    base.mkdir()
    for place in (str(base), "../tiny-base", "~/no/such/base"):
        run = make_run(tmp_path / f"r{len(place)}", base=BaseReference(id=place))
        with pytest.raises(UsageError, match=r"hf upload YOU/NAME .*--base-id YOU/NAME"):
            push(run)
    assert hub.requests == []


def test_base_id_replaces_it_in_the_repository_only(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    sha = hub.add_model("tester/tiny", tmp_path / "tiny")
    fingerprint = {"tensors": {"a": 1}}
    base = BaseReference(id=str(tmp_path / "tiny"), fingerprint=fingerprint)
    run = make_run(tmp_path / "run", base=base)
    before = (run / "graft_config.json").read_bytes()
    push(run, base_id="tester/tiny")
    sent = json.loads(hub.repos["tester/run"].read("graft_config.json"))
    assert sent["base"] == {"id": "tester/tiny", "revision": sha, "fingerprint": fingerprint}
    assert b"base_model: tester/tiny" in hub.repos["tester/run"].read("README.md")
    assert (run / "graft_config.json").read_bytes() == before
    with pytest.raises(UsageError, match="--base-id tiny is no Hub id"):
        push(run, base_id="tiny")
    with pytest.raises(UsageError, match="does not give out tester/typo as the base"):
        push(run, base_id="tester/typo")


def test_a_name_that_is_also_a_folder_here_is_a_hub_id_with_its_revision(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    pinned = make_run(tmp_path / "pinned", base=BaseReference(id="acme/tiny", revision="c" * 40))
    local = make_run(tmp_path / "local", base=BaseReference(id="acme/tiny"))
    assert plan_push(pinned).record.base.id == "acme/tiny"
    with pytest.raises(UsageError, match="--base-id"):
        plan_push(local)


def test_a_tower_on_this_machine_is_refused_or_renamed(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    sha = hub.add_model("tester/clip", tmp_path / "clip")
    run = make_run(tmp_path / "run", vision=VisionSpec(id=str(tmp_path / "clip")))
    with pytest.raises(UsageError, match=r"the vision tower .*--vision-id YOU/NAME"):
        push(run)
    push(run, vision_id="tester/clip")
    sent = GraftFile.model_validate_json(hub.repos["tester/run"].read("graft_config.json"))
    assert (sent.vision.id, sent.vision.revision) == ("tester/clip", sha)
    assert sent.vision.kind == "transformers"


def test_a_trained_base_inside_the_run_goes_along(hub: HubServer, tmp_path: Path) -> None:
    original = BaseReference(id=str(tmp_path))
    run = make_run(
        tmp_path / "run",
        base=BaseReference(id="./base"), base_trained=True, trained_from=original,
    )  # fmt: skip
    with pytest.raises(UsageError, match="holds no model"):
        push(run)
    (run / "base" / "checkpoint-5").mkdir(parents=True)
    shutil.copy(run / "graft.safetensors", run / "base" / "model.safetensors")
    for name in ("config.json", "optimizer.pt", ".hidden", "checkpoint-5/config.json"):
        (run / "base" / name).write_text("{}")
    push(run)
    sent = hub.repos["tester/run"].names
    assert [n for n in sent if "/" in n] == ["base/config.json", "base/model.safetensors"]
    assert str(tmp_path).encode() not in hub.repos["tester/run"].read("graft_config.json")
    (run / "base" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UsageError, match=r"base/model.safetensors cannot be read"):
        push(run)


def test_a_base_folder_that_the_record_does_not_name_stays(hub: HubServer, run: Path) -> None:
    (run / "base").mkdir()
    (run / "base" / "config.json").write_text("{}")
    push(run)
    assert "base/config.json" not in hub.repos["tester/my-iaa"].names


def test_what_others_cannot_get_is_said(hub: HubServer, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    revision = hub.add_model("acme/tiny-llama", tmp_path / "empty")
    said: list[str] = []
    push(run, warn=said.append)  # both revisions of the record are unknown to this Hub
    assert [word for line in said for word in ("base", "vision tower") if f"the {word} " in line]
    assert len(said) == 2
    base = BaseReference(id="acme/tiny-llama", revision=revision)
    kind = VisionSpec(kind="efficientnet-lite2")
    said.clear()
    push(make_run(tmp_path / "fine", base=base, vision=kind), warn=said.append)
    assert said == []
    hub.repos["acme/tiny-llama"].private = True
    push(tmp_path / "fine", warn=said.append)
    assert said == ["the base acme/tiny-llama is private; who cannot read it cannot load this"]


# The card and the repository


def test_the_users_own_readme_is_sent_as_it_is(hub: HubServer, run: Path) -> None:
    (run / "README.md").write_text("---\ntags: [mine]\n---\nmy words")
    said: list[str] = []
    push(run, warn=said.append)
    assert hub.repos["tester/my-iaa"].read("README.md").endswith(b"my words")
    assert (run / "README.md").read_text().endswith("my words")
    assert any("README.md is your own" in line for line in said)


def test_our_own_card_is_written_anew(hub: HubServer, run: Path) -> None:
    (run / "README.md").write_text(f"---\n---\n{MARKER}\nold")
    push(run, "tester/elsewhere", license="mit")
    card = (run / "README.md").read_text()
    assert "old" not in card
    assert "license: mit" in card
    assert "mmgraft chat tester/elsewhere" in card


def test_a_readme_that_the_hub_refuses(hub: HubServer, run: Path) -> None:
    (run / "README.md").write_text("---\ntags: [\n---\nmine")
    with pytest.raises(UsageError, match="mend its front matter"):
        push(run)
    assert "graft_config.json" not in hub.repos["tester/my-iaa"].names


def test_a_repository_that_is_no_graft_is_left_alone(hub: HubServer, run: Path) -> None:
    (run.parent / "model").mkdir()
    (run.parent / "model" / "model.safetensors").write_bytes(b"x")
    before = hub.add_model("tester/my-iaa", run.parent / "model")
    with pytest.raises(UsageError, match=r"something else than a graft \(model.safetensors\)"):
        push(run)
    assert hub.repos["tester/my-iaa"].sha == before


def test_private(hub: HubServer, run: Path) -> None:
    push(run, "secret", private=True)
    assert hub.repos["tester/secret"].private
    push(run, "secret")
    assert hub.repos["tester/secret"].private
    push(run, "open")
    with pytest.raises(UsageError, match=r"is public, so --private cannot hide"):
        push(run, "open", private=True)


def test_a_name_that_cannot_be_one(hub: HubServer, run: Path) -> None:
    renamed = run.rename(run.with_name("my graft!"))
    with pytest.raises(UsageError, match="cannot be the name of a repository"):
        push(renamed)
    assert push(renamed, "my-graft").endswith("tester/my-graft")


@pytest.mark.parametrize("folder", ["/home/me/mine/", "~/mine/", "C:\\Users\\me\\"])
def test_folders_of_the_recipe_stay_at_home(hub: HubServer, run: Path, folder: str) -> None:
    """The arms of a comparison and a run that was trained name their data by whole paths."""
    recipe = {
        "name": "r",
        "data": [{"path": f"{folder}rows.jsonl", "images": f"{folder}images"}],
        "stages": [{"name": "a", "data": None, "template": f"{folder}chat.jinja", "lr": 1e-3}],
        "evaluation": [{"name": "s", "train": f"{folder}train.jsonl", "prompt": "yes/no: {q} /"}],
        "feature_cache": f"{folder}features",
    }
    began = QFormerConfig(weights=f"{folder}blip2", features=16)
    record = make_record(recipe=recipe, projector=began)
    (run / "graft_config.json").write_text(record.dump())
    (run / "recipe.yaml").write_text("# kept\n" + yaml.safe_dump(recipe))
    assert plan_push(run).warnings == []
    push(run)
    repo = hub.repos["tester/my-iaa"]
    assert json.loads(repo.read("graft_config.json"))["projector"]["weights"] == "blip2"
    sent = json.loads(repo.read("graft_config.json"))["recipe"]
    assert sent["data"] == [{"path": "rows.jsonl", "images": "images"}]
    assert sent["stages"] == [{"name": "a", "data": None, "template": "chat.jinja", "lr": 1e-3}]
    assert sent["evaluation"][0] == {"name": "s", "train": "train.jsonl", "prompt": "yes/no: {q} /"}
    assert sent["feature_cache"] == "features"
    text = repo.read("recipe.yaml").decode()
    assert text.startswith("# kept\n")
    assert yaml.safe_load(text) == sent
    for name in repo.names:
        assert folder.encode() not in repo.read(name), name
    assert folder in (run / "recipe.yaml").read_text()  # at home all is as it was


def test_what_was_measured_goes_along_and_into_the_card(hub: HubServer, run: Path) -> None:
    write_results(run, vision_section())
    kept = {
        "report.md": b"# report",
        "report.html": b"<h1>",
        "report.json": b"{}",
        "laws.png": b"x",
    }
    for name, content in kept.items():
        (run / "results" / name).write_bytes(content)
    answers = run / "results" / "predictions" / "easy-vqa.jsonl"
    answers.parent.mkdir()
    answers.write_text("{}\n")
    push(run)
    repo = hub.repos["tester/my-iaa"]
    sent = {name.removeprefix("results/") for name in repo.names if name.startswith("results/")}
    assert sent == {*kept, "vision.json"}
    card = repo.read("README.md").decode()
    assert "| easy-vqa | accuracy | 1,000 | **0.871** (0.851 to 0.891) |" in card
    assert "](results/laws.png)" in card
    assert "(results/report.html)" in card
    for name in ("report.html", "laws.png"):
        (run / "results" / name).unlink()
    push(run)
    assert "results/report.html" not in repo.names
    assert "results/laws.png" not in repo.read("README.md").decode()


def test_a_damaged_section_never_reaches_the_hub(hub: HubServer, run: Path) -> None:
    write_results(run, vision_section()).write_text("{")
    with pytest.raises(UsageError, match=r"vision\.json is damaged .*measure again"):
        push(run)
    assert hub.repos == {}


def test_the_plan_tells_of_folders_in_the_results(run: Path) -> None:
    write_results(run, vision_section())
    assert plan_push(run).warnings == []
    there = vision_section()
    for folder in ("/home/me/llama", "~/llama", "C:\\Users\\me"):
        there.graft["base"] = folder
        write_results(run, there)
        (warning,) = plan_push(run).warnings
        assert "results/vision.json names a folder of this machine" in warning
    write_results(run, text_section())
    for fine in ("acme/llama", "/", "and/or", "w/o"):
        there.graft["base"] = fine
        write_results(run, there)
        assert plan_push(run).warnings == []


def test_parts_of_a_graft_are_counted_by_name(run: Path) -> None:
    sizes = {row.part: row.parameters for row in graft_parts(run, "iaa")}
    assert sizes == {"projector": 64 * 64 + 64, "inserted layers": 128 * 64, "norm": 64}


@pytest.mark.parametrize(
    ("method", "config", "parts"),
    [
        ("lora", {"rank": 4, "gate": "token"}, {"attention", "feedforward", "projector"}),
        ("lora", {"rank": 4, "targets": "attention"}, {"attention", "projector"}),
        ("expert", {"layers": [1]}, {"attention", "feedforward", "projector"}),
        ("expert", {"parts": ["feedforward"], "rank": 3}, {"feedforward", "projector"}),
    ],
)
def test_what_is_pushed_loads_and_computes_the_same(
    hub: HubServer, tmp_path: Path, method: str, config: dict[str, Any], parts: set[str]
) -> None:
    made = make_graft(tmp_path, method=method, **config)
    base, vision = GraftFile.read(made).base.id, GraftFile.read(made).vision.id
    for name, folder in (("tester/tiny", base), ("tester/eyes", str(vision))):
        hub.add_model(name, Path(folder))
    push(made, "tester/again", base_id="tester/tiny", vision_id="tester/eyes")
    repo = hub.repos["tester/again"]
    card = repo.read("README.md").decode()
    assert f"| method | `{method}`: {get_method(method).title}" in card
    assert {
        row for row in ("attention", "feedforward", "projector") if f"| {row} |" in card
    } == parts
    for key, value in config.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        assert f"{key}: {shown}" in card or f"{key}: {value}" in card
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name in ("graft_config.json", "graft.safetensors"):
        (fetched / name).write_bytes(repo.read(name))
    sent, own = load_file(fetched / "graft.safetensors"), load_file(made / "graft.safetensors")
    assert sent.keys() == own.keys()
    assert all(torch.equal(sent[key], own[key]) for key in own)
    record = GraftFile.read(fetched)
    assert (record.base.id, record.vision.id) == ("tester/tiny", "tester/eyes")
    assert record.settings == GraftFile.read(made).settings


def test_sizes_are_those_of_the_files(run: Path) -> None:
    sizes = {file.name: file.size for file in plan_push(run).all_files("tester/my-iaa")}
    assert list(sizes) == SENT
    assert sizes["graft.safetensors"] == (run / "graft.safetensors").stat().st_size
    assert sizes["graft_config.json"] == len((run / "graft_config.json").read_bytes())
    assert UploadFile("x", b"four").size == 4
