"""`mmgraft import`."""

import json
from pathlib import Path

import pytest

from hub_fixtures import hub
from hub_server import HubServer
from published import published_wings, save_published
from tiny import save_base, tiny_siglip_dir

__all__ = ["hub"]


@pytest.fixture
def wings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "qwen2", "qwen2", tie_word_embeddings=False)
    tower = tiny_siglip_dir(tmp_path / "siglip")
    tensors, config = published_wings(tmp_path / "qwen2", tower)
    return save_published(tmp_path / "wings", tensors, config, tower=tower)


def test_it_writes_a_folder_and_says_what_is_in_it(cli, wings: Path) -> None:
    ran = cli("import", wings)
    assert ran.code == 0, ran.err
    assert "wings-graft" in ran.out
    assert "the checkpoint's own" in ran.out
    assert "not of the original LLM" in ran.err
    assert Path("wings-graft/graft_config.json").is_file()
    again = cli("import", wings)
    assert (again.code, "--force" in again.err) == (2, True)
    assert cli("import", wings, "--force", "--base", "qwen2", "--json").code == 0


def test_json_is_the_report_alone(cli, wings: Path) -> None:
    ran = cli("import", wings, "-o", "there", "--base", "./qwen2", "--json")
    report = json.loads(ran.out)
    assert report["method"] == "wings-official"
    assert (report["own_base"], report["dry_run"]) == (False, False)
    assert report["grafts"][0]["workflow"] == "mm"
    assert Path(report["folder"]) == Path("there")


def test_the_example_of_its_help(cli, wings: Path, hub: HubServer) -> None:
    hub.add_model("AIDC-AI/Wings-Qwen1_5-8B", wings)
    ran = cli("import", "AIDC-AI/Wings-Qwen1_5-8B", "--dry-run")
    assert ran.code == 0, ran.err
    assert "would be written" in ran.out
    assert "wings-qwen1_5-8b" in ran.out
    assert not Path("wings-qwen1_5-8b").exists()


def test_what_is_no_checkpoint_is_wrong_use(cli, wings: Path, hub: HubServer) -> None:
    for name in ("me/nothing", "./nothing", "qwen2"):
        ran = cli("import", name)
        assert ran.code == 2, (name, ran.err)
        assert "Traceback" not in ran.err
