from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgraft.data.formats.sources import read_rows
from mmgraft.errors import UsageError
from mmgraft.evaluation.attention.laws import (
    attention_shift,
    evaluate_laws,
    layer_sums,
    read_samples,
)
from mmgraft.evaluation.items.files import file_sha256, read_items
from mmgraft.evaluation.report.plots import laws_plot
from mmgraft.inference import Answerer
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.results import read_results, write_results
from tiny_runs import make_parts, make_run

# -- the shift ------------------------------------------------------------------------------------


def shift_of(before: list[float], after: list[float]) -> float:
    sums = np.stack([before, np.zeros_like(before), after], axis=-1)
    return float(attention_shift(sums[None])[0])


def test_shift_by_hand() -> None:
    assert shift_of([1, 2, 3], [10, 20, 30]) == pytest.approx(0)  # they rise together
    assert shift_of([1, 2, 3], [5, 4, 3]) == pytest.approx(2)  # one rises as the other falls
    assert shift_of([1, 2, 1, 2], [1, 1, 2, 2]) == pytest.approx(1)  # nothing to do with each other
    # deviations (-1, 0, 1) and (-1, 1, 0): their product 1, their squares 2 and 2
    assert shift_of([0, 1, 2], [1, 3, 2]) == pytest.approx(1 - 1 / 2)


def test_a_curve_that_does_not_vary_has_no_shift() -> None:
    assert np.isnan(shift_of([1, 1, 1], [1, 2, 3]))
    assert np.isnan(shift_of([1, 2, 3], [0, 0, 0]))
    assert np.isnan(shift_of([1000, 1000.0004, 1000], [1, 2, 3]))  # rounding
    assert np.isnan(shift_of([5], [6]))


numbers = st.lists(st.integers(0, 50), min_size=3, max_size=12)


@given(numbers, st.data())
def test_the_shift_is_numpys_correlation(before: list[int], data: Any) -> None:
    after = data.draw(st.lists(st.integers(0, 50), min_size=len(before), max_size=len(before)))
    found = shift_of([float(x) for x in before], [float(x) for x in after])
    if len(set(before)) == 1 or len(set(after)) == 1:
        assert np.isnan(found)
        return
    assert found == pytest.approx(1 - np.corrcoef(before, after)[0, 1], abs=1e-9)
    assert found == pytest.approx(shift_of([7 * x + 1.0 for x in before], [*map(float, after)]))


# -- samples --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


RUNS: dict[str, dict[str, Any]] = {
    "iaa": {"layers": [0, 2]},
    "wings": {"rank": 4},
    "llava": {},
    "lora": {"rank": 4},
    "expert": {"layers": [1, 3]},
}


@pytest.fixture(scope="module")
def runs(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(parts, folder / name, name, **more) for name, more in RUNS.items()}


@dataclass
class Told:
    messages: list[Any]
    id: str = "one"
    where: str = "made up"
    file: str = ""
    tools: Any = None
    group: str | None = None
    images: list[Any] = field(default_factory=list)


def turn(role: str, *content: str, image: Any = None) -> dict[str, Any]:
    """Texts and images (written as None) of one turn."""
    made = [
        {"type": "text", "text": text} if text else {"type": "image", "image": str(image)}
        for text in content
    ]
    return {"role": role, "content": made}


def measure(run: Path, samples: Any, parts: Path, **options: Any) -> Any:
    answerer = options.pop("answerer", None) or Answerer.load(run)
    return evaluate_laws(answerer, samples, run, file=parts / "rows.jsonl", **options)


