"""Any transformers vision model gives its patches, in reading order, without special tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from hub_server import HubServer
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.vision import VisionSpec, describe_tower, load_tower
from mmgraft.vision.towers.inspection import examine
from mmgraft.vision.towers.transformers import TransformersTower
from tiny_towers import TOWERS, picture, save_processor, save_tower, shape_of, tiny_vision_model


def load(folder: Path, **values: Any) -> TransformersTower:
    tower = load_tower(VisionSpec(id=str(folder), **values))
    assert isinstance(tower, TransformersTower)
    return tower


def pixels(size: int, images: int = 2) -> Tensor:
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))


def tokens_by_hand(model: Any, x: Tensor, layer: int, prefix: int) -> Tensor:
    return model(x, output_hidden_states=True).hidden_states[layer][:, prefix:]


def grid_by_hand(grid: Tensor) -> Tensor:
    _, _, height, width = grid.shape
    cells = [grid[:, :, row, column] for row in range(height) for column in range(width)]
    return torch.stack(cells, dim=1)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_features_equal_a_call_by_hand(name: str, tmp_path: Path) -> None:
    tiny = TOWERS[name]
    model = save_tower(tmp_path, name)
    tower = load(tmp_path)
    x = pixels(tiny.size)
    if tiny.prefix is None:
        expected = grid_by_hand(model(x).last_hidden_state)
    else:
        layer = -1 if name == "swin" else -2
        expected = tokens_by_hand(model, x, layer, tiny.prefix)
    torch.testing.assert_close(tower(x), expected, atol=1e-6, rtol=0)
    assert (tower.num_patches, tower.hidden_size) == expected.shape[1:]
    assert shape_of(tower.spec) == expected.shape[1:][::-1]
    assert tower.image_size == (tiny.size, tiny.size)


@pytest.mark.parametrize("name", [name for name, tiny in TOWERS.items() if tiny.prefix])
@torch.no_grad()
def test_the_dropped_tokens_are_those_that_see_no_pixel(name: str, tmp_path: Path) -> None:
    model = save_tower(tmp_path, name)
    first = model(pixels(32), output_hidden_states=True).hidden_states[0]
    blind = (first[0] == first[1]).all(-1)
    prefix = load(tmp_path).feature_map.prefix
    assert blind.tolist() == [True] * prefix + [False] * 16


@torch.no_grad()
def test_layer_can_be_chosen(tmp_path: Path) -> None:
    model = save_tower(tmp_path / "vit", "vit")
    x = pixels(32)
    for layer in (-4, -1, 0, 3):
        tower = load(tmp_path / "vit", feature_layer=layer)
        torch.testing.assert_close(tower(x), tokens_by_hand(model, x, layer, 1))
        assert tower.spec.feature_layer == layer
    for layer in (-5, 4):
        with pytest.raises(UsageError, match=r"has 4 hidden states; choose one of -4 \.\. 3"):
            load(tmp_path / "vit", feature_layer=layer)
    # A convolutional model counts its stages: -2 has another width and twice the resolution.
    grid_model = save_tower(tmp_path / "convnext", "convnext")
    tower = load(tmp_path / "convnext", feature_layer=-2)
    x = pixels(96)
    expected = grid_by_hand(grid_model(x, output_hidden_states=True).hidden_states[-2])
    torch.testing.assert_close(tower(x), expected)
    assert shape_of(tower.spec) == (16, 36)


def two_towers(name: str, folder: Path) -> Any:
    tiny = TOWERS[name]
    family = {"clip": "CLIP", "siglip": "Siglip"}[name]
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 60,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=tiny.values)
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}Model")(config).eval()
    model.save_pretrained(folder)
    save_processor(folder, tiny.size)
    return model


@pytest.mark.parametrize("name", ["clip", "siglip"])
@torch.no_grad()
def test_only_the_vision_half_of_a_two_tower_model_is_kept(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    both = two_towers(name, tmp_path)
    capfd.readouterr()
    tower = load(tmp_path)
    seen = capfd.readouterr()
    assert "UNEXPECTED" not in seen.out + seen.err
    x = pixels(32)
    expected = tokens_by_hand(both.vision_model, x, -2, TOWERS[name].prefix or 0)
    torch.testing.assert_close(tower(x), expected)
    count = sum(parameter.numel() for parameter in both.vision_model.parameters())
    assert sum(parameter.numel() for parameter in tower.parameters()) == count
    alone = tmp_path / "alone"
    tower.save(alone)
    assert load(alone).fingerprint() == tower.fingerprint()


@torch.no_grad()
def test_published_tower_keys_and_layer(golden: Path, tmp_path: Path) -> None:
    """The golden tower, stored under the names of older transformers, gives the golden features."""
    case = golden / "iaa" / "llama_gqa_l6"
    prefix = "model.vision_tower.vision_tower."
    stored = load_file(case / "model.safetensors")
    part = {key.removeprefix(prefix): stored[key] for key in stored if key.startswith(prefix)}
    save_file(part, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(case / "vision_config.json", tmp_path / "config.json")
    save_processor(tmp_path, 28)
    tower = load(tmp_path)
    samples = load_file(case / "samples.safetensors")
    names = [key.removesuffix(".vision_features") for key in samples if "vision_feat" in key]
    assert names
    for name in names:
        features = tower(samples[f"{name}.pixel_values"])
        torch.testing.assert_close(features, samples[f"{name}.vision_features"], atol=1e-5, rtol=0)


def test_frozen_and_always_in_eval_mode(tmp_path: Path) -> None:
    save_tower(tmp_path, "vit")
    tower = load(tmp_path)
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    x = pixels(32)
    before = tower(x)
    assert not before.requires_grad
    torch.nn.ModuleList([tower]).train()
    assert not any(module.training for module in tower.modules())
    assert torch.equal(tower(x), before)


def test_dtype_is_the_towers_own_under_autocast(tmp_path: Path) -> None:
    save_tower(tmp_path, "vit")
    x = pixels(32)
    tower = load(tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tower(x)
    assert torch.equal(inside, tower(x))
    half = load_tower(str(tmp_path), dtype=torch.bfloat16)
    assert half(x).dtype == torch.bfloat16
    assert half.fingerprint() == tower.fingerprint()


def test_fingerprint_tells_towers_apart(tmp_path: Path) -> None:
    model = save_tower(tmp_path / "a", "dinov2")
    here = load(tmp_path / "a").fingerprint()
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert load(tmp_path / "copy").fingerprint() == here
    assert load(tmp_path / "a", feature_layer=-1).fingerprint() != here
    save_processor(tmp_path / "copy", 40)
    assert load(tmp_path / "copy").fingerprint() != here
    with torch.no_grad():
        model.get_parameter("layernorm.weight")[3] += 1e-3
    model.save_pretrained(tmp_path / "tuned")
    save_processor(tmp_path / "tuned", 32)
    assert load(tmp_path / "tuned").fingerprint() != here


@pytest.mark.parametrize("name", [name for name, tiny in TOWERS.items() if tiny.prefix is not None])
def test_the_sample_tells_layers_apart(name: str, tmp_path: Path) -> None:
    save_tower(tmp_path, name)
    layers = (-1,) if name == "swin" else (-2, -1)
    samples = [torch.tensor(load(tmp_path, feature_layer=layer).sample()) for layer in layers]
    again = torch.tensor(load(tmp_path, feature_layer=layers[0]).sample())
    assert torch.equal(samples[0], again)
    for other in samples[1:]:
        assert (samples[0] - other).norm() > 1e-3 * samples[0].norm()
    keys = {load(tmp_path, feature_layer=layer).features_key() for layer in layers}
    assert len(keys) == len(layers)


class ListsOfLayers(torch.nn.Module):
    """A model whose lists of indices hold numbers of layers, as from transformers 5.19 to 5.22."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, pixel_values: Tensor, output_hidden_states: Any = False) -> Any:
        outputs = self.model(pixel_values, output_hidden_states=bool(output_hidden_states))
        if isinstance(output_hidden_states, list):
            layers = outputs.hidden_states[1:]
            kept = [one if at in output_hidden_states else None for at, one in enumerate(layers)]
            outputs.hidden_states = tuple(kept)
        return outputs


