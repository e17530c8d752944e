"""lm-evaluation-harness asks a grafted model what it asks any other, and says the same of text."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness_tasks import QUESTIONS, SEEN, TEXTS, write_answers, write_task, write_tasks
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.errors import UsageError
from mmgraft.evaluation.lm_eval import harness
from mmgraft.evaluation.lm_eval.harness import evaluate_harness
from mmgraft.evaluation.lm_eval.models import ImageLM, TextLM, plain_lm
from mmgraft.inference import Answerer
from tiny import save_base, tiny_clip_dir
from tiny_runs import make_run
from tiny_towers import picture

TEXT_TASKS = ["tiny_choice", "tiny_rolling", "tiny_answer"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    # A context longer than the tokenizer's own limit of 128: the base's counts.
    save_base(folder / "base", "llama", max_position_embeddings=256)
    tiny_clip_dir(folder / "tower")
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("data")))
        # Seconds of subprocesses that ask about the machine.
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def answerer(folder: Path) -> Answerer:
    made = Answerer.load(make_run(folder, folder / "run", "iaa", layers=[1, 3]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.model.workflows.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return made


def run(answerer: Answerer, folder: Path, *tasks: str, **options: Any) -> list[Any]:
    return evaluate_harness(
        answerer, tasks, include_path=folder / "tasks", **{"batch_size": 4, **options}
    )


def plain(folder: Path) -> HFLM:
    """The harness's own model of the base, as anybody would make it."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    return HFLM(pretrained=base, tokenizer=tokenizer, batch_size=4)


