"""The report of a comparison, from arms whose answers are known."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from box_example import BOX, GPL, SIZE, make_boxes
from comparison_example import (
    COLOURS,
    SAID,
    add_arm,
    example_comparison,
    keep_answers,
    make_spec,
    vision_of,
    write_questions,
)
from mmgraft.comparison.files import PHASES, read_comparison
from mmgraft.comparison.measured import SetAnswers, read_answers, read_arms
from mmgraft.comparison.report import ComparisonReport, answer_sheet, write_comparison_report
from mmgraft.comparison.spec import dump_comparison
from mmgraft.comparison.tables import main_table
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.files import file_sha256, read_items
from mmgraft.evaluation.metrics.boxes import format_box
from mmgraft.evaluation.report import sheets, words
from mmgraft.evaluation.report.words import change_with_interval, verdict
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.results import Score, write_results
from report_example import iit_section


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with its report, which no test changes."""
    out = example_comparison(tmp_path_factory.mktemp("comparison") / "out")
    write_comparison_report(out)
    return out


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take seconds and have tests of their own; the module's fixture has real ones."""
    data = io.BytesIO()
    Image.new("RGB", (4, 3)).save(data, "PNG")
    plots = SimpleNamespace(
        training_curves=lambda *_: data.getvalue(), laws_plot=lambda _: data.getvalue()
    )
    monkeypatch.setitem(sys.modules, "mmgraft.evaluation.report.plots", plots)


@pytest.fixture
def changed(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def markdown(out: Path) -> str:
    return (out / "report.md").read_text()


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.split("\n") if line.startswith(start)]


def answers_of(out: Path) -> SetAnswers:
    comparison = read_comparison(out)
    found = read_answers(comparison.evaluation[0], read_arms(out, comparison))
    assert found is not None
    return found


def test_the_table_has_the_base_and_every_arm(whole: Path) -> None:
    text = markdown(whole)
    (header,) = lines_of(text, "| arm | identity")
    assert header == (
        "| arm | identity | text kept | wiki, perplexity | mmlu, accuracy | KL, wiki | "
        "colours, accuracy | prior | no image | parameters trained | training | peak memory |"
    )
    (base,) = lines_of(text, "| the base, untouched |")
    assert base.startswith(
        "| the base, untouched | - | - | **28.40** (27.60 to 29.20) | **0.281** ("
    )
    full = lines_of(text, "| llava-full | no: trained | - |")[0]
    assert "| **31.50** (30.60 to 32.40; worse) | **0.270** (0.250 to 0.290) |" in full
    assert "| 0.210 (0.200 to 0.220) | **0.950** (" in full
    assert full.endswith("| 12,352 | 17 min | 3.1 GB |")
    assert "**1.000** (1.000 to 1.000)" in lines_of(text, "| iaa | bit for bit | E0 E1 |")[0]
    assert lines_of(text, "| late | - |")[0].replace("-", "").replace("|", "").strip() == "late"


def test_every_column_is_of_its_own_score(changed: Path) -> None:
    """Blind scores that differ from each other, by arm and by name."""
    arms = read_arms(changed, read_comparison(changed))[:3]
    wanted = {}
    for at, arm in enumerate(arms):
        (seen,) = arm.sections["vision"].sets
        for place, (name, title) in enumerate([("prior", "prior"), ("no_image", "no image")]):
            value = (1 + at + 4 * place) / 10
            score = Score(value=value, low=value - 0.05, high=value + 0.05, count=40, groups=40)
            seen.blind[name] = {"other": score.model_copy(update={"value": 0.99}), seen.main: score}
            wanted[arm.name, title] = words.with_interval(score)
    table = main_table(arms)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert {at: rows[at[0]][at[1]] for at in wanted} == wanted
    assert len(set(wanted.values())) == 6


def test_worse_text_is_marked_in_the_page(whole: Path) -> None:
    html = (whole / "report.html").read_text()
    right = '<td style="text-align:right"'
    assert f'{right} class="bad"><strong>31.50</strong> <span' in html
    assert f"{right}><strong>0.270</strong> <span" in html  # not resolved: no colour


def test_arms_are_compared_on_the_same_items(whole: Path) -> None:
    text = markdown(whole)
    assert lines_of(text, "| iaa | llava | +")[0].endswith("| better |")
    assert lines_of(text, "| llava | llava-full |")[0].endswith("| worse |")
    assert "- colours: late is left out of these: it was not evaluated" in text
    assert lines_of(text, "| llava | no image | 0 (exactly) | the same |")
    assert lines_of(text, "| near | 20 |")


