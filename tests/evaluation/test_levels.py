"""E1 and E2 proved on a run: of each method what it claims, and a false claim is found out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grafting import perturb
from mmgraft.evaluation.identity import PROMPTS, load_untouched, prove_levels
from mmgraft.evaluation.text import evaluate_text
from mmgraft.grafts import Promises
from mmgraft.inference import Answerer
from tiny_runs import make_parts, make_run

CLAIMS = {
    "iaa": ({}, {"E1"}),
    "wings": ({}, {"E1"}),
    "llava": ({}, {"E1", "E2"}),
    "lora": ({}, {"E1"}),
    "lora-token": ({"gate": "token"}, {"E1", "E2"}),
    "expert": ({}, {"E1", "E2"}),
    "expert-shared": ({"image_positions": "shared"}, {"E1", "E2"}),
    "xattn": ({}, {"E1", "E2"}),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


def answerer_of(parts: Path, run: Path, name: str) -> Answerer:
    made = Answerer.load(make_run(parts, run, name.partition("-")[0], **CLAIMS[name][0]))
    perturb(made.model)
    return made


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_graft_claims_is_proved_on_its_own_base(
    parts: Path, tmp_path: Path, name: str
) -> None:
    made = answerer_of(parts, tmp_path / "run", name)
    base, _ = load_untouched(parts / "base", made.model.base)
    found = prove_levels(made.model, made.processor, base, PROMPTS)
    assert set(found) == CLAIMS[name][1]
    assert all(one.identical and one.max_difference == 0.0 for one in found.values())
    assert all(one.positions > 3 for one in found.values())


@pytest.mark.parametrize("name", ["iaa", "wings", "lora"])
def test_a_false_claim_is_found_out(parts: Path, tmp_path: Path, name: str) -> None:
    made = answerer_of(parts, tmp_path / "run", name)
    made.model.workflow().graft.promises = Promises(before="")
    base, _ = load_untouched(parts / "base", made.model.base)
    found = prove_levels(made.model, made.processor, base, PROMPTS)
    assert found["E1"].identical
    assert not found["E2"].identical
    assert found["E2"].max_difference > 1e-3


def test_a_touched_base_is_found_out_at_every_level(parts: Path, tmp_path: Path) -> None:
    made = answerer_of(parts, tmp_path / "run", "llava")
    base, _ = load_untouched(parts / "base", made.model.base)
    with torch.no_grad():
        base.get_parameter("model.layers.0.self_attn.k_proj.weight")[0, 0] += 1e-2
    found = prove_levels(made.model, made.processor, base, PROMPTS)
    assert not any(one.identical for one in found.values())


def test_the_text_section_says_so(parts: Path, tmp_path: Path, said: list[str]) -> None:
    made = answerer_of(parts, tmp_path / "run", "lora-token")
    results = evaluate_text(made, tmp_path / "run")
    assert results.identity is not None
    assert {level: one["identical"] for level, one in results.identity["levels"].items()} == {
        "E1": True,
        "E2": True,
    }
    assert any(
        one.startswith("E2, text before an image in its row: the base's bit") for one in said
    )
