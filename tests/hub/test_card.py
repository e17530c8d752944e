"""The model card says what the graft's record says, and claims nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

from hub_fixtures import RECIPE, make_record
from mmgraft.hub.card import MARKER, is_ours, render_card
from mmgraft.model.files.graft_file import BaseReference
from mmgraft.runs.results import Results
from mmgraft.vision.projectors.configs import QFormerConfig
from mmgraft.vision.spec import VisionSpec
from report_example import (
    a_set,
    laws_section,
    score,
    section,
    text_section,
    training_section,
    vision_section,
)

PARTS = {"projector": 4160, "layers": 8192}


def card(recipe: str | None = None, license: str | None = None, **values: Any) -> str:
    return render_card(make_record(**values), "me/my-graft", PARTS, recipe, license)


def front_matter(text: str) -> dict[str, Any]:
    opening, block, _ = text.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(block)


def test_front_matter_is_what_the_hub_reads() -> None:
    assert front_matter(card(license="apache-2.0")) == {
        "library_name": "mmgraft",
        "pipeline_tag": "image-text-to-text",
        "license": "apache-2.0",
        "base_model": "acme/tiny-llama",
        "base_model_relation": "adapter",
        "tags": ["mmgraft", "iaa", "vision-language", "multimodal"],
    }
    assert "license" not in front_matter(card())


def test_a_base_in_the_repository_is_no_base_model_of_the_hub() -> None:
    text = card(base=BaseReference(id="./base"), base_trained=True)
    assert "base_model" not in front_matter(text)
    assert "| base | `./base` in this repository |" in text
    assert "huggingface.co/./base" not in text


@pytest.mark.parametrize("name", ["/home/someone/base", "/base"])
def test_a_folder_of_this_machine_is_not_told(name: str) -> None:
    text = card(base=BaseReference(id=name), vision=VisionSpec(id=name))
    assert "base_model" not in front_matter(text)
    assert name not in text
    assert "| base | a folder of the machine that it was made on |" in text
    assert "--base" in text


def test_facts_are_those_of_the_record() -> None:
    text = card()
    for line in (
        "| base | [acme/tiny-llama](https://huggingface.co/acme/tiny-llama) at `"
        + "a" * 40
        + "` |",
        "| settings | layers: 1, 3; structure: c; head: no |",
        "| projector | 4,160 |",
        "| **all** | **12,352** |",
        "mmgraft chat me/my-graft --image",
        'GraftedModel.from_pretrained("me/my-graft"',
    ):
        assert line in text
    assert "hidden state -2 |" in text
    assert "decoder layers inserted after chosen base layers (arXiv 2408.12902)" in text


def test_structure_c_is_not_said_to_have_a_gate() -> None:
    config = {"method": "iaa", "layers": [1], "gate": "linear"}
    assert "gate" not in card(config={**config, "structure": "c"})
    assert "layers: 1; structure: b; gate: linear |" in card(
        config={"method": "iaa", "layers": [1], "structure": "b", "gate": "linear"}
    )


def test_a_tower_without_an_id_is_called_by_its_kind() -> None:
    text = card(vision=VisionSpec(kind="efficientnet-lite2"))
    assert "| vision tower | `efficientnet-lite2` |" in text


def test_published_weights_of_a_projector_are_named_with_their_licence() -> None:
    published = {"weights": "acme/blip2", "revision": "b" * 40, "features": 16}
    text = card(projector=QFormerConfig(**published))
    link = "[acme/blip2](https://huggingface.co/acme/blip2) at `" + "b" * 40 + "`"
    assert f"| projector | `qformer`, which began as the weights of {link}; their licence" in text
    local = card(projector=QFormerConfig(weights="blip2", features=16))
    assert "weights of a folder of the machine that it was made on; their licence" in local
    assert "| projector | `mlp` |" in card()


def test_what_is_kept_of_text() -> None:
    frozen, trained = card(), card(base_trained=True)
    assert "bit for bit" in frozen
    assert "Text may change" not in frozen
    assert "Text may change" in trained
    assert "bit for bit" not in trained


def test_official_wings_names_what_it_lacks() -> None:
    lengths = {"system_prompt_length": 3, "image_token_length": 4}
    official = card(method="wings-official", config={"method": "wings-official", **lengths})
    paper = card(method="wings", config={"method": "wings"})
    for lack in ("does not promise", "padded on the right", "exactly one image", "teaches nothing"):
        assert lack in official
    assert "does not promise" not in paper


def test_the_recipe_is_shown_to_the_letter() -> None:
    assert f"```yaml\n{RECIPE}```\n" in card(recipe=RECIPE)


def test_a_recipe_cannot_break_out_of_its_fence() -> None:
    text = card(recipe="description: |\n  ```\n  # not a heading\n  ```\n")
    assert "````yaml\ndescription: |\n  ```\n  # not a heading\n  ```\n````" in text


def test_a_recipe_that_only_the_record_has_is_shown_too() -> None:
    record = make_record(recipe={"name": "small", "stages": [{"name": "align"}]})
    text = render_card(record, "me/x", PARTS)
    assert "as it was run:\n\n```yaml\nname: small\nstages:\n- name: align\n```\n" in text
    assert "```yaml" not in card()


def test_data_are_named_by_file_and_stage_without_their_folders() -> None:
    recipe = {
        "data": [{"path": "/home/me/private/vqa.jsonl", "limit": 100}],
        "stages": [
            {"name": "align", "data": [{"path": "captions.json", "weight": 2.0}, {"path": None}]},
            {"name": "tune", "data": None},
        ],
    }
    text = render_card(make_record(recipe=recipe), "me/x", PARTS, "name: x\n")
    assert "| align | captions.json | weight 2 |\n| tune | vqa.jsonl | first 100 rows |" in text
    assert "/home/me" not in text
    assert "fresh" not in text


def test_an_untrained_graft_says_so() -> None:
    assert "nothing in it was trained yet" in card(recipe=RECIPE)


def test_results_become_a_table() -> None:
    results = {"easy-vqa": {"accuracy": 0.81234, "a|b": 3}, "text identical": True, "curve": [1, 2]}
    text = card(results=results)
    assert "| easy-vqa, accuracy | 0.8123 |\n" in text
    assert "| easy-vqa, a\\|b | 3 |\n" in text
    assert "| text identical | yes |\n" in text
    assert "curve" not in text
    assert "## Results" not in card()


def test_only_a_card_with_the_marker_is_ours() -> None:
    text = card()
    assert is_ours(text)
    assert not is_ours(text.replace(MARKER, ""))
    assert not is_ours("# about mmgraft: my own words")


@pytest.mark.parametrize("recipe", [None, RECIPE])
def test_no_hole_is_left_in_the_text(recipe: str | None) -> None:
    text = card(recipe=recipe, results={"accuracy": 0.5})
    assert "None" not in text.replace("None of", "")
    assert "\n\n\n" not in text
    assert text.endswith("| accuracy | 0.5 |\n")


def measured_card(*sections: Results, files: tuple[str, ...] = ()) -> str:
    record = make_record(results={"accuracy": 0.5})
    return render_card(record, "me/x", PARTS, measured=sections, files_there=files)


def test_what_was_measured_becomes_tables_with_intervals() -> None:
    text = measured_card(training_section(), text_section(), vision_section(), laws_section())
    assert "| accuracy | 0.5 |" in text
    for line in (
        "### Text",
        "The text workflow is the base bit for bit: on 8 prompts",
        "| wiki | perplexity | 20 | **28.40** (27.60 to 29.20) | 28.40 (27.60 to 29.20) | "
        "0 (exactly) | the same | 0 |",
        "### Vision",
        "| easy-vqa | accuracy | 1,000 | **0.871** (0.851 to 0.891) | 0.670 (0.650 to 0.690) | "
        "0.610 (0.590 to 0.630) |",
        "| color | 300 | 0.950 (0.930 to 0.970) |",
    ):
        assert line in text
    assert text.index("## Results") < text.index("### Text") < text.index("### Vision")
    assert "### Interleaved" not in text
    assert "\n\n\n" not in text


def test_images_and_reports_are_shown_where_they_go_along() -> None:
    files = ("results/laws.png", "results/report.html", "results/other.png")
    text = measured_card(vision_section(), files=files)
    assert "](results/laws.png)" in text
    assert "- [report.html](results/report.html)" in text
    for absent in ("curves.png", "report.md", "other.png"):
        assert absent not in text
    assert "results/" not in measured_card(vision_section())


def test_the_hubs_metadata_reads_back() -> None:
    data = front_matter(measured_card(training_section(), text_section(), vision_section()))
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "x"
    found = {(one.dataset_name, one.metric_type): one for one in results}
    asked = found["easy-vqa", "accuracy"]
    assert asked.metric_value == 0.871
    assert asked.task_type == "visual-question-answering"
    assert asked.metric_name == "accuracy, 1,000 items (95 % interval 0.851 to 0.891)"
    assert found["stamps", "precision_at_0.5"].task_type == "image-text-to-text"
    assert found["mmlu", "accuracy"].task_type == "text-generation"
    assert len(results) == 7


def test_a_number_that_is_none_is_not_told_to_the_hub() -> None:
    one = a_set("x", "exact", "accuracy", scores={"accuracy": score(float("inf"), 0)})
    assert "model-index" not in front_matter(measured_card(section("vision", [one])))
    assert "model-index" not in front_matter(measured_card(laws_section()))
