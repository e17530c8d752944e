"""Resamplers: held to slow references, to transformers' own classes, and to what a plan says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Idefics2Config, IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

import reference.perceiver as slow
from grafting import CONFIGS
from mmgraft import GraftedModel
from mmgraft.errors import UsageError
from mmgraft.model.files.create import create_graft
from mmgraft.model.files.graft_file import CONFIG_NAME, GraftFile
from mmgraft.vision import VisionSpec, load_tower
from mmgraft.vision.plan import Plan, View
from mmgraft.vision.projectors.configs import PerceiverConfig, QFormerConfig
from mmgraft.vision.projectors.registry import build_projector
from tiny import save_base, tiny_model
from tiny_blip import QUERIES, tiny_blip
from tiny_towers import tiny_tower

C, H = 12, 20
"""Width of the features, and of the base."""
FLAMINGO = PerceiverConfig(latents=3, layers=2, heads=3, head_dim=4)
IDEFICS2 = PerceiverConfig(
    form="idefics2", latents=3, layers=2, heads=4, kv_heads=2, head_dim=6, hidden=28
)
QFORMER = QFormerConfig(queries=5, width=24, layers=3, heads=2, hidden=40, every=2)
ALL = {"flamingo": FLAMINGO, "idefics2": IDEFICS2, "qformer": QFORMER}
every_config = pytest.mark.parametrize("config", ALL.values(), ids=ALL)
TWO = Plan((View("base", (2, 3)), View("tile", (1, 2), at=(0, 1))))


@torch.no_grad()
def made(config: Any, seed: int = 0) -> Any:
    """Return a projector whose every parameter acts."""
    torch.manual_seed(seed)
    projector = build_projector(config, C, H)
    for parameter in projector.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return projector.eval()


# -- what they compute --------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FLAMINGO, IDEFICS2], ids=["flamingo", "idefics2"])
@pytest.mark.parametrize("per", ["image", "view"])
@torch.no_grad()
def test_each_latent_is_the_slow_references(config: PerceiverConfig, per: Any) -> None:
    projector = made(config.model_copy(update={"per": per}))
    features, weights = torch.randn(TWO.entries, C), projector.state_dict()
    wanted: list[Tensor] = []
    for piece in [features] if per == "image" else features.split([6, 2]):
        if config.form == "flamingo":
            wanted += slow.flamingo(list(piece), weights, 2, 3)
        else:
            wanted += slow.idefics2(list(piece), weights, 2, 4, 2)
    found = projector(features, [TWO])
    assert len(wanted) == projector.counts(TWO) == (3 if per == "image" else 6)
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-5, rtol=1e-4)


def renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Return parameters under the names of another class, given by what stands in theirs."""
    found = {}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[name] = tensor
    return found


IDEFICS = {
    "layers.": "blocks.",
    ".norm_features.": ".0.context_layer_norm.",
    ".norm_latents.": ".0.latents_layer_norm.",
    ".q.": ".0.q_proj.",
    ".k.": ".0.k_proj.",
    ".v.": ".0.v_proj.",
    ".out.": ".0.output_proj.",
    ".norm.": ".1.ln.",
    ".feedforward.0.": ".1.fc.",
    ".feedforward.2.": ".1.c_proj.",
}