@pytest.mark.parametrize(
    ("method", "series"),
    [
        ("llava", ["base_with_projector"]),
        ("iaa", ["base_with_projector", "base_layers", "all_layers"]),
        ("wings", ["base_with_projector", "main", "main_and_learners"]),
        ("lora", ["base_with_projector", "main"]),
        ("expert", ["base_with_projector", "main"]),
    ],
)
def test_a_section_of_a_run(
    method: str, series: list[str], runs: dict[str, Path], parts: Path, tmp_path: Path
) -> None:
    samples = read_rows(parts / "rows.jsonl", parts / "images")
    found = measure(runs[method], samples, parts, batch_size=4)
    (one,) = found.sets
    assert list(one.scores) == [f"shift_{name}" for name in series]
    assert one.main == f"shift_{series[-1]}"
    assert list(one.change) == [f"shift_{name}" for name in series[1:]]
    assert one.items == 9
    assert all(score.count == 9 and score.low <= score.value <= score.high
               for score in one.scores.values())  # fmt: skip
    for name, change in one.change.items():
        before = one.scores["shift_base_with_projector"].value
        assert change.value == pytest.approx(one.scores[name].value - before)
    assert one.file == "rows.jsonl"
    assert one.sha256 == file_sha256(parts / "rows.jsonl")
    assert found.graft["method"] == method
    assert len(found.graft["sha256"]) == 64
    details = found.details["laws"]
    assert details["left_out"] == {
        "no_image": 3, "no_text_before": 0, "no_text_after": 0, "no_variance": 0,
    }  # fmt: skip
    assert (details["samples"], details["used"]) == (12, 9)
    assert list(details["series"]) == series
    alone = details["series"]["base_with_projector"]
    assert alone["layers"] == ["0", "1", "2", "3"]
    sides = [sum(alone[side][layer] for side in ("before", "image", "after")) for layer in range(4)]
    assert sides == pytest.approx([1] * 4, abs=1e-5)
    if method == "iaa":
        assert details["series"]["all_layers"]["layers"] == ["0", "0+", "1", "2", "2+", "3"]
    write_results(tmp_path, found)
    assert read_results(tmp_path, "laws") == found
    assert laws_plot({method: found}).startswith(b"\x89PNG")


def test_batches_and_padding_do_not_matter(runs: dict[str, Path], parts: Path) -> None:
    """Rows of different lengths together or one by one; the order of samples either."""
    samples = read_rows(parts / "rows.jsonl", parts / "images")
    answerer = Answerer.load(runs["wings"])
    alone = measure(runs["wings"], samples, parts, batch_size=1, answerer=answerer)
    together = measure(runs["wings"], samples[::-1], parts, batch_size=64, answerer=answerer)
    for name, score in alone.sets[0].scores.items():
        assert together.sets[0].scores[name].value == pytest.approx(score.value, abs=1e-4)
    for name, curve in alone.details["laws"]["series"].items():
        other = together.details["laws"]["series"][name]
        for side in ("before", "image", "after"):
            assert other[side] == pytest.approx(curve[side], abs=1e-5)


def test_the_mean_is_of_shifts_and_curves_of_samples(runs: dict[str, Path], parts: Path) -> None:
    """Each sample counts once, however long: checked with two of unequal length."""
    samples = read_rows(parts / "rows.jsonl", parts / "images")[:2]
    answerer = Answerer.load(runs["iaa"])
    found = measure(runs["iaa"], samples, parts, answerer=answerer)
    shifts, curves = [], []
    for sample in samples:
        inputs = answerer.processor([sample.messages], "right", add_generation_prompt=False)
        sums = layer_sums(answerer.model, inputs)["all_layers"].sums
        shifts.append(1 - np.corrcoef(sums[0, :, 0], sums[0, :, 2])[0, 1])
        curves.append(sums[0] / inputs["input_ids"].shape[1])
    assert found.sets[0].scores["shift_all_layers"].value == pytest.approx(np.mean(shifts))
    shown = found.details["laws"]["series"]["all_layers"]
    wanted = np.mean(curves, axis=0)
    assert shown["before"] == pytest.approx(wanted[:, 0], abs=1e-6)
    assert shown["after"] == pytest.approx(wanted[:, 2], abs=1e-6)


def test_every_reason_to_leave_a_sample_out_is_counted(runs: dict[str, Path], parts: Path) -> None:
    image = parts / "images" / "0.png"
    answerer = Answerer.load(runs["llava"])
    answerer.processor = answerer.processor.with_template("plain")
    samples = [
        Told([turn("user", "what?", None, image=image), turn("assistant", "red")]),
        Told([turn("user", None, image=image), turn("assistant", "red")]),
        Told([turn("user", "what?", None, image=image)]),
        Told([turn("user", "what?"), turn("assistant", "red")]),
    ]
    kinds = [answerer.processor.encode(s.messages, False).kinds for s in samples]
    begins = [row[0] for row in kinds]
    found = measure(runs["llava"], samples, parts, answerer=answerer)
    left = found.details["laws"]["left_out"]
    assert begins == [0, 1, 0, 0]  # the tiny tokenizer puts nothing before a text
    assert left == {"no_image": 1, "no_text_before": 1, "no_text_after": 1, "no_variance": 0}
    assert found.sets[0].items == 1


