"""The slow references compute what the published implementations computed, sample for sample."""

import pytest
import torch
from torch import Tensor

from reference.golden import GoldenCase, golden_case, row_lengths, sample_ids
from reference.iaa import IAAOutput, published_iaa
from reference.wings_official import WingsOutput, published_wings

TOLERANCE = 1e-5
IAA_SAMPLES = sample_ids("iaa")
WINGS_SAMPLES = sample_ids("wings")

pytestmark = pytest.mark.skipif(
    not IAA_SAMPLES, reason="set MMGRAFT_GOLDEN to the folder of golden data"
)


def assert_close(got: Tensor | None, expected: Tensor, what: str) -> None:
    assert got is not None, f"{what} was not computed"
    assert got.shape == expected.shape, what
    difference = (got - expected).abs().max().item()
    assert difference < TOLERANCE, f"{what} differs by {difference:.2e}"


def run_iaa(case: GoldenCase, task: str, sample: dict[str, Tensor]) -> list[IAAOutput]:
    """Every row by itself, without its padding."""
    images, outputs = list(sample.get("pixel_values", [])), []
    real = sample.get("attention_mask", torch.ones_like(sample["input_ids"]))
    for ids, mask in zip(sample["input_ids"], real, strict=True):
        tokens = ids[mask.bool()].tolist()
        count = tokens.count(-200)
        outputs.append(
            published_iaa(case.state, case.config, case.vision_config, task, tokens, images[:count])
        )
        images = images[count:]
    return outputs


def run_wings(case: GoldenCase, sample: dict[str, Tensor]) -> WingsOutput:
    return published_wings(
        case.state,
        case.config,
        case.vision_config,
        sample["input_ids"],
        sample.get("attention_mask"),
        sample.get("pixel_values"),
    )


def with_token(sample: dict[str, Tensor], token: int) -> dict[str, Tensor]:
    return {**sample, "input_ids": torch.cat([sample["input_ids"], torch.tensor([[token]])], 1)}


@pytest.mark.parametrize(("case_name", "name"), IAA_SAMPLES)
def test_iaa_sample(case_name: str, name: str) -> None:
    case, note = golden_case(case_name), golden_case(case_name).notes[name]
    sample, task = case.samples[name], note["task_type"]
    if "step_logits" in sample:
        for step, token in enumerate(sample["new_tokens"][0].tolist()):
            logits = run_iaa(case, task, sample)[0].logits[-1]
            assert_close(logits, sample["step_logits"][0, step], f"logits of step {step}")
            assert int(logits.argmax()) == token
            sample = with_token(sample, token)
        return
    outputs = run_iaa(case, task, sample)
    for r, length in enumerate(row_lengths(sample, 16)):
        assert_close(outputs[r].logits, sample["logits"][r, :length], f"logits of row {r}")
    for field in ("vision_features", "image_features"):
        if field in sample:
            assert_close(getattr(outputs[0], field), sample[field], field)
    if "hidden_states" in sample:
        assert_close(outputs[0].hidden_states, sample["hidden_states"][:, 0], "hidden states")


@pytest.mark.parametrize(("case_name", "name"), WINGS_SAMPLES)
def test_wings_sample(case_name: str, name: str) -> None:
    case = golden_case(case_name)
    sample = case.samples[name]
    if "step_logits" in sample:
        for step, token in enumerate(sample["new_tokens"][0].tolist()):
            logits = run_wings(case, sample).logits[0, -1]
            assert_close(logits, sample["step_logits"][0, step], f"logits of step {step}")
            assert int(logits.argmax()) == token
            sample = with_token(sample, token)
        return
    output = run_wings(case, sample)
    assert output.logits.shape == sample["logits"].shape
    for r, length in enumerate(row_lengths(sample, case.config["image_token_length"])):
        assert_close(output.logits[r, :length], sample["logits"][r, :length], f"row {r}")
    for field in ("image_features", "hidden_states"):
        if field in sample:
            assert_close(getattr(output, field), sample[field], field)
    for field, expected in sample.items():
        if field.startswith(("attn_pool.", "attn_t_pool.", "reweight_module.")):
            assert_close(output.learners.get(field), expected, field)
