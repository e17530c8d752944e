"""The report of a run says what its sections say, in three forms, and nothing else."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mmgraft.errors import UsageError
from mmgraft.evaluation.report.about_run import last_losses
from mmgraft.evaluation.report.report import RunReport, write_report
from mmgraft.evaluation.report.words import change_with_interval, with_interval
from mmgraft.model.files.graft_file import BaseReference, GraftFile
from mmgraft.runs.results import Results, Score
from report_example import (
    a_set,
    example_run,
    iit_section,
    laws_section,
    score,
    section,
    text_section,
    training_section,
    vision_section,
)


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what was asked to be plotted; the plots have tests of their own."""
    asked: list[Any] = []
    data = io.BytesIO()
    Image.new("RGB", (4, 3)).save(data, "PNG")

    def plot(what: Any, *_: Any) -> bytes:
        asked.append(what)
        return data.getvalue()

    plots = SimpleNamespace(training_curves=plot, laws_plot=plot)
    monkeypatch.setitem(sys.modules, "mmgraft.evaluation.report.plots", plots)
    return asked


def markdown(run: Path) -> str:
    return write_report(run)["md"].read_text()


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.split("\n") if line.startswith(start)]


def test_the_report_of_everything(tmp_path: Path, drawn: list[Any]) -> None:
    run = example_run(tmp_path / "my-iaa")
    written = write_report(run)
    assert {name: path.relative_to(run).as_posix() for name, path in written.items()} == {
        "json": "results/report.json",
        "md": "results/report.md",
        "html": "results/report.html",
        "laws": "results/laws.png",
        "curves": "results/curves.png",
    }
    text, html = written["md"].read_text(), written["html"].read_text()
    headings = [line[3:] for line in lines_of(text, "## ")]
    assert headings == [
        "What was trained on what", "Text", "Vision", "Interleaved dialogues", "Attention",
        "Training curve", "In detail", "How to repeat it",
    ]  # fmt: skip
    assert [name for name in headings if f">{name}</h2>" not in html] == []
    assert "\n\n\n" not in text
    assert html.count("data:image/png;base64,") == 2
    sources = "| mmlu | choice | mmlu.jsonl | `c0ffee0000000000` | workflow: text; batch_size: 8; "
    assert f"{sources}normalised: yes |" in text
    assert "Software:\n\n<details><summary>show</summary>\n\n| package | version |" in text
    labels = [list(asked) for asked in drawn]
    assert labels == [["my-iaa"], ["my-iaa"]]
    assert drawn[1]["my-iaa"] == run / "metrics.jsonl"


def test_text_is_shown_beside_the_base_with_the_change_and_what_it_comes_to(tmp_path: Path) -> None:
    text = markdown(example_run(tmp_path / "run", text_section(moved=True)))
    assert lines_of(text, "| wiki | perp")[0] == (
        "| wiki | perplexity | 20 | **31.50** (30.60 to 32.40) | 28.40 (27.60 to 29.20) | "
        "+3.100 (+2.600 to +3.600) | worse | 0.210 (0.200 to 0.220) |"
    )
    assert lines_of(text, "| mmlu | acc")[0].endswith(
        "| −0.011 (−0.031 to +0.009) | not resolved | - |"
    )
    assert "logits differ by up to 1.250, first in logits of prompts 1 to 4" in text
    assert "graft `bb22bb22bb22bb22`, base `aa11aa11aa11aa11`" in text


def test_identity_is_one_sentence_with_both_fingerprints(tmp_path: Path) -> None:
    run = example_run(tmp_path / "run", text_section())
    text = markdown(run)
    assert (
        "The text workflow is the base bit for bit: on 8 prompts (1,234 positions) every id and "
        "every logit is the same as of the base loaded without mmgraft (SHA-256 of all logits: "
        "graft `aa11aa11aa11aa11`, base `aa11aa11aa11aa11`; of the weights: graft "
        "`dd44dd44dd44dd44`, base `cc33cc33cc33cc33`)."
    ) in text
    assert "| 0 (exactly) | the same | 0 |" in lines_of(text, "| wiki | perp")[0]


def test_blind_scores_stand_beside_every_number(tmp_path: Path) -> None:
    text = markdown(example_run(tmp_path / "run", vision_section()))
    assert "| set | score | items | graft | prior | no image |" in text
    assert lines_of(text, "| easy-vqa | accuracy | 1,000")[0] == (
        "| easy-vqa | accuracy | 1,000 | **0.871** (0.851 to 0.891) | 0.670 (0.650 to 0.690) | "
        "0.610 (0.590 to 0.630) |"
    )
    assert "| - | 0.100 (0.080 to 0.120) |" in lines_of(text, "| stamps | precision")[0]
    assert lines_of(text, "| color |") == ["| color | 300 | 0.950 (0.930 to 0.970) |"]
    assert "stamps, by kind" not in text