def test_differences_are_those_of_the_answers(whole: Path) -> None:
    found = answers_of(whole)
    items = found.items
    share = sum(item.answers[0] == "red" for item in items) / len(items)
    changes = {(first, second): change for first, second, change in found.differences}
    assert list(changes) == [("llava", "llava-full"), ("iaa", "llava-full"), ("iaa", "llava")]
    change = changes["iaa", "llava"]
    assert change.value == pytest.approx(1 - share)
    assert change.count == len(items)
    blind = {(arm, name): change for arm, name, change in found.over_blind}
    assert {name for arm, name in blind if arm == "llava"} == {"prior", "no_image"}
    no_image = blind["llava", "no_image"]
    assert (no_image.value, no_image.high) == (0, 0)


def test_many_arms_are_compared_with_the_best(changed: Path) -> None:
    found = answers_of(changed)
    many = {f"arm{n}": found.measured["llava"] for n in range(5)} | {"iaa": found.measured["iaa"]}
    pairs = SetAnswers(found.spec, found.items, found.groups, measured=many).differences
    assert [names for *names, _ in pairs] == [[f"arm{n}", "iaa"] for n in range(5)]


def test_the_json_holds_arms_and_differences(whole: Path) -> None:
    data = json.loads((whole / "report.json").read_text())
    report = ComparisonReport.parse(data, "report.json")
    assert list(report.arms) == ["llava-full", "llava", "iaa", "late"]
    assert report.arms["late"].method is None
    assert report.arms["iaa"].done == [*PHASES]
    assert set(report.arms["iaa"].sections) == {"training", "text", "vision", "laws"}
    pairs = [(one.first, one.second) for one in report.differences]
    assert pairs[:3] == [("llava", "llava-full"), ("iaa", "llava-full"), ("iaa", "llava")]
    assert ("iaa", "no_image") in pairs
    assert report.notes == ["colours: late is left out of these: it was not evaluated"]


def test_images_lie_beside_the_markdown(whole: Path) -> None:
    written = {path.name for path in whole.iterdir() if path.name.endswith(".png")}
    assert written == {"answers-colours.png", "laws.png", "curves.png"}
    text = markdown(whole)
    assert all(f"]({name})" in text for name in written)
    assert (whole / "report.html").read_text().count('src="data:image/png') == 3


def test_the_sheet_says_in_words_what_it_shows(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheets, "SHOWN", 5)
    found = answers_of(whole)
    sheet = answer_sheet(found)
    assert sheet is not None
    assert len(sheet.table.rows) == 5
    assert sheet.table.columns == ["question", "truth", "llava-full", "llava", "iaa"]
    for question, truth, _, llava, iaa in sheet.table.rows:
        assert question == "which colour is \\| it?"
        assert iaa == f"{truth} (right)"
        assert llava == ("red (right)" if truth == "red" else "red (wrong)")
    assert answer_sheet(found) == sheet


@pytest.mark.parametrize(("licence", "private"), [("MIT", False), (None, False), (GPL, True)])
def test_boxes_of_arms_have_their_iou_and_gpl_images_are_private(
    tmp_path: Path, licence: str | None, private: bool
) -> None:
    spec = make_boxes(tmp_path / "set", licence)
    texts = {"iaa": [format_box(BOX, "unit", SIZE)] * 3, "llava": ["there"] * 3}
    sheet = answer_sheet(SetAnswers(spec, read_items(spec), texts=texts))
    assert sheet is not None
    for _, _, iaa, llava in sheet.table.rows:
        assert iaa.endswith(" (right, IoU 1.00)")
        assert llava == "there (wrong, malformed)"
    assert sheet.private is private


def test_images_that_may_not_go_along_are_files_beside_the_page(tmp_path: Path) -> None:
    out = example_comparison(tmp_path / "out", arms=("llava",))
    (tmp_path / "questions" / "made.source.json").write_text(json.dumps({"licence": GPL}))
    write_comparison_report(out)
    html = (out / "report.html").read_text()
    assert '<img src="answers-colours.png"' in html
    assert html.count("data:image/png") == 2, "the plots alone"
    assert (out / "answers-colours.png").is_file()
    assert "does not go along with it" in markdown(out)


def test_no_folder_of_the_machine_is_in_the_page(whole: Path) -> None:
    for name in ("report.md", "report.html"):
        assert str(whole.parent) not in (whole / name).read_text()


