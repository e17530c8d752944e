from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grafting import CONFIGS, perturb
from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.errors import UsageError
from mmgraft.evaluation import kept
from mmgraft.evaluation.generate import answers as asking
from mmgraft.evaluation.generate.answers import answer, read_prefix
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.kept import Kept, read_predictions
from mmgraft.model.modeling import GraftedModel
from mmgraft.vision.feature_cache import TowerFeatures
from tiny import tiny_model, tiny_tower
from tiny_tokenizer import tiny_tokenizer
from tiny_towers import picture

METHODS = [("llama", name) for name in ("iaa-a", "iaa-c", "wings", "llava")]
LEARNED = [("gpt2", "iaa-c"), ("opt", "llava")]
ALIBI = [("bloom", "wings"), ("falcon_alibi", "iaa-c")]


def made(arch: str = "llama", method: str = "llava") -> tuple[GraftedModel, GraftProcessor]:
    tower = tiny_tower()
    model = perturb(GraftedModel.graft(tiny_model(arch), tower, CONFIGS[method], tokenizer=None))
    processor = GraftProcessor(tiny_tokenizer(), tower.num_patches, 5, "chat", tower.preprocess)
    return model, processor


def chat(text: str, *images: Any) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def asked() -> tuple[GraftedModel, GraftProcessor, list[list[dict[str, Any]]]]:
    one, two = picture(), picture(which=1)
    chats = [
        chat("Is there a triangle in the picture? Say yes or no, please.", one),
        chat("What?", two),
        [{"role": "user", "content": "What?"}],
        chat("Is there a circle?", picture(20, 50)),
        chat("What?", one),
        chat("Which of the two?", one, two),
        chat("And in this one?", one),
    ]
    return *made(), chats


@pytest.mark.parametrize(("arch", "method"), [*METHODS, *LEARNED])
def test_an_answer_is_the_one_that_a_question_gets_alone(asked, arch: str, method: str) -> None:
    """Batches, their order, padding, and the beginning that rows share change no answer."""
    chats = asked[2]
    model, processor = made(arch, method)
    alone = [answer(model, processor, [one], max_new_tokens=6)[0] for one in chats]
    assert len(set(alone)) > 2, "equal answers could not show a mistaken order"
    given: list[int] = []
    for size in (2, 3, 16):
        together = answer(
            model,
            processor,
            chats,
            max_new_tokens=6,
            batch_size=size,
            on_result=lambda indices, _: given.append(len(indices)),
        )
        assert together == alone
    assert given[:4] == [2, 2, 2, 1]  # six see, one does not


@pytest.mark.parametrize(("arch", "method"), [*METHODS, *LEARNED, *ALIBI])
def test_logits_after_a_shared_beginning_are_those_of_a_full_pass(
    asked, arch: str, method: str
) -> None:
    """Equal answers could be luck: the numbers behind them must agree, padding in between."""
    model, processor = made(arch, method)
    one, two = picture(), picture(which=1)
    chats = [
        chat("What?", one),
        chat("Is there a circle here?", two),
        chat("Which one is it?", one),
    ]
    rows = [processor.encode(each) for each in chats]

    def images(found: list[Encoded]) -> dict[str, torch.Tensor]:
        return {"pixel_values": processor.pixels([one.images[0] for one in found])}

    with torch.no_grad():
        beginning = read_prefix(model, rows, "mm", images)
        assert beginning is not None
        assert beginning.images == 1
        batch = asking._Batch(model, processor, rows, None, "mm")
        inputs = batch._inputs(4)
        past = inputs["past_key_values"]
        assert past.get_seq_length() == beginning.length
        new = {
            name: inputs[name][:, beginning.length :] for name in ("input_ids", "mm_token_type_ids")
        }
        mask = inputs["attention_mask"]
        assert not mask[:, beginning.length :].all(), "no padding between beginning and rest"
        got = model(**new, attention_mask=mask, past_key_values=past, workflow="mm").logits[:, -1]
        for row, logits in zip(rows, got, strict=True):
            whole = processor.collate([row], "left")
            wanted = model(**whole, **images([row]), workflow="mm").logits[0, -1]
            assert (logits - wanted).abs().max() < 1e-4


def test_each_picture_of_a_batch_is_read_once(asked) -> None:
    model, processor, _ = asked
    one, two = picture(), picture(which=1)
    rows = [processor.encode(chat(text, image)) for text in "abc" for image in (one, two)]
    counts: list[int] = []

    def images(found: list[Encoded]) -> dict[str, torch.Tensor]:
        counts.append(len(found))
        return {"pixel_values": processor.pixels([one.images[0] for one in found])}

    with torch.no_grad():
        read_prefix(model, rows, "mm", images)
    assert counts == [2]


@pytest.mark.parametrize(("arch", "shared"), [("llama", True), ("gemma2", False)])
def test_nothing_is_shared_where_a_window_would_count_padding(arch: str, shared: bool) -> None:
    model, processor = made(arch)
    rows = [processor.encode([{"role": "user", "content": text}]) for text in ("one", "two words")]
    assert max(map(len, rows)) > 8, "the window of the tiny models"
    with torch.no_grad():
        found = read_prefix(model, rows, "text", lambda _: {})
    assert (found is not None) is shared