def test_every_score_has_its_own_numbers_beside_it(tmp_path: Path) -> None:
    """Two scores of one set of which no number is like another."""
    names = ("accuracy", "malformed")

    def numbers(first: float) -> dict[str, Score]:
        return {name: score(first + 0.05 * place, 0.01) for place, name in enumerate(names)}

    blind = {"prior": numbers(0.3), "no_image": numbers(0.2)}
    one = a_set(
        "odd", "exact", "accuracy", scores=numbers(0.8), base=numbers(0.6), change=numbers(0.1),
        blind=blind,
    )  # fmt: skip
    text = markdown(example_run(tmp_path / "run", section("vision", [one])))
    for place, name in enumerate(names):
        wanted = [
            show(first[name])
            for show, first in (
                (with_interval, numbers(0.8)),
                (with_interval, numbers(0.6)),
                (change_with_interval, numbers(0.1)),
                (with_interval, blind["prior"]),
                (with_interval, blind["no_image"]),
            )
        ]
        line = f"| odd | {name} | {' | '.join(wanted)} |"
        assert line in text, place


def test_what_was_trained_on_what(tmp_path: Path) -> None:
    text = markdown(example_run(tmp_path / "run", training_section(), vision_section()))
    for line in (
        "| base | acme/tiny-llama at `aaaaaaaaaaaa` |",
        "| base trained | no, it was frozen |",
        "| settings | layers: 1, 3; structure: c; head: no |",
        "| parameters of the graft | 12,416 (inserted layers 8,192, norm 64, projector 4,160) |",
        "| trained parameters | 12,352 |",
        "| time of training | 1 h 7 min |",
        "| peak memory | 3.1 GB |",
        "| align | projector | captions.jsonl (first 500 rows) | 80 steps | 32 | 0.001 |",
        "| tune | projector, layers | vqa.jsonl | 1 epoch | - | 0.0002 |",
    ):
        assert line in text
    assert "/home/someone" not in text


def test_a_base_in_a_folder_is_called_by_its_last_name(tmp_path: Path) -> None:
    base = BaseReference(id="/home/someone/models/llama-small")
    files = write_report(example_run(tmp_path / "run", text_section(), base=base))
    for kind in ("md", "html", "json"):
        assert "/home/someone" not in files[kind].read_text()
    assert "mmgraft graft llama-small --vision" in files["md"].read_text()


def test_a_recipe_with_whole_paths_is_shown_without_them(tmp_path: Path) -> None:
    run = example_run(tmp_path / "run", text_section())
    recipe = (
        "# see https://example.org/a/b\ndata: [{path: /home/someone/data/vqa.jsonl}, {path: a/b}]\n"
    )
    (run / "recipe.yaml").write_text(recipe)
    files = write_report(run)
    for kind in ("md", "html", "json"):
        assert "someone" not in files[kind].read_text()
    text = files["md"].read_text()
    assert "# see https://example.org/a/b\ndata: [{path: vqa.jsonl}, {path: a/b}]" in text


def test_a_trained_base_is_said_to_be_one(tmp_path: Path) -> None:
    base = BaseReference(id="./base")
    trained = {"base": base, "base_trained": True}
    text = markdown(example_run(tmp_path / "run", text_section(True), **trained))
    assert "| base trained | yes: text may change |" in text
    assert "mmgraft graft" not in text
    before = BaseReference(id="acme/first")
    run = example_run(tmp_path / "other", text_section(True), **trained, trained_from=before)
    text = markdown(run)
    assert "| base | its own, in the run's folder; trained from acme/first |" in text
    assert "mmgraft graft acme/first --vision acme/tiny-clip --recipe" in text


def test_the_json_holds_every_section_whole(tmp_path: Path) -> None:
    run = example_run(tmp_path / "run")
    data = json.loads(write_report(run)["json"].read_text())
    report = RunReport.parse(data, "report.json")
    assert list(report.sections) == ["training", "text", "vision", "iit", "laws"]
    assert report.sections["vision"] == vision_section()
    assert report.identity is not None
    assert report.parameters == {"projector": 4160, "inserted layers": 8192, "norm": 64}
    assert report.repeat[-2:] == ["mmgraft eval run --text --vision --iit", "mmgraft laws run"]


def test_only_what_was_measured_is_shown_and_repeated(tmp_path: Path) -> None:
    run = example_run(tmp_path / "run", vision_section())
    (run / "metrics.jsonl").unlink()
    written = write_report(run)
    text = written["md"].read_text()
    assert set(written) == {"json", "md", "html"}
    for absent in ("## Text", "## Attention", "## Training curve", "KL", "mmgraft laws"):
        assert absent not in text
    assert "mmgraft eval run --vision\n" in text