def test_answers_that_are_not_whole_are_left_out_by_name(changed: Path) -> None:
    file = changed / "arms" / "iaa" / "results" / "predictions" / "colours.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    write_comparison_report(changed)
    text = markdown(changed)
    assert "iaa is left out of these: its answers are not complete" in text
    assert not lines_of(text, "| iaa | llava | +")
    assert lines_of(text, "| iaa | bit for bit |")  # its own results still stand


def test_a_set_that_changed_since_is_not_compared(whole: Path, tmp_path: Path) -> None:
    data = tmp_path / "questions"
    out = example_comparison(tmp_path / "own", arms=("llava",))
    write_questions(data, count=41)
    add_arm(out, "iaa", make_spec(data))
    write_comparison_report(out)
    text = markdown(out)
    assert "llava is left out of these: the set's file has changed since" in text
    assert not lines_of(text, "| iaa | llava | +")


def test_a_set_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    out = example_comparison(tmp_path / "out")
    (tmp_path / "questions" / "test.jsonl").unlink()
    report = json.loads(write_comparison_report(out)["json"].read_text())
    assert report["differences"] == []
    assert "colours: arms cannot be compared item by item" in report["notes"][0]
    assert "arms cannot be compared item by item" in markdown(out)


def test_multiple_choice_is_scored_again_from_log_probabilities(tmp_path: Path) -> None:
    out = example_comparison(tmp_path / "out", arms=("llava", "iaa"))
    spec = make_spec(tmp_path / "questions")
    items = read_items(spec)
    comparison = read_comparison(out)
    arms = read_arms(out, comparison)
    options = ["red", "green", "blue"]
    choice = spec.model_copy(update={"metric": "choice", "path": str(tmp_path / "choice.jsonl")})
    rows = [
        {"id": item.id, "question": "which?", "options": options, "answer": item.answers[0],
         "image": str(next(iter(item.messages[0]["content"]))["image"])}
        for item in items
    ]  # fmt: skip
    Path(str(choice.path)).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for arm in arms[1:3]:
        results = arm.sections["vision"]
        results.sets[0].sha256 = file_sha256(Path(str(choice.path)))
        kept = arm.run / str(results.sets[0].predictions)
        told = [json.loads(line) for line in kept.read_text().splitlines()]
        for row in told[1:]:
            row |= {
                "sums": [-1.0 if option == row["answer"] else -2.0 for option in options],
                "tokens": [1, 1, 1],
                "characters": [3, 5, 4],
            }
        kept.write_text("".join(json.dumps(row) + "\n" for row in told))
    found = read_answers(choice.model_copy(update={"blind": ["prior"]}), arms)
    assert found is not None
    assert found.measured["iaa"].values()["accuracy"] == 1
    share = sum(item.answers[0] == "red" for item in items) / len(items)
    ((*_, change),) = found.differences
    assert change.value == pytest.approx(1 - share)
    blind = {(arm, name): change.value for arm, name, change in found.over_blind}
    assert 0 < blind["iaa", "prior"] < 1


def test_perplexities_are_compared_text_by_text(tmp_path: Path) -> None:
    out = example_comparison(tmp_path / "out", arms=("llava-full", "iaa"))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(8)))
    spec = SetSpec(name="wiki", metric="perplexity", path=str(texts))
    ids = [item.id for item in read_items(spec)]
    arms = read_arms(out, read_comparison(out))
    for arm, loss, beside in ((arms[0], 2.0, True), (arms[2], 1.0, False)):
        found = arm.sections["text"].sets[0]
        found.sha256 = file_sha256(texts)
        found.predictions = "results/predictions/wiki.jsonl"
        rows = [
            {"id": one, "words": 2, "bytes": 6,
             "windows": [[10, -10 * loss, -10.0, 0.1] if beside else [10, -10 * loss, None, None]]}
            for one in ids
        ]  # fmt: skip
        lines = [{"mmgraft_predictions": 1}, *rows]
        (arm.run / found.predictions).write_text("".join(json.dumps(row) + "\n" for row in lines))
    found = read_answers(spec, arms)
    assert found is not None
    assert found.texts == {}
    ((*names, change),) = found.differences
    assert names == ["iaa", "llava-full"]
    assert change.value == pytest.approx(math.e - math.e**2)
    assert change_with_interval(change).startswith("−4.671 (")
    assert verdict(change, found.main) == "better"


def test_an_answer_with_markup_stays_an_answer(changed: Path) -> None:
    comparison = read_comparison(changed)
    spec = comparison.evaluation[0]
    items = read_items(spec)
    run = changed / "arms" / "iaa"
    keep_answers(run, spec, items, ["<b>x</b> | `y`"] * len(items), spec.name)
    write_comparison_report(changed)
    assert "<b>x</b>" not in (changed / "report.html").read_text()
    assert "\\<b\\>x\\</b\\> \\| 'y' (wrong)" in markdown(changed)