@torch.no_grad()
def test_flamingos_is_that_of_idefics_with_a_gelu() -> None:
    config = IdeficsConfig(vision_config={"embed_dim": C})
    theirs = IdeficsPerceiverResampler(config, C, depth=2, n_heads=3, head_dim=4, n_latents=3)
    for _, feedforward in theirs.blocks:
        feedforward.act = nn.GELU()
    projector = made(FLAMINGO)
    state = {n: t for n, t in projector.state_dict().items() if not n.startswith("linear")}
    last = {f"layer_{name}": state.pop(name) for name in ("norm.weight", "norm.bias")}
    theirs.load_state_dict({**renamed(state, IDEFICS), **last})
    features = torch.randn(2, 6, C)
    found = projector(features, [Plan.single((2, 3))] * 2)
    wanted = projector.linear(theirs(features)).flatten(0, 1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


CONNECTOR = {
    "before.": "modality_projection.",
    "latents": "perceiver_resampler.latents",
    "layers.": "perceiver_resampler.layers.",
    ".norm_features.": ".input_context_norm.",
    ".norm_perceiver_resampler.latents.": ".input_latents_norm.",
    ".norm.": ".post_attention_layernorm.",
    **{f".{name}.": f".self_attn.{name}_proj." for name in "qkv"},
    ".out.": ".self_attn.o_proj.",
    "feedforward": "mlp",
    **{f"{name}.weight": f"{name}_proj.weight" for name in ("gate", "up", "down")},
}


@torch.no_grad()
def test_idefics2s_is_that_of_transformers_with_padding_masked() -> None:
    """A view whose last column is padding, and one whose last row is."""
    perceiver = {
        "hidden_size": H,
        "resampler_n_latents": 3,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 6,
        "num_key_value_heads": 2,
    }
    text = {"hidden_size": H, "intermediate_size": 28, "num_hidden_layers": 1}
    config = Idefics2Config(
        vision_config={"hidden_size": C},
        perceiver_config=perceiver,
        text_config={"model_type": "mistral", "num_attention_heads": 2, **text},
    )
    projector = made(IDEFICS2)
    theirs = Idefics2Connector(config).eval()
    state = renamed(projector.state_dict(), CONNECTOR)
    state["perceiver_resampler.norm.weight"] = state.pop("norm.weight")
    theirs.load_state_dict(state)
    features = torch.randn(2, 6, C)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0]]).bool()
    plans = [Plan((View("tile", (2, 3), valid=valid),)) for valid in ((2, 2), (1, 3))]
    found = projector(features.masked_fill(~mask[..., None], torch.nan), plans)
    torch.testing.assert_close(found, theirs(features, mask).flatten(0, 1), atol=1e-5, rtol=1e-5)
    whole = theirs(features, torch.ones_like(mask)).flatten(0, 1)
    assert (found - whole).abs().max() > 1e-2


@every_config
@torch.no_grad()
def test_padding_is_not_seen(config: Any) -> None:
    projector = made(config)
    features = torch.randn(3, 4, C)
    seen = projector(features[:2, :3].reshape(-1, C), [Plan.single((2, 3))])
    features[2], features[:, 3] = torch.nan, torch.inf
    padded = Plan((View("base", (3, 4), valid=(2, 3)),))
    assert torch.equal(projector(features.flatten(0, 1), [padded]), seen)
    assert projector.counts(padded) == len(seen)


@every_config
@torch.no_grad()
def test_an_image_is_the_same_alone_and_beside_any_others(config: Any) -> None:
    projector = made(config)
    plans = [TWO, Plan.single((3, 1)), Plan.single((2, 3)), TWO]
    pieces = [torch.randn(plan.entries, C) for plan in plans]
    together = projector(torch.cat(pieces), plans)
    for piece, plan, found in zip(
        pieces, plans, together.split([projector.counts(plan) for plan in plans]), strict=True
    ):
        torch.testing.assert_close(found, projector(piece, [plan]), atol=1e-5, rtol=1e-4)


@every_config
def test_every_parameter_learns_and_vectors_differ(config: Any) -> None:
    """Equal latents, or queries of zeros, would be one vector for ever."""
    torch.manual_seed(0)
    projector = build_projector(config, C, H).train()
    features = torch.randn(6, C)
    found = projector(features, [Plan.single((2, 3))])
    assert torch.pdist(found).min() > 1e-2
    assert torch.equal(found, projector(features, [Plan.single((2, 3))]))  # without dropout
    (found * torch.randn_like(found)).sum().backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith(("key.bias", "k.bias")):  # softmax does not see a key's bias
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("form", ["flamingo", "idefics2"])
def test_the_published_sizes(form: Any) -> None:
    settled = PerceiverConfig(form=form).settled()
    sizes = [settled.latents, settled.layers, settled.heads, settled.kv_heads, settled.head_dim]
    assert sizes == ([64, 6, 8, None, 64] if form == "flamingo" else [64, 3, 16, 4, 96])
    with torch.device("meta"):
        projector = build_projector(settled, 1152, 4096)
    held = {name: tuple(tensor.shape) for name, tensor in projector.named_parameters()}
    width = 1152 if form == "flamingo" else 4096
    assert held["latents"] == (64, width)
    assert held["layers.1.q.weight"] == ((512, 1152) if form == "flamingo" else (1536, 4096))
    assert held["layers.1.k.weight"] == ((512, 1152) if form == "flamingo" else (384, 4096))
    assert sum(name.endswith(".out.weight") for name in held) == settled.layers


