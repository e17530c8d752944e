"""Recipes: schema, refusals with the nearest key and the line, overrides, shipped files."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmgraft.aliases import resolve_alias
from mmgraft.errors import UsageError
from mmgraft.recipes.recipe import Recipe
from mmgraft.recipes.source import (
    dump_recipe,
    find_recipe,
    load_recipe,
    recipe_dir,
    shipped_recipes,
    with_data,
    with_max_steps,
)

SMALL = """\
name: small
method: iaa
stages:
  - name: align
    train: [projector]
    graft_active: false
    lr: 1e-3
  - name: tune
    train: [projector, layers]
    lr: {projector: 1.0e-5, default: 2.0e-4}
    epochs: 2
"""


@pytest.fixture
def recipe_file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, **kwargs)
    return str(caught.value)


def test_numbers_without_a_dot_are_numbers(recipe_file):
    assert load_recipe(recipe_file(SMALL)).stages[0].lr == 1e-3  # YAML reads 1e-3 as text


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("lrr: 1", "did you mean 'lr'"),
        ("learning_rate: 1", "here it is called 'lr'"),
        ("gradient_accumulation_steps: 4", "here it is called 'accumulate'"),
        ("max_stepz: 4", "did you mean 'max_steps'"),
    ],
)
def test_unknown_key_names_the_right_one_and_the_line(recipe_file, wrong, hint):
    lines = SMALL.splitlines()
    lines.insert(7, f"    {wrong}")
    message = refusal(recipe_file("\n".join(lines)))
    assert hint in message
    assert "line 8:" in message


def test_all_problems_are_told_at_once(recipe_file):
    text = SMALL.replace("epochs: 2", "epochs: -1").replace("name: small", "name: small\nsead: 3")
    message = refusal(recipe_file(text))
    assert "2 problems" in message
    assert "line 2: unknown key 'sead'" in message
    assert "line 12: 'stages[1].epochs'" in message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("method: iaa", "method: iaa\nbase: lora"), "mmgraft graft BASE --method lora"),
        (
            ("method: iaa", "method: lora\nbase: full"),
            "base: full, but no stage trains it",
        ),
        (("method: iaa", "method: iaa\nprecision: fp16"), "fp16 is refused"),
        (("epochs: 2", "precision: fp16"), "fp16 is refused"),
        (
            ("train: [projector, layers]", "train: [projector, base]"),
            "this method keeps its base frozen",
        ),
        (("method: iaa", "method: wings\nbase: full\nquantization: nf4"), "trains it"),
        (("method: iaa", "method: llava\nbase: full"), "no stage trains it"),
        (("train: [projector, layers]", "train: [projector, layer]"), "did you mean 'layers'"),
        (("train: [projector]", "train: [layers]"), "out of the path"),
        (("epochs: 2", "text_rows: base"), "does not train"),
        (("epochs: 2", "router: true"), "router belongs to method wings, not iaa"),
        (("epochs: 2", "roter: true"), "A stage of method iaa has no keys of its own"),
        (("epochs: 2", "epochs: 2\n    max_steps: 3"), "not both"),
        (("default: 2.0e-4", "norm: 2.0e-4"), "no rate for layers"),
        (("default: 2.0e-4", "layers: 0"), "above 0"),
        (("name: tune", "name: align"), "two stages"),
        (("epochs: 2", "epochs: 2\n    epochs: 3"), "twice"),
        (("method: iaa", "method: iia"), "did you mean 'iaa'"),
        (("method: iaa", "method: iaa\ngraft: {config: {layerz: all}}"), "did you mean 'layers'"),
        (("method: iaa", "method: iaa\neval_every: 5"), "eval_data is empty"),
        (("epochs: 2", "packing: true"), "give max_length"),
        (
            ("epochs: 2", "packing: true\n    max_length: 64\n    group_by: length"),
            "give packing or",
        ),
        (("epochs: 2", "group_by: modality"), "write group_by: length"),
        (("method: iaa", "method: iaa\nattention: flash"), "'flash_attention_2'"),
        (("method: iaa", "method: iaa\nattention: flash_attention_2\nprecision: fp32"), "bf16"),
        (("method: iaa", "method: iaa\ncompile: true\nquantization: nf4"), "not built"),
        (("stages:", "stages: ["), "not YAML"),
        (("name: small", "name: &a [*a]"), "not YAML"),
        (("epochs: 2", "epochs: 010"), "010 would be read in base 8"),
        (("epochs: 2", "max_steps: -017"), "-017 would be read in base 8"),
        (("default: 2.0e-4", "layers: 1:30"), "1:30 would be read in base 8 or 60"),
        (("epochs: 2", "epochs: 0:20.5"), "0:20.5 would be read in base 8 or 60"),
        (("epochs: 2", "epochs: .inf"), "finite number"),
        (("epochs: 2", "epochs: 1.0e+30"), "less than or equal to 100000 (got 1e+30)"),
        (("default: 2.0e-4", "layers: .nan"), "finite number"),
        (("epochs: 2", "betas: [0.9, 1.0]"), "less than 1"),
        (("epochs: 2", "seed: -1"), "greater than or equal to 0"),
        (("method: iaa", "method: iaa\nseed: 4294967296"), "less than 4294967296"),
        (("epochs: 2", "workflow: text"), "text is the base alone"),
        (("epochs: 2", "workflow: ../out"), "called by a word"),
        (("method: iaa", "method: iaa\nworkflow: a.b"), "called by a word"),
        (("method: iaa", "method: iaa\nfeature_cache: ''"), "write true, false or a folder"),
        (("epochs: 2", "data: [{path: a.json, revision: main}]"), "leave revision out"),
        (("epochs: 2", "data: [{path: a.json, subset: small}]"), "leave subset out"),
        (("epochs: 2", "data: [{path: a.json, weight: .inf}]"), "finite number"),
        (("epochs: 2", "data: [{path: a.json, weight: 1.0e+30}]"), "equal to 100000"),
    ],
)
def test_refusals(recipe_file, change, says):
    assert says in refusal(recipe_file(SMALL.replace(*change)))


def test_a_set_of_the_hub_has_a_subset_and_a_revision(recipe_file):
    entry = "{path: hub:o/n, split: 'train[:9]', subset: small, revision: main}"
    (read,) = (
        load_recipe(recipe_file(SMALL.replace("epochs: 2", f"data: [{entry}]"))).stages[1].data
    )
    assert (read.split, read.subset, read.revision) == ("train[:9]", "small", "main")


def test_flash_attention_keeps_packed_rows_apart_in_one_sequence_only(recipe_file):
    text = SMALL.replace("method: iaa", "method: iaa\nattention: flash_attention_2")
    packed = text.replace("epochs: 2", "packing: true\n    max_length: 64")
    assert load_recipe(recipe_file(packed)).stages[1].packing
    assert "write batch_size: 1" in refusal(recipe_file(packed + "    batch_size: 2\n"))


def test_wings_learner_out_of_the_path_cannot_be_trained(recipe_file):
    text = (
        SMALL.replace("iaa", "wings")
        .replace("graft_active: false", "learners: [visual]")
        .replace("[projector]", "[projector, learners.textual]")
        .replace("layers", "router")
    )
    assert "add textual to learners" in refusal(recipe_file(text))


def test_recipe_for_another_method(recipe_file):
    message = refusal(recipe_file(SMALL), method="wings")
    assert "recipe for iaa" in message
    assert "wings-base" in message


def test_resolved_writes_the_recipe_values_into_stages(recipe_file):
    text = SMALL.replace("method: iaa", "method: llava\nbase: full\nseed: 5\ntext_rows: base")
    text = text.replace("[projector, layers]", "[projector, base]").replace(
        "graft_active: false", "seed: 9"
    )
    recipe = load_recipe(recipe_file(text)).resolved()
    assert [stage.seed for stage in recipe.stages] == [9, 5]
    assert [stage.text_rows for stage in recipe.stages] == ["skip", "base"]
    assert [stage.epochs for stage in recipe.stages] == [1.0, 2.0]
    assert {stage.workflow for stage in recipe.stages} == {"mm"}
    assert {stage.precision for stage in recipe.stages} == {"bf16"}


@pytest.mark.parametrize(
    ("key", "of_recipe", "own", "neither"),
    [
        ("seed", 5, 9, 0),
        ("seed", 5, 0, 0),
        ("precision", "fp32", "bf16", "bf16"),
        ("precision", "bf16", "fp32", "bf16"),
        ("workflow", "see", "ground", "mm"),
        ("text_rows", "graft", "skip", "skip"),
        ("text_rows", "skip", "graft", "skip"),
        ("image_share", 0.25, 0.75, None),
        ("data", [{"path": "a"}], [{"path": "b"}], []),
    ],
)
def test_a_stage_has_its_own_value_or_else_the_recipes(key, of_recipe, own, neither):
    extra = {"text_rows": "graft"} if key == "image_share" else {}
    stages = [{"name": name, "train": ["projector"], "lr": 1.0} for name in "ab"]
    whole = {"name": "x", "method": "iaa", **extra, "stages": [{**stages[0], key: own}, stages[1]]}

    def shown(recipe: dict) -> list:
        found = [getattr(one, key) for one in Recipe.model_validate(recipe).resolved().stages]
        return [[x.path for x in one] if isinstance(one, list) else one for one in found]

    plain = (lambda value: [x["path"] for x in value]) if key == "data" else (lambda value: value)
    assert shown({**whole, key: of_recipe}) == [plain(own), plain(of_recipe)]
    assert shown(whole) == [plain(own), plain(neither)]


def test_dump_reads_back_to_the_same(recipe_file):
    recipe = load_recipe(recipe_file(SMALL)).resolved()
    assert Recipe.model_validate(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_overrides_reach_stages_by_name_index_and_star(recipe_file):
    recipe = load_recipe(
        recipe_file(SMALL),
        overrides=[
            "stages.tune.batch_size=3",
            "stages[0].accumulate=7",
            "stages.*.seed=11",
            "stages.tune.lr.layers=1e-4",
            "stages.align.lr.projector=2e-3",
            "data.0.path=rows.json",
            "tracking=wandb",
        ],
    )
    align, tune = recipe.stages
    assert tune.batch_size == 3
    assert align.accumulate == 7
    assert [align.seed, tune.seed] == [11, 11]
    assert tune.lr == {"projector": 1e-5, "default": 2e-4, "layers": 1e-4}
    assert align.lr == {"default": 1e-3, "projector": 2e-3}
    assert recipe.data[0].path == "rows.json"
    assert recipe.tracking == "wandb"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.tun.lr=1", "did you mean 'tune'"),
        ("stages.7.lr=1", "counted from 0"),
        ("stages.tune.batchsize=1", "did you mean 'batch_size'"),
        ("seed", "key=value"),
        ("name.first=1", "name is one value"),
        ("stages.tune.batch_size=010", "--set stages.tune.batch_size=010, line 1: 010 would be"),
        ("seed=1:30", "1:30 would be read in base 8 or 60"),
        ("name=[", "--set name=[ is not YAML"),
        ("name=&a [*a]", "is not YAML"),
    ],
)
def test_overrides_that_reach_nothing(recipe_file, override, says):
    assert says in refusal(recipe_file(SMALL), overrides=[override])


def test_data_from_the_command_line(recipe_file):
    recipe = load_recipe(recipe_file(SMALL))
    assert recipe.data_to_set() == ["data[0].path"]
    both = with_data(recipe, ["a.json"], "pics")
    assert [stage.data[0].path for stage in both.stages] == ["a.json", "a.json"]
    assert both.stages[0].data[0].images == "pics"
    assert both.data_to_set() == []
    one = with_data(recipe, ["tune=b.json"], None, ["format=vqa", "vqa.answer=sampled"])
    assert one.stages[1].data[0].format == "vqa"
    assert one.stages[1].data[0].vqa.answer == "sampled"
    assert one.stages[0].data is None
    assert one.data_to_set() == ["data[0].path"]
    with pytest.raises(UsageError, match="did you mean 'tune'"):
        with_data(recipe, ["tunes=b.json"], None)


def test_images_alone_are_the_folder_of_the_recipes_own_rows():
    shared = [{"path": "a.json", "images": "x", "weight": 2.0}, {"path": "b.json", "limit": 5}]
    own = [{"path": "c.json", "images": "y", "format": "swift"}, {"path": "d.json"}]
    stages = [
        {"name": "align", "train": ["projector"], "lr": 1.0},
        {"name": "tune", "train": ["projector"], "lr": 1.0, "data": own},
    ]
    recipe = Recipe.model_validate(
        {"name": "r", "method": "llava", "data": shared, "stages": stages}
    )

    def rows_of(data, images):
        found = with_data(recipe, data, images).resolved()
        return [
            [entry.model_dump(exclude_defaults=True) for entry in stage.data]
            for stage in found.stages
        ]

    moved = [[{**entry, "images": "pics"} for entry in each] for each in (shared, own)]
    assert rows_of(None, "pics") == moved
    assert rows_of(None, None) == [shared, own]
    assert rows_of(["tune=e.json", "tune=f.json"], "pics") == [
        shared,  # a folder that goes with files is of these files
        [{"path": "e.json", "images": "pics"}, {"path": "f.json", "images": "pics"}],
    ]
    assert rows_of(["align=e.json"], "pics") == [[{"path": "e.json", "images": "pics"}], own]
    assert rows_of(["align=e.json", "f.json"], None) == [[{"path": "e.json"}], [{"path": "f.json"}]]


def test_max_steps_ends_every_stage(recipe_file):
    recipe = with_max_steps(load_recipe(recipe_file(SMALL)), 2).resolved()
    assert [(s.max_steps, s.epochs) for s in recipe.stages] == [(2, None), (2, None)]


def test_unknown_recipe_name():
    with pytest.raises(UsageError, match="did you mean 'wings-base'"):
        find_recipe("wings-bas")


# Shipped recipes

EXPECTED = {
    "iaa": "iaa iaa-8b-14 iaa-24gb iaa-cpu grounding demo-iaa",
    "wings": "wings wings-1.8b wings-1.8b-full wings-base wings-base-full wings-pro "
    "wings-pro-full wings-24gb demo-wings",
    "llava": "llava llava-full demo-llava",
    "lora": "lora lora-phi4 lora-xcomposer2 lora-24gb lora-cpu demo-lora",
    "expert": "expert expert-24gb expert-cpu demo-expert",
    "xattn": "xattn xattn-flamingo xattn-24gb xattn-cpu demo-xattn",
}


def test_all_shipped_recipes_are_there():
    assert set(shipped_recipes()) == set(" ".join(EXPECTED.values()).split())


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_is_right(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert name in EXPECTED[recipe.method].split()
    assert recipe.data_to_set(), "shipped recipes leave their data to the user"


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_value_of_a_shipped_recipe_has_its_source(name):
    text = (recipe_dir() / f"{name}.yaml").read_text()
    lines = text.splitlines()
    assert re.match(r"# mmgraft (graft|train|demo) ", lines[0])
    valued = set()

    def walk(node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(value, yaml.ScalarNode) or value.flow_style:
                    valued.add(key.start_mark.line)
                else:
                    walk(value)
        else:
            assert isinstance(node, yaml.SequenceNode)
            for item in node.value:
                walk(item)

    walk(yaml.compose(text))
    assert len(valued) > 10
    for number in valued:
        assert re.search(r" # (paper|official script|ours)\b", lines[number]), lines[number]


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_commands_at_the_top_are_about_this_recipe(name):
    recipe = load_recipe(name)
    text = (recipe_dir() / f"{name}.yaml").read_text().split("\n#\n")[0]
    joined = re.sub(r"\\\n# +", "", text).removeprefix("# ")
    commands = [shlex.split(command) for command in joined.split("\n# ")]
    assert all(command[0] == "mmgraft" for command in commands)
    for command in commands:
        if command[1] == "graft":
            assert command[2:] == [recipe.graft.base, "--recipe", name]
            assert resolve_alias(command[2])
        if command[1] == "train":
            given = [b for a, b in itertools.pairwise(command) if a == "--data"]
            assert with_data(recipe, given, None).data_to_set() == []
        if command[1] == "demo":
            assert command[2:] == ["--method", recipe.method]


def test_published_numbers():
    iaa = load_recipe("iaa-8b-14")
    assert iaa.graft.config["layers"] == [0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31]
    assert [stage.lr for stage in iaa.stages[:2]] == [1e-3, 2e-5]
    assert [stage.graft_active for stage in iaa.stages] == [False, True, True, True]
    assert iaa.stages[3].workflow == "grounding"
    for name in ("wings-1.8b", "wings-base", "wings-pro"):
        frozen, full = load_recipe(name), load_recipe(f"{name}-full")
        assert (frozen.base, full.base) == ("frozen", "full")
        assert full.stages[1].lr == {"default": 2e-6, "projector": 1e-5}
        for recipe in (frozen, full):
            assert [s.batch_size * s.accumulate for s in recipe.stages] == [32, 32]
            assert recipe.stages[0].learners == ["visual"]
            assert recipe.stages[0].router is False
    published = [("phi4", 512, "row", 0.0), ("xcomposer2", 256, "token", 0.05)]
    for name, alpha, gate, dropout in published:
        config = load_recipe(f"lora-{name}").graft.config
        assert (config["rank"], config["alpha"]) == (256, alpha)
        assert (config["gate"], config["dropout"]) == (gate, dropout)
    llava = load_recipe("llava-full")
    assert [stage.lr for stage in llava.stages] == [1e-3, 2e-5]
    assert [s.batch_size * s.accumulate for s in llava.stages] == [256, 128]


def test_small_card_recipes_keep_their_promises():
    iaa = load_recipe("iaa-24gb")
    assert iaa.graft.config["layers"] == "every:7"  # 4 of qwen2-7b's 28
    assert (iaa.graft.config["embedding"], iaa.graft.config["head"]) == (False, False)
    assert iaa.stages[-1].optimizer == "paged_adamw_8bit"
    for recipe in (iaa, load_recipe("wings-24gb")):
        assert (recipe.base, recipe.quantization) == ("frozen", "nf4")
        assert all(stage.gradient_checkpointing for stage in recipe.stages)


def test_recipes_load_without_torch():
    code = (
        "import sys; from mmgraft.recipes.source import load_recipe; "
        "load_recipe('iaa'); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
