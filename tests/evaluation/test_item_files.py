from __future__ import annotations

import base64
import io
import json
import tarfile
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmgraft.data.chat.turns import images_of_all
from mmgraft.data.formats.fields import fill_prompt, gold_of, lettered_lines
from mmgraft.data.images import size_of
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.files import (
    data_file,
    file_sha256,
    read_items,
    read_training_answers,
    set_sha256,
)
from mmgraft.evaluation.items.item import Item
from mmgraft.recipes.evaluation_set import SetSpec


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name, size in (("a.png", (20, 10)), ("b.png", (8, 8))):
        Image.new("RGB", size).save(tmp_path / "images" / name)
    return tmp_path


def _spec(metric: str = "choice", **more: Any) -> SetSpec:
    modality = "text" if metric in ("choice", "perplexity") else "image"
    return SetSpec.model_validate(
        {"name": "s", "metric": metric, "modality": modality, "path": "set.jsonl", **more}
    )


def _read(folder: Path, rows: Any, metric: str = "choice", name: str = "set.jsonl", **more: Any):
    path = folder / name
    if isinstance(rows, str):
        path.write_text(rows, encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    images = {} if metric in ("choice", "perplexity") else {"images": "images"}
    return read_items(_spec(metric, path=str(path), **{**images, **more}))


# -- what files hold ----------------------------------------------------------------------------

FOUR = ("one", "two", "three, or four", "5")


def _is_the_question(item: Item, gold: int = 1) -> None:
    assert (item.question, item.options, item.gold) == ("How many?", FOUR, gold)
    assert item.answers == (FOUR[gold],)
    assert list(item.messages) == [{"role": "user", "content": "Question: How many?\nAnswer:"}]
    assert not item.has_image


@pytest.mark.parametrize(
    "row",
    [
        {"question": "How many?", "options": list(FOUR), "answer": "two"},
        {"question": " How many? ", "options": list(FOUR), "answer": 1},
        {"question": "How many?", "choices": list(FOUR), "answer": "B"},
        {"question": "How many?", "choices": {"label": list("ABCD"), "text": list(FOUR)},
         "answer": "(b)"},
        {"question": "How many?", "options": dict(zip("ABCD", FOUR, strict=True)), "answer": "1"},
        {"question": "How many?", "options": "A. one\nB. two\nC. three, or four\nD. 5",
         "answer": "B. two"},
        {"question": "How many?", "options": "\nA) one\n B) two \nC) three, or four\nD) 5",
         "answer": "B) two"},
        {"question": "How many?", "options": list(FOUR), "answer": "TWO"},
        {"question": "How many?", "A": "one", "B": "two", "C": "three, or four", "D": "5",
         "answer": 1.0},
    ],
)  # fmt: skip
def test_options_and_answers_in_every_form(folder: Path, row: dict[str, Any]) -> None:
    (item,) = _read(folder, [row])
    _is_the_question(item)
    assert (item.id, item.place, item.group) == ("1", "line 1", "1")
    assert item.where == f"{folder / 'set.jsonl'}, line 1 (id 1)"


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("heading", [True, False])
def test_mmlus_table(folder: Path, ending: str, heading: bool) -> None:
    lines = [["How many?", "one", "two", '"three, or four"', "5", "B"]]
    lines += [["Which \n one?".join(['"', '"']), "x", "y", "z", "w", "A"]]
    if heading:
        lines.insert(0, ["question", "A", "B", "C", "D", "answer"])
    text = "\n".join(("," if ending == "csv" else "\t").join(line) for line in lines)
    first, second = _read(folder, text + "\n", name=f"set.{ending}")
    _is_the_question(first)
    assert first.place == f"line {1 + heading}"
    assert (second.question, second.gold) == ("Which \n one?", 0)
    assert second.place == f"line {2 + heading}"  # where it begins


def test_a_table_with_cells_for_the_longest_question(folder: Path) -> None:
    text = "question,A,B,C,answer\nwhich,x,y,z,C\nis it,yes,no,,B\n"
    one, two = _read(folder, text, name="set.csv")
    assert (one.options, two.options) == (("x", "y", "z"), ("yes", "no"))


def test_a_json_list_and_columns_of_other_names(folder: Path) -> None:
    rows = [{"qid": 7, "stem": "How many?", "w": "one", "x": "two", "right": "two", "topic": 3}]
    columns = {
        "id": "qid", "question": "stem", "options": "w, x", "answer": "right", "kind": "topic",
    }  # fmt: skip
    (item,) = _read(folder, json.dumps(rows), name="set.json", columns=columns)
    assert (item.id, item.place, item.kind) == ("7", "row 1", "3")
    assert (item.options, item.gold) == (("one", "two"), 1)


def test_a_passage_goes_before_the_question_and_groups_it(folder: Path) -> None:
    row = {"passage": "It rained.", "question": "Wet?", "options": ["yes", "no"], "answer": "yes"}
    (item,) = _read(folder, [row])
    assert item.question == "It rained.\nWet?"
    assert item.group == "It rained."
    (item,) = _read(folder, [{**row, "context": " ", "hint": " Today. ", "id": "b"}])
    assert item.question == "It rained.\n\nToday.\nWet?"


def test_messages_end_with_the_answer(folder: Path) -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Colour?"}]},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "Shape?"},
        {"role": "assistant", "content": "circle"},
    ]
    llava = {
        "id": "l",
        "image": "b.png",
        "conversations": [
            {"from": "human", "value": "<image>\nShape?"},
            {"from": "gpt", "value": "square"},
        ],
    }
    one, two = _read(folder, [{"messages": turns, "images": ["a.png"]}, llava], "exact")
    assert [message["role"] for message in one.messages] == ["system", "user", "assistant", "user"]
    assert (one.question, one.answers) == ("Shape?", ("circle",))
    assert one.group == str(folder / "images" / "a.png")
    assert (two.id, two.question, two.answers) == ("l", "Shape?", ("square",))
    assert two.messages[0]["content"][0]["image"] == str(folder / "images" / "b.png")
    with_prompt = _read(folder, [llava], "exact", prompt="{question} One word.")[0]
    parts = with_prompt.messages[0]["content"]
    assert [part["type"] for part in parts] == ["image", "text"]
    assert parts[1]["text"] == "Shape? One word."