@torch.no_grad()
def test_a_list_that_numbers_layers_is_not_used(tmp_path: Path) -> None:
    model = save_tower(tmp_path, "clip")
    old: Any = ListsOfLayers(model)
    feature_map = examine(old, (TOWERS["clip"].size,) * 2, -2, "clip")
    x = pixels(TOWERS["clip"].size)
    torch.testing.assert_close(feature_map.features(old, x), tokens_by_hand(model, x, -2, 1))
    assert not feature_map.selects


def test_absent_pooler_is_no_fault_but_an_absent_layer_is(tmp_path: Path) -> None:
    save_tower(tmp_path, "vit")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    whole = load(tmp_path)
    without = {key: value for key, value in tensors.items() if "pooler" not in key}
    assert len(without) < len(tensors)
    save_file(without, file, metadata={"format": "pt"})
    first, second = load(tmp_path), load(tmp_path)
    assert torch.equal(first(pixels(32)), whole(pixels(32)))
    assert first.fingerprint() == second.fingerprint()
    # Layer 1's output is what layer -2 reads; layer 2 comes after it.
    for gone, fatal in ((".0.", True), (".1.", True), (".2.", False)):
        kept = {key: value for key, value in without.items() if gone not in key}
        assert len(kept) < len(without)
        save_file(kept, file, metadata={"format": "pt"})
        if fatal:
            with pytest.raises(UsageError, match="lacks 16 weights of ViTModel"):
                load(tmp_path)
        else:
            load(tmp_path)