def test_features_given_are_used_for_the_right_pictures(tmp_path: Path) -> None:
    model, processor = made()
    names = []
    for which in range(2):
        names.append(tmp_path / f"{which}.png")
        picture(which=which).save(names[-1])
    chats = [chat("what is it", str(name)) for name in (*names, names[0])]
    tower = model.vision_tower
    assert tower is not None
    compute = TowerFeatures(tower)
    seen: list[str] = []

    def features(paths: list[Path]) -> torch.Tensor:
        seen.extend(path.name for path in paths)
        return torch.cat(list(compute(paths)))

    opened = answer(model, processor, chats, max_new_tokens=6)
    assert answer(model, processor, chats, max_new_tokens=6, features=features) == opened
    assert seen == ["0.png", "1.png"]
    nothing = answer(
        model,
        processor,
        chats,
        max_new_tokens=6,
        features=lambda paths: torch.zeros(len(paths), 4, 16),
    )
    assert nothing != opened


def test_a_workflow_that_is_not_there_is_refused_before_anything_is_asked(asked) -> None:
    model, processor, chats = asked
    with pytest.raises(UsageError, match=r"'grounding'.*has: mm"):
        answer(model, processor, chats, workflow="grounding")


def test_an_item_beyond_the_bases_table_is_named_before_any_is_asked(asked) -> None:
    model, processor = made("gpt2")
    answered: list[int] = []

    def questions(most: int) -> list[list[dict[str, Any]]]:
        """A short one, and one that leaves room for so many tokens of an answer and no more."""
        for count in range(200):
            long = chat("a" * count, asked[2][1][0]["content"][0]["image"])
            if len(processor.encode(long)) == 128 - most + 1:
                return [chat("What?"), long]
        raise AssertionError("no text has this length")

    def on_answers(places: Any, texts: Any) -> None:
        answered.extend(places)

    chats = questions(6)
    assert len(answer(model, processor, chats, max_new_tokens=6, batch_size=1)) == 2
    with pytest.raises(UsageError, match="conversation 2: 123 positions and up to 7 tokens"):
        answer(model, processor, chats, max_new_tokens=7, batch_size=1, on_result=on_answers)
    with pytest.raises(UsageError, match=r"129 positions.* a table of 128; shorten it, or leave"):
        answer(model, processor, questions(0), max_new_tokens=1, on_result=on_answers)
    assert not answered


def test_a_broken_picture_names_its_item(tmp_path: Path, asked) -> None:
    model, processor, _ = asked
    (tmp_path / "a.png").write_bytes(b"no picture")
    item = Item(
        "7", chat("what?", str(tmp_path / "a.png")), "what?", file="set.jsonl", place="line 3"
    )
    with pytest.raises(UsageError, match=r"set\.jsonl, line 3"):
        ask(model, processor, [item], tmp_path)


def ask(model: Any, processor: Any, items: list[Item], run: Path, **more: Any) -> list[str]:
    """Answers that are kept in a run."""
    return Kept(model, processor, run, {}, 2, **more).answers("p", items, None, 4)


# -- resumed ------------------------------------------------------------------------------------


def questions(count: int) -> list[Item]:
    return [
        Item(str(n), chat(f"question {n} " + "word " * (n % 3)), f"question {n}")
        for n in range(count)
    ]


def test_what_is_answered_is_not_asked_again(
    tmp_path: Path, asked, monkeypatch, steps: list[tuple[int, int]]
) -> None:
    model, processor, _ = asked
    items = questions(5)
    whole = ask(model, processor, items, tmp_path / "whole")
    run = tmp_path / "run"
    path = run / "results/predictions/p.jsonl"
    ask(model, processor, items, run)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[2:4]]))
    done = [row["id"] for row in read_predictions(path)]
    given: list[int] = []
    original = asking.answer

    def counted(model: Any, processor: Any, conversations: Any, **rest: Any) -> list[str]:
        given.append(len(conversations))
        return original(model, processor, conversations, **rest)

    monkeypatch.setattr(kept, "answer", counted)
    steps.clear()
    again = ask(model, processor, items, run)
    assert given == [3]
    assert steps == [(4, 5), (5, 5)]
    assert again == whole
    assert [row["id"] for row in read_predictions(path)][:2] == done


def test_answers_cleaned_by_an_older_version_are_made_anew(
    tmp_path: Path, asked, monkeypatch, said: list[str]
) -> None:
    model, processor, _ = asked
    with monkeypatch.context() as patch:
        patch.setattr(kept, "CLEANED", kept.CLEANED - 1)
        ask(model, processor, questions(2), tmp_path)
    assert not said
    ask(model, processor, questions(2), tmp_path)
    assert any("another" in one for one in said), said


KILLED = """
import signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from mmgraft.progress import Work
from test_asking import ask, made, questions

def slow(work, done, total):
    print(done, flush=True)
    if done >= 10:
        signal.pause()  # until it is killed

Work.__call__ = slow
model, processor = made()
ask(model, processor, questions(40), Path({run!r}))
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """A real SIGKILL in the middle of a set, then the rest in this process."""
    here = Path(__file__).resolve().parent
    file = tmp_path / "results/predictions/p.jsonl"
    paths = [str(here), str(here.parent), str(here.parent / "support")]
    code = KILLED.format(paths=paths, run=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if int(line) >= 10:
                break
        run.send_signal(signal.SIGKILL)
    with file.open("ab") as half:
        half.write(b'{"id": "39", "answ')  # what a kill in the middle of a write leaves
    rows = read_predictions(file)
    assert 10 <= len(rows) < 40
    model, processor = made()
    items = questions(40)
    texts = ask(model, processor, items, tmp_path)
    whole = ask(model, processor, items, tmp_path / "whole")
    assert texts == whole
    ids = [json.loads(line)["id"] for line in file.read_text().splitlines()[1:]]
    assert sorted(ids, key=int) == [str(n) for n in range(40)], "each question once"
    assert ids[: len(rows)] == [row["id"] for row in rows]
