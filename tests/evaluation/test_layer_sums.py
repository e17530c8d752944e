"""Sums of attention against explicit eager weights, for every architecture and method."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grafting import (
    BESIDE,
    CONFIGS,
    MATRIX,
    batch,
    every_architecture,
    graft_on,
    logits_of,
    perturb,
    project,
    row,
    rows,
)
from mmgraft import GraftedModel, IAAConfig, WingsConfig
from mmgraft.anatomy import decoder_layers
from mmgraft.errors import UsageError
from mmgraft.evaluation.attention import laws as attention_sums
from mmgraft.evaluation.attention.laws import (
    PROJECTOR_ONLY,
    AttentionSums,
    layer_sums,
    side_columns,
)
from mmgraft.grafts.base import IMAGE, PADDING, TEXT
from reference.decoder import rotate, split_heads
from reference.wings_paper import low_rank, router_reference
from tiny import LAYERS

WORDS = ("ttiiiittttt", "tiiiit", "tttiiiitttttttttt")  # the last passes every sliding window
METHODS = {
    **{name: config for name, config in CONFIGS.items() if name not in BESIDE},
    "wings-visual": WingsConfig(rank=4, learners=["visual"]),
    "wings-textual": WingsConfig(rank=4, learners=["textual"]),
    "wings-some": WingsConfig(rank=4, layers=[0, 2]),
    "wings-unrouted": WingsConfig(rank=4, router=False),
}

OTHER_WINGS = [
    (arch, method)
    for arch in ("llama", "gpt2", "gemma2", "gemma3", "falcon")
    for method in METHODS
    if method not in CONFIGS
]


@cache
def model_of(arch: str, method: str, attention: str | None = None) -> GraftedModel:
    return perturb(graft_on(arch, METHODS[method], attention=attention))


# -- the slow, explicit form ----------------------------------------------------------------------


@contextmanager
def explicit(model: GraftedModel) -> Iterator[dict[str, Any]]:
    """Return the output of every attention of an eager model, and every base layer's input."""
    layers = decoder_layers(model.base, model.anatomy)
    inserted = getattr(model.workflow().graft, "layer_indices", [])
    found: dict[str, Any] = {}
    modules = {str(i): layer for i, layer in enumerate(layers)}
    if model.workflow().graft.method == "iaa":
        own = model.workflow().graft.layers
        modules.update({f"{i}+": layer for i, layer in zip(inserted, own, strict=True)})
    handles = []
    for name, layer in modules.items():

        def after(module: Any, args: Any, out: Any, name: str = name) -> None:
            found[f"weights {name}"] = out[1]

        def before(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
            found[f"entered {name}"] = args[0] if args else kwargs["hidden_states"]

        attention = layer.get_submodule(model.anatomy.attention_name)
        handles.append(attention.register_forward_hook(after))
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
    yield found
    for handle in handles:
        handle.remove()


def side_sums(weights: Tensor, word: str) -> Tensor:
    """One row's ``(s, s)`` weights to sums of the three sides, key by key."""
    sums = torch.zeros(3)
    for key, letter in enumerate(word):
        side = 1 if letter == "i" else 0 if key < word.index("i") else 2
        sums[side] += weights[:, key].sum()
    return sums


def learner_sums(model: GraftedModel, found: dict[str, Any], index: int, word: str, inputs: Any):
    """Return what the learners of one layer give to the sides, query by query and head by head."""
    graft: Any = model.workflow().graft
    total = torch.zeros(len(word), len(word))
    if not graft.acts_on(index):
        return side_sums(total, word)
    wing = graft.layers[str(index)]
    image = torch.tensor([letter == "i" for letter in word])
    features = model.base.get_input_embeddings()(inputs["input_ids"])[0].clone()
    features[image] = project(model, inputs["image_features"]).flatten(0, 1)
    positions, theta = torch.arange(len(word)), model.anatomy.rope_theta
    shares = None
    if hasattr(wing, "router"):
        shares = router_reference(found[f"weights {index}"][0], positions, wing.router.weight)
    for column, (kind, keys) in enumerate((("visual", image), ("textual", ~image))):
        if kind not in graft.running:
            continue
        learner, x = wing.get_submodule(kind), found[f"entered {index}"][0]
        query = x + low_rank(x, learner.query.down.weight, learner.query.up.weight)
        key = features + low_rank(features, learner.key.down.weight, learner.key.up.weight)
        query = rotate(split_heads(query, graft.heads), positions, theta)
        key = rotate(split_heads(key, graft.heads), positions, theta)
        for i in range(len(word)):
            seen = keys & (positions <= i)
            if not seen.any():
                continue
            scores = key[:, seen] @ query[:, i, :, None] / math.sqrt(query.shape[-1])
            given = scores[..., 0].softmax(-1).mean(0)  # over heads
            total[i, seen] += given * (1 if shares is None else shares[i, column])
    return side_sums(total, word)


@torch.no_grad()
def reference(arch: str, method: str) -> dict[str, Tensor]:
    """Every series, ``(rows, layers, 3)``, from eager weights of one row at a time."""
    model, graft = model_of(arch, method, "eager"), model_of(arch, method, "eager").workflow().graft
    series: dict[str, list[Tensor]] = {}
    for word, one in zip(WORDS, rows(*WORDS), strict=True):
        inputs = batch([one])
        with explicit(model) as found:
            graft.active = False
            model(**inputs, use_cache=False)
            graft.active = True
            alone = dict(found)
            found.clear()
            model(**inputs, use_cache=False)

        def sides(maps: dict[str, Any], name: str, word: str = word) -> Tensor:
            return side_sums(maps[f"weights {name}"][0].mean(0), word)

        base = [str(i) for i in range(LAYERS)]
        series.setdefault(PROJECTOR_ONLY, []).append(torch.stack([sides(alone, n) for n in base]))
        if graft.method == "llava":
            continue
        main = torch.stack([sides(found, n) for n in base])
        if graft.method == "iaa":
            order = [n for i in base for n in (i, f"{i}+") if f"weights {n}" in found]
            every = torch.stack([sides(found, n) for n in order])
            series.setdefault("base_layers", []).append(main)
            series.setdefault("all_layers", []).append(every)
            continue
        series.setdefault("main", []).append(main)
        if graft.method == "wings":
            learned = [learner_sums(model, found, i, word, inputs) for i in range(LAYERS)]
            series.setdefault("main_and_learners", []).append(main + torch.stack(learned))
    return {name: torch.stack(found) for name, found in series.items()}


def check(model: GraftedModel, wanted: dict[str, Tensor], side: str = "right") -> None:
    found = layer_sums(model, batch(rows(*WORDS), side))
    assert list(found) == list(wanted)
    for name, sums in wanted.items():
        assert found[name].sums.shape == sums.shape
        error = (torch.from_numpy(found[name].sums) - sums).abs().max().item()
        assert error < 2e-4, (name, error)


# -- equality -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "method"), [*(one for one in MATRIX if one[1] in METHODS), *OTHER_WINGS]
)
def test_sums_are_those_of_explicit_weights(arch: str, method: str) -> None:
    """In a padded batch, beside rows of one at a time without padding."""
    check(model_of(arch, method), reference(arch, method))