@pytest.mark.parametrize(
    ("model", "config", "values"),
    [
        ("ViTMAEModel", "ViTMAEConfig", {}),  # masks three patches of four
        ("YolosModel", "YolosConfig", {"image_size": [32, 32]}),  # 100 tokens after the patches
    ],
)
def test_tokens_that_are_no_grid_are_refused(
    model: str, config: str, values: dict[str, Any], tmp_path: Path
) -> None:
    built = getattr(transformers, config)(**{**TOWERS["vit"].values, **values})
    getattr(transformers, model)(built).save_pretrained(tmp_path)
    save_processor(tmp_path, 32)
    with pytest.raises(UsageError, match=r"tokens for 4 x 4 patches, .* Use an image encoder"):
        load(tmp_path)


def test_naflex_and_models_that_see_nothing_are_refused_by_name(tmp_path: Path) -> None:
    transformers.Siglip2Config().save_pretrained(tmp_path / "naflex")
    with pytest.raises(UsageError, match=r"NaFlex .* google/siglip2-so400m-patch14-384"):
        describe_tower(str(tmp_path / "naflex"))
    transformers.LlamaConfig().save_pretrained(tmp_path / "llama")
    save_processor(tmp_path / "llama", 32)
    with pytest.raises(UsageError, match=r"model type llama.*it takes no images"):
        describe_tower(str(tmp_path / "llama"))


def test_shape_is_known_without_weights(tmp_path: Path) -> None:
    save_tower(tmp_path, "siglip")
    (tmp_path / "model.safetensors").unlink()
    assert shape_of(str(tmp_path)) == (16, 16)
    with pytest.raises(UsageError, match="cannot be loaded"):
        load(tmp_path)


def test_preprocessing_is_the_models_own_processor(tmp_path: Path) -> None:
    save_tower(tmp_path, "clip")
    values = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    images = [picture(60, 40), picture(33, 90, 1)]
    stock = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = stock(images=images, return_tensors="pt")["pixel_values"]
    tower = load(tmp_path)
    assert torch.equal(tower.preprocess(images), expected)
    assert tower.preprocess([picture().convert("L")]).shape == (1, 3, 32, 32)


