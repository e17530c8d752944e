"""Imported checkpoints give the logits of the published code, for every golden sample."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from grafting import project
from mmgraft import GraftedModel
from mmgraft.published.importer import import_checkpoint
from reference.golden import IMAGE_ID, golden_case, golden_root, row_lengths, sample_ids

pytestmark = pytest.mark.skipif(golden_root() is None, reason="set MMGRAFT_GOLDEN")

PATCHES, TOLERANCE = 16, 1e-5
IAA_SAMPLES, WINGS_SAMPLES = sample_ids("iaa"), sample_ids("wings")
WORKFLOWS = {"Text": "text", "MM": "mm", "G": "grounding"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GraftedModel]:
    """One model for each golden case, imported and loaded; IAA's with both its grafts."""
    root = tmp_path_factory.mktemp("imported")
    loaded = {}
    for name in sorted({case for case, _ in IAA_SAMPLES + WINGS_SAMPLES}):
        folder = root / name
        import_checkpoint(golden_case(name).path, folder)
        loaded[name] = GraftedModel.from_pretrained(folder)
        if name.startswith("iaa"):
            loaded[name].add_workflow("grounding", folder / "grounding")
    return loaded


def expand(sample: dict[str, Tensor], filler: int = 0) -> dict[str, Tensor]:
    """The sample as mmgraft takes it: 16 positions of kind 1 an image, padded on the right."""
    ids = sample["input_ids"]
    real = sample.get("attention_mask", torch.ones_like(ids))
    rows, kinds = [], []
    for row, mask in zip(ids, real, strict=True):
        tokens = row[mask.bool()]
        repeats = torch.where(tokens == IMAGE_ID, PATCHES, 1)
        kinds.append((tokens == IMAGE_ID).long().repeat_interleave(repeats))
        rows.append(tokens.clamp(min=filler).repeat_interleave(repeats))
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = {
        "input_ids": pad(rows, True),
        "attention_mask": pad([torch.ones_like(row) for row in rows], True),
        "mm_token_type_ids": pad(kinds, True),
    }
    if "pixel_values" in sample:
        inputs["pixel_values"] = sample["pixel_values"]
    return inputs


def check(model: GraftedModel, case_name: str, name: str, workflow: str) -> None:
    sample = golden_case(case_name).samples[name]
    inputs = {**expand(sample), "use_cache": case_name.startswith("iaa")}
    if "step_logits" in sample:
        with torch.no_grad():
            out = model.generate(
                **inputs,
                workflow=workflow,
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert torch.equal(out.sequences[:, -8:], sample["new_tokens"])
        difference = (torch.stack(out.logits, 1) - sample["step_logits"]).abs().max()
        assert difference < TOLERANCE
        return
    with torch.no_grad():
        logits = model(**inputs, workflow=workflow).logits
    for row, length in enumerate(row_lengths(sample, PATCHES)):
        difference = (logits[row, :length] - sample["logits"][row, :length]).abs().max()
        assert difference < TOLERANCE, f"row {row}"


@pytest.mark.parametrize(("case_name", "name"), IAA_SAMPLES)
def test_iaa(models: dict[str, GraftedModel], case_name: str, name: str) -> None:
    workflow = WORKFLOWS[golden_case(case_name).notes[name]["task_type"]]
    check(models[case_name], case_name, name, workflow)


@pytest.mark.parametrize(("case_name", "name"), WINGS_SAMPLES)
def test_wings(models: dict[str, GraftedModel], case_name: str, name: str) -> None:
    check(models[case_name], case_name, name, "mm")


def test_image_features(models: dict[str, GraftedModel]) -> None:
    sample = golden_case("iaa/llama_gqa_l6").samples["g"]
    model = models["iaa/llama_gqa_l6"]
    features = model.image_features(sample["pixel_values"])
    features = features.view(sample["vision_features"].shape)
    assert (features - sample["vision_features"]).abs().max() < TOLERANCE
    projected = project(model, features, "grounding")
    assert (projected - sample["image_features"]).abs().max() < TOLERANCE


def test_text_is_the_imported_base(models: dict[str, GraftedModel], tmp_path: Path) -> None:
    model = models["wings/qwen2_mha"]
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model.base(input_ids=ids).logits)