def test_attention_shift_is_compared_with_the_projector_alone(tmp_path: Path) -> None:
    text = markdown(example_run(tmp_path / "run", laws_section()))
    assert lines_of(text, "| run | base with projector")[0].endswith(
        "| 48 | 0.500 (0.470 to 0.530) | - | - |"
    )
    assert lines_of(text, "| run | base layers")[0].endswith(
        "| −0.100 (−0.120 to −0.080) | lower |"
    )
    assert lines_of(text, "| run | all layers")[0].endswith(
        "| **0.300** (0.270 to 0.330) | −0.200 (−0.500 to +0.100) | not resolved |"
    )


def test_dialogues_are_shown_with_their_blind_scores(tmp_path: Path) -> None:
    text = markdown(example_run(tmp_path / "run", iit_section()))
    assert "| shape | items | accuracy | accuracy generated | accuracy, no image |" in text
    assert lines_of(text, "| (T) |")[0].endswith("| 0.440 (0.350 to 0.530) | - |")
    assert lines_of(text, "| (T,V) |")[0].endswith("| 0.200 (0.180 to 0.220) |")
    assert "| (T,T) | accuracy | −0.050 (−0.070 to −0.030) | worse |" in text


def test_a_task_of_the_harness_says_itself_what_is_better(tmp_path: Path) -> None:
    one = a_set(
        "odd", "word_loss", "word_loss,none", scores={"word_loss,none": score(2.0)},
        base={"word_loss,none": score(1.0)}, change={"word_loss,none": score(1.0, 0.5)},
        settings={"higher_is_better": {"word_loss": True}},
    )  # fmt: skip
    text = markdown(example_run(tmp_path / "run", section("text", [one])))
    line = lines_of(text, "| odd | word loss | 1,000 |")[0]
    assert "| +1.000 (+0.500 to +1.500) | better |" in line


def test_sets_and_data_that_the_recipe_does_not_name_are_told(tmp_path: Path) -> None:
    run = example_run(tmp_path / "run", vision_section())
    text = markdown(run)
    assert "does not name the sets `easy-vqa` and `stamps`: they were given" in text
    assert "mmgraft train run --data align=captions.jsonl --data tune=vqa.jsonl\n" in text
    record = GraftFile.read(run)
    assert record.recipe is not None
    recipe = {**record.recipe, "evaluation": [{"name": "easy-vqa"}, {"name": "stamps"}]}
    (run / "graft_config.json").write_text(record.model_copy(update={"recipe": recipe}).dump())
    (run / "recipe.yaml").write_text("data: [captions.jsonl, vqa.jsonl]\n")
    text = markdown(run)
    assert "does not name" not in text
    assert "mmgraft train run\n" in text


def test_one_measurement_for_both_is_told(tmp_path: Path) -> None:
    results = text_section()
    assert "serves both" not in markdown(example_run(tmp_path / "a", results))
    results.sets[0].settings["base"] = "equal by identity"
    assert "one measurement serves both" in markdown(example_run(tmp_path / "b", results))


def test_a_name_with_markup_stays_a_name(tmp_path: Path) -> None:
    one = a_set("x", "exact", "accuracy", scores={"accuracy": score(0.5)})
    one.kinds = {name: {"accuracy": score(0.5)} for name in ("<img src=x>", "a|b")}
    written = write_report(example_run(tmp_path / "run", section("vision", [one])))
    assert "<img src=x" not in written["html"].read_text()
    assert "| a\\|b | 1,000 |" in written["md"].read_text()


def test_nothing_measured_is_said_with_what_to_do(tmp_path: Path) -> None:
    run = example_run(tmp_path / "run", text_section())
    (run / "results" / "text.json").unlink()
    with pytest.raises(UsageError, match=r"nothing was measured .*mmgraft eval"):
        write_report(run)
    assert list((run / "results").iterdir()) == []


def test_a_damaged_section_leaves_the_old_report(tmp_path: Path) -> None:
    run = example_run(tmp_path / "run", text_section())
    before = write_report(run)["md"].read_bytes()
    (run / "results" / "vision.json").write_text("{")
    with pytest.raises(UsageError, match=r"vision\.json is damaged"):
        write_report(run)
    assert (run / "results" / "report.md").read_bytes() == before


def test_last_losses_pass_over_what_a_kill_left(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"stage": "a", "loss": 2.0}\n{"stage": "a", "loss": 1.5}\n'
        '{"stage": "b", "eval_loss": 9}\n{"stage": "b", "loss": 1}\n{"stage": "b", "lo'
    )
    assert last_losses(path) == {"a": 1.5, "b": 1.0}


def test_a_section_without_sets_still_makes_a_report(tmp_path: Path) -> None:
    empty: Results = section("text", [], identity=text_section().identity)
    text = markdown(example_run(tmp_path / "run", empty))
    assert "bit for bit" in text
    assert "Every score" not in text