@pytest.mark.parametrize("method", ["iaa-a", "wings"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_oss", "gpt2", "bloom", "falcon"])
def test_padding_on_the_left(arch: str, method: str) -> None:
    check(model_of(arch, method, "eager"), reference(arch, method), "left")
    check(model_of(arch, method), reference(arch, method), "left")


@every_architecture
@pytest.mark.parametrize("method", ["iaa-c", "wings"])
def test_measuring_changes_nothing(arch: str, method: str) -> None:
    """Neither the logits while it runs, nor the model afterwards."""
    model, inputs = model_of(arch, method), batch(rows(*WORDS))
    before = logits_of(model, inputs)
    attentions = {
        str(i): layer.get_submodule(model.anatomy.attention_name)
        for i, layer in enumerate(decoder_layers(model.base, model.anatomy))
    }
    kinds = torch.where(inputs["attention_mask"] == 0, PADDING, TEXT)
    kinds = kinds.masked_fill(inputs["mm_token_type_ids"] == 1, IMAGE)
    sums = AttentionSums(side_columns(kinds), kinds != PADDING)
    state = {k: v for k, v in vars(model.base.config).items() if "attn" in k}
    with sums.of(attentions, model.anatomy.attention_in_registry):
        during = logits_of(model, inputs)
    assert len(sums.sums) == LAYERS
    real = inputs["attention_mask"].bool()
    assert torch.equal(before[real], during[real])
    assert torch.equal(before, logits_of(model, inputs))
    assert state == {k: v for k, v in vars(model.base.config).items() if "attn" in k}
    assert not any(attention_sums._JOB in vars(module) for module in model.modules())


# -- shapes and sides -----------------------------------------------------------------------------


def test_sides_of_one_and_several_images() -> None:
    """P padding, t and i; text between two images is on no side."""
    code = {"P": PADDING, "t": TEXT, "i": IMAGE}

    def sides(word: str) -> str:
        columns = side_columns(torch.tensor([[code[letter] for letter in word]]))[0]
        assert (columns.sum(-1) <= 1).all()
        letters = ["-", "b", "i", "a"]
        return "".join(letters[int(c @ torch.tensor([1, 2, 3]))] for c in columns.long())

    assert sides("PPttiitt") == "--bbiiaa"
    assert sides("tiittitPP") == "bii--ia--"
    assert sides("iitt") == "iiaa"
    assert sides("tttP") == "----"


def test_a_query_gives_one_in_all_and_with_learners_up_to_two() -> None:
    """So sums add up to the number of queries; padding gives and gets nothing."""
    model = model_of("llama", "wings")
    found = layer_sums(model, batch(rows(*WORDS)))
    lengths = torch.tensor([float(len(word)) for word in WORDS])
    for name in (PROJECTOR_ONLY, "main"):
        total = torch.from_numpy(found[name].sums).sum(-1)
        assert torch.allclose(total, lengths.double()[:, None].expand_as(total), atol=1e-4)
    total = torch.from_numpy(found["main_and_learners"].sums).sum(-1)
    assert (total > lengths[:, None] * 1.3).all()
    assert (total < lengths[:, None] * 2).all()


def test_layers_are_named_in_the_order_in_which_they_run() -> None:
    model = perturb(graft_on("llama", IAAConfig(layers=[0, 3], structure="a")))
    found = layer_sums(model, batch([row("ttiiiit")]))
    assert found["base_layers"].layers == ("0", "1", "2", "3")
    assert found["all_layers"].layers == ("0", "0+", "1", "2", "3", "3+")


def test_a_graft_that_a_stage_left_out_has_the_projector_series_alone() -> None:
    model = perturb(graft_on("llama", METHODS["iaa-c"]))
    inputs = batch([row("ttiiiit")])
    with_graft = layer_sums(model, inputs)
    model.workflow().graft.active = False
    without = layer_sums(model, inputs)
    assert list(without) == [PROJECTOR_ONLY]
    assert (without[PROJECTOR_ONLY].sums == with_graft[PROJECTOR_ONLY].sums).all()
    assert abs(with_graft["base_layers"].sums - without[PROJECTOR_ONLY].sums).max() > 1e-3


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation gives, in numbers."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self.size = max(self.size, one.numel())
        return out


def test_no_map_is_held_beside_a_fused_kernel() -> None:
    model = graft_on("llama", METHODS["iaa-c"], base={"max_position_embeddings": 1024})
    word = "t" * 500 + "iiii" + "t" * 520
    inputs = batch([row(word)])
    del inputs["attention_mask"]
    with _Largest() as largest:
        layer_sums(model, inputs)
    assert largest.size <= 0.1 * len(word) ** 2


def test_an_attention_that_hides_its_weights_is_refused() -> None:
    class Hidden(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x, None

    module = Hidden()
    sums = AttentionSums(torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    with (
        sums.of({"0": module}, registry=False),
        pytest.raises(UsageError, match=r"weights of Hidden cannot be found.*take a base"),
    ):
        module(torch.ones(1, 2, 4))


def test_half_precision_counts_the_same() -> None:
    """A bf16 base: the columns are exact, what a query gives is rounded once."""
    model = perturb(graft_on("qwen2", METHODS["iaa-c"], dtype=torch.bfloat16))
    inputs = batch(rows(*WORDS))
    inputs["image_features"] = inputs["image_features"].bfloat16()
    found = layer_sums(model, inputs)["all_layers"].sums
    lengths = torch.tensor([float(len(word)) for word in WORDS]).double()
    total = torch.from_numpy(found).sum(-1)
    assert torch.allclose(total, lengths[:, None].expand_as(total), rtol=0.01)
