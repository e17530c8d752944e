from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmgraft.errors import UsageError
from mmgraft.evaluation.generate import answers as asking
from mmgraft.evaluation.kept import read_predictions
from mmgraft.evaluation.vision import blind_workflow, evaluate_vision, without_images
from mmgraft.inference import Answerer
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.results import Results
from tiny_runs import make_parts, make_run
from tiny_towers import picture

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a tower, a run of each method, and sets of six questions on three pictures."""
    parts = make_parts(tmp_path_factory.mktemp("vision"))
    for method in ("iaa", "wings", "llava", "lora", "expert", "xattn"):
        make_run(parts, parts / method, method)
    rows = []
    for number in range(6):
        name = f"q{number % 3}.png"
        picture(20 + 10 * (number % 3), 30).save(parts / "images" / name)
        shared = {"id": f"n{number}", "image": name, "kind": "ab"[number % 2]}
        asked = {**shared, "question": "which colour?" + " please" * number}
        rows.append({**asked, "options": list(COLOURS), "answer": COLOURS[number % 3]})
    (parts / "exact.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parts


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "iaa", tmp_path / "run"))


def spec(folder: Path, metric: str = "exact", **more: Any) -> SetSpec:
    values = {
        "name": metric, "metric": metric, "path": str(folder / "exact.jsonl"),
        "images": str(folder / "images"), "train": str(folder / "exact.jsonl"), **more,
    }  # fmt: skip
    return SetSpec.model_validate(values)


def evaluate(run: Path, *specs: SetSpec, **more: Any) -> Results:
    return evaluate_vision(Answerer.load(run), run, specs, **more)


@pytest.mark.parametrize("method", ["iaa", "wings", "llava", "lora", "expert", "xattn"])
def test_a_set_is_asked_with_and_without_its_pictures(
    folder: Path, tmp_path: Path, said: list[str], method: str
) -> None:
    run = Path(shutil.copytree(folder / method, tmp_path / "run"))
    results = evaluate(run, spec(folder))
    (found,) = results.sets
    assert results.section == "vision"
    assert results.graft["method"] == method
    assert found.items == 6
    assert found.scores["accuracy"].count == 6
    assert found.blind["prior"]["accuracy"].value == pytest.approx(1.0), "each was asked there"
    assert set(found.blind) == {"prior", "no_image"}
    assert set(found.kinds) == {"a", "b"}
    assert found.settings["workflow"] == found.settings["no_image_workflow"] == "mm"
    assert found.predictions == "results/predictions/exact.jsonl"
    seen = read_predictions(run / "results/predictions/exact.jsonl")
    blind = read_predictions(run / "results/predictions/exact.no_image.jsonl")
    assert [row["id"] for row in sorted(seen, key=lambda row: row["id"])] == [
        f"n{number}" for number in range(6)
    ]
    assert {row["id"]: row["answer"] for row in seen} != {row["id"]: row["answer"] for row in blind}
    assert not (run / "results" / "vision.json").exists(), "the caller writes it"
    assert any("without" in text for text in said)


def test_a_finished_set_is_scored_again_without_asking(
    folder: Path, run: Path, monkeypatch
) -> None:
    sets = [spec(folder), spec(folder, "choice")]
    first = evaluate(run, *sets)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(asking._Batch, "answers", refuse)
    monkeypatch.setattr("mmgraft.evaluation.likelihood.likelihood.Likelihoods.score", refuse)
    again = evaluate(run, *sets, batch_size=3)
    for one, other in zip(first.sets, again.sets, strict=True):
        assert one.scores == other.scores
        assert one.blind == other.blind


def test_answers_of_other_weights_are_asked_again(folder: Path, run: Path, said: list[str]) -> None:
    evaluate(run, spec(folder))
    file = run / "results" / "predictions" / "exact.jsonl"
    before = file.read_bytes()
    weights = load_file(run / "graft.safetensors")
    save_file({name: tensor + 0.5 for name, tensor in weights.items()}, run / "graft.safetensors")
    evaluate(run, spec(folder))
    assert file.with_name("exact.stale-1.jsonl").read_bytes() == before
    assert any("exact.stale-1.jsonl" in text for text in said)
    assert len(read_predictions(file)) == 6


def test_multiple_choice_is_scored_by_log_probability(folder: Path, run: Path) -> None:
    (found,) = evaluate(run, spec(folder, "choice")).sets
    assert set(found.scores) == {"accuracy", "accuracy_per_token", "accuracy_per_character"}
    assert set(found.blind["prior"]) == {"accuracy"}
    assert set(found.blind["no_image"]) == set(found.scores)
    rows = read_predictions(run / "results/predictions/choice.jsonl")
    for row in rows:
        likeliest = max(range(3), key=lambda at: row["sums"][at])
        assert row["answer"] == COLOURS[likeliest]
    right = [row["answer"] == row["truth"][0] for row in rows]
    assert found.scores["accuracy"].value == pytest.approx(sum(right) / 6)


def test_features_come_from_the_runs_cache(folder: Path, run: Path, monkeypatch) -> None:
    """Pictures pass through the tower once, however often they are shown."""
    answerer = Answerer.load(run)
    tower = answerer.model.vision_tower
    assert tower is not None
    seen: list[int] = []
    original = type(tower).forward

    def counted(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(type(tower), "forward", counted)
    evaluate_vision(answerer, run, [spec(folder), spec(folder, "choice")])
    assert sum(seen) == 3
    assert list((run / "features").glob("*/*.safetensors"))


def test_without_training_rows_the_prior_is_left_out_and_said(
    folder: Path, run: Path, said: list[str]
) -> None:
    one = spec(folder, train=None)
    (found,) = evaluate(run, one).sets
    assert set(found.blind) == {"no_image"}
    assert any("no training rows" in text for text in said)


def test_no_blind_score_is_asked_for_where_none_is_wanted(folder: Path, run: Path) -> None:
    (found,) = evaluate(run, spec(folder, blind=[])).sets
    assert found.blind == {}
    assert not (run / "results/predictions/exact.no_image.jsonl").exists()


def test_images_are_left_out_and_words_stay() -> None:
    image = {"type": "image", "image": "a.png"}
    turns = [
        {"role": "user", "content": [image, {"type": "text", "text": "one"}, image,
                                     {"type": "text", "text": " two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": [image]},
    ]  # fmt: skip
    assert without_images(turns) == [
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": ""},
    ]
    assert turns[0]["content"][0] is image


def test_a_graft_that_needs_a_picture_in_every_row_is_asked_blindly_as_text(
    folder: Path, run: Path, tmp_path: Path
) -> None:
    official = {"system_prompt_length": 2, "image_token_length": 4}
    answerer = Answerer.load(make_run(folder, tmp_path / "official", "wings-official", **official))
    assert blind_workflow(answerer.model, "mm") == "text"
    assert blind_workflow(Answerer.load(run).model, "mm") == "mm"
    (found,) = evaluate_vision(answerer, tmp_path / "official", [spec(folder)]).sets
    assert found.settings["no_image_workflow"] == "text"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"workflow": "grounding"}, "'grounding' is not there; this graft has: mm"),
        ({"workflow": "text"}, "cannot see"),
        ({"path": "nowhere.jsonl"}, r"nowhere\.jsonl"),
        ({"columns": {"answer": "label"}}, "'label'"),
        ({"train": "nowhere.jsonl"}, r"nowhere\.jsonl"),
        ({"metric": "yes_no"}, "yes or no"),
        ({"metric": "vqa_v2"}, r"exact\.jsonl, line 1"),
        ({"metric": "box", "boxes": "unit"}, r"exact\.jsonl, line 1"),
    ],
)
def test_a_set_that_cannot_be_asked_is_refused_before_anything_is(
    folder: Path, run: Path, more: dict[str, Any], says: str
) -> None:
    """Before the sets in front of it are asked, too."""
    with pytest.raises(UsageError, match=says):
        evaluate(run, spec(folder, name="first"), spec(folder, **more))
    assert not (run / "results").exists()


def test_sets_of_one_name_and_no_sets_are_refused(folder: Path, run: Path) -> None:
    with pytest.raises(UsageError, match="two sets are called 'exact'"):
        evaluate(run, spec(folder), spec(folder))
    with pytest.raises(UsageError, match="--data FILE"):
        evaluate(run)
    text = SetSpec(name="mmlu", metric="choice", modality="text")
    with pytest.raises(UsageError, match="--text"):
        evaluate(run, text)