def test_blip_2s_sizes_without_its_text_half() -> None:
    with torch.device("meta"):
        projector = build_projector(QFormerConfig(), 1408, 4096)
    assert projector.counts(TWO) == 2 * 32
    sizes = {name: p.numel() for name, p in projector.named_parameters()}
    assert not [name for name in sizes if "embeddings" in name or ".intermediate." in name]
    inside = sum(size for name, size in sizes.items() if not name.startswith("linear"))
    assert 104e6 < inside < 108e6
    reading = [name for name in sizes if name.endswith("crossattention.attention.query.weight")]
    assert [name.split(".")[3] for name in reading] == ["0", "2", "4", "6", "8", "10"]


def test_a_start_is_scaled() -> None:
    for config in ALL.values():
        one, half = (made_fresh(config, scale) for scale in (1.0, 0.5))
        torch.testing.assert_close(half, 0.5 * one)


@torch.no_grad()
def made_fresh(config: Any, scale: float) -> Tensor:
    torch.manual_seed(0)
    projector = build_projector(config.model_copy(update={"init_scale": scale}), C, H)
    torch.manual_seed(1)
    return projector(torch.randn(6, C), [Plan.single((2, 3))])


# -- published weights --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    tiny_blip(folder / "whole")
    tiny_blip(folder / "shards", shards="20KB")
    shutil.copytree(folder / "whole", folder / "pickled")
    from safetensors.torch import load_file

    torch.save(load_file(folder / "whole/model.safetensors"), folder / "pickled/pytorch_model.bin")
    (folder / "pickled/model.safetensors").unlink()
    save_base(folder / "base", "llama")
    return folder


@pytest.mark.parametrize("files", ["whole", "shards", "pickled"])
@torch.no_grad()
def test_a_published_q_former_gives_what_its_model_gives(blip: Path, files: str) -> None:
    theirs = tiny_blip(blip / "again")
    projector = build_projector(QFormerConfig(weights=str(blip / files)), 16, H)
    assert projector.counts(Plan.single((2, 2))) == QUERIES
    projector.fill()
    features = torch.randn(2, 4, 16)
    found = projector(features, [Plan.single((2, 2))] * 2)
    states = theirs.qformer(
        query_embeds=theirs.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=theirs.vision_model.post_layernorm(features),
    ).last_hidden_state
    torch.testing.assert_close(found, projector.linear(states).flatten(0, 1), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_tower_of_a_blip_2_checkpoint_gives_what_its_q_former_reads(blip: Path) -> None:
    theirs = tiny_blip(blip / "again")
    tower = load_tower(VisionSpec(id=str(blip / "shards"), feature_layer=-1))
    pixels = torch.randn(2, 3, 16, 16)
    found = theirs.vision_model.post_layernorm(tower(pixels))
    assert torch.equal(found, theirs.vision_model(pixels).last_hidden_state[:, 1:])
    saved = tower.save(blip / "tower")
    assert torch.equal(load_tower(saved)(pixels), tower(pixels))


def test_a_graft_needs_no_published_file_any_more(blip: Path, tmp_path: Path) -> None:
    weights = Path(shutil.copytree(blip / "whole", tmp_path / "weights"))
    vision = VisionSpec(id=str(blip / "whole"), feature_layer=-1)
    config, spec = CONFIGS["lora"], QFormerConfig(weights=str(weights))
    create_graft(str(blip / "base"), vision, config, tmp_path / "run", projector=spec)
    published = tiny_blip(tmp_path / "again").qformer.state_dict()
    shutil.rmtree(weights)
    record = GraftFile.read(tmp_path / "run").projector
    assert (record.weights, record.features) == (str(weights), 16)
    assert (record.queries, record.width, record.heads, record.act) == (QUERIES, 24, 3, "relu")
    model = GraftedModel.from_pretrained(tmp_path / "run")
    held = model.workflow().projector.qformer.state_dict()
    assert held.keys() == published.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in published.items())


