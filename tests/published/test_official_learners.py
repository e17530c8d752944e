"""The published code's learners, as the product computes them, against the slow reference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmgraft.errors import UsageError
from mmgraft.grafts.base import IMAGE, PADDING, TEXT
from mmgraft.published.wings.learners import (
    ROUTER_WIDTH,
    OfficialLearners,
    OfficialPlan,
    plan_official,
)
from reference.decoder import causal_mask, mlp, rms_norm, self_attention
from reference.golden import IMAGE_ID, GoldenCase, golden_case, golden_root
from reference.wings_official import published_wings
from reference.wings_paper import LearnerWeights, wings_layer_reference

needs_golden = pytest.mark.skipif(golden_root() is None, reason="set MMGRAFT_GOLDEN")
CASES = ["wings/qwen2_mha", "wings/qwen2_gqa_stage1", "wings/llama_gqa"]
PATCHES, HIDDEN, HEADS = 16, 64, 4


def learners_of(case: GoldenCase, layer: int) -> OfficialLearners:
    stage_two = case.config["wings_router_type"] == "linear"
    learners = OfficialLearners(
        HIDDEN,
        rank=case.config["lora_dim"],
        heads=HEADS,
        theta=case.config["rope_theta"],
        learners=("visual", "textual") if stage_two else ("visual",),
        router=stage_two,
    )
    state = {}
    for name in learners.state_dict():
        published = (
            name.replace("visual.", "attn_pool.")
            .replace("textual.", "attn_t_pool.")
            .replace("router.", "reweight_module.linear.")
            .replace(".down.", ".0.")
            .replace(".up.", ".1.")
        )
        for part in ("query", "key", "value", "output"):
            published = published.replace(f".{part}.", f".{part[0]}_proj.")
        state[name] = case.state[f"model.layers.{layer}.{published}"]
    learners.load_state_dict(state)
    return learners


def scores_of(learners: OfficialLearners, attention: Tensor) -> Tensor | None:
    """Return what the router sees of explicit weights (b, n, s, s): the sum over heads of A W^T."""
    if learners.router is None:
        return None
    columns = learners.router.weight[:, : attention.shape[-1]].to(attention.dtype)
    return torch.einsum("bnqk,ck->bqc", attention, columns)


def expand(case: GoldenCase, ids: Tensor, real: Tensor, features: Tensor | None):
    """Embeddings (b, s, h) and kinds (b, s) of a right-padded batch."""
    embeddings, kinds = [], []
    for r, row in enumerate(ids):
        pieces, kind = [], []
        for token in row[real[r].bool()].tolist():
            if token == IMAGE_ID:
                pieces.append(features[r])
                kind += [IMAGE] * PATCHES
            else:
                pieces.append(case.state["model.embed_tokens.weight"][token][None])
                kind.append(TEXT)
        embeddings.append(torch.cat(pieces))
        kinds.append(torch.tensor(kind))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(embeddings, True), pad(kinds, True, PADDING)


def product_hidden_states(
    case: GoldenCase, ids: Tensor, real: Tensor, features: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A forward with the product's learners on an explicit base: (layers + 1, b, s, h) and mask."""
    x, kinds = expand(case, ids, real, features)
    mask = kinds != PADDING
    config, eps = case.config, case.config["rms_norm_eps"]
    plan = plan_official(x, kinds, features, config["system_prompt_length"])
    states = [x]
    for i in range(config["num_hidden_layers"]):
        prefix, hidden, weights = f"model.layers.{i}", [], []
        for r in range(x.shape[0]):
            seen = causal_mask(x.shape[1], int(mask[r].sum()))
            normed = rms_norm(x[r], case.state[f"{prefix}.input_layernorm.weight"], eps)
            out = self_attention(case.state, f"{prefix}.self_attn", normed, config, seen)
            hidden.append(x[r] + out[0])
            weights.append(out[1])
        hidden, weights = torch.stack(hidden), torch.stack(weights)
        learners = learners_of(case, i)
        x = hidden + learners(hidden, plan, scores_of(learners, weights))
        normed = rms_norm(x, case.state[f"{prefix}.post_attention_layernorm.weight"], eps)
        x = x + mlp(case.state, f"{prefix}.mlp", normed)
        states.append(x)
    states[-1] = rms_norm(x, case.state["model.norm.weight"], eps)
    return torch.stack(states), mask


def check_against_reference(case: GoldenCase, ids: Tensor, real: Tensor, images: Tensor | None):
    expected = published_wings(case.state, case.config, case.vision_config, ids, real, images)
    got, mask = product_hidden_states(case, ids, real, expected.image_features)
    difference = (got - expected.hidden_states).abs()[:, mask].max().item()
    assert difference < 1e-5


@needs_golden
@pytest.mark.parametrize("case_name", CASES)
def test_every_golden_batch(case_name: str) -> None:
    case = golden_case(case_name)
    for name, sample in case.samples.items():
        if name.startswith("gen_"):
            continue
        ids = sample["input_ids"]
        real = sample.get("attention_mask", torch.ones_like(ids))
        images = sample.get("pixel_values")
        expected = published_wings(case.state, case.config, case.vision_config, ids, real, images)
        got, mask = product_hidden_states(case, ids, real, expected.image_features)
        logits = got[-1] @ case.state["lm_head.weight"].T
        difference = (logits - sample["logits"]).abs()[mask].max().item()
        assert difference < 1e-5, f"{name} differs by {difference:.2e}"


def row(length: int, image_at: int | None, total: int, seed: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 500, (total,), generator=torch.Generator().manual_seed(seed))
    if image_at is not None:
        ids[image_at] = IMAGE_ID
    return ids, (torch.arange(total) < length).long()