@torch.no_grad()
def test_options_stand_in_for_a_processor(tmp_path: Path) -> None:
    model = save_tower(tmp_path, "clip")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match="has no image processor that works here"):
        load(tmp_path)
    options: dict[str, Any] = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    tower = load(tmp_path, options=options)
    white = tower.preprocess([picture(32, 32).point(lambda value: 255)])
    torch.testing.assert_close(white[0, :, 5, 5], torch.tensor([2.5, 3.0, 7.0]))
    # Another size than the trained one: position embeddings are interpolated.
    large = load(tmp_path, options=options | {"image_size": 48})
    x = pixels(48)
    hidden = model(x, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    torch.testing.assert_close(large(x), hidden[-2][:, 1:])
    assert large.num_patches == 36
    with pytest.raises(UsageError, match=r"takes pixels of 48 x 48, not \(2, 3, 32, 32\)"):
        large(pixels(32))
    with pytest.raises(UsageError, match="did you mean 'image_size'"):
        load(tmp_path, options={"image_sizes": 48})


def test_processor_without_pil_form_becomes_a_plain_resize(tmp_path: Path) -> None:
    save_tower(tmp_path, "dinov3")
    values = {
        "image_processor_type": "DINOv3ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "rescale_factor": 1 / 255,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    tower = load(tmp_path)
    black = tower.preprocess([picture(9, 9).point(lambda value: 0)])
    expected = torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    torch.testing.assert_close(black[0, :, 0, 0], expected)
    assert tower.image_size == (32, 32)
    assert load_tower(tower.save(tmp_path / "saved")).fingerprint() == tower.fingerprint()
    again = load(
        tmp_path, options={"image_size": 48, "image_mean": [0.1] * 3, "image_std": [1] * 3}
    )
    saved = load_tower(again.save(tmp_path / "saved"))
    assert saved.fingerprint() == again.fingerprint()
    assert saved.image_size == (48, 48)


def test_saved_tower_loads_alone(tmp_path: Path) -> None:
    save_tower(tmp_path / "source", "dinov2-registers")
    tower = load(tmp_path / "source", feature_layer=-1)
    spec = tower.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "source")
    again = load_tower(spec)
    assert again.fingerprint() == tower.fingerprint()
    assert torch.equal(again(pixels(32)), tower(pixels(32)))


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs an id"):
        load_tower(VisionSpec())
    with pytest.raises(UsageError, match=r"has no config\.json"):
        load_tower(str(tmp_path))
    with pytest.raises(UsageError, match=r"no folder \./no/such/folder"):
        load_tower("./no/such/folder")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        load_tower("acme/tower")


def test_hub_tower_is_pinned_to_its_commit(tmp_path: Path, hub: HubServer) -> None:
    old = save_tower(tmp_path / "one", "clip", seed=1)
    first = hub.add_model("acme/tower", tmp_path / "one")
    save_tower(tmp_path / "two", "clip", seed=2)
    second = hub.add_model("acme/tower", tmp_path / "two")
    tower = load_tower("acme/tower")
    assert (tower.spec.id, tower.spec.revision) == ("acme/tower", second)
    earlier = load_tower(VisionSpec(id="acme/tower", revision=first))
    assert earlier.spec.revision == first
    expected = tokens_by_hand(old, pixels(32), -2, 1)
    torch.testing.assert_close(earlier(pixels(32)), expected)
    with pytest.raises(UsageError, match="no model 'acme/none'"):
        load_tower("acme/none")


def test_a_shape_costs_no_weights_and_a_dead_hub_is_a_failure(
    tmp_path: Path, hub: HubServer
) -> None:
    save_tower(tmp_path, "clip")
    hub.add_model("acme/tower", tmp_path)
    assert shape_of("acme/tower") == (16, 16)
    assert not any("safetensors" in path for path in hub.paths("GET"))
    hub.drop_connection_on("model.safetensors")
    with pytest.raises(MMGraftError, match="check the network") as error:
        load_tower("acme/tower")
    assert error.value.exit_code == 1
    hub.restore()
    assert load_tower("acme/tower").num_patches == 16


def test_weights_in_a_pickle_are_read_too(tmp_path: Path, hub: HubServer) -> None:
    model = save_tower(tmp_path, "clip")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    hub.add_model("acme/tower", tmp_path)
    tower = load_tower("acme/tower")
    torch.testing.assert_close(tower(pixels(32)), tokens_by_hand(model, pixels(32), -2, 1))


def test_the_tiny_models_differ_where_it_matters() -> None:
    """Guards the tests above: features that were constant would pass any order of patches."""
    for name in ("clip", "convnext"):
        state = tiny_vision_model(name)(pixels(TOWERS[name].size)).last_hidden_state
        assert state.flatten(2).std(dim=-1).min() > 1e-4