def changed(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def lacking_queries(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["query_tokens"]
    save_file(tensors, path, metadata={"format": "pt"})


BROKEN = [
    (lambda folder: shutil.rmtree(folder), "weights"),
    (lambda folder: (folder / "config.json").unlink(), "config.json"),
    (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "corrupt"),
    (lambda folder: changed(folder, model_type="instructblip"), "type instructblip.*image alone"),
    (lambda folder: changed(folder, model_type="llama"), "type llama.*BLIP-2"),
    (lambda folder: changed(folder, num_query_tokens=6), r"no query_tokens of shape \(1, 6, 24\)"),
    (lacking_queries, "holds no query_tokens"),
]


@pytest.mark.parametrize(("damage", "says"), BROKEN)
def test_weights_that_hold_no_q_former_are_refused(
    blip: Path, tmp_path: Path, damage: Any, says: str
) -> None:
    weights = Path(shutil.copytree(blip / "whole", tmp_path / "weights"))
    damage(weights)
    vision = VisionSpec(id=str(blip / "whole"))
    spec = QFormerConfig(weights=str(weights))
    with pytest.raises(UsageError, match=says):
        create_graft(str(blip / "base"), vision, CONFIGS["llava"], tmp_path / "run", projector=spec)
    assert not (tmp_path / "run").exists()


def test_a_q_former_of_another_width_is_refused(blip: Path) -> None:
    spec = QFormerConfig(weights=str(blip / "whole"))
    with pytest.raises(UsageError, match=r"width 16, and this tower gives width 12; name"):
        GraftedModel.graft(
            tiny_model("llama"), tiny_tower(hidden=12), CONFIGS["llava"], projector=spec
        )


# -- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (PerceiverConfig, {"latents": 0}, "latents.*greater than or equal to 1"),
        (PerceiverConfig, {"layers": 0}, "layers.*greater than or equal to 1"),
        (PerceiverConfig, {"heads": 4, "kv_heads": 3}, "3 kv_heads do not divide 4 heads"),
        (PerceiverConfig, {"form": "idefics2", "heads": 6}, "4 kv_heads do not divide 6 heads"),
        (PerceiverConfig, {"hidden": 8}, "hidden is of form idefics2"),
        (PerceiverConfig, {"form": "flamenco"}, "flamingo"),
        (PerceiverConfig, {"per": "tile"}, "'image' or 'view'"),
        (PerceiverConfig, {"latent": 4}, "unknown key 'latent'"),
        (QFormerConfig, {"heads": 5}, "5 heads do not divide width 768"),
        (QFormerConfig, {"width": 100}, "12 heads do not divide width 100"),
        (QFormerConfig, {"queries": 0}, "queries.*greater than or equal to 1"),
        (QFormerConfig, {"weights": "x/y", "queries": 9, "width": 24}, "queries, width: read"),
        (QFormerConfig, {"act": "glue"}, "'gelu', 'relu' or"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: Any, settings: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        kind.parse(settings, "projector")


@every_config
def test_the_record_says_every_number_and_the_seed_decides(config: Any, tmp_path: Path) -> None:
    save_base(tmp_path / "base", "llama")
    tensors = []
    for method in ("llava", "iaa-c"):
        torch.manual_seed(len(method))
        model = GraftedModel.graft(
            tiny_model("llama"), tiny_tower(), CONFIGS[method], projector=config
        )
        tensors.append(model.workflow().projector.state_dict())
    assert all(torch.equal(tensors[0][name], tensor) for name, tensor in tensors[1].items())
    model.save_pretrained(tmp_path / "run")
    text = json.loads((tmp_path / "run" / CONFIG_NAME).read_text())["projector"]
    assert text == config.settled().model_dump(mode="json")
    assert text["per"] is not None
