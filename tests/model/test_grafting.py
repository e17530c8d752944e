"""A fresh graft: from files without loading the base, or on a base in memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from grafting import CONFIGS, batch, graft_on, logits_of, rows, text_of
from mmgraft import ExpertConfig, GraftedModel, IAAConfig, LlavaConfig, WingsConfig
from mmgraft.basefiles import TensorReader
from mmgraft.errors import UsageError
from mmgraft.model.files.create import create_graft
from mmgraft.model.files.graft_file import TemplateChoice
from mmgraft.vision.projectors.configs import MlpConfig
from mmgraft.vision.spec import ProjectorSpec
from tiny import save_base, tiny_clip_dir, tiny_model, tiny_tower


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    save_base(tmp_path / "base", "llama")
    tiny_clip_dir(tmp_path / "tower")
    return tmp_path


def make(parts: Path, config: Any, name: str = "graft", **options: Any) -> dict[str, torch.Tensor]:
    create_graft(str(parts / "base"), str(parts / "tower"), config, parts / name, **options)
    return load_file(parts / name / "graft.safetensors")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the base's tensors that are read; loading a whole model fails the test."""
    names: set[str] = set()
    lazy = TensorReader.lazy

    class Watched:
        """Stand-in for what `lazy` gives; indexing it reads."""

        def __init__(self, inner: Any, key: str) -> None:
            self.inner, self.key = inner, key

        def __getitem__(self, index: Any) -> Any:
            names.add(self.key)
            return self.inner[index]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    def watched(self: TensorReader, key: str) -> Any:
        return Watched(lazy(self, key), key)

    load = AutoModelForCausalLM.from_pretrained

    def outline(*args: Any, **options: Any) -> Any:
        if options.get("device_map") != "meta":
            raise AssertionError("a model was loaded")
        return load(*args, **options)  # names and shapes alone

    monkeypatch.setattr(TensorReader, "lazy", watched)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", outline)
    return names


