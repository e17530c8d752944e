"""`mmgraft graft`: what it writes, and that a mistake writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tiny import save_base, tiny_clip_dir, tiny_model


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_base(folder / "Base-Llama", "llama")
    tiny_clip_dir(folder / "clip")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_writes_a_graft_and_its_recipe_beside_it(cli, parts: Path, here: Path) -> None:
    ran = cli("graft", parts / "Base-Llama", "--method", "iaa", "--layers", "1,3",
              "--vision", parts / "clip")  # fmt: skip
    assert ran.code == 0, ran.err
    folder = here / "base-llama-iaa"
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "graft_config.json", "graft.safetensors", "recipe.yaml",
    }  # fmt: skip
    record = json.loads((folder / "graft_config.json").read_text())
    assert record["config"]["layers"] == "1,3"
    assert record["vision"]["id"] == str((parts / "clip").resolve())
    tensors = load_file(folder / "graft.safetensors")
    base = tiny_model("llama").state_dict()
    copied = tensors["graft.layers.1.mlp.up_proj.weight"]
    assert (copied == base["model.layers.3.mlp.up_proj.weight"]).all()
    assert "method: iaa" in (folder / "recipe.yaml").read_text()
    assert "mmgraft train base-llama-iaa" in ran.err


@pytest.mark.parametrize("verify", ["fast", "full"])
def test_a_hash_of_the_whole_base_is_kept_if_asked(cli, parts: Path, here: Path, verify) -> None:
    ran = cli("graft", parts / "Base-Llama", "--method", "llava", "--vision", parts / "clip",
              "--verify", verify)  # fmt: skip
    assert ran.code == 0, ran.err
    record = json.loads((here / "base-llama-llava" / "graft_config.json").read_text())
    tensors = record["base"]["fingerprint"]["tensors"].values()
    assert all(("full" in tensor) == (verify == "full") for tensor in tensors)


def test_json_tells_what_was_added(cli, parts: Path, here: Path) -> None:
    ran = cli("graft", parts / "Base-Llama", "--method", "wings", "--rank", "4", "--layers",
              "every:2", "--vision", parts / "clip", "--json")  # fmt: skip
    data = json.loads(ran.out)
    tensors = load_file(here / "base-llama-wings" / "graft.safetensors")
    assert data["parameters"] == sum(t.numel() for t in tensors.values())
    assert data["config"]["rank"] == 4


def test_a_projector_is_chosen_by_name(cli, parts: Path, here: Path) -> None:
    graft = ("graft", parts / "Base-Llama", "--method", "llava", "--vision", parts / "clip")
    ran = cli(*graft, "--projector", "pixel_shuffle", "--no-projector-norm")
    assert ran.code == 0, ran.err
    record = json.loads((here / "base-llama-llava" / "graft_config.json").read_text())
    assert record["projector"] == {
        "kind": "pixel_shuffle", "k": 2, "norm": False, "hidden": None, "init_scale": 1.0,
    }  # fmt: skip
    tensors = load_file(here / "base-llama-llava" / "graft.safetensors")
    assert tensors["projector.mlp.0.weight"].shape[1] == 4 * 16
    wrong = cli(*graft, "--projector", "pixel_shufle", "--out", "other")
    assert wrong.code == 2
    assert "pixel_shuffle" in wrong.err
    assert not (here / "other").exists()


def test_a_projectors_settings_are_options(cli, parts: Path, here: Path) -> None:
    graft = ("graft", parts / "Base-Llama", "--method", "llava", "--vision", parts / "clip")
    recipe = here / "own.yaml"
    recipe.write_text(
        "name: own\nmethod: llava\ngraft:\n  projector: {kind: perceiver, latents: 9, layers: 2}\n"
        "stages:\n- {name: a, train: [projector], lr: 1e-3}\n"
    )
    given = (
        "--recipe",
        recipe,
        "--projector-option",
        "form=idefics2",
        "--projector-option",
        "heads=2",
        "--projector-option",
        "kv_heads=1",
        "--projector-option",
        "latents=16",
    )
    ran = cli(*graft, *given, "--out", "run")  # fmt: skip
    assert ran.code == 0, ran.err
    assert json.loads((here / "run" / "graft_config.json").read_text())["projector"] == {
        "kind": "perceiver", "form": "idefics2", "per": "view", "latents": 16, "layers": 2,
        "heads": 2, "kv_heads": 1, "head_dim": 96, "hidden": None, "init_scale": 1.0,
    }  # fmt: skip
    tensors = load_file(here / "run" / "graft.safetensors")
    assert tensors["projector.latents"].shape == (16, 32)
    for projector, options, says in (
        ("perceiver", ["latents=0"], "latents"),
        ("perceiver", ["latent=4"], "did you mean 'latents'"),
        ("perceiver", ["form=idefics2", "heads=6"], "4 kv_heads do not divide 6 heads"),
        ("perceiver", ["latents"], "--projector-option latents: write key=value"),
        ("perceiver", ["latents=[1"], "latents=[1 is not YAML"),
        ("perceiver", ["kind=pool"], "'kind'"),
        ("mlp", ["latents=4"], "unknown key 'latents'"),
        ("qformer", ["weights=nowhere/at/all"], "no folder 'nowhere/at/all' here"),
        ("qformer", [f"weights={parts / 'clip'}"], "BLIP-2"),
    ):
        flags = [word for one in options for word in ("--projector-option", one)]
        wrong = cli(*graft, "--projector", projector, *flags, "--out", "other")
        assert wrong.code == 2, options
        assert says in " ".join(wrong.err.split()), wrong.err
        assert not (here / "other").exists()


def test_dry_run_writes_nothing(cli, parts: Path, here: Path) -> None:
    ran = cli("graft", parts / "Base-Llama", "--method", "llava", "--vision", parts / "clip",
              "--dry-run")  # fmt: skip
    assert ran.code == 0, ran.err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "iaa", "--layers", "1,9"], "layer 9"),
        (["--method", "iaa", "--layers", "1,1"], "twice"),
        (["--method", "iaa"], "layers"),
        (["--method", "iia", "--layers", "1"], "iaa"),
        (["--layers", "1"], "--method"),
        (["--method", "wings", "--structure", "b"], "--structure"),
        (["--method", "iaa", "--layers", "1", "--set", "structre=b"], "structure"),
        (["--method", "iaa", "--layers", "1", "--recipe", "wings"], "wings"),
        (["--method", "wings", "--heads", "5"], "heads"),
        (["--method", "iaa", "--layers", "1", "--template", "no.jinja"], "no.jinja"),
        (["--method", "iaa", "--layers", "1", "--verify", "hard"], "fast or full"),
    ],
)
def test_a_mistake_is_explained_and_nothing_is_written(
    cli, parts: Path, here: Path, arguments: list[str], says: str
) -> None:
    ran = cli("graft", parts / "Base-Llama", "--vision", parts / "clip", *arguments)
    assert ran.code == 2
    assert says in ran.err
    assert "Traceback" not in ran.err
    assert list(here.iterdir()) == []


def test_a_folder_in_use_is_kept_unless_forced(cli, parts: Path, here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "notes.txt").write_text("mine")
    arguments = ["graft", parts / "Base-Llama", "--method", "llava", "--vision", parts / "clip",
                 "--out", "run"]  # fmt: skip
    ran = cli(*arguments)
    assert ran.code == 2
    assert "--force" in ran.err
    assert [p.name for p in (here / "run").iterdir()] == ["notes.txt"]
    assert cli(*arguments, "--force").code == 0
    assert (here / "run" / "notes.txt").read_text() == "mine"
    assert (here / "run" / "graft_config.json").is_file()


def test_a_model_that_is_no_causal_lm_is_refused(cli, parts: Path, here: Path) -> None:
    ran = cli("graft", parts / "clip", "--method", "llava", "--vision", parts / "clip")
    assert ran.code == 2
    assert list(here.iterdir()) == []


def test_a_base_without_a_chat_template_wants_one_named(cli, parts: Path, here: Path) -> None:
    save_base(here / "bare", "llama")
    (here / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    config = here / "bare" / "tokenizer_config.json"
    data = json.loads(config.read_text())
    data.pop("chat_template", None)
    config.write_text(json.dumps(data))
    arguments = ["graft", here / "bare", "--method", "llava", "--vision", parts / "clip",
                 "--out", "run"]  # fmt: skip
    ran = cli(*arguments)
    assert ran.code == 2
    assert "--template plain" in ran.err
    assert cli(*arguments, "--template", "plain").code == 0
    record = json.loads((here / "run" / "graft_config.json").read_text())
    assert record["template"] == {"kind": "plain", "text": None, "options": {}}


def test_a_recipe_sets_the_towers_options(cli, parts: Path, here: Path, monkeypatch) -> None:
    from mmgraft.model.files import create as grafting
    from mmgraft.model.files import summary

    made = []

    def create(base, spec, *args, **kwargs):
        made.append(spec)
        return type("Record", (), {})()

    monkeypatch.setattr(grafting, "create_graft", create)
    monkeypatch.setattr(summary, "summarise_graft", lambda folder: None)
    (here / "r.yaml").write_text(
        "name: r\nmethod: llava\ngraft: {vision: efficientnet-lite2, vision_options: "
        "{image_size: 160}}\nstages: [{name: a, train: [projector], lr: 0.001}]\n"
    )
    asked = ["graft", parts / "Base-Llama", "--recipe", "r.yaml", "--dry-run"]
    assert cli(*asked).code == 0
    assert cli(*asked, "--vision", parts / "clip").code == 0
    assert (made[0].kind, made[0].options) == ("efficientnet-lite2", {"image_size": 160})
    assert made[1].options == {}, "another tower does not get the options of the recipe's"