def test_a_comparison_of_which_nothing_is_done_still_has_a_report(tmp_path: Path) -> None:
    out = example_comparison(tmp_path / "out", arms=())
    write_comparison_report(out)
    text = markdown(out)
    assert len(lines_of(text, "| iaa |")) == 2
    assert set(SAID) <= set(text.replace(",", " ").split())


def test_a_folder_without_a_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mmgraft compare"):
        write_comparison_report(tmp_path)


def test_arms_that_were_evaluated_on_other_items_are_named(changed: Path) -> None:
    file = changed / "arms" / "llava" / "results" / "vision.json"
    data = json.loads(file.read_text())
    data["sets"][0]["items"] = 7
    file.write_text(json.dumps(data))
    write_comparison_report(changed)
    assert "not evaluated on the same items (llava-full 40, llava 7, iaa 40)" in markdown(changed)


def test_a_set_that_is_gone_is_told_without_its_folder(changed: Path) -> None:
    text = (changed / "comparison.yaml").read_text()
    folder = "/home/someone/data"
    (changed / "comparison.yaml").write_text(
        re.sub(r"path: \S+/test.jsonl", f"path: {folder}/test.jsonl", text)
    )
    write_comparison_report(changed)
    assert "arms cannot be compared item by item" in markdown(changed)
    for name in ("report.md", "report.html", "report.json"):
        assert folder not in (changed / name).read_text()


def test_dialogues_stand_shape_by_shape_with_arms_across(changed: Path) -> None:
    for name in ("llava", "iaa"):
        write_results(changed / "arms" / name, iit_section())
    write_comparison_report(changed)
    text = markdown(changed)
    assert lines_of(text, "| shape | dialogues | llava | iaa |")
    (line,) = lines_of(text, "| (T,T,V) |")
    assert line.startswith("| (T,T,V) | 120 | 0.350 (0.260 to 0.440) | 0.350 (")


@pytest.fixture
def repeated(tmp_path: Path) -> Path:
    """Two arms with three seeds each, of which the last one's third was not begun."""
    out = example_comparison(tmp_path / "out", arms=())
    spec = make_spec(tmp_path / "questions")
    said = {
        "llava": ["red", "red", "green"],
        "iaa": [None, "blue"],
    }
    comparison = read_comparison(out)
    arms = {name: comparison.arms[name] for name in said}
    (out / "comparison.yaml").write_text(
        dump_comparison(comparison.model_copy(update={"arms": arms, "seed": [0, 1, 2]}))
    )
    for name, told in said.items():
        for seed, word in enumerate(told):
            run = add_arm(out, name, spec)
            vision = vision_of(run, spec, lambda item, at, word=word: word or item.answers[0])
            (run / "results" / "vision.json").write_text(vision.model_dump_json())
            run.rename(run.with_name(f"{name}.seed{seed}"))
    return out


def test_seeds_are_taken_together_and_what_was_not_run_is_named(repeated: Path) -> None:
    write_comparison_report(repeated)
    text = markdown(repeated)
    items = read_items(read_comparison(repeated).evaluation[0])
    share = {word: sum(one.answers[0] == word for one in items) / len(items) for word in COLOURS}
    (header,) = lines_of(text, "| arm | seeds |")
    assert header == "| arm | seeds | accuracy | by seed | far (20) | near (20) |"
    (llava,) = lines_of(text, "| llava | 3 |")
    mean = (2 * share["red"] + share["green"]) / 3
    assert f"| **{mean:.3f}** (" in llava
    assert f"| {share['red']:.3f}, {share['red']:.3f}, {share['green']:.3f} |" in llava
    (iaa,) = lines_of(text, "| iaa | 2 |")
    assert f"| **{(1 + share['blue']) / 2:.3f}** (" in iaa
    assert "iaa.seed2 is left out of these: it was not evaluated" in text
    assert "seed 0, 1, 2, the same data" in text
    report = json.loads((repeated / "report.json").read_text())
    pairs = [(one["first"], one["second"]) for one in report["differences"]]
    assert pairs[0] == ("iaa", "llava"), "arms, not each seed with each"
    assert ("llava", "prior") in pairs
    assert not [names for names in pairs if "seed" in "".join(names)]


def test_without_several_seeds_there_is_no_table_of_them(whole: Path) -> None:
    assert "by seed" not in markdown(whole)