@needs_golden
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([(20, 5)], id="image within the system prompt"),
        pytest.param([(18, 17)], id="no text after the system prompt"),
        pytest.param([(30, 20), (24, 0)], id="image first beside image in the middle"),
        pytest.param([(30, 20), (12, None), (22, 21)], id="three rows of three kinds"),
    ],
)
def test_batches_that_the_golden_data_lack(rows: list[tuple[int, int | None]]) -> None:
    case = golden_case("wings/llama_gqa")
    total = max(length for length, _ in rows)
    made = [row(length, at, total, seed) for seed, (length, at) in enumerate(rows)]
    ids, real = (torch.stack(each) for each in zip(*made, strict=True))
    images = torch.randn(len(rows), 3, 28, 28, generator=torch.Generator().manual_seed(9))
    check_against_reference(case, ids, real, images)


def random_learners(seed: int = 0, **settings) -> OfficialLearners:
    torch.manual_seed(seed)
    learners = OfficialLearners(16, rank=4, heads=4, theta=10000.0, **settings)
    for parameter in learners.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return learners


def small_batch(length: int = 12, image_at: int = 4, patches: int = 3):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, length, 16, generator=generator)
    initial = torch.randn(1, length, 16, generator=generator)
    kinds = torch.full((1, length), TEXT)
    kinds[:, image_at : image_at + patches] = IMAGE
    scores = torch.randn(1, 4, length, length, generator=generator)
    attention = scores.masked_fill(~causal_mask(length), -torch.inf).softmax(-1)
    return hidden, initial, kinds, attention


def test_a_new_one_adds_exactly_zero() -> None:
    learners = OfficialLearners(16, rank=4, heads=4, theta=10000.0)
    hidden, initial, kinds, attention = small_batch()
    plan = plan_official(initial, kinds, None, system_length=2)
    assert not learners(hidden, plan, scores_of(learners, attention)).any()


def test_no_image_and_no_textual_learner_adds_nothing() -> None:
    learners = random_learners(learners=("visual",), router=False)
    hidden, initial, kinds, _ = small_batch()
    plan = plan_official(initial, torch.full_like(kinds, TEXT), None, system_length=2)
    assert plan.image_features is None
    assert not learners(hidden, plan).any()


def paper_addition(learners: OfficialLearners, hidden, initial, kinds, attention) -> Tensor:
    def weights(name: str) -> LearnerWeights:
        learner = getattr(learners, name)
        return LearnerWeights(
            **{
                f"{part}_{way}": getattr(getattr(learner, part), way).weight.detach()
                for part in ("query", "key", "value", "output")
                for way in ("down", "up")
            }
        )

    router = learners.router.weight.detach()
    return wings_layer_reference(
        hidden[0],
        initial[0],
        (kinds[0] == IMAGE).long(),
        torch.arange(hidden.shape[1]),
        attention[0],
        weights("visual"),
        weights("textual"),
        router,
        heads=4,
        theta=10000.0,
    )


@pytest.mark.parametrize("changed", [5, 10], ids=["image token", "text after the image"])
def test_later_tokens_leak_here_and_not_in_the_paper_form(changed: int) -> None:
    learners = random_learners()
    hidden, initial, kinds, attention = small_batch()
    other = initial.clone()
    other[:, changed] += 1.0

    def official(features: Tensor) -> Tensor:
        plan = plan_official(features, kinds, None, system_length=2)
        return learners(hidden, plan, scores_of(learners, attention))[0].detach()

    def paper(features: Tensor) -> Tensor:
        return paper_addition(learners, hidden, features, kinds, attention)

    assert (official(initial) - official(other))[:changed].abs().max() > 1e-3
    assert torch.equal(paper(initial)[:changed], paper(other)[:changed])
    assert not torch.equal(paper(initial)[changed:], paper(other)[changed:])


def test_half_precision_stays_finite_and_close() -> None:
    learners = random_learners()
    hidden, initial, kinds, attention = small_batch()
    plan = plan_official(initial, kinds, None, system_length=2)
    exact = learners(hidden, plan, scores_of(learners, attention))
    halved = replace(
        plan,
        image_features=plan.image_features.bfloat16(),
        text_features=plan.text_features.bfloat16(),
        image_gate=plan.image_gate.bfloat16(),
    )
    learners = learners.bfloat16()
    scores = scores_of(learners, attention.bfloat16())
    rough = learners(hidden.bfloat16(), halved, scores)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).norm() < 0.05 * exact.norm()


def plan_of(*rows: str, image_features: Tensor | None = None) -> OfficialPlan:
    """A plan of rows of t (text), i (image) and . (padding)."""
    kinds = torch.tensor([[{".": PADDING, "t": TEXT, "i": IMAGE}[c] for c in row] for row in rows])
    return plan_official(torch.ones(*kinds.shape, 16), kinds, image_features, system_length=1)


def test_padding_counts_as_zero_features() -> None:
    plan = plan_of("ttt..", "ttttt")
    assert plan.text_features[:, :, 0].tolist() == [[1, 1, 1, 0, 0], [1] * 5]


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match="right-padded"):
        plan_of(".tit")
    with pytest.raises(UsageError, match="one image a row"):
        plan_of("titi")
    with pytest.raises(UsageError, match="some rows have an image"):
        plan_of("tiit", "tttt")
    with pytest.raises(UsageError, match="by itself"):
        plan_of("tiii", "tttt", image_features=torch.zeros(2, 3, 16))
    with pytest.raises(UsageError, match=str(ROUTER_WIDTH)):
        plan_of("t" * (ROUTER_WIDTH + 1))
    with pytest.raises(UsageError, match="does not divide"):
        OfficialLearners(10, rank=2, heads=4, theta=1e4)