def test_curves_without_variance_are_left_out_of_all_series(
    runs: dict[str, Path], parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that differences between series are of the same samples."""

    def flat(model: Any, inputs: Any, workflow: Any) -> Any:
        found = layer_sums(model, inputs, workflow)
        found["main"].sums[:2, :, 2] = 3.0
        return found

    monkeypatch.setattr("mmgraft.evaluation.attention.laws.layer_sums", flat)
    samples = read_rows(parts / "rows.jsonl", parts / "images")
    found = measure(runs["wings"], samples, parts, batch_size=64)
    assert found.details["laws"]["left_out"]["no_variance"] == 2
    assert {score.count for score in found.sets[0].scores.values()} == {7}
    assert np.isfinite([score.value for score in found.sets[0].scores.values()]).all()


def test_nothing_to_measure_is_said(runs: dict[str, Path], parts: Path) -> None:
    samples = [Told([turn("user", "what?"), turn("assistant", "red")])]
    with pytest.raises(UsageError, match=r"rows\.jsonl leaves no sample.*1 no_image.*between text"):
        measure(runs["llava"], samples, parts)
    with pytest.raises(UsageError, match="no samples to measure; give rows"):
        measure(runs["llava"], [], parts)


def test_rows_are_drawn_and_say_where_they_were_read(runs: dict[str, Path], parts: Path) -> None:
    rows = read_samples(parts / "rows.jsonl", parts / "images")
    assert [row.id for row in rows] == [str(number) for number in range(12)]
    assert read_samples(parts / "rows.jsonl", parts / "images", limit=12) == rows
    drawn = [row.id for row in read_samples(parts / "rows.jsonl", parts / "images", 5, seed=3)]
    assert len(drawn) == 5
    assert drawn == sorted(drawn, key=int)
    assert drawn != [row.id for row in rows[:5]]
    found = evaluate_laws(Answerer.load(runs["llava"]), rows, runs["llava"])
    assert found.sets[0].sha256 == file_sha256(parts / "rows.jsonl")


def test_what_learners_change_is_told_against_the_main_branch(
    runs: dict[str, Path], parts: Path
) -> None:
    samples = read_rows(parts / "rows.jsonl", parts / "images")
    found = measure(runs["wings"], samples, parts)
    change = found.details["laws"]["learners_change"]
    scores = found.sets[0].scores
    wanted = scores["shift_main_and_learners"].value - scores["shift_main"].value
    assert change["value"] == pytest.approx(wanted)
    assert change["low"] <= change["value"] <= change["high"]
    assert "learners_change" not in measure(runs["iaa"], samples, parts).details["laws"]


def test_items_are_measured_up_to_where_the_answer_begins(
    runs: dict[str, Path], parts: Path
) -> None:
    spec = SetSpec(
        name="colours", metric="exact", path=str(parts / "seen.jsonl"), images=str(parts / "images")
    )
    lines = (parts / "rows.jsonl").read_text().splitlines()
    (parts / "seen.jsonl").write_text("\n".join(line for line in lines if "image" in line))
    items = read_items(spec)
    answerer = Answerer.load(runs["llava"])
    lengths: list[int] = []
    encode = answerer.processor.encode

    def noting(messages: Any, add_generation_prompt: bool, *more: Any) -> Any:
        lengths.append(add_generation_prompt)
        return encode(messages, add_generation_prompt, *more)

    answerer.processor.encode = noting  # type: ignore[method-assign]
    found = measure(runs["llava"], items, parts, answerer=answerer, name="colours")
    assert all(lengths)
    assert found.sets[0].name == "colours"
    assert found.sets[0].items == len(items)


def test_features_take_the_place_of_pictures(runs: dict[str, Path], parts: Path) -> None:
    samples = read_rows(parts / "rows.jsonl", parts / "images")
    answerer = Answerer.load(runs["iaa"])
    asked: list[Path] = []

    def features(paths: list[Path]) -> Any:
        from mmgraft.data.images import open_images

        asked.extend(paths)
        pixels = answerer.processor.pixels(open_images(paths, "a test"))
        return answerer.model.image_features(pixels)

    seen = measure(runs["iaa"], samples, parts, answerer=answerer)
    cached = measure(runs["iaa"], samples, parts, answerer=answerer, features=features)
    assert len(asked) == 9
    assert cached.sets[0].scores == seen.sets[0].scores


def test_a_sample_beyond_the_bases_table_is_named(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "parts", "gpt2")
    run = make_run(parts, tmp_path / "run", "llava")
    image = parts / "images/0.png"
    short = Told([turn("user", "look ", None, " which?", image=image)])
    long = Told([turn("user", "look " * 40, None, " which?", image=image)], where="d.jsonl, line 2")
    with pytest.raises(UsageError, match=r"d\.jsonl, line 2: \d+ positions.* a table of 128"):
        measure(run, [short, long], parts)
    assert measure(run, [short], parts) is not None