def test_rows_with_images_of_every_metric(folder: Path) -> None:
    row = {"image": "a.png", "question": "Is there a dog?", "answer": "yes"}
    (yes_no,) = _read(folder, [row], "yes_no")
    image = {"type": "image", "image": str(folder / "images" / "a.png")}
    content = [image, {"type": "text", "text": "Is there a dog?"}]
    assert list(yes_no.messages) == [{"role": "user", "content": content}]
    ten = [{"answer": str(at % 3)} for at in range(10)]
    (vqa,) = _read(folder, [{**row, "answers": ten}], "vqa_v2")
    assert vqa.answers == tuple("0120120120")
    captions = {"image": "a.png", "captions": ["a dog", "one dog"]}
    (caption,) = _read(folder, [captions], "caption")
    assert caption.answers == ("a dog", "one dog")
    assert list(caption.messages) == [{"role": "user", "content": [image]}]
    (asked,) = _read(folder, [captions], "caption", prompt="Describe it.")
    assert asked.messages[0]["content"][1]["text"] == "Describe it."
    (choice,) = _read(
        folder, [{**row, "options": ["yes", "no"]}], "choice", modality="image", images="images",
        prompt="{question}\n{options}",
    )  # fmt: skip
    assert choice.messages[0]["content"][1]["text"] == "Is there a dog?\nA. yes\nB. no"