@pytest.mark.parametrize(
    ("config", "others"),
    [
        (
            IAAConfig(layers=[2]),
            {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"},
        ),
        (IAAConfig(layers=[2], embedding=False, head=False), {"model.norm.weight"}),
        (IAAConfig(layers=[2], embedding=False, norm=False, head=False), set()),
        (ExpertConfig(layers=[2]), set()),
        (ExpertConfig(rank=2), None),
        (CONFIGS["wings"], None),
        (CONFIGS["llava"], None),
    ],
)
def test_only_what_is_copied_is_read(parts: Path, read: set[str], config: Any, others) -> None:
    make(parts, config)
    layers = {key for key in read if ".layers." in key}
    assert {re.search(r"layers\.(\d+)\.", key)[1] for key in layers} == (
        set() if others is None else {"2"}
    )
    assert read - layers == (others or set())


def test_a_graft_from_files_equals_one_on_the_loaded_base(parts: Path) -> None:
    """The copies are exact; what is drawn is drawn from one seed."""
    for method in ("iaa-c", "iaa-a", "wings", "expert"):
        tensors = make(parts, CONFIGS[method], method)
        model = GraftedModel.graft(str(parts / "base"), str(parts / "tower"), CONFIGS[method])
        mine = model.workflow().state_dict()
        assert tensors.keys() == mine.keys()
        assert all(torch.equal(tensor, mine[name]) for name, tensor in tensors.items())
        loaded = GraftedModel.from_pretrained(parts / method)
        assert loaded.workflow().record.config == model.workflow().record.config
        inputs = batch(rows("ttiiiittt"))
        inputs["image_features"] = inputs["image_features"][..., :16]
        assert torch.equal(logits_of(model, inputs), logits_of(loaded, inputs))
        base = AutoModelForCausalLM.from_pretrained(parts / "base")
        texts = text_of(batch(rows("ttttttt")))
        assert torch.equal(logits_of(loaded, texts), logits_of(base, texts))


def test_nothing_is_written_when_it_cannot_be_made(parts: Path) -> None:
    save_base(parts / "silent", "llama", chat_template=False)
    for base, config, options, says in [
        ("base", IAAConfig(layers=[1, 7]), {}, "7"),
        ("base", WingsConfig(rank=4, heads=5), {}, "Set --heads"),
        ("silent", CONFIGS["llava"], {}, "no chat template"),
        ("base", CONFIGS["llava"], {"workflow": "text"}, "cannot name a workflow"),
        ("base", CONFIGS["llava"], {"workflow": "two words"}, "cannot name a workflow"),
    ]:
        with pytest.raises(UsageError, match=says):
            create_graft(
                str(parts / base), str(parts / "tower"), config, parts / "graft", **options
            )
    create_graft(
        str(parts / "base"), str(parts / "tower"), CONFIGS["llava"], parts / "graft", dry_run=True
    )
    assert not (parts / "graft").exists()
    plain = TemplateChoice(kind="plain")
    tower, folder = str(parts / "tower"), parts / "graft"
    record = create_graft(str(parts / "silent"), tower, CONFIGS["llava"], folder, template=plain)
    assert record.template == plain


HYBRID: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
BAMBA = {
    **HYBRID,
    "attn_layer_indices": [2],
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}
NEXT = {
    **HYBRID,
    "head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


@pytest.mark.parametrize(("kind", "values"), [("bamba", BAMBA), ("qwen3_next", NEXT)])
@pytest.mark.parametrize("config", [IAAConfig(layers=[2, 3]), IAAConfig(layers="all")])
def test_layers_that_keep_a_running_state_are_refused_by_name(
    kind: str, values: dict[str, Any], config: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values))
    first = 3 if config.layers == [2, 3] else 0
    with pytest.raises(
        UsageError,
        match=rf"layer {first} of .*ForCausalLM.*(?:keys and values|running state).*can: 2\.",
    ):
        GraftedModel.graft(base, None, config)
    with pytest.raises(UsageError, match=r"layer 0 of"):
        GraftedModel.graft(base, None, CONFIGS["wings"])
    base.save_pretrained(tmp_path / "base")
    tiny_clip_dir(tmp_path / "tower")
    with pytest.raises(UsageError, match=rf"layer {first} of"):
        create_graft(str(tmp_path / "base"), str(tmp_path / "tower"), config, tmp_path / "graft")
    assert not (tmp_path / "graft").exists()


def test_a_base_in_memory() -> None:
    base = tiny_model("llama")
    before = {name: p.clone() for name, p in base.named_parameters()}
    tower = tiny_tower()
    spec = ProjectorSpec(norm=True, hidden=24)
    model = GraftedModel.graft(base, tower, CONFIGS["iaa-c"], workflow="eyes", projector=spec)
    assert model.base is base
    assert model.names == ["eyes"]
    assert model.default_workflow == "eyes"
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    projector = model.workflow().projector
    assert projector.mlp[0].weight.shape == (24, 16)
    assert projector.mlp[2].weight.shape == (32, 24)
    record = model.workflow().record
    assert record.vision_fingerprint == tower.fingerprint()
    assert record.projector == spec
    # The image token fills slots; it must be an id of the vocabulary.
    assert 0 <= record.image_token.id < model.anatomy.vocab_size


def test_the_same_graft_twice_is_the_same() -> None:
    for method in ("iaa-b", "wings", "llava"):
        one, other = (graft_on("llama", CONFIGS[method]).workflows.state_dict() for _ in range(2))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_projector_begins_alike_whatever_the_method() -> None:
    """Else a comparison of methods would also compare two draws of the projector."""
    states = [
        graft_on("llama", config).workflow().projector.state_dict()
        for config in (LlavaConfig(), WingsConfig(rank=4), IAAConfig(layers=[1], structure="b"))
    ]
    for other in states[1:]:
        assert all(torch.equal(other[key], value) for key, value in states[0].items())


@pytest.mark.parametrize(
    ("name", "value", "example"),
    [
        ("config", None, "settings of a method, such as"),
        ("config", {"method": "llava"}, "settings of a method, such as"),
        ("config", MlpConfig(), "settings of a method, such as"),
        ("projector", "mlp", r"such as PoolConfig\(k=2\)"),
        ("projector", {"kind": "pool"}, r"such as PoolConfig\(k=2\)"),
        ("template", "plain", "TemplateChoice"),
        ("vision", {"id": "a"}, "a VisionSpec"),
        ("base", 3, "a loaded causal LM"),
    ],
)
def test_an_argument_of_another_type_is_named(
    tmp_path: Path, name: str, value: Any, example: str
) -> None:
    given = {"base": "here", "vision": "there", "config": CONFIGS["llava"], name: value}
    with pytest.raises(UsageError, match=f"{name}=.*: give .*{example}"):
        GraftedModel.graft(**given)
    with pytest.raises(UsageError, match=f"{name}=.*: give .*{example}"):
        create_graft(**given, folder=tmp_path / "graft")
    assert not (tmp_path / "graft").exists()


def test_a_longer_name_of_a_keyword_means_that_keyword() -> None:
    with pytest.raises(TypeError, match="'torch_dtype'; did you mean 'dtype'"):
        GraftedModel.from_pretrained("graft", torch_dtype="bfloat16")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'graft_dtyp'; did you mean 'graft_dtype'"):
        GraftedModel.from_pretrained("graft", graft_dtyp=None)  # type: ignore[call-arg]
