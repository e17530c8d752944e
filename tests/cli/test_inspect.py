from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from hub_fixtures import hub, make_run
from tiny import save_base, tiny_model

__all__ = ["hub"]  # pytest finds the fixture by this name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "gemma3"
    save_base(folder, "gemma3")
    return folder


def test_a_model_is_counted_as_it_is(cli, base: Path) -> None:
    data = json.loads(cli("inspect", base, "--json").out)
    model = tiny_model("gemma3")
    assert data["parameters"] == sum(p.numel() for p in model.parameters())
    assert data["bytes"] == 4 * data["parameters"]
    layers = model.model.layers
    assert [row["parameters"] for row in data["layers"]] == [
        sum(p.numel() for p in layer.parameters()) for layer in layers
    ]
    assert [row["attention"] for row in data["layers"]] == model.config.layer_types
    assert {row["kind"] for row in data["layers"]} == {"Gemma3DecoderLayer"}
    assert data["parts"]["head"] == 0, "the head is the embedding's tensor"
    assert data["parameters"] == sum(data["parts"].values()) + sum(
        row["parameters"] for row in data["layers"]
    )


def test_the_table_has_a_line_for_each_layer(cli, base: Path) -> None:
    ran = cli("inspect", base)
    assert ran.code == 0
    lines = [line.split() for line in ran.out.splitlines()]
    rows = [line for line in lines if "Gemma3DecoderLayer" in line]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [row[2] for row in rows] == ["sliding", "full", "sliding", "sliding"]
    assert all(row[-1] == "yes" for row in rows)


def test_weights_are_not_read(cli, base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not even a header")
    assert cli("inspect", tmp_path).code == 0


def test_of_a_model_on_the_hub_only_the_config_is_fetched(cli, hub, base: Path) -> None:
    hub.add_model("acme/gemma", base)
    data = json.loads(cli("inspect", "acme/gemma", "--json").out)
    assert data["id"] == "acme/gemma"
    assert len(data["revision"]) == 40
    fetched = [path for path in hub.paths("GET") if "/resolve/" in path]
    assert fetched
    assert all(path.endswith("config.json") for path in fetched)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("zebra", "unknown model 'zebra'"),
        ("./nowhere", "./nowhere"),
        ("acme/nothing", "acme/nothing"),
    ],
)
def test_an_unknown_model_exits_2(cli, hub, model: str, said: str) -> None:
    ran = cli("inspect", model)
    assert ran.code == 2
    assert said in ran.err
    assert ran.out == ""


def test_a_model_that_is_not_causal_exits_2(cli, tmp_path: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    ran = cli("inspect", tmp_path)
    assert ran.code == 2
    assert "bert" in ran.err.lower()


def test_a_layer_that_cannot_carry_a_graft_says_why(cli, tmp_path: Path) -> None:
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        vocab_size=64,
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
    )
    config.architectures = ["Qwen3NextForCausalLM"]
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    data = json.loads(cli("inspect", tmp_path, "--json").out)
    assert "GatedDeltaNet" in data["layers"][0]["refused"]
    assert data["layers"][1]["refused"] is None
    assert "no: " in cli("inspect", tmp_path).out


def test_a_graft_tells_what_it_adds(cli, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", size=8)
    data = json.loads(cli("inspect", run, "--json").out)
    tensors = load_file(run / "graft.safetensors")
    assert data["parameters"] == sum(tensor.size for tensor in tensors.values())
    assert data["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    parts = {row["part"]: (row["tensors"], row["parameters"]) for row in data["parts"]}
    assert parts == {"projector": (2, 72), "inserted layers": (1, 128), "norm": (1, 8)}
    assert data["base"] == "acme/tiny-llama"
    out = cli("inspect", run).out
    assert f"acme/tiny-llama @ {'a' * 40}" in out
    assert "acme/tiny-clip, hidden state -2" in out


def test_a_graft_on_the_hub(cli, hub, tmp_path: Path) -> None:
    hub.add_model("acme/graft", make_run(tmp_path / "run", size=8))
    data = json.loads(cli("inspect", "acme/graft", "--json").out)
    assert data["method"] == "iaa"
    assert data["parameters"] == 208
    assert not any("tokenizer" in path for path in hub.paths("GET"))


OFFICIAL = {"method": "wings-official", "system_prompt_length": 1, "image_token_length": 4}


def test_learners_and_router_are_parts(cli, tmp_path: Path) -> None:
    official = OFFICIAL
    run = make_run(tmp_path / "run", size=4, method="wings-official", config=official)
    tensors = load_file(run / "graft.safetensors")
    one = tensors["projector.mlp.0.bias"]
    names = ("visual.query.up.weight", "textual.query.up.weight", "router.weight")
    save_file({f"graft.layers.0.{name}": one for name in names}, run / "graft.safetensors")
    ran = cli("inspect", run)
    for part in ("visual learners", "textual learners", "router"):
        assert part in ran.out


@pytest.mark.parametrize(
    ("values", "lacking"),
    [
        ({"method": "llava", "config": {"method": "llava"}}, 1),  # its positions are new
        ({"method": "lora", "config": {"method": "lora"}}, 0),
        ({"method": "expert", "config": {"method": "expert"}}, 1),  # rounding
        ({"method": "expert", "config": {"method": "expert", "rank": 2}}, 0),
        ({"method": "expert", "config": {"method": "expert", "image_positions": "shared"}}, 2),
        ({}, 1),  # iaa c starts as a deeper decoder
        ({"config": {"method": "iaa", "layers": [1], "structure": "b"}}, 0),
        ({"base_trained": True}, 2),
        ({"method": "wings", "config": {"method": "wings"}}, 0),
        ({"method": "wings-official", "config": OFFICIAL}, 9),
    ],
)
def test_what_a_graft_does_not_promise(cli, tmp_path: Path, values: dict, lacking: int) -> None:
    run = make_run(tmp_path / "run", size=4, **values)
    assert len(json.loads(cli("inspect", run, "--json").out)["lacks"]) == lacking
    assert ("does not promise" in cli("inspect", run).out) == bool(lacking)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: (run / "graft.safetensors").unlink(), "lacks graft.safetensors"),
        (lambda run: (run / "graft.safetensors").write_bytes(b"x"), "corrupt"),
        (lambda run: (run / "graft_config.json").write_text("{"), "corrupt"),
        (lambda run: (run / "graft_config.json").write_text('{"schema_version": 99}'), "99"),
    ],
)
def test_a_damaged_graft_exits_2(cli, tmp_path: Path, damage, said: str) -> None:
    run = make_run(tmp_path / "run", size=4)
    damage(run)
    ran = cli("inspect", run)
    assert ran.code == 2
    assert said in ran.err