def test_boxes_know_their_images_size(folder: Path) -> None:
    row = {"image": "a.png", "question": "the dog", "bbox": [1, 2.5, 20, 10]}
    (item,) = _read(folder, [row], "box", boxes="unit")
    assert (item.box, item.size) == ((1.0, 2.5, 20.0, 10.0), (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown on its side
    Image.new("RGB", (20, 10)).save(folder / "images" / "turned.jpg", exif=exif)
    (turned,) = _read(
        folder, [{**row, "image": "turned.jpg", "bbox": [0, 0, 10, 20]}], "box", boxes="pixel"
    )
    assert turned.size == (10, 20)
    data = io.BytesIO()
    Image.new("RGB", (6, 4)).save(data, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    (inline,) = _read(
        folder, [{**row, "image": uri, "bbox": [0, 0, 6, 4]}], "box", boxes="thousand"
    )
    assert inline.size == (6, 4)


def test_texts_for_perplexity(folder: Path) -> None:
    (whole,) = _read(folder, "One.\n\nTwo.\n", "perplexity", name="book.txt")
    assert (whole.question, whole.messages, whole.group) == ("One.\n\nTwo.\n", (), "1")
    rows = [{"text": "a b"}, {"text": "  "}, {"text": "c"}, {"text": "a b"}]
    assert [item.question for item in _read(folder, rows, "perplexity")] == ["a b", "c"]
    items = _read(
        folder, [{"document": "d", "id": "x"}], "perplexity", columns={"text": "document"}
    )
    assert [(item.id, item.question) for item in items] == [("x", "d")]


def test_chats_for_perplexity_have_a_question_and_an_answer(folder: Path) -> None:
    """No prompt of plain text, the right option as the answer, and several turns as they are."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"question": "q", "passage": "p", "options": ["x", "y"], "answer": "B"},
        {"question": "q", "answer": " long answer "},
        {"messages": [*turns, *turns]},
    ]
    items = _read(folder, rows, "perplexity", chat=True)
    assert [item.answers[0] for item in items] == ["y", "long answer", "b"]
    assert items[0].messages == [{"role": "user", "content": "p\nq"}]
    assert [len(item.messages) for item in items] == [1, 1, 3]
    assert items[0].group == "p"
    (choice,) = _read(folder, rows[:1], chat=True)
    assert choice.messages == items[0].messages
    with pytest.raises(UsageError, match=r"line 1 .*empty answer"):
        _read(folder, [{"question": "q", "answer": " "}], "perplexity", chat=True)
    with pytest.raises(UsageError, match="no question but 'text'"):
        _read(folder, [{"text": "a"}], "perplexity", chat=True)


# -- draws --------------------------------------------------------------------------------------


def test_a_draw_is_by_seed_and_in_the_order_of_the_file(folder: Path) -> None:
    rows = [{"question": str(at), "options": ["a", "b"], "answer": "a"} for at in range(40)]
    draws = [
        [int(item.id) for item in _read(folder, rows, limit=8, seed=seed)] for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    for drawn in draws:
        assert drawn == sorted(set(drawn))
        assert len(drawn) == 8
    assert draws[0] != list(range(1, 9))
    assert len(_read(folder, rows, limit=400)) == 40


@given(st.lists(st.text("abc12AB .", min_size=1, max_size=3), min_size=2, max_size=5, unique=True))
def test_an_options_own_text_always_names_it(texts: list[str]) -> None:
    options = [text.strip() for text in texts]
    if "" in options or len(set(options)) < len(options):
        return
    for at, option in enumerate(options):
        assert gold_of(at, options, "here") == at
        assert gold_of(option, options, "here") == at
        assert gold_of(f"{chr(65 + at)}. {option}", options, "here") == at


def test_a_letter_that_is_an_option_means_the_option() -> None:
    assert gold_of("A", ["B", "A"], "here") == 1
    assert gold_of("A", ["x", "y"], "here") == 0
    assert gold_of("1", ["3", "1", "2"], "here") == 1
    assert gold_of(2, ["3", "1", "2"], "here") == 2
    assert gold_of("B. the dog", ["x", "the dog?"], "here") == 1


def test_prompts_keep_other_braces() -> None:
    filled = fill_prompt("{x} {question} {options}", "what is {options}?", ["a", "b"])
    assert filled == "{x} what is {options}? A. a\nB. b"
    assert lettered_lines(["a", "b"]) == "A. a\nB. b"


# -- refusals -----------------------------------------------------------------------------------

OK = {"question": "q", "options": ["a", "b"], "answer": "a"}
SEEN = {"image": "a.png", "question": "q", "answer": "yes"}


@pytest.mark.parametrize(
    ("row", "metric", "words"),
    [
        ({**OK, "answer": "c"}, "choice", r"set.jsonl, line 1 .*'c' is not among the options"),
        ({**OK, "answer": 2}, "choice", "the answer '2' is not among"),
        ({**OK, "answer": "E"}, "choice", "not among the options"),
        ({**OK, "answer": True}, "choice", "an answer that is no text"),
        ({**OK, "options": "a or b"}, "choice", "no lettered lines"),
        ({**OK, "options": ["a"]}, "choice", "at least two"),
        ({"question": "q", "answer": "a"}, "choice", "no options"),
        ({"question": "q", "options": ["a", "b"]}, "choice", "no answer"),
        ({"options": ["a", "b"], "answer": "a"}, "choice", "no question but 'options', 'answer'"),
        ({**OK, "image": "a.png"}, "choice", "image in a set of text|not found"),
        ({**SEEN, "image": "c.png"}, "exact", r"line 1 \(id 1\): image file not found"),
        ({**SEEN, "image": "../set.jsonl"}, "exact", "outside of the image folder"),
        ({**SEEN, "image": "https://x/a.png"}, "exact", "download it first"),
        ({"question": "q", "answer": "a"}, "exact", "no item has an image"),
        *(({"question": "q", "answer": "a", key: value}, "exact", f"'{key}' is not read")
          for key, value in (("media", ["a.png"]), ("img_path", "a.jpg"), ("s", {"x": "a.webp"}),
                             ("pic", "data:image/png;base64,AA"), ("sound", "a.wav"))),
        ({**SEEN, "answer": "maybe"}, "yes_no", "yes_no needs yes or no"),
        ({**SEEN, "answers": ["a"] * 9}, "vqa_v2", "9 answers, and vqa_v2 compares with 10"),
        ({**SEEN, "messages": []}, "exact", "not a list of messages"),
        ({"text": 3}, "perplexity", "no text but 'text'"),
        ({"passage": "x"}, "perplexity", "no text but 'passage'"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_asked_are_named(
    folder: Path, row: dict[str, Any], metric: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        _read(folder, [row], metric)
    assert "set.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([1, 2, 3], r"write \[x1, y1, x2, y2\]"),
        (None, r"write \[x1, y1, x2, y2\]"),
        (["1", 2, 3, 4], r"write \[x1, y1, x2, y2\]"),
        ([5, 5, 5, 9], "no area"),
        ([15, 5, 10, 9], "no area"),
        ([15, 5, 22, 9], "leaves its image of 20 x 10"),
    ],
)
def test_boxes_that_cannot_be_are_named(folder: Path, box: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _read(folder, [{"image": "a.png", "question": "q", "box": box}], "box", boxes="unit")


def test_sets_that_cannot_be_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="no items"):
        _read(folder, "")
    with pytest.raises(UsageError, match="has no text"):
        _read(folder, " \n", "perplexity", name="empty.txt")
    with pytest.raises(UsageError, match=r"line 2: the id '7' stands at line 1"):
        _read(folder, [{**OK, "id": 7}, {**OK, "id": "7"}])
    with pytest.raises(UsageError, match=r"'solution', which no row has; there are question, opt"):
        _read(folder, [OK], columns={"answer": "solution"})
    with pytest.raises(UsageError, match="did you mean 'answer'"):
        _read(folder, [OK], columns={"answer": "anwser"})
    with pytest.raises(UsageError, match="does not contain the question"):
        _read(folder, [OK], prompt="{quesiton}")
    with pytest.raises(UsageError, match="row 2: '3' is no object"):
        _read(folder, json.dumps([OK, 3]))
    with pytest.raises(UsageError, match="line 2: not JSON"):
        _read(folder, json.dumps(OK) + "\n{")
    with pytest.raises(UsageError, match="line 2: 2 columns, and 3"):
        _read(folder, "question,A,answer\nx,y\n", name="set.csv")
    with pytest.raises(UsageError, match="3 columns and no heading"):
        _read(folder, "x,y,A\n", name="set.csv")
    with pytest.raises(ValueError, match="images are always chats"):
        SetSpec(name="seen", metric="exact", chat=True)
    with pytest.raises(UsageError, match="no image folder"):
        _read(folder, [SEEN], "exact", images="nowhere")
    with pytest.raises(UsageError, match="no data file"):
        read_items(_spec(path="nowhere.jsonl"))
    with pytest.raises(UsageError, match="names no path and no packaged set"):
        data_file(SetSpec(name="mine", metric="choice", modality="text"))


# -- the prior's rows ---------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c", "\x1c"])
def test_a_table_has_rows_where_lines_end_and_nowhere_else(folder: Path, mark: str) -> None:
    """Such marks end a line for `str.splitlines`, and none for CSV."""
    (one,) = _read(folder, f"what{mark}is it,x,y,A\n", name="set.csv")
    assert one.question == f"what{mark}is it"
    assert one.place == "line 1"


def test_an_answer_that_is_an_object_is_shown_as_it_is(folder: Path) -> None:
    row = {"question": "x", "options": ["a", "b"], "answer": {"text": "a"}}
    with pytest.raises(UsageError, match=r"no text \(\{'text': 'a'\}\)"):
        _read(folder, [row])


def test_training_answers_are_in_the_sets_own_columns(folder: Path) -> None:
    rows = [
        {"asks": "Size?", "says": "big", "question": "no", "answer": "never"},
        {"asks": "Size?", "from": ["big", "small"], "says": "small", "answer": "never"},
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"question": "asks", "answer": "says", "options": "from"}
    spec = _spec("exact", train="train.jsonl", columns=columns)
    assert read_training_answers(spec) == [("Size?", "big"), ("Size?", "small")]


def test_training_answers_of_every_kind_of_row(folder: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "gone.png"},
                                             {"type": "text", "text": "Colour?"}]},
                {"role": "assistant", "content": "blue"},
                {"role": "user", "content": "Shape?"},
                {"role": "assistant", "content": "circle"},
            ]
        },
        {"question": "Size?", "answer": "big"},
        {"question": "Size?", "options": ["big", "small"], "answer": "B"},
    ]  # fmt: skip
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = _spec("exact", train="train.jsonl")
    assert read_training_answers(spec) == [
        ("Colour?", "blue"), ("Shape?", "circle"), ("Size?", "big"), ("Size?", "small"),
    ]  # fmt: skip
    (folder / "train.jsonl").write_text('{"question": "x"}')
    with pytest.raises(UsageError, match=r"train.jsonl, line 1: no answer to count"):
        read_training_answers(spec)
    asked = {"messages": [{"role": "user", "content": "x"}]}
    (folder / "train.jsonl").write_text(json.dumps(asked))
    with pytest.raises(UsageError, match=r"train.jsonl has no question with an answer"):
        read_training_answers(spec)
    with pytest.raises(UsageError, match="no training rows"):
        read_training_answers(_spec("exact"))


def test_shards_are_one_set(folder: Path) -> None:
    """Read a folder or a pattern: each file with its own places, ids and pictures."""
    (folder / "shards").mkdir()
    for shard, sizes in enumerate(((3, 4), (5,))):
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as file:
            for size in sizes:
                picture = io.BytesIO()
                Image.new("RGB", (size, size)).save(picture, "PNG")
                row = json.dumps({"question": f"{size}?", "answer": "a"}).encode()
                for ending, held in (("png", picture.getvalue()), ("json", row)):
                    info = tarfile.TarInfo(f"{size}.{ending}")
                    info.size = len(held)
                    file.addfile(info, io.BytesIO(held))
    for path in ("shards", "shards/{0..1}.tar"):
        spec = _spec("exact", path=path)
        items = read_items(spec)
        assert [item.question for item in items] == ["3?", "4?", "5?"]
        assert [item.id for item in items] == ["3", "4", "5"]
        places = ["0.tar sample 1", "0.tar sample 2", "1.tar sample 1"]
        assert [item.place for item in items] == places
        widths = [size_of(next(images_of_all(item.messages)), "x")[0] for item in items]
        assert widths == [3, 4, 5]
    (folder / "lines").mkdir()
    for shard in "ab":
        row = {"question": "x?", "answer": "y", "options": ["y", "z"]}
        (folder / "lines" / f"{shard}.jsonl").write_text(json.dumps(row))
    lines = read_items(_spec(path="lines"))
    assert [item.id for item in lines] == ["a.jsonl-1", "b.jsonl-1"]
    sha256 = set_sha256(spec, data_file(spec))
    (folder / "shards" / "1.tar").unlink()
    spec = _spec("exact", path="shards")
    assert set_sha256(spec, data_file(spec)) != sha256
    with pytest.raises(UsageError, match=r"no data file shards/\*\.json"):
        read_items(_spec("exact", path="shards/*.json"))


def test_a_set_of_the_hub_is_read_by_its_test_split(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    held: dict[str, Any] = {
        "question": ["a?"],
        "answer": ["b"],
        "image": [Image.new("RGB", (9, 9))],
    }
    held |= {"image": [Image.new("RGB", (9, 9))], "asked": [datetime(2026, 1, 1)]}
    table = datasets.Dataset.from_dict(held)

    def load(*args: Any, **more: Any) -> Any:
        asked.append((*args, more["split"], more["revision"]))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    spec = _spec("exact", path="hub:me/set", subset="small", revision="v1", train="hub:me/set")
    (item,) = read_items(spec)
    assert (item.id, item.question, item.answers, item.has_image) == ("1", "a?", ("b",), True)
    assert read_training_answers(spec) == [("a?", "b")]
    assert asked == [("me/set", "small", split, "v1") for split in ("test", "train")]
    sha256 = set_sha256(spec, data_file(spec))
    assert sha256 == set_sha256(spec, data_file(spec))
    table = datasets.Dataset.from_dict({**held, "image": [Image.new("RGB", (8, 9))]})
    assert sha256 != set_sha256(spec, data_file(spec)), "another picture is another set"
    read_items(spec.model_copy(update={"split": "validation"}))
    assert asked[-1][2] == "validation"


def test_the_sha_is_the_files(folder: Path) -> None:
    import hashlib

    path = folder / "x"
    path.write_bytes(b"abc" * 500_000)
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