def found_by(lm: Any, folder: Path, tasks: list[str], **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found: Any = simple_evaluate(
        model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options
    )
    return found


@pytest.mark.parametrize("chat", [False, True])
def test_text_says_exactly_what_the_plain_base_says(
    answerer: Answerer, folder: Path, chat: bool
) -> None:
    theirs = found_by(plain(folder), folder, TEXT_TASKS, apply_chat_template=chat)
    ours = found_by(TextLM(answerer, "text", 4), folder, TEXT_TASKS, apply_chat_template=chat)
    for task in TEXT_TASKS:
        for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert one["arguments"] == other["arguments"]
            assert one["resps"] == other["resps"]  # every log-probability, every answer
    if chat:
        return
    sets = run(answerer, folder, *TEXT_TASKS)
    for one in sets:
        assert one.settings["workflow"] == "text"
        numbers = {name: score.value for name, score in one.scores.items()}
        results = theirs["results"][one.name]
        assert numbers == {
            key.removesuffix(",none"): value
            for key, value in results.items()
            if key.endswith(",none") and "_stderr" not in key
        }
        for score in one.scores.values():
            assert score.low <= score.value <= score.high
    assert [one.name for one in sets] == TEXT_TASKS
    assert [one.items for one in sets] == [len(QUESTIONS), len(TEXTS), len(QUESTIONS)]
    assert [one.main for one in sets] == ["acc", "word_perplexity", "right"]


def test_the_bases_own_settings_do_not_change_greedy_answers(
    answerer: Answerer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    asked = [Instance("generate_until", {}, ("Who answers?", {"max_gen_toks": 12}), 0)]
    seeing = ImageLM(answerer, "mm", 1)
    chat = seeing.apply_chat_template([{"role": "user", "content": "<image>What?"}])
    given = (chat, {"max_gen_toks": 12}, {"visual": [picture(30, 20)]})
    models = [
        (plain_lm(base, answerer.processor, 1), asked),
        (TextLM(answerer, "text", 1), asked),
        (seeing, [Instance("generate_until", {}, given, 0)]),
    ]
    before = [lm.generate_until(requests) for lm, requests in models]
    for model in (base, answerer.model, answerer.model.base):
        config = copy.deepcopy(model.generation_config)
        config.update(repetition_penalty=9.0, no_repeat_ngram_size=1, temperature=5.0, num_beams=3)
        monkeypatch.setattr(model, "generation_config", config)
    assert [lm.generate_until(requests) for lm, requests in models] == before


def test_text_can_be_asked_in_a_workflow_that_sees(answerer: Answerer, folder: Path) -> None:
    lm = TextLM(answerer, "mm", 4)
    texts = ["One, two, three images.", "user asks"]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    for text, found in zip(texts, lm.loglikelihood_rolling(requests), strict=True):
        ids = [
            answerer.processor.tokenizer.bos_token_id,
            *answerer.processor.tokenizer(text).input_ids,
        ]
        with torch.no_grad():
            logits = answerer.model(torch.tensor([ids]), workflow="mm").logits[0].log_softmax(-1)
        slow = sum(float(logits[at, index]) for at, index in enumerate(ids[1:]))
        assert found == pytest.approx(slow, rel=1e-5)
    seen, text = (run(answerer, folder, "tiny_rolling", workflow=w)[0] for w in ("mm", None))
    assert seen.settings["workflow"] == "mm"
    assert seen.scores["byte_perplexity"] != text.scores["byte_perplexity"]
    asked = [Instance("generate_until", {}, ("Who answers?", {"max_gen_toks": 8}), 0)]
    assert lm.generate_until(asked) != TextLM(answerer, "text", 1).generate_until(asked)


def conversation(folder: Path, number: int) -> list[dict[str, Any]]:
    """Return what `tiny_seen` asks, as messages."""
    prompt, count = SEEN[number]
    pieces = prompt.split("<image>")
    parts: list[dict[str, Any]] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for at in range(count):
        image = str(folder / "tasks" / f"{number}-{at}.png")
        parts += [{"type": "image", "image": image}, {"type": "text", "text": pieces[at + 1]}]
    return [{"role": "user", "content": parts}]


def test_images_are_seen_as_the_graft_sees_them(answerer: Answerer, folder: Path) -> None:
    """Each answer of a batch is the one that the same question gets by itself."""
    alone = [
        answerer.answers([conversation(folder, n)], max_new_tokens=6)[0].split("\n\n")[0].strip()
        for n in range(len(SEEN))
    ]
    blind = "".join(alone)
    assert len(set(alone)) == len(alone), "equal answers could not show a mistaken order"
    write_answers(folder / "tasks", [""] * len(QUESTIONS), alone)
    (right,) = run(answerer, folder, "tiny_seen")
    assert right.scores["right"].value == 1
    assert right.settings["workflow"] == "mm"
    assert right.settings["chat_template"] is True
    write_answers(folder / "tasks", [""] * len(QUESTIONS), [alone[0], blind, blind])
    (third,) = run(answerer, folder, "tiny_seen", workflow="mm")
    assert third.scores["right"].value == pytest.approx(1 / 3)
    assert third.file == "tiny_seen.jsonl"


def test_a_graft_that_takes_no_padding_is_asked_row_by_row(folder: Path) -> None:
    config = {"system_prompt_length": 2, "image_token_length": 4}
    official = Answerer.load(make_run(folder, folder / "official", "wings-official", **config))
    alone = [
        official.answers([conversation(folder, n)], max_new_tokens=6)[0].split("\n\n")[0].strip()
        for n in range(2)
    ]
    write_answers(folder / "tasks", [""] * len(QUESTIONS), [*alone, ""])
    (found,) = run(official, folder, "tiny_seen", limit=2)
    assert found.scores["right"].value == 1
    with pytest.raises(
        UsageError, match=r"every row has exactly one image.*; evaluate it with text"
    ):
        run(official, folder, "tiny_choice", workflow="mm")


def test_what_was_asked_is_told_apart_by_its_pixels(answerer: Answerer, folder: Path) -> None:
    (one,) = run(answerer, folder, "tiny_seen")
    (again,) = run(answerer, folder, "tiny_seen", batch_size=1)
    assert one.sha256 == again.sha256
    picture(which=1).save(folder / "tasks" / "0-0.png")
    (other,) = run(answerer, folder, "tiny_seen")
    assert other.sha256 != one.sha256


def test_a_group_is_put_together_as_its_file_says(answerer: Answerer, folder: Path) -> None:
    few, more, pooled, means = run(
        answerer, folder, "tiny_choice", "tiny_choice_more", "tiny_pooled", "tiny_means"
    )
    one, two = (found.scores["acc"].value for found in (few, more))
    assert one != two
    assert pooled.scores["acc"].value == pytest.approx((5 * one + 2 * two) / 7)
    assert means.scores["acc"].value == pytest.approx((one + two) / 2)
    for group in (pooled, means):
        assert list(group.scores) == ["acc"]  # what its file names, not acc_norm
        assert group.kinds == {"tiny_choice": few.scores, "tiny_choice_more": more.scores}
        assert group.items == group.scores["acc"].count == 7


def test_a_trained_base_is_compared_with_the_untouched_one(
    answerer: Answerer, folder: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    same = run(answerer, folder, "tiny_choice", "tiny_pooled", untouched=base)
    for one in same:
        assert one.base == one.scores
        assert {(c.value, c.low, c.high) for c in one.change.values()} == {(0, 0, 0)}
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.norm.weight.mul_(0.25)
    choice, rolling = run(answerer, folder, "tiny_choice", "tiny_rolling", untouched=other)
    for one in (choice, rolling):
        for name, change in one.change.items():
            assert change.value == pytest.approx(one.scores[name].value - one.base[name].value)
    assert rolling.change["bits_per_byte"].value != 0
    (seen,) = run(answerer, folder, "tiny_seen", untouched=other)
    assert seen.base == seen.change == {}


def test_the_first_documents_are_asked(answerer: Answerer, folder: Path) -> None:
    (one,) = run(answerer, folder, "tiny_choice", limit=2)
    (more,) = run(answerer, folder, "tiny_choice_more")  # the first two rows
    assert one.items == 2
    assert one.scores == more.scores


def test_the_processor_keeps_its_tokenizer(answerer: Answerer) -> None:
    processor = answerer.processor
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.pad_token = None
    own = GraftProcessor(tokenizer, processor.image_positions, 5, "chat", processor.preprocess)
    for lm in (
        TextLM(Answerer(answerer.model, own), "text", 1),
        ImageLM(Answerer(answerer.model, own), "mm", 1),
    ):
        assert lm.tokenizer.pad_token is not None
        assert lm.max_length == 256
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == processor.tokenizer.padding_side


def test_mmgraft_is_imported_without_the_harness() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; import mmgraft.evaluation.lm_eval.harness"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- refused ------------------------------------------------------------------------------------


def test_a_missing_extra_is_named(
    answerer: Answerer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'mmgraft\[eval\]'"):
        run(answerer, folder, "tiny_choice")


def test_an_unknown_task_names_near_ones_and_files_without_a_task(
    answerer: Answerer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The harness's own files are read for seconds; ours stand in for them.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "tasks" / "manager.py"))
    (tmp_path / "mine.yaml").write_text("task: [unfinished")
    with pytest.raises(UsageError, match=r"'tiny_chioce'; near ones: tiny_choice, .*mine\.yaml"):
        evaluate_harness(answerer, ["tiny_chioce"], include_path=tmp_path)
    with pytest.raises(UsageError, match="near ones: tiny_rolling"):
        evaluate_harness(answerer, ["rolling"])
    with pytest.raises(UsageError, match="lm-eval ls tasks"):
        evaluate_harness(answerer, ["zzzzzz"])


def test_what_a_task_cannot_be_asked_is_refused(
    answerer: Answerer, folder: Path, tmp_path: Path
) -> None:
    rows = [{"q": "<image> <image>\nWhat?", "images": [str(folder / "tasks/0-0.png")], "a": "b"}]
    seen = "doc_to_image: !function functions.images\n"
    (tmp_path / "functions.py").write_text((folder / "tasks/functions.py").read_text())
    common: dict[str, Any] = {"doc_to_text": "{{q}}", "doc_to_target": "a"}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "options": (seen, {"output_type": "multiple_choice", "doc_to_choice": ["a", "b"]}),
        "places": (seen, {"output_type": "generate_until"}),
        "begins": (seen, {"output_type": "generate_until", "gen_prefix": "It is"}),
        "code": ("", {"output_type": "generate_until", "unsafe_code": True}),
        "long": ("", {"output_type": "generate_until",
                      "generation_kwargs": {"max_gen_toks": 300}}),
        "sound": ("", {"output_type": "generate_until", "doc_to_audio": "q"}),
        "broken": ("", {"output_type": "guessing"}),
    }  # fmt: skip
    for name, (more, config) in kinds.items():
        write_task(tmp_path, name, rows, more, **common, **config)
    write_task(tmp_path, "lost", rows, **common, output_type="generate_until")
    (tmp_path / "lost.jsonl").unlink()
    for name, message in {
        "options": "scores options beside an image .*metric: choice",
        "places": "says <image> 2 times and has 1 images.*doc_to_text",
        "begins": "gen_prefix",
        "code": "runs code that the model writes",
        "long": "task long: lm-eval refuses it .*300",
        "sound": "has sound",
        "broken": "task broken: .*guessing",
        "lost": r"task lost: .*lost\.jsonl",
    }.items():
        with pytest.raises(UsageError, match=message):
            evaluate_harness(answerer, [name], include_path=tmp_path)
    text = {"q": "What?" * 80, "images": rows[0]["images"], "a": "b"}
    write_task(tmp_path, "places", [{**text, "q": "<image>" + text["q"]}], seen, **common,
               output_type="generate_until", generation_kwargs={"max_gen_toks": 200})  # fmt: skip
    with pytest.raises(UsageError, match="56 fit beside the answer"):
        evaluate_harness(answerer, ["places"], include_path=tmp_path)


def test_what_cannot_be_asked_of_this_graft_is_refused(answerer: Answerer, folder: Path) -> None:
    with pytest.raises(UsageError, match="no task"):
        run(answerer, folder)
    with pytest.raises(UsageError, match="no workflow is called 'video'"):
        run(answerer, folder, "tiny_seen", workflow="video")
    with pytest.raises(UsageError, match="text workflow sees none"):
        run(answerer, folder, "tiny_seen", workflow="text")
    with pytest.raises(UsageError, match="no folder"):
        evaluate_harness(answerer, ["tiny_choice"], include_path=folder / "nowhere")
    bare = Answerer(answerer.model, answerer.processor.with_template("plain"))
    assert math.isfinite(run(bare, folder, "tiny_choice")[0].scores["acc"].value)
